package server

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// lifeBatch is how many packets one transaction changes at most, so that a large
// group does not keep booting machines waiting.
const lifeBatch = 500

// lives tells how long packets live and are kept, by group.
func (s *Server) lives(call) (any, error) {
	out := []api.Life{}
	return &out, s.store.View(func(tx *store.Tx) error {
		lives, err := store.Lives.Get(tx)
		for group, life := range lives {
			out = append(out, api.Life{Group: group, Lifetime: unlock.Duration(life.Lifetime), Retention: unlock.Duration(life.Retention), Hold: life.Hold})
		}
		slices.SortFunc(out, func(a, b api.Life) int { return strings.Compare(a.Group, b.Group) })
		return err
	})
}

// setLife changes what is said of it; without the group's own settings it starts
// from those that held so far.
func (s *Server) setLife(c call) (any, error) {
	in, err := decode[api.SetLife](c)
	if err != nil {
		return nil, err
	}
	if in.Group != "" {
		if err := checkName("group", in.Group); err != nil {
			return nil, err
		}
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		lives, err := store.Lives.Get(tx)
		if err != nil {
			return err
		}
		life := lives.Of(in.Group)
		if in.Lifetime != nil {
			life.Lifetime = time.Duration(*in.Lifetime)
		}
		if in.Retention != nil {
			life.Retention = time.Duration(*in.Retention)
		}
		if in.Hold != nil {
			life.Hold = *in.Hold
		}
		if err := life.Check(); err != nil {
			return api.Errorf(api.CodeUsage, "%v", err)
		}
		if lives == nil {
			lives = escrow.Lives{}
		}
		if _, known := lives[in.Group]; !known && len(lives) >= maxLives {
			return api.Errorf(api.CodeLimit, "%d groups have settings of their own, which is the most", maxLives)
		}
		detail := fmt.Sprintf("lifetime %s, retention %s, hold %t, of group %q", unlock.Duration(life.Lifetime), unlock.Duration(life.Retention), life.Hold, in.Group)
		if lives[in.Group] = life; in.Inherit {
			delete(lives, in.Group)
			detail = fmt.Sprintf("as other groups, of group %q", in.Group)
		}
		return errors.Join(store.Lives.Put(tx, lives), c.record(tx, store.Event{Action: "policy.set", Detail: detail}))
	})
}

// maxLives bounds the settings: they are one value of the store.
const maxLives = 1000

// packetExpire says that others may know the secrets of packets in use: of one,
// of a machine's or of a group's. Their machines replace them at their next
// contact.
func (s *Server) packetExpire(c call) (any, error) {
	in, err := decode[api.Expire](c)
	if err != nil {
		return nil, err
	}
	ids, err := s.toExpire(in)
	if err != nil {
		return nil, err
	}
	out := api.Expired{}
	for batch := range slices.Chunk(ids, lifeBatch) {
		done := 0
		err := s.store.Update(func(tx *store.Tx) error {
			done = 0
			for _, id := range batch {
				e, err := tx.Entry(id)
				if err != nil {
					return err
				}
				if e, err = e.Expire(c.now); errors.Is(err, escrow.ErrState) && in.Packet == "" {
					continue // it was replaced meanwhile
				} else if err != nil {
					return err
				}
				if err := tx.PutEntry(e); err != nil {
					return err
				}
				if err := c.record(tx, store.Event{Action: "packet.expire", Packet: e.ID, Machine: string(e.KeyID), Volume: e.Volume.UUID}); err != nil {
					return err
				}
				done++
			}
			return c.authorize(tx)
		})
		if err != nil {
			return nil, err
		}
		out.Packets += done
	}
	return &out, nil
}

// toExpire are the packets that a call means; none is an error.
func (s *Server) toExpire(in api.Expire) (ids []string, err error) {
	given := 0
	for _, word := range []string{in.Packet, in.Machine, in.Group} {
		if word != "" {
			given++
		}
	}
	if given != 1 {
		return nil, api.Errorf(api.CodeUsage, "name a packet, a machine or a group: one of them")
	}
	inUse := func(e escrow.Entry) bool { return e.State == escrow.Verified || e.State == escrow.Pending }
	return ids, s.store.View(func(tx *store.Tx) error {
		switch {
		case in.Packet != "":
			e, err := findPacket(tx, in.Packet)
			ids = []string{e.ID}
			return err
		case in.Machine != "":
			entries, err := meant(tx, in.Machine, true, false)
			if err != nil {
				return err
			}
			if err := oneMachine(in.Machine, entries); err != nil {
				return err
			}
			for _, e := range entries {
				if inUse(e) {
					ids = append(ids, e.ID)
				}
			}
		default:
			for e, err := range tx.Briefs("") {
				if err != nil {
					return err
				}
				if e.Group == in.Group && inUse(e) {
					ids = append(ids, e.ID)
				}
			}
		}
		if len(ids) == 0 {
			return api.Errorf(api.CodeNotFound, "no packet in use is of %q; `mandos-escrow packet list` shows them", in.Machine+in.Group)
		}
		return nil
	})
}

