package store

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
)

var update = flag.Bool("update", false, "freeze a store of the newest schema in testdata")

const frozenText = "frozen text"

// Every store that a released program wrote must open for ever, with what was
// in it. After a change of schema, -update adds a file and changes none.
func TestFrozenStores(t *testing.T) {
	newest := 1 + len(migrations)
	if *update {
		freeze(t, fmt.Sprintf("testdata/schema%d", newest))
	}
	for schema := 1; schema <= newest; schema++ {
		t.Run(fmt.Sprint("schema ", schema), func(t *testing.T) {
			name := fmt.Sprintf("testdata/schema%d", schema)
			data, err := os.ReadFile(name + ".db")
			want(t, err, nil)
			text, err := os.ReadFile(name + ".key")
			want(t, err, nil)
			key, err := hex.DecodeString(strings.TrimSpace(string(text)))
			want(t, err, nil)
			path := filepath.Join(t.TempDir(), "store.db")
			writeFile(t, path, data)
			s, err := Open(path, key)
			if err != nil {
				t.Fatal(err)
			}
			checkEverything(t, s, frozenText)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			_, err = CheckSnapshot(path, key)
			want(t, err, nil)
		})
	}
}

func freeze(t *testing.T, name string) {
	t.Helper()
	s := newStore(t)
	change(t, s, func(tx *Tx) error { return putEverything(tx, frozenText) })
	writeFile(t, name+".db", snapshot(t, s))
	writeFile(t, name+".key", []byte(hex.EncodeToString(testKey)+"\n"))
}

// checkEverything finds what putEverything put.
func checkEverything(t *testing.T, s *Store, text string) {
	t.Helper()
	reference := newStore(t)
	change(t, reference, func(tx *Tx) error { return putEverything(tx, text) })
	view(t, s, func(tx *Tx) error {
		return reference.View(func(wanted *Tx) error {
			equal(t, collect(t, tx.Machines()), nil, collect(t, wanted.Machines()))
			equal(t, collect(t, tx.Entries()), nil, collect(t, wanted.Entries()))
			equal(t, collect(t, tx.Requests()), nil, collect(t, wanted.Requests()))
			equal(t, collect(t, tx.Tokens()), nil, collect(t, wanted.Tokens()))
			equal(t, collect(t, tx.Admins()), nil, collect(t, wanted.Admins()))
			return nil
		})
	})
	view(t, s, func(tx *Tx) error {
		id := keyID(1)
		_, packet, err := tx.Packet("packet-1")
		equal(t, string(packet), err, text)
		equal(t, collect(t, tx.EntriesByWord(string(id[:6]))), nil, collect(t, tx.Entries()))
		equal(t, len(collect(t, tx.Briefs(""))), nil, 1)
		named, err := tx.MachinesNamed(text)
		equal(t, named, err, []identity.KeyID{id})
		equal(t, tx.checkPackets(), nil, nil)
		blob, err := tx.Blob(id, text)
		equal(t, string(blob), err, text)
		blob, err = tx.PendingBlob(id, text)
		equal(t, string(blob), err, text)
		machine, err := tx.MachineByRunning(keyID(-1))
		equal(t, machine.KeyID, err, id)
		admin, err := tx.AdminByKey(testAdmin(1).KeyID)
		equal(t, admin.Name, err, text)
		name, err := ServerName.Get(tx)
		equal(t, name, err, text)
		epoch, err := Epoch.Get(tx)
		equal(t, epoch, err, 3)
		events, err := tx.AuditFrom(1, 1)
		equal(t, events[0].Detail, err, text)
		_, err = tx.VerifyAudit()
		return err
	})
}

