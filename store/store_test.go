package store

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"mandos-escrow/recovery"
)

var (
	testKey = bytes.Repeat([]byte{7}, KeySize)
	testNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

func newStore(t testing.TB) *Store {
	t.Helper()
	s, err := Create(filepath.Join(t.TempDir(), "store.db"), testKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// change is an Update with an event.
func change(t testing.TB, s *Store, do func(*Tx) error) {
	t.Helper()
	if err := s.Update(audited(do)); err != nil {
		t.Fatal(err)
	}
}

func audited(do func(*Tx) error) func(*Tx) error {
	return func(tx *Tx) error {
		if err := do(tx); err != nil {
			return err
		}
		return tx.Audit(Event{Time: testNow, Actor: "tester", Action: "test"})
	}
}

func view(t testing.TB, s *Store, do func(*Tx) error) {
	t.Helper()
	if err := s.View(do); err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("error %v, want %v", err, target)
	}
}

func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	if err := os.WriteFile(path+".new", []byte("left by a killed init"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := Create(path, testKey)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if _, err := os.Lstat(path + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("draft is left: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(path)
	_, err = Create(path, testKey)
	want(t, err, ErrExists)
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Fatal("a second Create changed the store")
	}
	if _, err = Create(filepath.Join(t.TempDir(), "short.db"), testKey[1:]); err == nil {
		t.Fatal("a short key was taken")
	}
}

func TestOpenRefuses(t *testing.T) {
	s := newStore(t)
	change(t, s, func(tx *Tx) error { return ServerName.Put(tx, strings.Repeat("n", 40000)) })
	whole := snapshot(t, s)
	for name, c := range map[string]struct {
		data  []byte
		error error
	}{
		"missing":    {nil, fs.ErrNotExist},
		"empty":      {[]byte{}, ErrDamaged},
		"text":       {bytes.Repeat([]byte("no store "), 4000), ErrDamaged},
		"a few kB":   {whole[:5000], ErrDamaged},
		"two pages":  {whole[:8192], ErrDamaged},
		"half":       {whole[:len(whole)/2], ErrDamaged},
		"a bit less": {whole[:len(whole)-4096], ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store.db")
			if c.data != nil {
				writeFile(t, path, c.data)
			}
			_, err := Open(path, testKey)
			want(t, err, c.error)
			if after, _ := os.ReadFile(path); !bytes.Equal(after, c.data) {
				t.Fatal("Open changed the file")
			}
		})
	}
}

func TestOpenWrongKey(t *testing.T) {
	s := newStore(t)
	path := filepath.Join(t.TempDir(), "copy.db")
	writeFile(t, path, snapshot(t, s))
	_, err := Open(path, bytes.Repeat([]byte{8}, KeySize))
	want(t, err, ErrKey)
	_, err = CheckSnapshot(path, bytes.Repeat([]byte{8}, KeySize))
	want(t, err, ErrKey)
	again, err := Open(path, testKey) // the refusals left no lock
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestOpenSymlink(t *testing.T) {
	s := newStore(t)
	link := filepath.Join(t.TempDir(), "link.db")
	if err := os.Symlink(s.db.Path(), link); err != nil {
		t.Fatal(err)
	}
	_, err := Open(link, testKey)
	want(t, err, ErrDamaged)
}

func TestSecondOpen(t *testing.T) {
	s := newStore(t)
	start := time.Now()
	_, err := Open(s.db.Path(), testKey)
	want(t, err, ErrInUse)
	if took := time.Since(start); took > 3*time.Second {
		t.Fatalf("took %v", took)
	}
	if !strings.Contains(err.Error(), "a server is running on it") {
		t.Fatalf("error says nothing of a server: %v", err)
	}
}

func TestUpdateNeedsEvent(t *testing.T) {
	s := newStore(t)
	for name, run := range map[string]func(func(*Tx) error) error{"Update": s.Update, "Batch": s.Batch} {
		want(t, run(func(tx *Tx) error { return ServerName.Put(tx, "unaudited") }), errUnaudited)
		want(t, run(func(tx *Tx) error { return tx.DeleteBlobs("none") }), nil)
		if err := run(func(*Tx) error { return nil }); err != nil {
			t.Fatalf("%s that writes nothing: %v", name, err)
		}
	}
	view(t, s, func(tx *Tx) error {
		if name, err := ServerName.Get(tx); name != "" || err != nil {
			t.Errorf("unaudited change was committed: %q, %v", name, err)
		}
		return nil
	})
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	s := newStore(t)
	stop := errors.New("stop")
	for _, run := range []func(func(*Tx) error) error{s.Update, s.Batch} {
		want(t, run(func(tx *Tx) error {
			return errors.Join(tx.PutRequest(recovery.Record{ID: "r"}), tx.Audit(Event{Time: testNow, Actor: "a", Action: "b"}), stop)
		}), stop)
		if err := run(audited(func(tx *Tx) error {
			_ = tx.PutRequest(recovery.Record{}) // an empty key fails; the closure overlooks it
			return tx.PutRequest(recovery.Record{ID: "r"})
		})); err == nil {
			t.Fatal("an overlooked failure was committed")
		}
	}
	func() {
		defer func() { _ = recover() }()
		_ = s.Update(func(tx *Tx) error {
			_ = tx.PutRequest(recovery.Record{ID: "r"})
			panic("closure")
		})
	}()
	view(t, s, func(tx *Tx) error {
		_, err := tx.Request("r")
		want(t, err, ErrNotFound)
		if head, err := tx.AuditHead(); head.Seq != 0 || err != nil {
			t.Errorf("head %+v, %v", head, err)
		}
		if err := ServerName.Put(tx, "x"); err == nil {
			t.Error("a reading transaction wrote")
		}
		return nil
	})
}

// A full disk before the root changed is no harm. After any other failure the
// store does nothing any more.
func TestFailedWrite(t *testing.T) {
	broken := errors.New("input/output error")
	for name, c := range map[string]struct {
		error   error
		visible bool // the next transaction finds the failed one
		stops   bool
	}{
		"full":                    {unix.ENOSPC, false, false},
		"full, as bbolt tells it": {errors.New("file resize error: truncate x: " + unix.EFBIG.Error()), false, false},
		"full after the root":     {unix.ENOSPC, true, true},
		"device fails":            {broken, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			var id int
			want(t, s.db.View(func(btx *bolt.Tx) error { id = btx.ID(); return nil }), nil)
			if !c.visible {
				id++
			}
			err := s.failed(c.error, id)
			if errors.Is(err, ErrFull) == c.stops {
				t.Errorf("error %v", err)
			}
			nothing := func(*Tx) error { return nil }
			for _, err := range []error{s.View(nothing), s.Update(nothing), s.Batch(nothing), s.Snapshot(filepath.Join(t.TempDir(), "copy.db"))} {
				if (err != nil) != c.stops {
					t.Errorf("then: %v", err)
				}
			}
		})
	}
}

func TestNothingInClear(t *testing.T) {
	s := newStore(t)
	canary := []byte("CANARY-7f3a9c-do-not-show-this")
	change(t, s, func(tx *Tx) error { return putEverything(tx, string(canary)) })
	change(t, s, func(tx *Tx) error { return tx.DeleteRequest("request-1") })
	data, err := os.ReadFile(s.db.Path())
	if err != nil {
		t.Fatal(err)
	}
	forms := [][]byte{canary, []byte(hex.EncodeToString(canary)), bytes.ToUpper([]byte(hex.EncodeToString(canary)))}
	for shift := range 3 { // base64 looks different at each of three offsets
		text := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), canary...))
		forms = append(forms, []byte(text[4:len(text)-4]))
	}
	for _, form := range forms {
		if bytes.Contains(data, form) {
			t.Errorf("the file has %s", form)
		}
	}
}

