package server

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"slices"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// notEnrolled is why a machine that registered gets nothing yet.
const notEnrolled = "not enrolled yet"

// enroll registers a machine: with a token, or again with the same keys. It
// can only add: a machine that is known under its boot key keeps its record.
func (s *Server) enroll(c call) (any, error) {
	in, err := decode[api.Enroll](c)
	if err != nil {
		return nil, err
	}
	if c.local || c.key == nil || c.admin != nil {
		return nil, api.Errorf(api.CodeUsage, "a machine enrolls over the network, with its own identity")
	}
	reg, err := api.ParseRegistration(in.Registration, c.key.KeyID())
	if err != nil {
		return nil, err
	}
	var out api.Enrolled
	return &out, s.store.Update(func(tx *store.Tx) error {
		token, err := tx.TokenBySecret(sha256.Sum256(in.Secret))
		if errors.Is(err, store.ErrNotFound) {
			return api.Errorf(api.CodeRefused, "refused: this server does not know the token; it was made by another server, or before this one was set up anew")
		}
		if err != nil {
			return err
		}
		used, err := token.Use(reg.Boot.KeyID(), c.now)
		if err != nil {
			return err
		}
		if err := tx.PutToken(used); err != nil {
			return err
		}
		if out.Policy, err = currentPolicy(tx); err != nil {
			return err
		}
		if out.Namesakes, err = namesakes(tx, reg); err != nil {
			return err
		}
		if out.Disabled, err = staysDisabled(tx, reg.Boot.KeyID()); err != nil {
			return err
		}
		return s.register(tx, c, reg, used)
	})
}

// staysDisabled is why a machine is disabled that no enrolment enables; empty: it
// is new, or enabled, or becomes so.
func staysDisabled(tx *store.Tx, id identity.KeyID) (string, error) {
	m, err := tx.Machine(id)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	if err != nil || m.Enabled || m.DisabledBecause == notEnrolled {
		return "", err
	}
	return cmp.Or(m.DisabledBecause, "disabled"), nil
}

// namesakes counts the other machines that have a machine's name: it is a
// label, and may stand twice, but people should know.
func namesakes(tx *store.Tx, reg *api.Registration) (n int, err error) {
	ids, err := tx.MachinesNamed(reg.Name)
	return len(slices.DeleteFunc(ids, func(id identity.KeyID) bool { return id == reg.Boot.KeyID() })), err
}

