package server

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

// clockSkew is how far the clocks of a requester and a server may differ.
const clockSkew = 10 * time.Minute

// request files what a requester signed. The server can neither make nor
// change one: the six words are of these bytes.
func (s *Server) request(c call) (any, error) {
	in, err := decode[api.Signed](c)
	if err != nil {
		return nil, err
	}
	r, err := recovery.ParseRequest(in.Signed)
	switch {
	case err != nil:
		return nil, err
	case c.admin == nil || r.RequesterID != c.admin.KeyID || r.Requester != c.requester():
		return nil, api.Errorf(api.CodeRefused, "refused: a request is filed by the one who signed it")
	case r.Created.After(c.now.Add(clockSkew)) || !r.Expires.After(c.now) || r.Expires.After(c.now.Add(recovery.MaxLifetime+clockSkew)):
		return nil, api.Errorf(api.CodeUsage, "the request's times do not fit this server's clock, %s: check the clocks", c.now.Format(time.RFC3339))
	}
	var out api.Request
	return &out, s.store.Update(func(tx *store.Tx) error {
		p, err := requestedPacket(tx, r)
		if err != nil {
			return err
		}
		if _, err := tx.Request(r.ID); err == nil {
			return api.Errorf(api.CodeConflict, "a request %s is there already", r.ID)
		}
		rec := recovery.Record{
			ID: r.ID, Signed: in.Signed, Requester: r.Requester, RequesterID: r.RequesterID,
			Threshold: p.Threshold, Expires: r.Expires, State: recovery.Open, Trustees: p.Trustees,
		}
		if rec.Here, err = enoughHere(tx, p); err != nil {
			return err
		}
		if err := c.fileRescue(tx, r, &rec); err != nil {
			return err
		}
		if out, err = describe(rec); err != nil {
			return err
		}
		if err := tx.PutRequest(rec); err != nil {
			return err
		}
		return c.record(tx, event(r, "recover.request", fmt.Sprintf("%s for %s: %s", r.Payload, r.Requester, r.Reason)))
	})
}

// enoughHere is how many approvals make this server hand out its part of a packet
// under a merged policy; 0: all that the packet needs.
func enoughHere(tx *store.Tx, p *escrow.Packet) (int, error) {
	own, err := ownPolicy(tx)
	if err != nil || p.PolicyDigest == own.Digest() || own.Accept(&p.Header) != nil {
		return 0, err
	}
	return own.Threshold, nil
}

// requestedPacket checks that a request is about a packet that is here, bit
// for bit.
func requestedPacket(tx *store.Tx, r *recovery.Request) (*escrow.Packet, error) {
	_, data, err := tx.Packet(r.PacketID)
	if errors.Is(err, escrow.ErrPurged) {
		return nil, err
	}
	if err != nil {
		return nil, api.Errorf(api.CodeNotFound, "packet %s is not here", r.PacketID)
	}
	p, err := escrow.Parse(data)
	if err != nil {
		return nil, err
	}
	sealed, err := p.Payload(r.Payload)
	if err != nil {
		return nil, api.Errorf(api.CodeNotFound, "%v", err)
	}
	if p.Digest != r.PacketDigest || p.HeaderDigest != r.HeaderDigest || sha256.Sum256(sealed.Message) != r.PayloadDigest || p.Volume.UUID != r.VolumeUUID || p.Machine != r.Machine {
		return nil, api.Errorf(api.CodeConflict, "the request is about other bytes than packet %s has here", r.PacketID)
	}
	return p, nil
}

func event(r *recovery.Request, action, detail string) store.Event {
	return store.Event{Action: action, Request: r.ID, Packet: r.PacketID, Volume: r.VolumeUUID, Detail: detail}
}

func describe(rec recovery.Record) (api.Request, error) {
	r, err := recovery.ParseRequest(rec.Signed)
	if err != nil {
		return api.Request{}, err
	}
	out := api.Request{
		ID: rec.ID, State: rec.State, Volume: r.VolumeUUID, Machine: r.Machine, Packet: r.PacketID, Payload: r.Payload,
		Requester: r.Requester, Reason: r.Reason, Created: r.Created, Expires: r.Expires, Approvers: []string{}, Approved: []string{},
		Threshold: rec.Threshold, DecidedBy: rec.DecidedBy, Decided: rec.Decided, Note: rec.Note,
	}
	for _, a := range rec.Approvals {
		out.Approvers, out.Approved = append(out.Approvers, a.Approver), append(out.Approved, a.Trustee)
	}
	if rec.State == recovery.Open {
		out.CanStill = slices.DeleteFunc(slices.Clone(rec.Trustees), func(t string) bool { return slices.Contains(out.Approved, t) })
	}
	return out, nil
}

