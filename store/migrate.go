package store

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
)

// The schema is the one value that stands in clear: it must be readable before
// the key that belongs to it is known to be right. It is in the additional
// data of every other value, so a changed schema opens nothing.
const (
	schemaBucket = "schema"
	schemaKey    = "version"
	checkName    = "check" // in meta: a value that tells whether the key is right
)

// sealedBuckets are all buckets but schemaBucket.
var sealedBuckets = []string{
	metaBucket, auditBucket,
	machineBucket, runningBucket, nameBucket, blobBucket, pendingBucket,
	entryBucket, bytesBucket, packetMachineBucket, packetVolumeBucket, packetWordBucket, packetBriefBucket,
	requestBucket,
	tokenBucket, tokenSecretBucket,
	adminBucket, adminKeyBucket, adminInviteBucket,
}

// migration changes records of one schema into records of the next. All
// values are sealed for the next schema already.
type migration func(*Tx) error

// migrations take a store from schema 1 to 2, from 2 to 3, and so on: the
// schema that this program writes is one more than their number.
var migrations = []migration{indexForLists}

// indexForLists makes schema 2: machines are found by name, packets by words,
// and lists go through briefs.
func indexForLists(tx *Tx) error {
	for machine, err := range tx.Machines() {
		if err == nil {
			err = tx.put(nameBucket, tx.nameKey(machine), nil)
		}
		if err != nil {
			return err
		}
	}
	for entry, err := range tx.Entries() {
		if err != nil {
			return err
		}
		for _, place := range tx.packetPlaces(entry) {
			if err := tx.put(place.bucket, place.key, nil); err != nil {
				return err
			}
		}
		if err := tx.put(packetBriefBucket, []byte(entry.ID), encodeBrief(entry)); err != nil {
			return err
		}
	}
	return nil
}

// initialize makes a store of the newest schema in a new file.
func initialize(path string, key []byte) error {
	schema := 1 + len(migrations)
	sealer, err := newSealer(key, schema)
	if err != nil {
		return err
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			return os.OpenFile(name, flag|os.O_EXCL, mode)
		},
	})
	if err != nil {
		return err
	}
	err = db.Update(func(btx *bolt.Tx) error {
		for _, name := range append([]string{schemaBucket}, sealedBuckets...) {
			if _, err := btx.CreateBucket([]byte(name)); err != nil {
				return err
			}
		}
		check := sealer.seal(metaBucket, []byte(checkName), nil)
		if err := btx.Bucket([]byte(metaBucket)).Put([]byte(checkName), check); err != nil {
			return err
		}
		return writeSchema(btx, schema)
	})
	return errors.Join(err, db.Close())
}

func writeSchema(btx *bolt.Tx, schema int) error {
	return btx.Bucket([]byte(schemaBucket)).Put([]byte(schemaKey), []byte(strconv.Itoa(schema)))
}

// readSchema returns the schema of a file after checking that its pages are
// all there.
func readSchema(db *bolt.DB) (schema int, err error) {
	defer guard(&err)()
	err = db.View(func(btx *bolt.Tx) error {
		info, err := os.Stat(db.Path())
		if err != nil {
			return err
		}
		if info.Size() < btx.Size() {
			return fmt.Errorf("%w: it is cut off", ErrDamaged)
		}
		bucket := btx.Bucket([]byte(schemaBucket))
		if bucket == nil {
			return fmt.Errorf("%w: it is another program's file", ErrDamaged)
		}
		schema, err = strconv.Atoi(string(bucket.Get([]byte(schemaKey))))
		if err != nil || schema < 1 {
			return fmt.Errorf("%w: its schema is unreadable", ErrDamaged)
		}
		return nil
	})
	return schema, err
}

// unlockSchema returns the sealer for a file, after the migrations it needs.
func unlockSchema(db *bolt.DB, key []byte, steps []migration) (*sealer, error) {
	schema, err := readSchema(db)
	if err != nil {
		return nil, err
	}
	newest := 1 + len(steps)
	if schema > newest {
		return nil, fmt.Errorf("%w: it has schema %d, this program knows up to %d; use the newer program", ErrSchema, schema, newest)
	}
	sealer, err := checkedSealer(db, key, schema)
	if err != nil {
		return nil, err
	}
	if schema < newest {
		if sealer, err = migrate(db, key, schema, steps); err != nil {
			return nil, err
		}
	}
	return sealer, hasBuckets(db)
}

func hasBuckets(db *bolt.DB) (err error) {
	defer guard(&err)()
	return db.View(func(btx *bolt.Tx) error {
		for _, name := range sealedBuckets {
			if btx.Bucket([]byte(name)) == nil {
				return fmt.Errorf("%w: bucket %s is not there", ErrDamaged, name)
			}
		}
		return nil
	})
}

// checkedSealer makes the sealer of a schema and tries it: ErrKey.
func checkedSealer(db *bolt.DB, key []byte, schema int) (_ *sealer, err error) {
	sealer, err := newSealer(key, schema)
	if err != nil {
		return nil, err
	}
	defer guard(&err)()
	err = db.View(func(btx *bolt.Tx) error {
		if btx.Bucket([]byte(metaBucket)) == nil {
			return fmt.Errorf("%w: bucket %s is not there", ErrDamaged, metaBucket)
		}
		_, err := (&Tx{bolt: btx, sealer: sealer}).get(metaBucket, []byte(checkName))
		return err
	})
	return sealer, err
}

// migrate runs all steps that are due in one transaction.
func migrate(db *bolt.DB, key []byte, from int, steps []migration) (*sealer, error) {
	sealer, err := newSealer(key, from)
	if err != nil {
		return nil, err
	}
	to := 1 + len(steps)
	err = db.Update(func(btx *bolt.Tx) error {
		for schema := from; schema < to; schema++ {
			next, err := newSealer(key, schema+1)
			if err != nil {
				return err
			}
			if err := reseal(btx, sealer, next); err != nil {
				return err
			}
			sealer = next
			if err := steps[schema-1](&Tx{bolt: btx, sealer: sealer}); err != nil {
				return fmt.Errorf("migrate to schema %d: %w", schema+1, err)
			}
		}
		tx := &Tx{bolt: btx, sealer: sealer}
		event := Event{Time: time.Now(), Actor: "server", Action: "migrate", Detail: fmt.Sprintf("schema %d to %d", from, to)}
		if err := tx.Audit(event); err != nil {
			return err
		}
		return writeSchema(btx, to)
	})
	return sealer, err
}

// reseal seals every value for the next schema.
func reseal(btx *bolt.Tx, from, to *sealer) error {
	tx := &Tx{bolt: btx, sealer: from}
	for _, name := range sealedBuckets {
		bucket, err := btx.CreateBucketIfNotExists([]byte(name)) // the schema may have brought it
		if err != nil {
			return err
		}
		for key, err := range tx.keys(name, nil) {
			if err != nil {
				return err
			}
			value, err := tx.get(name, key)
			if err != nil {
				return err
			}
			if err := bucket.Put(key, to.seal(name, key, value)); err != nil {
				return err
			}
		}
	}
	return nil
}