func TestMovedValuesAreRefused(t *testing.T) {
	s := newStore(t)
	change(t, s, func(tx *Tx) error {
		return errors.Join(
			tx.PutRequest(recovery.Record{ID: "a"}), tx.PutRequest(recovery.Record{ID: "b"}),
			tx.PutToken(Token{ID: "a"}),
		)
	})
	for name, move := range map[string]func(btx *bolt.Tx) error{
		"between keys":    func(btx *bolt.Tx) error { return moveRaw(btx, requestBucket, "b", requestBucket, "a") },
		"between buckets": func(btx *bolt.Tx) error { return moveRaw(btx, tokenBucket, "a", requestBucket, "a") },
		"cut off": func(btx *bolt.Tx) error {
			return btx.Bucket([]byte(requestBucket)).Put([]byte("a"), []byte("short"))
		},
		"flipped": func(btx *bolt.Tx) error {
			value := bytes.Clone(btx.Bucket([]byte(requestBucket)).Get([]byte("b")))
			value[len(value)-1] ^= 1
			return btx.Bucket([]byte(requestBucket)).Put([]byte("a"), value)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := s.db.Update(move); err != nil {
				t.Fatal(err)
			}
			view(t, s, func(tx *Tx) error {
				_, err := tx.Request("a")
				want(t, err, ErrKey)
				return nil
			})
		})
	}
	path := filepath.Join(t.TempDir(), "copy.db")
	writeFile(t, path, snapshot(t, s))
	_, err := CheckSnapshot(path, testKey)
	want(t, err, ErrKey)
}

func moveRaw(btx *bolt.Tx, from, key, to, place string) error {
	value := bytes.Clone(btx.Bucket([]byte(from)).Get([]byte(key)))
	return btx.Bucket([]byte(to)).Put([]byte(place), value)
}

func snapshot(t testing.TB, s *Store) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "copy.db")
	if err := s.Snapshot(path); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
