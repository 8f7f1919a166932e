package store

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"

	bolt "go.etcd.io/bbolt"

	"mandos-escrow/internal/record"
)

// Tx is a transaction. It is used by one goroutine and only inside the closure
// that it was given to. What it returns may be kept.
type Tx struct {
	bolt    *bolt.Tx
	sealer  *sealer
	wrote   bool     // records, not the audit log itself
	audited bool     // has an event
	changed []string // Watch keys
	err     error    // the first write that failed
}

// run applies the rules that hold for every closure that writes.
func (tx *Tx) run(change func(*Tx) error) error {
	if err := change(tx); err != nil {
		return err
	}
	if tx.err != nil {
		return tx.err
	}
	if tx.wrote && !tx.audited {
		return fmt.Errorf("store: %w", errUnaudited)
	}
	return nil
}

// describe names a place in an error, in clear as far as it is text.
func describe(bucket string, key []byte) string {
	if record.Printable(string(key)) != nil {
		return bucket + " " + hex.EncodeToString(key)
	}
	return bucket + " " + string(key)
}

// get opens the value of a key: ErrNotFound, ErrKey.
func (tx *Tx) get(bucket string, key []byte) ([]byte, error) {
	sealed := tx.bolt.Bucket([]byte(bucket)).Get(key)
	if sealed == nil {
		return nil, fmt.Errorf("store: %s: %w", describe(bucket, key), ErrNotFound)
	}
	value, err := tx.sealer.open(bucket, key, sealed)
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w", describe(bucket, key), err)
	}
	return value, nil
}

func (tx *Tx) has(bucket string, key []byte) bool {
	return tx.bolt.Bucket([]byte(bucket)).Get(key) != nil
}

func (tx *Tx) put(bucket string, key, value []byte) error {
	tx.wrote = true
	return tx.write(bucket, key, value)
}

// write is put for the audit log, which needs no audit event.
func (tx *Tx) write(bucket string, key, value []byte) error {
	sealed := tx.sealer.seal(bucket, key, value)
	return tx.note("put", bucket, key, tx.bolt.Bucket([]byte(bucket)).Put(key, sealed))
}

// delete removes a key; one that is not there is no error.
func (tx *Tx) delete(bucket string, key []byte) error {
	tx.wrote = true
	return tx.note("delete", bucket, key, tx.bolt.Bucket([]byte(bucket)).Delete(key))
}

// note keeps the first failed write: a closure that overlooks one must not
// commit the rest.
func (tx *Tx) note(verb, bucket string, key []byte, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("store: %s %s: %w", verb, describe(bucket, key), err)
	if tx.err == nil {
		tx.err = err
	}
	return err
}

// keys goes through the keys that have the prefix, in order. The loop's body
// may change the bucket: each step looks up its place again. On damaged pages
// that could lead back; it is an error then, and the last thing it gives.
func (tx *Tx) keys(bucket string, prefix []byte) iter.Seq2[[]byte, error] {
	return tx.keysFrom(bucket, prefix, prefix)
}

// keysFrom is keys from the place start on.
func (tx *Tx) keysFrom(bucket string, prefix, start []byte) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		cursor := tx.bolt.Bucket([]byte(bucket)).Cursor()
		key, _ := cursor.Seek(start)
		var here []byte
		for key != nil && bytes.HasPrefix(key, prefix) {
			if here != nil && bytes.Compare(key, here) <= 0 {
				yield(nil, fmt.Errorf("store: %w: keys of bucket %s are out of order", ErrDamaged, bucket))
				return
			}
			here = bytes.Clone(key)
			if !yield(here, nil) {
				return
			}
			if key, _ = cursor.Seek(here); bytes.Equal(key, here) {
				key, _ = cursor.Next()
			}
		}
	}
}

func getJSON[T any](tx *Tx, bucket string, key []byte) (T, error) {
	var value T
	data, err := tx.get(bucket, key)
	if err != nil {
		return value, err
	}
	if err := json.Unmarshal(data, &value); err != nil {
		return value, fmt.Errorf("store: %s: %w", describe(bucket, key), err)
	}
	return value, nil
}

func putJSON[T any](tx *Tx, bucket string, key []byte, value T) error {
	data, err := json.Marshal(value)
	if err != nil {
		return tx.note("encode", bucket, key, err)
	}
	return tx.put(bucket, key, data)
}

// allJSON goes through a bucket in the order of its keys; an error ends it.
func allJSON[T any](tx *Tx, bucket string) iter.Seq2[T, error] { return jsonAfter[T](tx, bucket, nil) }

// jsonAfter is allJSON for the keys after one.
func jsonAfter[T any](tx *Tx, bucket string, after []byte) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for key, err := range tx.keysFrom(bucket, nil, after) {
			if len(after) > 0 && bytes.Equal(key, after) {
				continue
			}
			var value T
			if err == nil {
				value, err = getJSON[T](tx, bucket, key)
			}
			if !yield(value, err) || err != nil {
				return
			}
		}
	}
}

// An index bucket leads from a blind key to the key of a record.

// available reports, as ErrExists, that an index key leads to another record.
func (tx *Tx) available(bucket, text string, target []byte) error {
	taken, err := tx.follow(bucket, text)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case err == nil && !bytes.Equal(taken, target):
		return fmt.Errorf("store: %s: %w, for another record", bucket, ErrExists)
	}
	return err
}

// claim points an index key at a record: ErrExists when it leads to another.
func (tx *Tx) claim(bucket, text string, target []byte) error {
	key := tx.sealer.blind(bucket, text)
	if err := tx.available(bucket, text, target); err != nil || tx.has(bucket, key) {
		return err
	}
	return tx.put(bucket, key, target)
}

// follow returns the key of the record that an index key leads to.
func (tx *Tx) follow(bucket, text string) ([]byte, error) {
	return tx.get(bucket, tx.sealer.blind(bucket, text))
}

func (tx *Tx) unclaim(bucket, text string) error {
	return tx.delete(bucket, tx.sealer.blind(bucket, text))
}
