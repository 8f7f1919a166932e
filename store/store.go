// Package store is a server's memory: one bbolt file in which every value is
// sealed under the server's store key, every change is on disk before it is
// acted on, and no record changes without an entry in the audit log.
//
// It is not a judge: the rules of a machine, a packet or a request live with
// their records. It serves one server; it does not talk to others. It is an
// edge: it imports unlock, recovery, escrow and the leaves, and nothing but
// the server, the commands and their tests imports it.
//
// What stands in the file in clear: the schema, bucket names, ids, key IDs,
// the sizes of values. Deleted values stay in the file's free pages, sealed,
// until they are written over.
package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

const (
	// lockPatience covers a server that is just ending.
	lockPatience = time.Second
	// mapSize is address space, not memory. Below it a long reading
	// transaction, such as a snapshot, never makes a writing one wait.
	mapSize = 256 << 20
	// growth is by how many bytes the file grows when it must.
	growth = 1 << 20
)

// Store is an open store. Its methods may be called from many goroutines.
type Store struct {
	db      *bolt.DB
	sealer  *sealer
	watches watches
	group   group

	mu      sync.Mutex
	stopped error
}

// Create makes a store at path, mode 0600, under a key of KeySize bytes, and
// opens it. It appears whole or not at all. A file that is there already is
// ErrExists, and is left as it is.
func Create(path string, key []byte) (*Store, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("store: create %s: %w", path, ErrExists)
	}
	draft := path + ".new"
	if err := os.Remove(draft); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("store: create: remove what an earlier try left: %w", err)
	}
	defer os.Remove(draft)
	if err := initialize(draft, key); err != nil {
		return nil, fmt.Errorf("store: create %s: %w", path, err)
	}
	if err := os.Link(draft, path); err != nil { // unlike a rename, it replaces nothing
		if errors.Is(err, fs.ErrExist) {
			err = ErrExists
		}
		return nil, fmt.Errorf("store: create %s: %w", path, err)
	}
	if err := syncFolder(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("store: create %s: %w", path, err)
	}
	return Open(path, key)
}

func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

// Open opens the store at path and, if it is of an older schema, migrates it.
// Errors: ErrInUse, after a second of trying; ErrSchema; ErrKey; ErrDamaged;
// and one of the file system, such as fs.ErrNotExist.
func Open(path string, key []byte) (*Store, error) {
	return open(path, key, migrations)
}

func open(path string, key []byte, steps []migration) (*Store, error) {
	db, err := openFile(path, false)
	if err != nil {
		return nil, fmt.Errorf("store: open %s: %w", path, err)
	}
	sealer, err := unlockSchema(db, key, steps)
	if err != nil {
		return nil, fmt.Errorf("store: open %s: %w", path, errors.Join(err, db.Close()))
	}
	db.AllocSize = growth
	return &Store{db: db, sealer: sealer, group: newGroup()}, nil
}

// openFile opens a bbolt file that exists. bbolt itself would make one, also
// out of an empty file, and it panics on a torn one.
func openFile(path string, readOnly bool) (db *bolt.DB, err error) {
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%w: not a regular file", ErrDamaged)
	case info.Size() == 0:
		return nil, fmt.Errorf("%w: it is empty", ErrDamaged)
	}
	defer guard(&err)()
	db, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout:         lockPatience,
		ReadOnly:        readOnly,
		InitialMmapSize: mapSize,
		OpenFile: func(name string, flag int, mode fs.FileMode) (*os.File, error) {
			return os.OpenFile(name, flag&^os.O_CREATE|unix.O_NOFOLLOW, mode)
		},
	})
	var system syscall.Errno
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, ErrInUse
	case err != nil && !errors.As(err, &system): // it dislikes what it read
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return db, err
}

// guard, called and then deferred, turns what bbolt does on a damaged file, a
// panic or a fault in its mapping, into an error.
func guard(err *error) func() {
	before := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(before)
		if fault := recover(); fault != nil {
			*err = fmt.Errorf("%w: %v", ErrDamaged, fault)
		}
	}
}

// Close waits for transactions that run, wakes whoever waits on a Watch, and
// closes the file.
func (s *Store) Close() error {
	s.watches.wakeAll()
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("store: close: %w", err)
	}
	return nil
}

// View reads in one transaction: what read sees is one consistent state. It
// must be short, and must not call Update, Batch or Close.
func (s *Store) View(read func(*Tx) error) error {
	if err := s.usable(); err != nil {
		return err
	}
	return s.db.View(func(btx *bolt.Tx) error {
		return read(&Tx{bolt: btx, sealer: s.sealer})
	})
}

// Update changes records in one transaction. All of it is on disk when Update
// returns nil, and nothing of it happened when change or Update returns an
// error. A change of records without an audit event is an error.
func (s *Store) Update(change func(*Tx) error) error {
	tx := &Tx{}
	err := s.commit(func(btx *bolt.Tx) error {
		tx = &Tx{bolt: btx, sealer: s.sealer}
		return tx.run(change)
	})
	if err == nil {
		s.watches.wake(tx.changed)
	}
	return err
}

// commit runs one writing transaction of the file.
func (s *Store) commit(change func(*bolt.Tx) error) error {
	if err := s.usable(); err != nil {
		return err
	}
	btx, err := s.db.Begin(true)
	if err != nil {
		return fmt.Errorf("store: begin: %w", err)
	}
	defer func() { _ = btx.Rollback() }() // after a Commit it does nothing
	if err := change(btx); err != nil {
		return err
	}
	id := btx.ID()
	if err := btx.Commit(); err != nil {
		return s.failed(err, id)
	}
	return nil
}

// failed sorts what went wrong with transaction id on its way to the disk. A
// full disk that was met before the file's root changed is ErrFull. After
// anything else nobody knows what the disk has, so the store stops: it is read
// again at the next start.
func (s *Store) failed(err error, id int) error {
	root := id
	readErr := s.db.View(func(btx *bolt.Tx) error {
		root = btx.ID()
		return nil
	})
	if readErr == nil && root != id && isFull(err) {
		return fmt.Errorf("store: %w: %w", ErrFull, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = fmt.Errorf("store: stopped by a failed write, start the server again: %w", err)
	return s.stopped
}

// isFull compares texts, because bbolt passes some errors on as text only.
func isFull(err error) bool {
	for _, full := range []error{unix.ENOSPC, unix.EDQUOT, unix.EFBIG} {
		if strings.Contains(err.Error(), full.Error()) {
			return true
		}
	}
	return false
}

func (s *Store) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}
