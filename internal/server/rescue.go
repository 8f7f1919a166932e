package server

import (
	"crypto/sha256"
	"errors"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

// rescueNames begins the names of rescue invites among administrators.
const rescueNames = "rescue-"

// rescueInvite makes an invite with which a rescue system, which has no identity,
// may ask for one volume's packet. Who makes it may not approve what is asked by
// it, and so must be somebody.
func (s *Server) rescueInvite(c call) (any, error) {
	in, err := decode[api.NewRescue](c)
	switch {
	case err != nil:
		return nil, err
	case c.admin == nil:
		return nil, api.Errorf(api.CodeUsage, "who invites a rescue may not approve it, and needs an identity of their own: use --home")
	case in.Lifetime < time.Minute || in.Lifetime > recovery.MaxRescueLifetime:
		return nil, api.Errorf(api.CodeUsage, "lifetime %s: from 1m to %s", in.Lifetime, recovery.MaxRescueLifetime)
	case len(in.Reason) > recovery.MaxReason || in.Reason != "" && record.Printable(in.Reason) != nil:
		return nil, api.Errorf(api.CodeUsage, "the reason must be at most %d printable bytes", recovery.MaxReason)
	}
	mine := api.RescueServer{Server: s.address(), Secret: secret.Random(16)}
	defer secret.Wipe(mine.Secret)
	out := api.NewRescueInvite{Expires: c.now.Add(in.Lifetime).UTC().Truncate(time.Second)}
	err = s.store.Update(func(tx *store.Tx) error {
		e, err := findVolume(tx, in.Volume)
		if err != nil {
			return err
		}
		if mine.PolicyDigest, err = policyDigest(tx); err != nil {
			return err
		}
		out.Volume = e.Volume.UUID
		rescue := recovery.Rescue{Volume: e.Volume.UUID, Inviter: c.admin.Name, InviterID: c.admin.KeyID, Reason: in.Reason, Expires: out.Expires}
		a := store.Admin{
			Name: rescueNames + secret.ID()[:16], Role: store.Rescuer, Created: c.now, Rescue: &rescue,
			InviteHash: sha256.Sum256(mine.Secret), InviteExpires: out.Expires,
		}
		if _, err := tx.AdminByName(a.Name); !errors.Is(err, store.ErrNotFound) {
			return errors.Join(store.ErrExists, err)
		}
		if err := tx.PutAdmin(a); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "rescue.invite", Volume: rescue.Volume, Detail: detailOf(a.Name, in.Reason)})
	})
	if err != nil {
		return nil, err
	}
	out.Text, err = api.RescueInvite{Volume: out.Volume, Servers: []api.RescueServer{mine}}.Text()
	return out, err
}

func detailOf(name, reason string) string {
	if reason == "" {
		return name
	}
	return name + ": " + reason
}

// actorOf names an administrator, or a rescue, in the audit log.
func actorOf(a store.Admin) string {
	if a.Rescue != nil {
		return "rescue:" + a.Name
	}
	return "admin:" + a.Name
}

// ownVolume refuses a rescue every word but its volume's UUID and the id of a
// packet of that volume.
func (c call) ownVolume(tx *store.Tx, word string) error {
	r := c.rescue()
	if r == nil || word == r.Volume {
		return nil
	}
	if e, err := tx.Entry(word); err != nil || e.Volume.UUID != r.Volume {
		return errStranger
	}
	return nil
}

