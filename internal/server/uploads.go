package server

import (
	"sync"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
)

// A machine may upload so many packets at once, and as many again in an hour:
// far more than any enrolment needs, and far less than what would fill a disk.
const (
	uploadBurst  = 60
	uploadRefill = time.Hour / uploadBurst
	maxUploaders = 10_000 // that are remembered before those are forgotten who have it all back
)

// allowance is how many uploads a machine had left at a time. The zero one was
// never used.
type allowance struct {
	left int
	at   time.Time
}

// at returns the allowance at a later time; a clock that was set back gives none
// back.
func (a allowance) now(now time.Time) allowance {
	if a.at.IsZero() {
		return allowance{uploadBurst, now}
	}
	if back := int(max(0, now.Sub(a.at)) / uploadRefill); back >= uploadBurst-a.left {
		return allowance{uploadBurst, now}
	} else if back > 0 {
		return allowance{a.left + back, a.at.Add(time.Duration(back) * uploadRefill)}
	}
	return a
}

// take takes one, if one is left.
func (a allowance) take(now time.Time) (allowance, bool) {
	if a = a.now(now); a.left == 0 {
		return a, false
	}
	a.left--
	return a, true
}

// uploads is how many packets each machine may still upload. It is in memory: a
// server that starts again gives all back.
type uploads struct {
	mu   sync.Mutex
	left map[identity.KeyID]allowance
}

// check refuses an upload over the limit.
func (u *uploads) check(id identity.KeyID, now time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.left == nil {
		u.left = map[identity.KeyID]allowance{}
	}
	if len(u.left) >= maxUploaders {
		for other, a := range u.left {
			if a.now(now).left == uploadBurst {
				delete(u.left, other)
			}
		}
	}
	next, ok := u.left[id].take(now)
	u.left[id] = next
	if !ok {
		return api.Errorf(api.CodeLimit, "the machine uploaded %d packets in a short time; it may send one again in %s", uploadBurst, uploadRefill)
	}
	return nil
}
