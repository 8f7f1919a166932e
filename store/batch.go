package store

import (
	"errors"
	"sync"

	bolt "go.etcd.io/bbolt"
)

// group gathers the closures of Batch. Whoever holds lead runs all that have
// gathered in one transaction; meanwhile the next ones gather. So a lone
// caller waits for nobody, and under load one fsync serves many.
type group struct {
	lead chan struct{} // holds one element while somebody leads

	mu      sync.Mutex
	waiting []*call
}

type call struct {
	change func(*Tx) error
	tx     *Tx
	done   chan error // of capacity 1
}

// errAlone tells a caller to run its closure in a transaction of its own.
var errAlone = errors.New("run alone")

func newGroup() group { return group{lead: make(chan struct{}, 1)} }

// Batch is Update for many callers at once: closures that wait at the same
// time share one transaction and one fsync. It returns when that is on disk.
//
// A closure may run more than once, and sees what those before it changed; it
// must not keep anything from a run that is followed by another, so it sets
// its results anew each time. When one returns an error, the others run again
// without it, and it runs again alone: refuse before calling Batch where that
// can be, or write the refusal as an event and return nil.
func (s *Store) Batch(change func(*Tx) error) error {
	c := &call{change: change, done: make(chan error, 1)}
	s.group.add(c)
	select {
	case err := <-c.done:
		return s.finish(c, err)
	case s.group.lead <- struct{}{}:
	}
	s.leadGroup()
	return s.finish(c, <-c.done)
}

// leadGroup runs what has gathered and gives the lead away.
func (s *Store) leadGroup() {
	defer func() { <-s.group.lead }()
	calls := s.group.take()
	if len(calls) == 0 { // the leader before took this caller's closure too
		return
	}
	failed := s.runGroup(calls)
	for failed != nil {
		failed.done <- errAlone
		calls = without(calls, failed)
		if len(calls) == 0 {
			return
		}
		failed = s.runGroup(calls)
	}
}

// runGroup commits the closures together and answers them all; or, when one
// of them failed, commits and answers nothing and returns that one.
func (s *Store) runGroup(calls []*call) (failed *call) {
	err := s.commit(func(btx *bolt.Tx) error {
		for _, c := range calls {
			c.tx = &Tx{bolt: btx, sealer: s.sealer}
			if !c.works() {
				failed = c
				return errAlone
			}
		}
		return nil
	})
	if failed != nil {
		return failed
	}
	for _, c := range calls {
		c.done <- err
	}
	return nil
}

// works runs the closure. A panic counts as a failure here, and happens again
// when the closure runs alone, in the goroutine of its own caller.
func (c *call) works() (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	return c.tx.run(c.change) == nil
}

func (s *Store) finish(c *call, err error) error {
	if errors.Is(err, errAlone) {
		return s.Update(c.change)
	}
	if err == nil {
		s.watches.wake(c.tx.changed)
	}
	return err
}

func (g *group) add(c *call) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = append(g.waiting, c)
}

func (g *group) take() []*call {
	g.mu.Lock()
	defer g.mu.Unlock()
	calls := g.waiting
	g.waiting = nil
	return calls
}

func without(calls []*call, gone *call) []*call {
	var rest []*call
	for _, c := range calls {
		if c != gone {
			rest = append(rest, c)
		}
	}
	return rest
}
