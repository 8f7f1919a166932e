package unlock

import (
	"errors"
	"fmt"
	"time"
)

// ErrRefused: the server does not release. On the wire no more than that is
// said; the text of the error is for the log.
var ErrRefused = errors.New("refused")

// Action is what a server does with a request.
type Action int

// The actions. The zero Decision refuses.
const (
	Refuse Action = iota
	Wait
	Release
)

// Reasons of a Decision, for the log and the audit record.
const (
	ReasonUnknown     = "unknown key"
	ReasonMalformed   = "malformed request"
	ReasonDisabled    = "disabled"
	ReasonTimedOut    = TimedOut
	ReasonDenied      = "denied"
	ReasonNotApproved = "not approved in time"
	ReasonApproved    = "approved"
	ReasonByDefault   = "approved by default"
	ReasonWaiting     = "waiting for approval"
	ReasonNotFound    = "record cannot be read"
	ReasonNotReleased = "not released"
	ReasonGone        = "connection closed while waiting for approval"
	ReasonStopped     = "server stopping"
)

// Decision says what to do, why, and for Wait the time at which to decide
// again when nothing changed before.
type Decision struct {
	Action Action
	Reason string
	Until  time.Time
}

// Err is nil for a release, and wraps ErrRefused otherwise.
func (d Decision) Err() error {
	if d.Action == Release {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrRefused, d.Reason)
}

// Decide says what becomes of a request that came at the given time. It is all
// of the rules, and changes nothing. They are those of mandos-clients.conf(5),
// with two differences: a denial holds without an approval delay too, and a
// machine that is not approved by default is refused when its delay is zero
// (Mandos serves both).
func (m Machine) Decide(requested, now time.Time) Decision {
	switch {
	case !m.Enabled:
		return Decision{Action: Refuse, Reason: ReasonDisabled}
	case m.expired(now):
		return Decision{Action: Refuse, Reason: ReasonTimedOut}
	case m.Approval.denies(now):
		return Decision{Action: Refuse, Reason: ReasonDenied}
	case m.Approval.approves(now):
		return Decision{Action: Release, Reason: ReasonApproved}
	}
	until := requested.Add(time.Duration(m.ApprovalDelay))
	switch {
	case now.Before(until):
		if !m.Expires.IsZero() && m.Expires.Before(until) {
			until = m.Expires
		}
		return Decision{Action: Wait, Reason: ReasonWaiting, Until: until}
	case m.ApprovedByDefault:
		return Decision{Action: Release, Reason: ReasonByDefault}
	}
	return Decision{Action: Refuse, Reason: ReasonNotApproved}
}

func (m Machine) expired(now time.Time) bool {
	return !m.Expires.IsZero() && !now.Before(m.Expires)
}

// A clock that was set back must not make an approval last longer, nor a
// denial shorter.
func (a Approval) approves(now time.Time) bool {
	return a.Given && !now.Before(a.At) && now.Before(a.Until)
}

func (a Approval) denies(now time.Time) bool { return !a.Given && now.Before(a.Until) }
