package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	bolt "go.etcd.io/bbolt"

	"mandos-escrow/escrow"
)

// compactStep is how much one transaction of a snapshot copies, in bytes.
const compactStep = 1 << 20

// Snapshot writes a consistent copy of the store to a new file, mode 0600,
// while the store goes on working. The copy is a store file under the same
// store key. It holds nothing that was deleted: bbolt's free pages, where
// values stay until they are overwritten, are left behind.
func (s *Store) Snapshot(path string) error {
	if err := s.usable(); err != nil {
		return err
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("store: snapshot %s: %w", path, ErrExists)
	}
	draft := path + ".new" // compacted, but as long as bbolt likes to grow files
	defer os.Remove(draft)
	compact, err := bolt.Open(draft, 0o600, &bolt.Options{NoSync: true})
	if err != nil {
		return fmt.Errorf("store: snapshot: %w", err)
	}
	err = copyAll(compact, s.db)
	if err == nil {
		err = compact.View(func(btx *bolt.Tx) error { return btx.CopyFile(path, 0o600) })
	}
	if err = errors.Join(err, compact.Close()); err != nil {
		return fmt.Errorf("store: snapshot: %w", err)
	}
	return nil
}

// copyAll puts all that a store holds in another, empty one. bolt.Compact would
// do the same, but ends its reading transaction before its last commit, while
// what it put still points into pages that a writer may then use again.
func copyAll(to, from *bolt.DB) error {
	return from.View(func(source *bolt.Tx) error {
		target, err := to.Begin(true)
		if err != nil {
			return err
		}
		defer func() { _ = target.Rollback() }() // of no effect after a commit
		written := 0
		err = source.ForEach(func(name []byte, bucket *bolt.Bucket) error {
			if _, err := target.CreateBucket(name); err != nil {
				return err
			}
			return bucket.ForEach(func(key, value []byte) error {
				if written += len(key) + len(value); written > compactStep {
					if err := target.Commit(); err != nil {
						return err
					}
					if target, err = to.Begin(true); err != nil {
						return err
					}
					written = 0
				}
				copied := target.Bucket(name)
				copied.FillPercent = 1 // keys come in order
				return copied.Put(key, value)
			})
		})
		if err != nil {
			return err
		}
		return target.Commit()
	})
}

// CheckSnapshot reads the whole store file at path, without writing to it:
// every value opens and stands where an index expects it, every packet has its
// digest, and the audit log is whole. It returns the log's head. Errors:
// ErrSchema also for an older schema, ErrKey, ErrDamaged, ErrAudit, ErrInUse.
// One kind of damage ends the program instead: a branch page that leads back
// to itself overflows the stack in bbolt.
func CheckSnapshot(path string, key []byte) (head Head, err error) {
	db, err := openFile(path, true)
	if err != nil {
		return Head{}, fmt.Errorf("store: check %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	head, err = check(db, key)
	if err != nil {
		return Head{}, fmt.Errorf("store: check %s: %w", path, err)
	}
	return head, nil
}

func check(db *bolt.DB, key []byte) (head Head, err error) {
	schema, err := readSchema(db)
	if err != nil {
		return Head{}, err
	}
	if newest := 1 + len(migrations); schema != newest {
		return Head{}, fmt.Errorf("%w: it has schema %d, this program checks %d", ErrSchema, schema, newest)
	}
	sealer, err := checkedSealer(db, key, schema)
	if err != nil {
		return Head{}, err
	}
	if err := hasBuckets(db); err != nil {
		return Head{}, err
	}
	defer guard(&err)()
	err = db.View(func(btx *bolt.Tx) error {
		tx := &Tx{bolt: btx, sealer: sealer}
		if err := tx.checkValues(); err != nil {
			return err
		}
		if err := tx.checkPackets(); err != nil {
			return err
		}
		head, err = tx.VerifyAudit()
		return err
	})
	return head, err
}

func (tx *Tx) checkValues() error {
	for _, bucket := range sealedBuckets {
		for key, err := range tx.keys(bucket, nil) {
			if err != nil {
				return err
			}
			if _, err := tx.get(bucket, key); err != nil {
				return err
			}
		}
	}
	return nil
}

func (tx *Tx) checkPackets() error {
	for entry, err := range tx.Entries() {
		if err != nil {
			return err
		}
		if _, _, err := tx.Packet(entry.ID); err != nil && (entry.State != escrow.Purged || !errors.Is(err, escrow.ErrPurged)) {
			return err
		}
		brief, err := tx.get(packetBriefBucket, []byte(entry.ID))
		if err != nil {
			return err
		}
		if !bytes.Equal(brief, encodeBrief(entry)) {
			return fmt.Errorf("store: packet %s: %w: its brief says otherwise than its entry", entry.ID, ErrDamaged)
		}
		for _, place := range tx.packetPlaces(entry) {
			if !tx.has(place.bucket, place.key) {
				return fmt.Errorf("store: packet %s: %w: an index lacks it", entry.ID, ErrDamaged)
			}
		}
	}
	return nil
}
