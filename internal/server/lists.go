package server

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// page is which part of a list is asked for: what follows after, limit items at
// most. With limit 0 it is all of it, as callers of before there were pages ask.
type page struct {
	after string
	limit int
}

func pageOf(c call) (page, error) {
	out := page{after: c.FormValue("after")}
	text := c.FormValue("limit")
	if text == "" {
		return page{}, nil
	}
	var err error
	if out.limit, err = strconv.Atoi(text); err != nil || out.limit < 1 || out.limit > api.MaxPage {
		return page{}, api.Errorf(api.CodeUsage, "limit %q: from 1 to %d", text, api.MaxPage)
	}
	return out, nil
}

// packetFilter is which packets are asked for; what is empty asks for nothing.
type packetFilter struct {
	page
	machine, volume, group string
	state                  escrow.PacketState
	unproved               bool
	within                 time.Duration
	now                    time.Time
	lives                  escrow.Lives
}

func packetFilterOf(c call) (packetFilter, error) {
	f := packetFilter{machine: c.FormValue("machine"), volume: c.FormValue("volume"), group: c.FormValue("group"), state: escrow.PacketState(c.FormValue("state")), now: c.now}
	var err error
	if f.page, err = pageOf(c); err != nil {
		return f, err
	}
	if f.state != "" && !slices.Contains(escrow.States, f.state) {
		return f, api.Errorf(api.CodeUsage, "state %q: one of %v", f.state, escrow.States)
	}
	if text := c.FormValue("unverified"); text != "" {
		if f.unproved, err = strconv.ParseBool(text); err != nil {
			return f, api.Errorf(api.CodeUsage, "unverified %q: true or false", text)
		}
	}
	if text := c.FormValue("since"); text != "" {
		within, err := unlock.ParseDuration(text)
		if err != nil || !f.unproved {
			return f, api.Errorf(api.CodeUsage, "since %q: an RFC 3339 duration, together with unverified", text)
		}
		f.within = time.Duration(within)
	}
	return f, nil
}

// fits compares what a brief has.
func (f packetFilter) fits(e escrow.Entry) bool {
	return e.ID > f.after && (f.group == "" || e.Group == f.group) &&
		(f.state == "" || e.Shown(f.lives.Of(e.Group), f.now) == f.state) &&
		(!f.unproved || e.Unproved(f.within, f.now))
}

func (f packetFilter) full(found []escrow.Entry) bool { return f.limit > 0 && len(found) >= f.limit }

func (s *Server) packets(c call) (any, error) {
	f, err := packetFilterOf(c)
	if err != nil {
		return nil, err
	}
	out := []api.Packet{}
	return &out, s.store.View(func(tx *store.Tx) (err error) {
		if f.lives, err = store.Lives.Get(tx); err != nil {
			return err
		}
		found, err := f.find(tx)
		for _, e := range found {
			out = append(out, shown(e, f.lives, f.now))
		}
		if f.limit == 0 {
			slices.SortFunc(out, func(a, b api.Packet) int {
				return cmp.Or(cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Volume.UUID, b.Volume.UUID), a.Stored.Compare(b.Stored), cmp.Compare(a.ID, b.ID))
			})
		}
		return err
	})
}

// find reads the packets that fit, in the order of their IDs: those that the
// words mean, or, without words, of all.
func (f packetFilter) find(tx *store.Tx) (found []escrow.Entry, err error) {
	if f.machine != "" || f.volume != "" {
		return f.meant(tx)
	}
	for brief, err := range tx.Briefs(f.after) {
		if err != nil {
			return nil, err
		}
		if !f.fits(brief) {
			continue
		}
		e, err := tx.Entry(brief.ID)
		if err != nil {
			return nil, err
		}
		if found = append(found, e); f.full(found) {
			break
		}
	}
	return found, nil
}

func (f packetFilter) meant(tx *store.Tx) (found []escrow.Entry, err error) {
	word, machine := f.machine, true
	if word == "" {
		word, machine = f.volume, false
	}
	entries, err := meant(tx, word, machine, !machine)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if f.fits(e) && (f.volume == "" || isPrefix(f.volume, e.Volume.UUID)) && !f.full(found) {
			found = append(found, e)
		}
	}
	return found, nil
}

// listed is a packet as lists show it.
func listed(tx *store.Tx, e escrow.Entry, now time.Time) (api.Packet, error) {
	lives, err := store.Lives.Get(tx)
	return shown(e, lives, now), err
}

func shown(e escrow.Entry, lives escrow.Lives, now time.Time) api.Packet {
	life := lives.Of(e.Group)
	out := api.Packet{Entry: e, Verified: !e.VerifiedAt.IsZero(), Held: e.Hold || life.Hold}
	out.State = e.Shown(life, now)
	if e.RotateDue(life, now) {
		out.Due = append(out.Due, api.DueRotate)
	}
	if e.State == escrow.Verified && !e.ReencryptSince.IsZero() {
		out.Due = append(out.Due, api.DueReencrypt)
	}
	return out
}