func (s *Server) register(tx *store.Tx, c call, reg *api.Registration, token store.Token) error {
	if err := checkName("the machine's name", reg.Name); err != nil {
		return err
	}
	known, err := tx.Machine(reg.Boot.KeyID())
	switch {
	case err == nil && known.RunningKeyID != c.key.KeyID():
		return api.Errorf(api.CodeRefused, "refused: this boot identity belongs to a machine with another running identity")
	case err == nil && known.MachineIDHash != reg.MachineIDHash:
		return api.Errorf(api.CodeRefused, "refused: this identity enrolled with another machine-id; on a copy of a machine, remove /etc/mandos-escrow and /var/lib/mandos-escrow-agent, then enroll it as one of its own")
	case err == nil:
		return c.record(tx, store.Event{Action: "machine.enroll", Machine: string(known.KeyID), Detail: "again"})
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	if _, err := tx.MachineByRunning(c.key.KeyID()); err == nil {
		return api.Errorf(api.CodeRefused, "refused: this running identity belongs to another machine; after an unenroll that was interrupted, finish it with `mandos-escrow unenroll`")
	}
	if err := notImported(tx, reg.Boot.KeyID()); err != nil {
		return err
	}
	m := unlock.Machine{
		KeyID: reg.Boot.KeyID(), RunningKeyID: c.key.KeyID(), RunningKey: c.key, Name: reg.Name, Host: reg.Name,
		MachineIDHash: reg.MachineIDHash, Group: token.Group, Hold: token.Hold, TokenID: token.ID,
		Settings: unlock.Defaults(), Created: c.now, DisabledBecause: notEnrolled,
	}
	if err := tx.PutMachine(m); err != nil {
		return err
	}
	return c.record(tx, store.Event{Action: "machine.enroll", Machine: string(m.KeyID), Detail: m.Name + " with token " + token.ID})
}

// self tells a machine what is held of its volumes, so that an interrupted
// enrolment finds its way.
func (s *Server) self(c call) (any, error) {
	out := []api.MachineVolume{}
	return &out, s.store.View(func(tx *store.Tx) error {
		entries, err := oldestFirst(tx, c.machine.KeyID)
		if err != nil {
			return err
		}
		lives, err := store.Lives.Get(tx)
		if err != nil {
			return err
		}
		for _, e := range entries {
			i := slices.IndexFunc(out, func(v api.MachineVolume) bool { return v.UUID == e.Volume.UUID })
			if i < 0 {
				i = len(out)
				out = append(out, api.MachineVolume{UUID: e.Volume.UUID, Boot: slices.Contains(c.machine.Volumes, e.Volume.UUID)})
			}
			switch v := &out[i]; e.State {
			case escrow.Verified:
				v.PacketID, v.Digest = e.ID, e.Digest
				_, v.Revealed = e.RevealedAt[escrow.ForPassphrase]
				v.Expired = e.IsExpired(lives.Of(e.Group), c.now)
				v.Reencrypt = !e.ReencryptSince.IsZero()
			case escrow.Pending:
				v.Pending = e.ID
			}
		}
		for i := range out {
			lookAt(tx, c.machine.KeyID, &out[i])
		}
		return nil
	})
}

// lookAt reads what entries only say: the packet's bytes, and the blob. A machine
// asks in order to know that they are still there.
func lookAt(tx *store.Tx, id identity.KeyID, v *api.MachineVolume) {
	if v.PacketID != "" {
		if _, _, err := tx.Packet(v.PacketID); err != nil {
			v.Digest, v.Damaged = "", true
		}
	}
	if v.Boot {
		_, err := tx.Blob(id, v.UUID)
		v.Blob = err == nil
	}
}

// oldestFirst returns what is held of a machine's packets, as they came.
func oldestFirst(tx *store.Tx, id identity.KeyID) ([]escrow.Entry, error) {
	var all []escrow.Entry
	for e, err := range tx.EntriesOf(id) {
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b escrow.Entry) int { return a.Stored.Compare(b.Stored) })
	return all, nil
}

// upload keeps a packet and a blob until commit makes them count.
func (s *Server) upload(c call) (any, error) {
	if err := s.uploads.check(c.machine.KeyID, c.now); err != nil {
		return nil, err
	}
	in, err := decode[api.Upload](c)
	if err != nil {
		return nil, err
	}
	packet, err := escrow.Parse(in.Packet)
	if err != nil {
		return nil, err
	}
	if len(in.Blob) > unlock.MaxBlob { // what the boot protocol could not carry
		return nil, api.Errorf(api.CodeLimit, "the sealed blob is longer than %d bytes", unlock.MaxBlob)
	}
	if len(in.Boot.Servers) > 0 {
		if err := in.Boot.Check(s.key.KeyID()); err != nil {
			return nil, api.Errorf(api.CodeUsage, "%v", err)
		}
	}
	uuid := c.PathValue("uuid")
	if err := matches(packet.Header, *c.machine, uuid); err != nil {
		return nil, err
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		entry := escrow.NewEntry(packet, c.now)
		entry.Group, entry.Hold = c.machine.Group, c.machine.Hold
		own, err := ownPolicy(tx)
		if err != nil {
			return err
		}
		if err := own.Accept(&packet.Header); err != nil {
			return api.Errorf(api.CodeRefused, "refused: the packet is sealed under another policy than this server's, and not under one that holds all its trustees: the token is of an earlier policy or of another server: use a new token")
		}
		old, err := tx.Entry(entry.ID)
		if err == nil && (old.Digest != entry.Digest || old.KeyID != entry.KeyID) {
			return api.Errorf(api.CodeConflict, "another packet has the id %s already", entry.ID)
		}
		if err != nil || old.State == escrow.Purged {
			// what was deleted and comes again has the same secrets
			entry.RevealedAt, entry.ExpiredAt, entry.ReencryptSince = old.RevealedAt, old.ExpiredAt, old.ReencryptSince
			if err := storePacket(tx, entry, in.Packet); err != nil {
				return err
			}
		}
		if err := dropPending(tx, entry); err != nil {
			return err
		}
		if in.Blob != nil {
			if err := putBlob(tx, c.machine.KeyID, uuid, in); err != nil {
				return err
			}
		}
		return c.record(tx, store.Event{Action: "packet.store", Machine: string(c.machine.KeyID), Packet: entry.ID, Volume: uuid})
	})
}