// oneMachine refuses a word that means the packets of several machines.
func oneMachine(word string, entries []escrow.Entry) error {
	found := map[string]escrow.Entry{}
	for _, e := range entries {
		if string(e.KeyID) == word { // whatever others call themselves
			return nil
		}
		found[string(e.KeyID)] = e
	}
	_, err := only("machine", word, found)
	return err
}

// packetReencrypted takes an administrator's word that the volume has another
// key since.
func (s *Server) packetReencrypted(c call) (any, error) {
	return s.changePacket(c, "packet.reencrypted", func(_ *store.Tx, e escrow.Entry) (escrow.Entry, error) {
		e.ReencryptSince = time.Time{}
		return e, nil
	})
}

// packetDelete removes the bytes of one packet, which is named twice, whole.
func (s *Server) packetDelete(c call) (any, error) {
	in, err := decode[api.Delete](c)
	if err != nil {
		return nil, err
	}
	if in.ID != c.PathValue("id") {
		return nil, api.Errorf(api.CodeUsage, "a packet is deleted by its whole id, given twice")
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		e, err := tx.Entry(in.ID)
		if err != nil {
			return err
		}
		removed, err := remove(tx, e, in.Newest, c.now)
		if err != nil {
			return err
		}
		if err := tx.PurgePacket(removed); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "packet.delete", Packet: e.ID, Machine: string(e.KeyID), Volume: e.Volume.UUID, Detail: fmt.Sprintf("it was %s, newest named %t", e.State, in.Newest)})
	})
}

// remove is what becomes of a packet whose bytes are to go.
func remove(tx *store.Tx, e escrow.Entry, newest bool, now time.Time) (escrow.Entry, error) {
	lives, err := store.Lives.Get(tx)
	if err != nil {
		return e, err
	}
	var ofVolume []escrow.Entry
	for other, err := range tx.EntriesOfVolume(e.Volume.UUID) {
		if err != nil {
			return e, err
		}
		ofVolume = append(ofVolume, other)
	}
	return e.Remove(lives.Of(e.Group), ofVolume, newest, now)
}

// purge removes the bytes of obsolete packets whose retention has passed. A
// server that was set back purges nothing until somebody confirmed it.
func (s *Server) purge(now time.Time) error {
	if s.unconfirmed() != "" {
		return nil
	}
	due, err := s.toPurge(now)
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(due, lifeBatch) {
		if err := s.store.Update(func(tx *store.Tx) error { return purgeAll(tx, batch, now) }); err != nil {
			return err
		}
	}
	return nil
}

// purgeAll looks again, in the transaction that removes, whether it may: somebody
// may have asked for a packet meanwhile, or held it, or found the server set back.
func purgeAll(tx *store.Tx, ids []string, now time.Time) error {
	if why, err := store.Unconfirmed.Get(tx); err != nil || why != "" {
		return err
	}
	asked, err := askedFor(tx, now)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if asked[id] {
			continue
		}
		if err := purgeOne(tx, id, now); err != nil {
			return err
		}
	}
	return nil
}

// toPurge are the packets that are due, less those that somebody asks for.
func (s *Server) toPurge(now time.Time) (due []string, err error) {
	return due, s.store.View(func(tx *store.Tx) error {
		lives, err := store.Lives.Get(tx)
		if err != nil || !lives.Purges() {
			return err
		}
		asked, err := askedFor(tx, now)
		if err != nil {
			return err
		}
		for brief, err := range tx.Briefs("") {
			if err != nil {
				return err
			}
			if !brief.PurgeDue(lives.Of(brief.Group), now) || asked[brief.ID] {
				continue
			}
			e, err := tx.Entry(brief.ID)
			if err != nil {
				return err
			}
			if _, err := remove(tx, e, false, now); err == nil {
				due = append(due, e.ID)
			}
		}
		return nil
	})
}

// askedFor are the packets of requests that are not over.
func askedFor(tx *store.Tx, now time.Time) (map[string]bool, error) {
	asked := map[string]bool{}
	for rec, err := range tx.Requests() {
		if err != nil {
			return nil, err
		}
		if rec = rec.At(now); rec.State != recovery.Open && rec.State != recovery.Approved {
			continue
		}
		r, err := recovery.ParseRequest(rec.Signed)
		if err != nil {
			return nil, err
		}
		asked[r.PacketID] = true
	}
	return asked, nil
}

// purgeOne removes a packet's bytes, unless it is not due any more.
func purgeOne(tx *store.Tx, id string, now time.Time) error {
	e, err := tx.Entry(id)
	if err != nil {
		return err
	}
	lives, err := store.Lives.Get(tx)
	if err != nil {
		return err
	}
	if !e.PurgeDue(lives.Of(e.Group), now) {
		return nil
	}
	removed, err := remove(tx, e, false, now)
	if errors.Is(err, escrow.ErrHeld) || errors.Is(err, escrow.ErrNewest) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tx.PurgePacket(removed); err != nil {
		return err
	}
	return tx.Audit(store.Event{
		Time: now, Actor: "server", Action: "packet.purge", Packet: e.ID, Machine: string(e.KeyID), Volume: e.Volume.UUID,
		Detail: "obsolete since " + e.ObsoleteAt.Format(time.RFC3339),
	})
}
