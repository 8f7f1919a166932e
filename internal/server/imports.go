package server

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
)

// packetImport keeps a packet that no machine uploaded: an administrator carried
// it here, or sealed it anew from what another system had. It takes no other
// packet's place, and raises no alarm. The same packet again is the same import.
func (s *Server) packetImport(c call) (any, error) {
	in, err := decode[api.Import](c)
	if err != nil {
		return nil, err
	}
	packet, err := escrow.Parse(in.Packet)
	if err != nil {
		return nil, err
	}
	if packet.KeyID != packet.RunningKeyID {
		return nil, api.Errorf(api.CodeRefused, "refused: packet %s is that of machine %q, which uploads it itself: `mandos-escrow enroll` there", packet.ID, packet.Machine)
	}
	var out api.Packet
	return &out, s.store.Update(func(tx *store.Tx) error {
		entry, err := importEntry(tx, c, packet, in)
		if err != nil {
			return err
		}
		if out, err = listed(tx, entry, c.now); err != nil {
			return err
		}
		detail := fmt.Sprintf("of machine %q, %s", entry.Machine, provedText(in.Proved))
		return c.record(tx, store.Event{Action: "packet.import", Packet: entry.ID, Volume: entry.Volume.UUID, Detail: detail})
	})
}

// provedText says whose word it is, in the audit log for ever.
func provedText(proved bool) string {
	if proved {
		return "proved on the volume, as the administrator says"
	}
	return "not proved"
}

func importEntry(tx *store.Tx, c call, packet *escrow.Packet, in api.Import) (escrow.Entry, error) {
	own, err := ownPolicy(tx)
	if err != nil {
		return escrow.Entry{}, err
	}
	if err := own.Accept(&packet.Header); err != nil {
		return escrow.Entry{}, api.Errorf(api.CodeRefused, "refused: the packet is sealed under another policy than this server's, and not under one that holds all its trustees")
	}
	if _, err := tx.Machine(packet.KeyID); err == nil {
		return escrow.Entry{}, api.Errorf(api.CodeRefused, "refused: packet %s is signed with the identity of an enrolled machine", packet.ID)
	} else if !errors.Is(err, store.ErrNotFound) {
		return escrow.Entry{}, err
	}
	entry := escrow.NewEntry(packet, c.now)
	entry.Imported = true
	old, err := tx.Entry(entry.ID)
	switch {
	case err == nil && (old.Digest != entry.Digest || !old.Imported):
		err = api.Errorf(api.CodeConflict, "another packet has the id %s already", entry.ID)
	case errors.Is(err, store.ErrNotFound), err == nil && old.State == escrow.Purged:
		err = storeImport(tx, entry, in.Packet)
	default:
		entry = old
	}
	if err != nil || !in.Proved || entry.State != escrow.Pending {
		return entry, err
	}
	if entry, err = entry.Verify(c.now); err != nil {
		return entry, err
	}
	return entry, tx.PutEntry(entry)
}

// storeImport bounds the imports of one volume as it does the packets of one
// machine, because each of them has an identity of its own.
func storeImport(tx *store.Tx, entry escrow.Entry, data []byte) error {
	count := 0
	for old, err := range tx.EntriesOfVolume(entry.Volume.UUID) {
		if err != nil {
			return err
		}
		if old.Imported && old.State != escrow.Purged {
			count++
		}
	}
	if err := escrow.CheckLimits(count, entry.Size); err != nil {
		return fmt.Errorf("imports of volume %s: %w", entry.Volume.UUID, err)
	}
	return tx.PutPacket(entry, data)
}

// notImported refuses a machine whose key made a packet that somebody imported: it
// would be the machine's own, to prove and to replace.
func notImported(tx *store.Tx, id identity.KeyID) error {
	for e, err := range tx.EntriesOf(id) {
		if err != nil {
			return err
		}
		if e.Imported {
			return api.Errorf(api.CodeRefused, "refused: this identity signed packet %s, which an administrator imported", e.ID)
		}
	}
	return nil
}

// ownFirst leaves the imports out where a machine's own packet is there: nobody
// who imports something makes a word ambiguous that meant a machine.
func ownFirst(found []escrow.Entry) []escrow.Entry {
	own := slices.DeleteFunc(slices.Clone(found), func(e escrow.Entry) bool { return e.Imported })
	if len(own) == 0 {
		return found
	}
	return own
}

// importOf is the import that a request for a volume would be about, where no
// machine has a packet of it that is in use: the proved one, or else the only one.
// The zero Entry: there is none.
func importOf(uuid string, imports []escrow.Entry) (escrow.Entry, error) {
	for _, state := range []escrow.PacketState{escrow.Verified, escrow.Pending} {
		var fits []escrow.Entry
		for _, e := range imports {
			if e.State == state {
				fits = append(fits, e)
			}
		}
		if len(fits) == 1 {
			return fits[0], nil
		}
		if len(fits) > 1 {
			return escrow.Entry{}, ambiguous(uuid, fits)
		}
	}
	return escrow.Entry{}, nil
}

func ambiguous(uuid string, packets []escrow.Entry) error {
	lines := []string{}
	for _, e := range packets {
		lines = append(lines, fmt.Sprintf("%s  of %s, key ID %s, stored %s", e.ID, e.Machine, e.KeyID.Short(), e.Stored.Format("2006-01-02 15:04")))
	}
	return api.Errorf(api.CodeAmbiguous, "volume %s has %d packets, and none replaces the others; name one by its id:\n  %s", uuid, len(packets), strings.Join(lines, "\n  "))
}
