package store

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mandos-escrow/recovery"
)

func TestBatch(t *testing.T) {
	s := newStore(t)
	const writers, each = 32, 10
	refused := errors.New("refused")
	var wait sync.WaitGroup
	for writer := range writers {
		wait.Go(func() {
			for n := range each {
				id := fmt.Sprintf("%d-%d", writer, n)
				err := s.Batch(audited(func(tx *Tx) error {
					if err := tx.PutRequest(recovery.Record{ID: id}); err != nil {
						return err
					}
					if n%5 == 4 {
						return refused
					}
					return nil
				}))
				if n%5 == 4 {
					if !errors.Is(err, refused) {
						t.Errorf("%s: %v, want refused", id, err)
					}
				} else if err != nil {
					t.Errorf("%s: %v", id, err)
				} else {
					view(t, s, func(tx *Tx) error { _, err := tx.Request(id); return err })
				}
			}
		})
	}
	wait.Wait()
	view(t, s, func(tx *Tx) error {
		equal(t, len(collect(t, tx.Requests())), nil, writers*each*4/5)
		head, err := tx.VerifyAudit()
		equal(t, head.Seq, err, writers*each*4/5)
		return nil
	})
}

// Calls that wait together take one transaction, and one that fails or
// panics among them hurts nobody else.
func TestBatchShares(t *testing.T) {
	s := newStore(t)
	before := s.db.Stats()
	hold := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		_ = s.Update(func(*Tx) error { <-hold; return nil })
	})
	time.Sleep(20 * time.Millisecond)
	put := func(id string) { // the first leads and waits for the Update above
		if err := s.Batch(audited(func(tx *Tx) error { return tx.PutRequest(recovery.Record{ID: id}) })); err != nil {
			t.Error(err)
		}
	}
	runs := 0
	panicked := make(chan any, 1)
	wait.Go(func() {
		defer func() { panicked <- recover() }()
		_ = s.Batch(func(*Tx) error { runs++; panic("closure") })
	})
	for n := range 40 {
		wait.Go(func() { put(fmt.Sprint("r", n)) })
	}
	for gathered := 0; gathered < 30; { // until nearly all wait
		s.group.mu.Lock()
		gathered = len(s.group.waiting)
		s.group.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	close(hold)
	wait.Wait()
	if fault := <-panicked; fault != "closure" || runs != 2 {
		t.Errorf("panic %v after %d runs", fault, runs)
	}
	view(t, s, func(tx *Tx) error {
		equal(t, len(collect(t, tx.Requests())), nil, 40)
		return nil
	})
	// Each commit writes some pages of the tree; 40 commits would write over 200.
	after := s.db.Stats()
	if writes := after.TxStats.GetWrite() - before.TxStats.GetWrite(); writes > 100 {
		t.Errorf("40 calls took %d page writes", writes)
	}
}

func TestWatch(t *testing.T) {
	s := newStore(t)
	machine := testMachine(1)
	for name, step := range map[string]struct {
		key string
		run func(func(*Tx) error) error
		do  func(*Tx) error
	}{
		"machine": {string(machine.KeyID), s.Update, func(tx *Tx) error { return tx.PutMachine(machine) }},
		"request": {"r1", s.Batch, func(tx *Tx) error { return tx.PutRequest(recovery.Record{ID: "r1"}) }},
		"removed": {"r1", s.Update, func(tx *Tx) error {
			return errors.Join(tx.PutRequest(recovery.Record{ID: "r1"}), tx.DeleteRequest("r1"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			changed, other := s.Watch(step.key), s.Watch("other")
			if s.Watch(step.key) != changed {
				t.Error("two channels for one key")
			}
			_ = step.run(func(tx *Tx) error { return errors.Join(step.do(tx), errors.New("refused")) })
			if isClosed(changed) {
				t.Fatal("closed by a change that was not committed")
			}
			want(t, step.run(audited(step.do)), nil)
			if !isClosed(changed) || isClosed(other) {
				t.Fatalf("changed %v, other %v", isClosed(changed), isClosed(other))
			}
			if isClosed(s.Watch(step.key)) {
				t.Fatal("a new watch sees the old change")
			}
		})
	}
}

func isClosed(channel <-chan struct{}) bool {
	select {
	case <-channel:
		return true
	default:
		return false
	}
}

// A waiting boot: wakes at a change or at Close, and leaves no goroutine,
// which synctest checks.
func TestWatchWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w Store
		waited := make(chan time.Duration, 2)
		for _, key := range []string{"a", "b"} {
			changed, start := w.Watch(key), time.Now()
			go func() {
				select {
				case <-changed:
				case <-time.After(time.Hour):
				}
				waited <- time.Since(start)
			}()
		}
		time.Sleep(time.Minute)
		w.watches.wake([]string{"a"})
		if took := <-waited; took != time.Minute {
			t.Errorf("woke after %v", took)
		}
		time.Sleep(time.Minute)
		w.watches.wakeAll()
		if took := <-waited; took != 2*time.Minute {
			t.Errorf("woke after %v", took)
		}
		if len(w.watches.channels) != 0 {
			t.Errorf("%d channels are left", len(w.watches.channels))
		}
	})
}