// fileRescue decides whether a rescue may file a request, and notes in the record
// who invited it. Of other callers it does nothing.
func (c call) fileRescue(tx *store.Tx, r *recovery.Request, rec *recovery.Record) error {
	if c.rescue() == nil {
		return nil
	}
	a, err := tx.AdminByKey(c.key.KeyID()) // it may have filed another one meanwhile, or been removed
	if err != nil {
		return errStranger
	}
	rescue := *a.Rescue
	var last *recovery.Record
	if rescue.Request != "" {
		before, err := tx.Request(rescue.Request)
		if err != nil {
			return err
		}
		last = &before
	}
	next, err := rescue.File(r, last, c.now)
	if err != nil {
		return err
	}
	if err := denyRescue(tx, c, a, "replaced by another request of the same rescue"); err != nil {
		return err
	}
	rec.Inviter, rec.InviterID = rescue.Inviter, rescue.InviterID
	a.Rescue = &next
	return tx.PutAdmin(a)
}

// endRescue makes a rescue nobody: it has got what it was for.
func (c call) endRescue(tx *store.Tx) error {
	if c.rescue() == nil {
		return nil
	}
	a, err := tx.AdminByKey(c.key.KeyID())
	if err != nil {
		return errStranger
	}
	return forget(tx, a)
}

// forget makes an administrator or a rescue nobody: no key and no invite of theirs
// is known from now on.
func forget(tx *store.Tx, a store.Admin) error {
	a.Removed, a.InviteHash, a.InviteExpires = true, store.Hash{}, time.Time{}
	return tx.PutAdmin(a)
}

// endInvited ends the rescues that a removed administrator invited: otherwise they
// could be a way to come back.
func endInvited(tx *store.Tx, c call, inviter store.Admin) error {
	ended, err := rescuesThat(tx, func(r recovery.Rescue) bool { return r.InviterID == inviter.KeyID })
	if err != nil {
		return err
	}
	for _, a := range ended {
		if err := forget(tx, a); err != nil {
			return err
		}
		if err := denyRescue(tx, c, a, "who invited the rescue was removed"); err != nil {
			return err
		}
		if err := c.record(tx, store.Event{Action: "rescue.end", Volume: a.Rescue.Volume, Detail: a.Name + ": invited by " + inviter.Name + ", who is removed"}); err != nil {
			return err
		}
	}
	return nil
}

// rescuesThat are the rescues that are not over and fit.
func rescuesThat(tx *store.Tx, fit func(recovery.Rescue) bool) (found []store.Admin, err error) {
	for a, err := range tx.Admins() {
		if err != nil {
			return nil, err
		}
		if a.Rescue != nil && !a.Removed && fit(*a.Rescue) {
			found = append(found, a)
		}
	}
	return found, nil
}

// expireRescues writes down that rescue invites have expired, so that no clock that
// is set back revives one.
func (s *Server) expireRescues(now time.Time) error {
	over := func(r recovery.Rescue) bool { return r.Over(now) }
	var due []store.Admin
	err := s.store.View(func(tx *store.Tx) (err error) {
		due, err = rescuesThat(tx, over)
		return err
	})
	if err != nil || len(due) == 0 {
		return err
	}
	return s.store.Update(func(tx *store.Tx) error {
		due, err := rescuesThat(tx, over)
		if err != nil {
			return err
		}
		for _, a := range due {
			if err := forget(tx, a); err != nil {
				return err
			}
			if err := tx.Audit(store.Event{Time: now, Actor: "server", Action: "rescue.expire", Volume: a.Rescue.Volume, Detail: a.Name}); err != nil {
				return err
			}
		}
		return nil
	})
}

// denyRescue ends the last request of a rescue, if it is not over.
func denyRescue(tx *store.Tx, c call, a store.Admin, why string) error {
	if a.Rescue == nil || a.Rescue.Request == "" {
		return nil
	}
	rec, err := tx.Request(a.Rescue.Request)
	if err != nil {
		return err
	}
	denied, err := rec.Deny(c.actor, why, c.now)
	if errors.Is(err, recovery.ErrOver) || errors.Is(err, recovery.ErrExpired) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tx.PutRequest(denied); err != nil {
		return err
	}
	return c.record(tx, store.Event{Action: "recover.deny", Request: rec.ID, Volume: a.Rescue.Volume, Detail: denied.Note})
}