func TestNewerSchema(t *testing.T) {
	s := newStore(t)
	path := filepath.Join(t.TempDir(), "store.db")
	change(t, s, func(tx *Tx) error { return putEverything(tx, "x") })
	newer := 2 + len(migrations)
	if err := s.db.Update(func(btx *bolt.Tx) error { return writeSchema(btx, newer) }); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, s)
	writeFile(t, path, before)
	_, err := Open(path, testKey)
	want(t, err, ErrSchema)
	if !strings.Contains(err.Error(), fmt.Sprintf("schema %d", newer)) {
		t.Errorf("error names no schema: %v", err)
	}
	_, err = CheckSnapshot(path, testKey)
	want(t, err, ErrSchema)
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Fatal("a store of a newer schema was written to")
	}
}

func TestMigrate(t *testing.T) {
	rename := func(tx *Tx) error { return ServerName.Put(tx, "renamed") }
	fail := errors.New("cannot")
	for name, c := range map[string]struct {
		steps []migration
		error error
		name  string
	}{
		"none due":     {migrations, nil, "x"},
		"one":          {append(migrations[:len(migrations):len(migrations)], rename), nil, "renamed"},
		"two":          {append(migrations[:len(migrations):len(migrations)], rename, func(*Tx) error { return nil }), nil, "renamed"},
		"second fails": {append(migrations[:len(migrations):len(migrations)], rename, func(*Tx) error { return fail }), fail, "x"},
	} {
		t.Run(name, func(t *testing.T) {
			origin := newStore(t)
			change(t, origin, func(tx *Tx) error { return putEverything(tx, "x") })
			path := filepath.Join(t.TempDir(), "store.db")
			writeFile(t, path, snapshot(t, origin))
			s, err := open(path, testKey, c.steps)
			want(t, err, c.error)
			if c.error != nil { // nothing of it happened: the old program still works
				if s, err = open(path, testKey, migrations); err != nil {
					t.Fatal(err)
				}
			}
			defer s.Close()
			view(t, s, func(tx *Tx) error {
				got, err := ServerName.Get(tx)
				equal(t, got, err, c.name)
				if err := tx.checkValues(); err != nil {
					t.Error(err)
				}
				head, err := tx.VerifyAudit()
				migrated := c.error == nil && len(c.steps) > len(migrations)
				equal(t, head.Seq == 3, err, migrated)
				return nil
			})
		})
	}
}

// Whatever bytes are damaged, a check ends with an error, or the damage hit
// bytes that no one reads and everything that was put is there. Branch pages
// are left out: see CheckSnapshot.
func TestCheckSnapshotDamage(t *testing.T) {
	s := newStore(t)
	change(t, s, func(tx *Tx) error { return putEverything(tx, "x") })
	for n := range 200 { // some pages of each kind
		change(t, s, func(tx *Tx) error {
			return tx.PutRequest(recovery.Record{ID: fmt.Sprint("r", n), Signed: make([]byte, 100)})
		})
	}
	whole := snapshot(t, s)
	path := filepath.Join(t.TempDir(), "copy.db")
	var head Head
	want(t, checkOnce(t, path, whole, &head), nil)
	refused := 0
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		bad := bytes.Clone(whole)
		start := random.IntN(len(bad))
		if flags := bad[start/os.Getpagesize()*os.Getpagesize()+8]; flags == 1 {
			continue
		}
		for n := range random.IntN(16) + 1 {
			bad[min(start+n, len(bad)-1)] ^= byte(1 + random.IntN(255))
		}
		var reached Head
		if err := checkOnce(t, path, bad, &reached); err != nil {
			refused++
		} else if reached != head {
			t.Fatalf("damage at %d: passed with head %+v", start, reached)
		}
	}
	if refused < 50 {
		t.Errorf("only %d of 300 damaged stores were refused", refused)
	}
	t.Logf("%d of 300 refused, %d bytes", refused, len(whole))
}

func checkOnce(t *testing.T, path string, data []byte, head *Head) error {
	t.Helper()
	writeFile(t, path, data)
	var err error
	*head, err = CheckSnapshot(path, testKey)
	return err
}