// putBlob keeps a blob, and which other servers hold one.
func putBlob(tx *store.Tx, id identity.KeyID, uuid string, in api.Upload) error {
	m, err := tx.Machine(id)
	if err != nil {
		return err
	}
	if m.Boots = in.Boot; len(in.Boot.Servers) == 0 {
		m.Boots = unlock.Holders{}
	}
	return errors.Join(tx.PutMachine(m), tx.PutPendingBlob(id, uuid, in.Blob))
}

func storePacket(tx *store.Tx, entry escrow.Entry, data []byte) error {
	count, err := tx.CountPackets(entry.KeyID)
	if err != nil {
		return err
	}
	if err := escrow.CheckLimits(count, entry.Size); err != nil {
		return err
	}
	return tx.PutPacket(entry, data)
}

// dropPending marks what an interrupted enrolment left. There is one pending
// blob of a volume, so only the newest packet may be committed: the blob of
// another, as a copy of the machine may upload it, opens another keyslot.
func dropPending(tx *store.Tx, newest escrow.Entry) error {
	for old, err := range tx.EntriesOf(newest.KeyID) {
		if err != nil {
			return err
		}
		if old.State != escrow.Pending || old.Volume.UUID != newest.Volume.UUID || old.ID == newest.ID {
			continue
		}
		if err := tx.PutEntry(old.MarkObsolete(newest.Stored)); err != nil {
			return err
		}
	}
	return nil
}

// matches compares what a packet says with whom the connection belongs to.
func matches(h escrow.Header, m unlock.Machine, uuid string) error {
	switch {
	case h.KeyID != m.KeyID || h.RunningKeyID != m.RunningKeyID:
		return api.Errorf(api.CodeRefused, "refused: the packet is another machine's")
	case h.MachineIDHash != m.MachineIDHash:
		return api.Errorf(api.CodeRefused, "refused: the packet has another machine-id than the one that enrolled")
	case h.Volume.UUID != uuid:
		return api.Errorf(api.CodeUsage, "the packet is about volume %s, not %s", h.Volume.UUID, uuid)
	}
	return nil
}

// commit makes an uploaded packet and blob count: the machine has proved that
// both passphrases open the volume. The packet that it names as superseded
// becomes obsolete. A machine is enabled by its first commit and by none after,
// so that enrolling again never revives one that was disabled.
func (s *Server) commit(c call) (any, error) {
	in, err := decode[api.Commit](c)
	if err != nil {
		return nil, err
	}
	uuid := c.PathValue("uuid")
	return nil, s.store.Update(func(tx *store.Tx) error {
		entry, err := tx.Entry(in.Packet)
		if err != nil || entry.KeyID != c.machine.KeyID || entry.Volume.UUID != uuid {
			return api.Errorf(api.CodeNotFound, "no packet %s of this machine and volume was uploaded", in.Packet)
		}
		m, err := tx.Machine(c.machine.KeyID)
		if err != nil {
			return err
		}
		switch boots := slices.Contains(m.Volumes, uuid); {
		case entry.State == escrow.Pending:
			if m, err = s.verify(tx, c, m, entry, in); err != nil {
				return err
			}
		case entry.State == escrow.Purged:
			return entry.Gone()
		case entry.State == escrow.Obsolete:
			return api.Errorf(api.CodeConflict, "packet %s was replaced by a newer one: run `mandos-escrow enroll` again", entry.ID)
		case boots != in.Boot:
			return api.Errorf(api.CodeConflict, "the sealed blob that came with packet %s is not here any more", entry.ID)
		case m.DisabledBecause != notEnrolled && m.Unenrolled.IsZero():
			return nil // it was committed before
		}
		if m.DisabledBecause == notEnrolled {
			m = m.Enable(c.now)
		}
		m.Unenrolled = time.Time{}
		if err := tx.PutMachine(m); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "packet.verify", Machine: string(m.KeyID), Packet: entry.ID, Volume: uuid})
	})
}

