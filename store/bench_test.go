package store

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"mandos-escrow/unlock"
)

// manyMachines is a store with count machines, filled in few transactions.
func manyMachines(b *testing.B, count int) *Store {
	b.Helper()
	s, err := Create(filepath.Join(b.TempDir(), "store.db"), testKey)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	for start := 0; start < count; start += 5000 {
		change(b, s, func(tx *Tx) error {
			for n := start; n < min(start+5000, count); n++ {
				machine := testMachine(n + 1)
				if err := tx.PutMachine(machine); err != nil {
					return err
				}
				if err := tx.PutBlob(machine.KeyID, "u", make([]byte, 600)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return s
}

// One boot's reading: the machine and its blob. It stays flat.
func BenchmarkLookup(b *testing.B) {
	for _, count := range []int{1, 1000, 100_000} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			s := manyMachines(b, count)
			ids := make([]unlock.Machine, 1000)
			for n := range ids {
				ids[n] = testMachine(n*count/len(ids) + 1)
			}
			for n := 0; b.Loop(); n++ {
				view(b, s, func(tx *Tx) error {
					id := ids[n%len(ids)].KeyID
					if _, err := tx.Machine(id); err != nil {
						return err
					}
					_, err := tx.Blob(id, "u")
					return err
				})
			}
		})
	}
}

// One boot's writing: the machine and an event, on disk before the reply.
func BenchmarkRelease(b *testing.B) {
	for _, count := range []int{1000, 100_000} {
		s := manyMachines(b, count)
		for name, commit := range map[string]func(func(*Tx) error) error{"Update": s.Update, "Batch": s.Batch} {
			for _, writers := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/%d machines/%d writers", name, count, writers), func(b *testing.B) {
					benchmarkWriters(b, commit, writers, count)
				})
			}
		}
	}
}

func benchmarkWriters(b *testing.B, commit func(func(*Tx) error) error, writers, machines int) {
	work := make(chan int)
	var wait sync.WaitGroup
	for range writers {
		wait.Go(func() {
			for n := range work {
				machine := testMachine(n%machines + 1)
				if err := commit(audited(func(tx *Tx) error { return tx.PutMachine(machine) })); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for n := 0; b.Loop(); n++ {
		work <- n * 7919
	}
	close(work)
	wait.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "releases/s")
}
