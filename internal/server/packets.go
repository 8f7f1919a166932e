package server

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/store"
)

func (s *Server) packet(c call) (any, error) {
	var out api.Packet
	return &out, s.store.View(func(tx *store.Tx) error {
		e, err := findPacket(tx, c.PathValue("id"))
		if err != nil {
			return err
		}
		out, err = listed(tx, e, c.now)
		return err
	})
}

// packetExport gives a whole packet away, sealed as it is.
func (s *Server) packetExport(c call) (any, error) {
	var data []byte
	err := s.store.Update(func(tx *store.Tx) error {
		e, err := findPacket(tx, c.PathValue("id"))
		if err != nil {
			return err
		}
		if _, data, err = tx.Packet(e.ID); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "packet.export", Packet: e.ID, Machine: string(e.KeyID), Volume: e.Volume.UUID})
	})
	if err != nil {
		return nil, err
	}
	return &stream{io.NopCloser(bytes.NewReader(data)), int64(len(data))}, nil
}

func (s *Server) packetObsolete(c call) (any, error) {
	return s.changePacket(c, "packet.obsolete", func(tx *store.Tx, e escrow.Entry) (escrow.Entry, error) {
		newest, err := newestOf(tx, e.Volume.UUID)
		if code := api.CodeOf(err); err != nil && code != api.CodeNotFound && code != api.CodeAmbiguous {
			return e, err
		}
		if err == nil && newest.ID == e.ID {
			return e, api.Errorf(api.CodeConflict, "packet %s is the newest of volume %s: there is nothing that replaces it", e.ID, e.Volume.UUID)
		}
		return e.MarkObsolete(c.now), nil
	})
}

func (s *Server) packetHold(c call) (any, error) {
	in, err := decode[api.Hold](c)
	if err != nil {
		return nil, err
	}
	return s.changePacket(c, "packet.hold", func(_ *store.Tx, e escrow.Entry) (escrow.Entry, error) {
		e.Hold = in.Hold
		return e, nil
	})
}

func (s *Server) changePacket(c call, action string, change func(*store.Tx, escrow.Entry) (escrow.Entry, error)) (any, error) {
	var out api.Packet
	return &out, s.store.Update(func(tx *store.Tx) error {
		e, err := findPacket(tx, c.PathValue("id"))
		if err != nil {
			return err
		}
		if err := e.Gone(); err != nil {
			return err
		}
		if e, err = change(tx, e); err != nil {
			return err
		}
		if out, err = listed(tx, e, c.now); err != nil {
			return err
		}
		if err := tx.PutEntry(e); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: action, Packet: e.ID, Machine: string(e.KeyID), Volume: e.Volume.UUID, Detail: fmt.Sprintf("%s, hold %t", e.State, e.Hold)})
	})
}

// recoverable finds the packet that a request would be about, and what the
// request binds of it.
func (s *Server) recoverable(c call) (any, error) {
	word := c.FormValue("volume")
	var out api.PacketHead
	return &out, s.store.View(func(tx *store.Tx) error {
		if err := c.ownVolume(tx, word); err != nil {
			return err
		}
		e, err := findVolume(tx, word)
		if err != nil {
			return err
		}
		_, data, err := tx.Packet(e.ID)
		if err != nil {
			return err
		}
		p, err := escrow.Parse(data)
		if err != nil {
			return err
		}
		out = api.PacketHead{Header: p.HeaderBytes, Digest: hex.EncodeToString(p.Digest[:]), PayloadDigests: map[string]string{}}
		for _, sealed := range p.Payloads {
			sum := sha256.Sum256(sealed.Message)
			out.PayloadDigests[sealed.Name] = hex.EncodeToString(sum[:])
		}
		return nil
	})
}

// findPacket finds a packet by its id or a prefix of it.
func findPacket(tx *store.Tx, word string) (escrow.Entry, error) {
	if e, err := tx.Entry(word); err == nil {
		return e, nil
	}
	found := map[string]escrow.Entry{}
	if len(word) >= shortest {
		for e, err := range tx.EntriesFrom(strings.ToLower(word)) {
			if err != nil {
				return escrow.Entry{}, err
			}
			found[e.ID] = e
		}
	}
	return only("packet", word, found)
}

