package enroll

import (
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
)

// respite is how long after a rotation that a server caused it causes no other: what
// it says of a volume is not proved, and could keep a machine rotating for ever.
// It is less than a day, so that a daily timer is never a minute too early.
const respite = 20 * time.Hour

// causes are the servers whose word caused a rotation, and when it last did, as far
// as their respite lasts.
type causes map[identity.KeyID]time.Time

// verdict is whether a volume is due, and whether it is rotated for that now.
type verdict struct {
	why   string           // it is due; "": it is not
	by    []identity.KeyID // servers that say so, and cause a rotation now
	until time.Time        // all that say so have their respite until then; zero: now
}

// judge decides whether a volume is due: an interrupted run always is; otherwise
// servers say it, each as often as its respite allows.
func (j *journal) judge(held []holding, owed *uploads, now time.Time) (v verdict) {
	if !j.committed {
		return verdict{why: "an enrolment or a rotation was interrupted"}
	}
	for _, h := range held {
		why, until := h.due(j, owed), j.causes.respite(h.KeyID, now)
		switch {
		case why == "":
		case until.IsZero() && len(v.by) > 0:
			v.by = append(v.by, h.KeyID)
		case until.IsZero():
			v = verdict{why: why, by: []identity.KeyID{h.KeyID}}
		case v.why == "" || len(v.by) == 0 && until.Before(v.until):
			v = verdict{why: why, until: until}
		}
	}
	return v
}

// respite is until when a server causes no rotation; zero: it may now. A time that is
// still to come is of a clock that was wrong.
func (c causes) respite(server identity.KeyID, now time.Time) time.Time {
	last := c[server]
	if until := last.Add(respite); !now.Before(last) && now.Before(until) {
		return until
	}
	return time.Time{}
}

// and are those that still count, with those of now.
func (c causes) and(by []identity.KeyID, now time.Time) causes {
	all := causes{}
	for server, last := range c {
		if !c.respite(server, now).IsZero() {
			all[server] = last
		}
	}
	for _, server := range by {
		all[server] = now
	}
	return all
}

// due is why a server that answered makes a volume due, or "". One that is still
// owed the packet gets it without a rotation.
func (h *holding) due(j *journal, owed *uploads) string {
	if h.err != nil {
		return ""
	}
	if why := dueOf(heldOf(h.volumes, j.uuid), j); why != "" {
		return why
	}
	if h.compare(j) != nil && !owed.owes(h.KeyID) {
		return h.Name + " does not hold the packet whole"
	}
	return ""
}

// dueOf is why one server's copy of a journal's packet says that it is due.
func dueOf(held api.MachineVolume, j *journal) string {
	switch {
	case held.PacketID != j.packet:
		return ""
	case held.Revealed:
		return "the recovery passphrase was released"
	case held.Expired:
		return "the packet expired: its lifetime is over, or others may know its secrets"
	}
	return ""
}