func (s *Server) requests(c call) (any, error) {
	out := []api.Request{}
	err := s.store.View(func(tx *store.Tx) error {
		for rec, err := range tx.Requests() {
			if err != nil {
				return err
			}
			r, err := describe(rec.At(c.now))
			if err != nil {
				return err
			}
			out = append(out, r)
		}
		return nil
	})
	slices.SortFunc(out, func(a, b api.Request) int { return a.Created.Compare(b.Created) })
	return &out, err
}

func (s *Server) requestShow(c call) (any, error) {
	var out api.Request
	return &out, s.store.View(func(tx *store.Tx) error {
		rec, _, err := c.requested(tx)
		if err != nil {
			return err
		}
		out, err = describe(rec.At(c.now))
		return err
	})
}

// requested finds the request that a call names, and reads what its requester
// signed. To a rescue there is only its own.
func (c call) requested(tx *store.Tx) (rec recovery.Record, r *recovery.Request, err error) {
	rec, err = findRequest(tx, c.PathValue("id"))
	if c.rescue() != nil && (err != nil || rec.RequesterID != c.admin.KeyID) {
		err = errStranger
	}
	if err == nil {
		r, err = recovery.ParseRequest(rec.Signed)
	}
	return rec, r, err
}

// findRequest finds a request by its id or a prefix of it.
func findRequest(tx *store.Tx, word string) (recovery.Record, error) {
	if rec, err := tx.Request(word); err == nil {
		return rec, nil
	}
	var fits []recovery.Record
	for rec, err := range tx.Requests() {
		if err != nil {
			return rec, err
		}
		if isPrefix(word, rec.ID) {
			fits = append(fits, rec)
		}
	}
	switch len(fits) {
	case 0:
		return recovery.Record{}, api.Errorf(api.CodeNotFound, "no request %q is known here; `mandos-escrow recover --list` shows them", word)
	case 1:
		return fits[0], nil
	}
	ids := []string{}
	for _, f := range fits {
		ids = append(ids, f.ID)
	}
	return recovery.Record{}, api.Errorf(api.CodeAmbiguous, "%q could be several requests:\n  %s", word, strings.Join(ids, "\n  "))
}

// material gives an approver what a decision needs, and the sealed shares that
// the approver may be able to open. The payload stays here.
func (s *Server) material(c call) (any, error) {
	var out api.Material
	return &out, s.store.Update(func(tx *store.Tx) error {
		rec, r, err := c.requested(tx)
		if err != nil {
			return err
		}
		if c.admin == nil {
			return api.Errorf(api.CodeUsage, "an approval needs an administrator's own identity: use --home")
		}
		if err := rec.MayApprove(c.admin.Name, c.admin.KeyID, c.now); err != nil {
			return err
		}
		p, err := requestedPacket(tx, r)
		if err != nil {
			return err
		}
		sealed, err := p.Payload(r.Payload)
		if err != nil {
			return err
		}
		out = api.Material{Request: rec.Signed, Header: p.HeaderBytes, Set: sealed.Set, Shares: map[string][]byte{}}
		for i, trustee := range p.Trustees {
			out.Shares[trustee] = sealed.Shares[i]
		}
		private, err := store.MasterPrivate.Get(tx)
		if err != nil {
			return err
		}
		out.Trustee = string(private)
		return c.record(tx, event(r, "recover.view", "share and protected master key given to an approver"))
	})
}

func (s *Server) approve(c call) (any, error) {
	in, err := decode[api.Approve](c)
	if err != nil {
		return nil, err
	}
	var out api.Request
	return &out, s.store.Update(func(tx *store.Tx) error {
		rec, r, err := c.requested(tx)
		if err != nil {
			return err
		}
		a, err := recovery.ParseApproval(in.Approval, recovery.Digest(rec.Signed), in.Share)
		if err != nil {
			return err
		}
		if c.admin == nil || a.ApproverID != c.admin.KeyID || a.Approver != c.admin.Name {
			return api.Errorf(api.CodeRefused, "refused: an approval is sent by the one who signed it")
		}
		p, err := requestedPacket(tx, r)
		if err != nil {
			return err
		}
		if !slices.Contains(p.Trustees, a.Trustee) {
			return api.Errorf(api.CodeRefused, "refused: %s is no trustee of packet %s", a.Trustee, p.ID)
		}
		rec, err = rec.Approve(recovery.StoredApproval{
			Approver: a.Approver, ApproverID: a.ApproverID, Trustee: a.Trustee, Signed: in.Approval, Share: in.Share, Time: c.now,
		}, c.now)
		if err != nil {
			return err
		}
		if out, err = describe(rec); err != nil {
			return err
		}
		if err := tx.PutRequest(rec); err != nil {
			return err
		}
		return c.record(tx, event(r, "recover.approve", "share of "+a.Trustee))
	})
}