// findVolume finds the newest packet of a volume that is named by its UUID or
// a prefix, its machine's name, that of now or that in the packet, or a key ID
// or a prefix.
func findVolume(tx *store.Tx, word string) (escrow.Entry, error) {
	if word == "" {
		return escrow.Entry{}, api.Errorf(api.CodeUsage, "name a volume: its UUID or the beginning of it, its machine, or a key ID")
	}
	if e, err := tx.Entry(word); err == nil { // whatever machines call themselves
		return e, nil
	}
	for _, err := range tx.EntriesOfVolume(word) { // a volume that is named whole
		if err != nil {
			return escrow.Entry{}, err
		}
		return newestOf(tx, word)
	}
	entries, err := meant(tx, word, !record.IsUUID(word), true) // a UUID is nobody's name
	if err != nil {
		return escrow.Entry{}, err
	}
	found := map[string]escrow.Entry{}
	for _, e := range ownFirst(entries) {
		found[e.Volume.UUID] = e
	}
	if len(found) == 0 {
		if e, err := findPacket(tx, word); err == nil { // the beginning of a packet's id
			return e, nil
		}
	}
	e, err := only("volume", word, found)
	if err != nil {
		return e, err
	}
	return newestOf(tx, e.Volume.UUID)
}

// meant are the packets of the machines, of the volumes, or of both that a word
// means, in the order of their IDs.
func meant(tx *store.Tx, word string, machine, volume bool) ([]escrow.Entry, error) {
	found := map[string]escrow.Entry{}
	take := func(word string, fits func(escrow.Entry) bool) error {
		for e, err := range tx.EntriesByWord(word) {
			if err != nil {
				return err
			}
			if fits(e) {
				found[e.ID] = e
			}
		}
		return nil
	}
	err := take(word, func(e escrow.Entry) bool {
		return volume && isPrefix(word, e.Volume.UUID) || machine && (e.Machine == word || isPrefix(word, string(e.KeyID)))
	})
	if err != nil {
		return nil, err
	}
	if machine { // those that were renamed since
		ids, err := tx.MachinesNamed(word)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			if err := take(string(id), func(e escrow.Entry) bool { return e.KeyID == id }); err != nil {
				return nil, err
			}
		}
	}
	return slices.SortedFunc(maps.Values(found), func(a, b escrow.Entry) int { return cmp.Compare(a.ID, b.ID) }), nil
}

// only returns the one thing that was found; what tells things apart is their
// label.
func only(kind, word string, found map[string]escrow.Entry) (escrow.Entry, error) {
	switch len(found) {
	case 0:
		return escrow.Entry{}, api.Errorf(api.CodeNotFound, "no %s %q is known here; `mandos-escrow packet list` shows them", kind, word)
	case 1:
		for _, e := range found {
			return e, nil
		}
	}
	lines := []string{}
	for l, e := range found {
		lines = append(lines, fmt.Sprintf("%s  of %s", l, e.Machine))
	}
	slices.Sort(lines)
	return escrow.Entry{}, api.Errorf(api.CodeAmbiguous, "%q could be %d:\n  %s", word, len(found), strings.Join(lines, "\n  "))
}

// newestOf returns the verified packet of a volume that is not replaced, or
// the newest obsolete one. Several that are not replaced are a fork, which a
// person must decide. An import counts only where no machine has one in use.
func newestOf(tx *store.Tx, uuid string) (escrow.Entry, error) {
	var current, imports []escrow.Entry
	var newest escrow.Entry
	var gone error
	for e, err := range tx.EntriesOfVolume(uuid) {
		if err != nil {
			return e, err
		}
		if e.Imported {
			imports = append(imports, e)
			continue
		}
		if e.State == escrow.Verified {
			current = append(current, e)
		}
		if e.State == escrow.Obsolete && !e.VerifiedAt.IsZero() && e.Stored.After(newest.Stored) {
			newest = e
		}
		gone = cmp.Or(e.Gone(), gone)
	}
	switch {
	case len(current) == 1:
		return current[0], nil
	case len(current) > 1:
		return escrow.Entry{}, ambiguous(uuid, current)
	}
	if e, err := importOf(uuid, imports); err != nil || e.ID != "" {
		return e, err
	}
	switch {
	case newest.ID != "":
		return newest, nil
	case gone != nil:
		return escrow.Entry{}, gone
	}
	return escrow.Entry{}, api.Errorf(api.CodeNotFound, "volume %s has no verified packet: its enrolment was not finished; run `mandos-escrow enroll` on the machine again", uuid)
}
