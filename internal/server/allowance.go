package server

import (
	"sync"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
)

// limit is how much a machine may do at once, and how long it takes until it may do
// one more again.
type limit struct {
	burst  int
	refill time.Duration
}

// Far more than any machine needs, and far less than what would fill a disk.
var (
	uploadLimit = limit{60, time.Minute}
	// Of what is written for ever: a verification of 64 volumes that all fail has
	// 128 entries in the audit log.
	eventLimit = limit{1000, time.Minute}
)

const maxRemembered = 10_000 // machines, before those are forgotten who have it all back

// allowance is how much a machine had left at a time. The zero one was never used.
type allowance struct {
	left int
	at   time.Time
}

// now returns the allowance at a later time; a clock that was set back gives none
// back.
func (a allowance) now(l limit, now time.Time) allowance {
	if a.at.IsZero() {
		return allowance{l.burst, now}
	}
	if back := int(max(0, now.Sub(a.at)) / l.refill); back >= l.burst-a.left {
		return allowance{l.burst, now}
	} else if back > 0 {
		return allowance{a.left + back, a.at.Add(time.Duration(back) * l.refill)}
	}
	return a
}

// take takes one, if one is left.
func (a allowance) take(l limit, now time.Time) (allowance, bool) {
	if a = a.now(l, now); a.left == 0 {
		return a, false
	}
	a.left--
	return a, true
}

// allowances are those of all machines. They are in memory: a server that starts
// again gives all back.
type allowances struct {
	limit
	what string // they may do no more of for now
	mu   sync.Mutex
	left map[identity.KeyID]allowance
}

// check refuses one more over the limit.
func (u *allowances) check(id identity.KeyID, now time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.left == nil {
		u.left = map[identity.KeyID]allowance{}
	}
	if len(u.left) >= maxRemembered {
		for other, a := range u.left {
			if a.now(u.limit, now).left == u.burst {
				delete(u.left, other)
			}
		}
	}
	next, ok := u.left[id].take(u.limit, now)
	u.left[id] = next
	if !ok {
		return api.Errorf(api.CodeLimit, "the machine %s %d times in a short time; it may do so again in %s", u.what, u.burst, u.refill)
	}
	return nil
}