// verify makes a pending packet, and the blob that came with it, those that
// count.
func (s *Server) verify(tx *store.Tx, c call, m unlock.Machine, entry escrow.Entry, in api.Commit) (unlock.Machine, error) {
	entry, err := entry.Verify(c.now)
	if err != nil {
		return m, err
	}
	if entry, err = s.supersede(tx, c, entry, in.NewVolumeKey); err != nil {
		return m, err
	}
	if err := tx.PutEntry(entry); err != nil {
		return m, err
	}
	return activate(tx, m, entry.Volume.UUID, in.Boot)
}

// activate makes the uploaded blob the one that is released, or takes the
// blob away from a volume that is escrowed only from now on.
func activate(tx *store.Tx, m unlock.Machine, uuid string, boot bool) (unlock.Machine, error) {
	has := slices.Contains(m.Volumes, uuid)
	if !boot { // a blob may be pending although none is active
		m.Volumes = slices.DeleteFunc(slices.Clone(m.Volumes), func(v string) bool { return v == uuid })
		return m, tx.DeleteBlob(m.KeyID, uuid)
	}
	if !has && len(m.Volumes) >= unlock.MaxBlobs {
		return m, api.Errorf(api.CodeLimit, "the machine boots from %d volumes, which is the most that one boot can be given; enroll this one with --no-boot", len(m.Volumes))
	}
	if !has {
		m.Volumes = append(slices.Clone(m.Volumes), uuid)
	}
	return m, tx.ActivateBlob(m.KeyID, uuid)
}

// supersede marks the packet that the new one names, and returns the new one
// with what it takes over. When a verified packet of the volume is there that it
// does not name, this machine's or another's, then somebody enrolled a copy:
// both are held, and an alarm stands in the log. An import is no sign of that,
// and stays what it is.
func (s *Server) supersede(tx *store.Tx, c call, entry escrow.Entry, newKey bool) (escrow.Entry, error) {
	var all, others []escrow.Entry
	for old, err := range tx.EntriesOfVolume(entry.Volume.UUID) {
		if err != nil {
			return entry, err
		}
		all = append(all, old)
		if old.ID != entry.ID && old.State == escrow.Verified && !old.Imported {
			others = append(others, old)
		}
	}
	if !newKey {
		entry = entry.Inherit(all...)
	}
	for _, old := range others {
		next, err := old.Replace(entry, c.now)
		if err != nil {
			if next, err = s.beside(tx, c, old, entry); err != nil {
				return entry, err
			}
			entry.Hold = entry.Hold || next.State == escrow.Verified
		}
		if err := tx.PutEntry(next); err != nil {
			return entry, err
		}
	}
	return entry, nil
}

// beside is what becomes of a verified packet that the new one of its volume
// does not name. Where its machine took itself back it is obsolete, and held:
// nobody else said that it is done with.
func (s *Server) beside(tx *store.Tx, c call, old, entry escrow.Entry) (escrow.Entry, error) {
	left, err := unenrolled(tx, old)
	if err != nil {
		return old, err
	}
	event := store.Event{Action: "alarm.fork", Machine: string(entry.KeyID), Packet: entry.ID, Volume: entry.Volume.UUID, Detail: "beside " + old.ID}
	if left && old.KeyID != entry.KeyID {
		old = old.MarkObsolete(c.now)
		event.Action, event.Packet, event.Detail = "packet.obsolete", old.ID, "its machine was unenrolled; beside "+entry.ID
	} else {
		s.log.Error("alarm: two packets of one volume, and neither replaces the other", "volume", entry.Volume.UUID, "packets", []string{old.ID, entry.ID})
	}
	old.Hold = true
	return old, c.record(tx, event)
}
