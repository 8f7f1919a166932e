package recovery

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"mandos-escrow/internal/identity"
)

// Refusals. Each leaves the request as it was.
var (
	ErrOwn         = errors.New("nobody approves their own request")
	ErrTwice       = errors.New("already approved by this approver or with this trustee's key")
	ErrExpired     = errors.New("the request has expired")
	ErrOver        = errors.New("the request is no longer open")
	ErrNotApproved = errors.New("not approved yet")
	ErrNotYours    = errors.New("only who made a request may have its release")
)

// State of a request.
type State string

// The states. Approvals gather while it is open; as many as the packet's
// threshold make it approved.
const (
	Open     State = "open"
	Approved State = "approved"
	Denied   State = "denied"
	Released State = "released"
	Expired  State = "expired"
)

// Record is a request as a server keeps it: what was asked, byte for byte as
// the requester signed it, and what became of it.
type Record struct {
	ID          string         `json:"id"`
	Signed      []byte         `json:"signed"`
	Requester   string         `json:"requester"`
	RequesterID identity.KeyID `json:"requester_key_id"`
	Threshold   int            `json:"threshold"` // of the packet's policy
	// Here is how many approvals make a server hand out what it has, where the
	// packet's trustees have other servers too: its own policy's threshold. 0: Threshold.
	Here      int              `json:"here,omitempty"`
	Trustees  []string         `json:"trustees,omitempty"` // fingerprints: the packet's
	Expires   time.Time        `json:"expires"`
	State     State            `json:"state"`
	Approvals []StoredApproval `json:"approvals,omitempty"`
	Decided   time.Time        `json:"decided,omitzero"`
	DecidedBy string           `json:"decided_by,omitempty"`
	Note      string           `json:"note,omitempty"` // why it was denied
	// Who made the rescue invite by which it was asked; none of other requests.
	Inviter   string         `json:"inviter,omitempty"`
	InviterID identity.KeyID `json:"inviter_key_id,omitempty"`
}

// StoredApproval is one approver's signed approval with the share that was
// re-sealed to the request's key.
type StoredApproval struct {
	Approver   string         `json:"approver"`
	ApproverID identity.KeyID `json:"approver_key_id"`
	Trustee    string         `json:"trustee"` // fingerprint
	Signed     []byte         `json:"signed"`
	Share      []byte         `json:"share,omitempty"` // gone once the request is over
	Time       time.Time      `json:"time"`
}

// At returns the record as it is at now: a request whose time is over is
// expired and holds no share, whatever is stored.
func (r Record) At(now time.Time) Record {
	if (r.State == Open || r.State == Approved) && !now.Before(r.Expires) {
		return r.end(Expired, "", now)
	}
	return r
}

// end closes a request and forgets the re-sealed shares.
func (r Record) end(state State, by string, now time.Time) Record {
	r.State, r.Decided, r.DecidedBy = state, now, by
	approvals := make([]StoredApproval, len(r.Approvals))
	for i, a := range r.Approvals {
		a.Share = nil
		approvals[i] = a
	}
	r.Approvals = approvals
	return r
}

func (r Record) over() error {
	switch r.State {
	case Expired:
		return ErrExpired
	case Denied, Released:
		return fmt.Errorf("%w: it was %s", ErrOver, r.State)
	}
	return nil
}

// MayApprove says whether an approver could approve now.
func (r Record) MayApprove(name string, id identity.KeyID, now time.Time) error {
	if err := r.At(now).over(); err != nil {
		return err
	}
	if r.RequesterID == id || r.Requester == name {
		return ErrOwn
	}
	if r.InviterID != "" && (r.InviterID == id || r.Inviter == name) {
		return ErrInvited
	}
	for _, a := range r.Approvals {
		if a.ApproverID == id || a.Approver == name {
			return ErrTwice
		}
	}
	return nil
}

// Approve adds an approval.
func (r Record) Approve(a StoredApproval, now time.Time) (Record, error) {
	if err := r.MayApprove(a.Approver, a.ApproverID, now); err != nil {
		return r, err
	}
	for _, other := range r.Approvals {
		if other.Trustee == a.Trustee {
			return r, ErrTwice
		}
	}
	r.Approvals = append(r.Approvals[:len(r.Approvals):len(r.Approvals)], a)
	if len(r.Approvals) >= r.Threshold {
		r.State = Approved
	}
	return r, nil
}

// Withdraw takes back what somebody approved who may approve no more; changed
// says whether there was anything.
func (r Record) Withdraw(approver identity.KeyID, now time.Time) (_ Record, changed bool) {
	if r.At(now).over() != nil {
		return r, false
	}
	kept := slices.DeleteFunc(slices.Clone(r.Approvals), func(a StoredApproval) bool { return a.ApproverID == approver })
	if len(kept) == len(r.Approvals) {
		return r, false
	}
	r.Approvals = kept
	if len(kept) < r.Threshold {
		r.State = Open
	}
	return r, true
}

// Deny ends a request. A requester may deny their own, which withdraws it.
func (r Record) Deny(by, why string, now time.Time) (Record, error) {
	if err := r.At(now).over(); err != nil {
		return r, err
	}
	r = r.end(Denied, by, now)
	r.Note = why
	return r, nil
}

// Release hands the re-sealed shares to the requester, and returns the record
// without them. Where a packet's trustees have servers of their own, each hands out
// its part: that N are needed is then arithmetic, not a count.
func (r Record) Release(id identity.KeyID, now time.Time) (Record, []StoredApproval, error) {
	if r.RequesterID != id {
		return r, nil, ErrNotYours
	}
	if err := r.At(now).over(); err != nil {
		return r, nil, err
	}
	if len(r.Approvals) < cmp.Or(r.Here, r.Threshold) {
		return r, nil, fmt.Errorf("%w: %d of %d approvals", ErrNotApproved, len(r.Approvals), r.Threshold)
	}
	shares := r.Approvals
	return r.end(Released, r.Requester, now), shares, nil
}