func (s *Server) deny(c call) (any, error) {
	in, err := decode[api.Deny](c)
	if err != nil {
		return nil, err
	}
	if len(in.Reason) > recovery.MaxReason {
		return nil, api.Errorf(api.CodeUsage, "the reason is longer than %d bytes", recovery.MaxReason)
	}
	if in.Reason != "" {
		if err := record.Printable(in.Reason); err != nil {
			return nil, api.Errorf(api.CodeUsage, "reason: %v", err)
		}
	}
	var out api.Request
	return &out, s.store.Update(func(tx *store.Tx) error {
		rec, r, err := c.requested(tx)
		if err != nil {
			return err
		}
		if c.admin != nil && rec.RequesterID != c.admin.KeyID && !c.admin.Role.Allows(store.Approver) {
			return api.Errorf(api.CodeRefused, "refused: %s has the role %s; to deny another's request needs the role %s", c.admin.Name, c.admin.Role, store.Approver)
		}
		if rec, err = rec.Deny(c.actor, in.Reason, c.now); err != nil {
			return err
		}
		if out, err = describe(rec); err != nil {
			return err
		}
		if err := tx.PutRequest(rec); err != nil {
			return err
		}
		return c.record(tx, event(r, "recover.deny", in.Reason))
	})
}

// release hands the packet and the re-sealed shares to the one who asked. The
// record that it was released, and that the payload is revealed, is on disk
// before the first byte goes out; the shares are gone from the store with it.
func (s *Server) release(c call) (any, error) {
	var out api.Release
	return &out, s.store.Update(func(tx *store.Tx) error {
		rec, r, err := c.requested(tx)
		if err != nil {
			return err
		}
		if c.admin == nil {
			return api.Errorf(api.CodeUsage, "a release goes to the requester's own identity: use --home")
		}
		over, approvals, err := rec.Release(c.admin.KeyID, c.now)
		if err != nil {
			return err
		}
		if _, err := requestedPacket(tx, r); err != nil {
			return err
		}
		entry, data, err := tx.Packet(r.PacketID)
		if err != nil {
			return err
		}
		out = api.Release{Request: rec.Signed, Packet: data}
		for _, a := range approvals {
			out.Approvals = append(out.Approvals, api.Approve{Approval: a.Signed, Share: a.Share})
		}
		if err := reveal(tx, entry, r.Payload, c.now); err != nil {
			return err
		}
		if err := tx.PutRequest(over); err != nil {
			return err
		}
		released := event(r, "recover.release", fmt.Sprintf("%s to %s, approved by %s: %s", r.Payload, r.Requester, approvedBy(rec), r.Reason))
		released.Machine = string(entry.KeyID)
		if err := c.record(tx, released); err != nil {
			return err
		}
		return c.endRescue(tx)
	})
}

// reveal records that a payload was released. A volume key is that of the volume's
// packets in use, too; but where it was known before, they say themselves what became
// of it since.
func reveal(tx *store.Tx, entry escrow.Entry, payload string, now time.Time) error {
	known := !entry.ReencryptSince.IsZero()
	entry = entry.Reveal(payload, now)
	if err := tx.PutEntry(entry); err != nil || known {
		return err
	}
	for other, err := range tx.EntriesOfVolume(entry.Volume.UUID) {
		if err != nil {
			return err
		}
		if other.State != escrow.Verified || other.Imported || !other.ReencryptSince.IsZero() {
			continue
		}
		other.ReencryptSince = entry.ReencryptSince
		if err := tx.PutEntry(other); err != nil {
			return err
		}
	}
	return nil
}

func approvedBy(rec recovery.Record) string {
	var names []string
	for _, a := range rec.Approvals {
		names = append(names, a.Approver)
	}
	return strings.Join(names, ", ")
}

// expireRequests closes the requests whose time is over, which deletes their
// re-sealed shares.
func (s *Server) expireRequests(now time.Time) error {
	var due []recovery.Record
	err := s.store.View(func(tx *store.Tx) error {
		for rec, err := range tx.Requests() {
			if err != nil {
				return err
			}
			if at := rec.At(now); at.State != rec.State {
				due = append(due, at)
			}
		}
		return nil
	})
	if err != nil || len(due) == 0 {
		return err
	}
	return s.store.Update(func(tx *store.Tx) error {
		for _, d := range due {
			rec, err := tx.Request(d.ID)
			if err != nil {
				return err
			}
			if rec = rec.At(now); rec.State != recovery.Expired {
				continue // it was decided meanwhile
			}
			if err := tx.PutRequest(rec); err != nil {
				return err
			}
			if err := tx.Audit(store.Event{Time: now, Actor: "server", Action: "recover.expire", Request: rec.ID}); err != nil {
				return err
			}
		}
		return nil
	})
}
