package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
)

// The test binary is also the program that is killed: a child runs the role
// that childVariable names on the store in childStore.
const (
	childVariable = "STORE_TEST_CHILD"
	childStore    = "STORE_TEST_STORE"
)

func TestMain(m *testing.M) {
	role, found := map[string]func(*Store) error{"writer": writeForEver, "full": fillUp}[os.Getenv(childVariable)]
	if !found {
		os.Exit(m.Run())
	}
	s, err := Open(os.Getenv(childStore), testKey)
	if err == nil {
		err = role(s)
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1)
}

func child(role, path string) *exec.Cmd {
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), childVariable+"="+role, childStore+"="+path)
	return command
}

// writeForEver says each number on standard output once it is committed.
func writeForEver(s *Store) error {
	next := 0
	err := s.View(func(tx *Tx) error {
		head, err := tx.AuditHead()
		next = int(head.Seq)
		return err
	})
	for err == nil {
		next++
		err = s.Batch(audited(func(tx *Tx) error {
			return tx.PutRequest(recovery.Record{ID: strconv.Itoa(next), Signed: make([]byte, 1500)})
		}))
		if err == nil {
			_, err = fmt.Println(next)
		}
	}
	return err
}

// What was acknowledged before a kill -9 is there after it; what was not is
// there whole or not at all.
func TestKill(t *testing.T) {
	s := newStore(t)
	path := filepath.Join(t.TempDir(), "store.db")
	writeFile(t, path, snapshot(t, s))
	total := 0
	for round := range 20 {
		acknowledged := killWriter(t, path)
		if acknowledged <= total {
			t.Fatalf("round %d: the child wrote nothing", round)
		}
		total = checkWritten(t, path, acknowledged)
	}
	t.Logf("%d writes in 20 rounds", total)
	if _, err := CheckSnapshot(path, testKey); err != nil {
		t.Fatal(err)
	}
}

func killWriter(t *testing.T, path string) (acknowledged int) {
	t.Helper()
	command := child("writer", path)
	var complaint bytes.Buffer
	command.Stderr = &complaint
	output, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(output)
	for seen := 0; lines.Scan(); seen++ {
		if acknowledged, err = strconv.Atoi(lines.Text()); err != nil {
			t.Fatal(err)
		}
		if seen == 0 {
			time.AfterFunc(time.Duration(rand.IntN(40_000))*time.Microsecond, func() { _ = command.Process.Kill() })
		}
	}
	if err := command.Wait(); complaint.Len() > 0 {
		t.Fatalf("%v: %s", err, &complaint)
	}
	return acknowledged
}

func checkWritten(t *testing.T, path string, acknowledged int) (written int) {
	t.Helper()
	s, err := Open(path, testKey)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	view(t, s, func(tx *Tx) error {
		head, err := tx.VerifyAudit()
		written = int(head.Seq)
		requests := len(collect(t, tx.Requests()))
		if written < acknowledged || written > acknowledged+1 || requests != written {
			t.Errorf("acknowledged %d, events %d, requests %d", acknowledged, written, requests)
		}
		return err
	})
	return written
}

// fillUp writes until its limit on file sizes stops it, and goes on when the
// limit is lifted.
func fillUp(s *Store) error {
	const room = 4 << 20
	var unlimited unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &unlimited); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: room, Max: unlimited.Max}); err != nil {
		return err
	}
	put := func(n int) error {
		return s.Update(audited(func(tx *Tx) error {
			return tx.PutRequest(recovery.Record{ID: fmt.Sprintf("r%06d", n), Signed: make([]byte, 30000)})
		}))
	}
	count, err := 0, error(nil)
	for ; err == nil && count < 1000; count++ {
		err = put(count)
	}
	count-- // the last one failed
	if !errors.Is(err, ErrFull) {
		return fmt.Errorf("after %d: %w, want ErrFull", count, err)
	}
	// A second try may find the room that the first gave back.
	switch err := put(count); {
	case err == nil:
		count++
	case !errors.Is(err, ErrFull):
		return fmt.Errorf("second try: %w, want ErrFull or success", err)
	}
	if err := countRequests(s, count); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unlimited); err != nil {
		return err
	}
	if err := put(count); err != nil {
		return fmt.Errorf("with room again: %w", err)
	}
	if err := countRequests(s, count+1); err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	fmt.Println(count + 1)
	os.Exit(0)
	return nil
}

func countRequests(s *Store, wanted int) error {
	return s.View(func(tx *Tx) error {
		found := 0
		for _, err := range tx.Requests() {
			if err != nil {
				return err
			}
			found++
		}
		head, err := tx.VerifyAudit()
		if err != nil || found != wanted || head.Seq != uint64(wanted) {
			return fmt.Errorf("%d requests, %d events, want %d: %w", found, head.Seq, wanted, err)
		}
		return nil
	})
}

func TestDiskFull(t *testing.T) {
	s := newStore(t)
	path := filepath.Join(t.TempDir(), "store.db")
	writeFile(t, path, snapshot(t, s))
	output, err := child("full", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	count, err := strconv.Atoi(string(bytes.TrimSpace(output)))
	if err != nil || count < 10 {
		t.Fatalf("%q: only %d fitted", output, count)
	}
	again, err := Open(path, testKey)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := countRequests(again, count); err != nil {
		t.Fatal(err)
	}
}

// A snapshot taken in the middle of writes is a whole store.
func TestSnapshotWhileWriting(t *testing.T) {
	s := newStore(t)
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := s.Update(audited(func(tx *Tx) error { return tx.PutRequest(recovery.Record{ID: strconv.Itoa(n)}) })); err != nil {
				done <- err
				return
			}
		}
	}()
	for range 10 {
		path := filepath.Join(t.TempDir(), "copy.db")
		writeFile(t, path, snapshot(t, s))
		head, err := CheckSnapshot(path, testKey)
		if err != nil {
			t.Fatal(err)
		}
		view(t, s, func(tx *Tx) error {
			has, err := tx.AuditHas(head)
			equal(t, has, err, true)
			return nil
		})
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestSnapshotSaysWhatFailed(t *testing.T) {
	err := newStore(t).Snapshot(filepath.Join(t.TempDir(), "nosuch", "copy.db"))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("error %v", err)
	}
}

func TestSnapshotLeavesBehindWhatWasDeleted(t *testing.T) {
	s := newStore(t)
	machine := identity.KeyID(strings.Repeat("a", 64))
	change := func(change func(*Tx) error) {
		t.Helper()
		if err := s.Update(func(tx *Tx) error {
			return errors.Join(change(tx), tx.Audit(Event{Time: time.Unix(1, 0), Actor: "test", Action: "test"}))
		}); err != nil {
			t.Fatal(err)
		}
	}
	change(func(tx *Tx) error { return tx.PutBlob(machine, "u", bytes.Repeat([]byte{1}, 100)) })
	var sealed []byte
	if err := s.db.View(func(btx *bolt.Tx) error {
		_, value := btx.Bucket([]byte(blobBucket)).Cursor().First()
		sealed = bytes.Clone(value)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	change(func(tx *Tx) error { return tx.DeleteBlob(machine, "u") })
	live, err := os.ReadFile(s.db.Path())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(live, sealed) {
		t.Fatal("the live file does not hold the deleted value any more: this test proves nothing")
	}
	if bytes.Contains(snapshot(t, s), sealed) {
		t.Error("the snapshot holds a deleted value")
	}
}
