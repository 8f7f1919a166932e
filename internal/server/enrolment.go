package server

import (
	"crypto/sha256"
	"errors"
	"slices"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// maxBlob bounds a sealed blob.
const maxBlob = 16 << 10

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
	var out api.Policy
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
		if out, err = currentPolicy(tx); err != nil {
			return err
		}
		return s.register(tx, c, reg, used)
	})
}

func (s *Server) register(tx *store.Tx, c call, reg *api.Registration, token store.Token) error {
	known, err := tx.Machine(reg.Boot.KeyID())
	switch {
	case err == nil && known.RunningKeyID != c.key.KeyID():
		return api.Errorf(api.CodeRefused, "refused: this boot identity belongs to a machine with another running identity")
	case err == nil:
		return c.record(tx, store.Event{Action: "machine.enroll", Machine: string(known.KeyID), Detail: "again"})
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	if _, err := tx.MachineByRunning(c.key.KeyID()); err == nil {
		return api.Errorf(api.CodeRefused, "refused: this running identity belongs to another machine")
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
		volumes := map[string]*api.MachineVolume{}
		for e, err := range tx.EntriesOf(c.machine.KeyID) {
			if err != nil {
				return err
			}
			v := volumes[e.Volume.UUID]
			if v == nil {
				v = &api.MachineVolume{UUID: e.Volume.UUID, Boot: slices.Contains(c.machine.Volumes, e.Volume.UUID)}
				volumes[e.Volume.UUID] = v
			}
			switch e.State {
			case escrow.Verified:
				v.PacketID, v.Digest = e.ID, e.Digest
			case escrow.Pending:
				v.Pending = e.ID
			}
		}
		for _, v := range volumes {
			out = append(out, *v)
		}
		return nil
	})
}

// upload keeps a packet and a blob until commit makes them count.
func (s *Server) upload(c call) (any, error) {
	in, err := decode[api.Upload](c)
	if err != nil {
		return nil, err
	}
	packet, err := escrow.Parse(in.Packet)
	if err != nil {
		return nil, err
	}
	if len(in.Blob) > maxBlob {
		return nil, api.Errorf(api.CodeLimit, "the sealed blob is longer than %d bytes", maxBlob)
	}
	uuid := c.PathValue("uuid")
	if err := matches(packet.Header, *c.machine, uuid); err != nil {
		return nil, err
	}
	return nil, s.store.Update(func(tx *store.Tx) error {
		entry := escrow.NewEntry(packet, c.now)
		entry.Group, entry.Hold = c.machine.Group, c.machine.Hold
		want, err := policyDigest(tx)
		if err != nil {
			return err
		}
		if packet.PolicyDigest != want {
			return api.Errorf(api.CodeRefused, "refused: the packet is sealed under another policy than this server's; the token is of an earlier policy or of another server: use a new token")
		}
		if old, err := tx.Entry(entry.ID); err == nil {
			if old.Digest != entry.Digest || old.KeyID != entry.KeyID {
				return api.Errorf(api.CodeConflict, "another packet has the id %s already", entry.ID)
			}
		} else if err := storePacket(tx, entry, in.Packet); err != nil {
			return err
		}
		if in.Blob != nil {
			if err := tx.PutPendingBlob(c.machine.KeyID, uuid, in.Blob); err != nil {
				return err
			}
		}
		return c.record(tx, store.Event{Action: "packet.store", Machine: string(c.machine.KeyID), Packet: entry.ID, Volume: uuid})
	})
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
		if entry.State == escrow.Pending {
			if entry, err = entry.Verify(c.now); err != nil {
				return err
			}
			if err := tx.PutEntry(entry); err != nil {
				return err
			}
			if err := s.supersede(tx, c, entry); err != nil {
				return err
			}
			if m, err = activate(tx, m, uuid, in.Boot); err != nil {
				return err
			}
		}
		if m.DisabledBecause == notEnrolled {
			m = m.Enable(c.now)
		}
		if err := tx.PutMachine(m); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "packet.verify", Machine: string(m.KeyID), Packet: entry.ID, Volume: uuid})
	})
}

// activate makes the uploaded blob the one that is released, or takes the
// blob away from a volume that is escrowed only from now on.
func activate(tx *store.Tx, m unlock.Machine, uuid string, boot bool) (unlock.Machine, error) {
	has := slices.Contains(m.Volumes, uuid)
	if !boot {
		if has {
			m.Volumes = slices.DeleteFunc(slices.Clone(m.Volumes), func(v string) bool { return v == uuid })
			return m, tx.DeleteBlob(m.KeyID, uuid)
		}
		return m, nil
	}
	if !has {
		m.Volumes = append(slices.Clone(m.Volumes), uuid)
	}
	return m, tx.ActivateBlob(m.KeyID, uuid)
}

// supersede marks the packet that the new one names. When a verified packet of
// the volume is there that it does not name, somebody else enrolled as this
// machine: both are held, and an alarm stands in the log.
func (s *Server) supersede(tx *store.Tx, c call, entry escrow.Entry) error {
	for old, err := range tx.EntriesOf(entry.KeyID) {
		if err != nil {
			return err
		}
		if old.ID == entry.ID || old.Volume.UUID != entry.Volume.UUID || old.State != escrow.Verified {
			continue
		}
		next, err := old.Replace(entry, c.now)
		if err != nil {
			s.log.Error("alarm: two packets of one volume, and neither replaces the other", "volume", entry.Volume.UUID, "packets", []string{old.ID, entry.ID})
			if err := c.record(tx, store.Event{Action: "alarm.fork", Machine: string(entry.KeyID), Packet: entry.ID, Volume: entry.Volume.UUID, Detail: "beside " + old.ID}); err != nil {
				return err
			}
			next = old
			next.Hold = true
		}
		if err := tx.PutEntry(next); err != nil {
			return err
		}
	}
	return nil
}
