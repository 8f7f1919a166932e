package server

import (
	"encoding/json"
	"io"
	"net/http"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// call is one request, with the one who makes it.
type call struct {
	*http.Request
	route   route
	now     time.Time
	actor   string // as the audit log names it
	key     identity.Public
	admin   *store.Admin
	machine *unlock.Machine
	local   bool
	events  *allowances // what machines may still write into the audit log
}

// authorize looks again, in the transaction that changes something, whether
// the caller may still do that: they may have been removed, or the server been
// set back, since the call was let in.
func (c call) authorize(tx *store.Tx) error {
	if why, err := store.Unconfirmed.Get(tx); err != nil {
		return err
	} else if why != "" && (!c.route.unconfirmed || !c.local) {
		return api.Errorf(api.CodeUnconfirmed, "this server serves nothing until it is confirmed: %s", why)
	}
	switch {
	case c.local || c.route.access == anyone:
		return nil
	case c.machine != nil:
		if m, err := tx.MachineByRunning(c.key.KeyID()); err != nil || m.KeyID != c.machine.KeyID {
			return errStranger
		}
	case c.admin != nil:
		a, err := tx.AdminByKey(c.key.KeyID())
		if err != nil || !mayAsk(&a, c.route, c.now) {
			return errStranger
		}
	default:
		return errStranger
	}
	return nil
}

func (c call) known() bool { return c.local || c.admin != nil || c.machine != nil }

func (c call) may(need access) bool {
	switch {
	case need == anyone:
		return true
	case need == machines:
		return c.machine != nil
	case c.local:
		return true
	case c.admin == nil || need == local:
		return false
	}
	return mayAsk(c.admin, c.route, c.now)
}

// mayAsk reports whether an administrator, or a rescue, may call a route.
func mayAsk(a *store.Admin, rt route, now time.Time) bool {
	if a.Rescue != nil {
		return rescueRoutes[rt.pattern] && !a.Rescue.Over(now)
	}
	return a.Role.Allows(roleOf[rt.access])
}

// rescue is what the caller may ask for by a rescue invite; nil for everybody
// else.
func (c call) rescue() *recovery.Rescue {
	if c.admin == nil {
		return nil
	}
	return c.admin.Rescue
}

// requester is the name that the caller's requests carry.
func (c call) requester() string {
	if r := c.rescue(); r != nil {
		return r.Requester()
	}
	return c.admin.Name
}

// decode reads the body of a call strictly.
func decode[T any](c call) (T, error) {
	var in T
	d := json.NewDecoder(c.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return in, api.Errorf(api.CodeUsage, "the request is not understood: %v", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return in, api.Errorf(api.CodeUsage, "the request is not understood: it goes on after its end")
	}
	return in, nil
}

// record adds an audit event for a call; it belongs to the same transaction as
// the change, and every change has one, so the caller's right is checked here, and
// how much a machine may write.
func (c call) record(tx *store.Tx, event store.Event) error {
	if err := c.authorize(tx); err != nil {
		return err
	}
	if c.machine != nil {
		if err := c.events.check(c.machine.KeyID, c.now); err != nil {
			return err
		}
	}
	event.Time, event.Actor = c.now, c.actor
	return tx.Audit(event)
}
