package recovery

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"mandos-escrow/internal/identity"
)

// Limits of a rescue invite.
const (
	RescueLifetime    = 24 * time.Hour     // when nothing else is said
	MaxRescueLifetime = 7 * 24 * time.Hour // the longest
	maxRescueRequests = 10                 // one after another

	// RescuePrefix begins the name of a rescue as a requester. No
	// administrator has such a name.
	RescuePrefix = "rescue of "
)

// Refusals of a rescue.
var (
	ErrRescueOver = errors.New("this rescue invite is over")
	ErrInvited    = errors.New("nobody approves what a rescue asks that they invited")
)

// Rescue is what a rescue invite lets the key that logged in with it ask for:
// the packet of one volume, until it expires.
type Rescue struct {
	Volume    string         `json:"volume"` // UUID
	Inviter   string         `json:"inviter"`
	InviterID identity.KeyID `json:"inviter_key_id"`
	Reason    string         `json:"reason,omitempty"`  // of the inviter
	Expires   time.Time      `json:"expires"`           // the first instant at which it is no more
	Request   string         `json:"request,omitempty"` // the id of the last request; none before the first
	Filed     int            `json:"filed,omitempty"`   // how many requests
}

// RescueName is how requests, lists and the audit log name who asks by a rescue
// invite.
func RescueName(volume, inviter string) string {
	return RescuePrefix + volume + ", invited by " + inviter
}

// Requester is the name that the rescue's requests carry.
func (r Rescue) Requester() string { return RescueName(r.Volume, r.Inviter) }

// Over reports whether the invite has expired.
func (r Rescue) Over(now time.Time) bool { return !now.Before(r.Expires) }

// File returns the rescue as it is after it filed a request. last is its last
// request; nil before the first. One is open at a time: the caller withdraws the
// last. After somebody else denied one there is no other: the answer was no.
func (r Rescue) File(request *Request, last *Record, now time.Time) (Rescue, error) {
	switch {
	case r.Over(now):
		return r, ErrRescueOver
	case request.VolumeUUID != r.Volume:
		return r, fmt.Errorf("%w: it is of volume %s", ErrRescueOver, r.Volume)
	case r.Filed >= maxRescueRequests:
		return r, fmt.Errorf("%w: it has made %d requests", ErrRescueOver, r.Filed)
	case last != nil:
		switch before := last.At(now); {
		case before.State == Released:
			return r, fmt.Errorf("%w: its request was released", ErrRescueOver)
		case before.State == Denied && !before.withdrawn():
			return r, fmt.Errorf("%w: its request was denied", ErrRescueOver)
		}
	}
	r.Request, r.Filed = request.ID, r.Filed+1
	return r, nil
}

// withdrawn reports whether who asked ended the request.
func (r Record) withdrawn() bool { return strings.HasPrefix(r.DecidedBy, "rescue:") }
