package escrow

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"time"

	"mandos-escrow/internal/identity"
)

// MaxPackets bounds the packets that one machine may store on a server.
const MaxPackets = 1000

// Errors of a packet's life.
var (
	// ErrLimit: the machine has too many packets, or the packet is too large.
	ErrLimit = errors.New("packet limit")
	// ErrNotSuccessor: a packet does not name the one that it would replace, or
	// is of another machine or volume.
	ErrNotSuccessor = errors.New("not a successor of the packet")
	// ErrFork: a packet has a second successor, so somebody cloned the machine.
	// Both are to be held, and an alarm raised.
	ErrFork = errors.New("packet has another successor already")
	// ErrState: a packet in that state cannot do that.
	ErrState = errors.New("packet is in another state")
)

// PacketState is where a packet is in its life.
type PacketState string

// The states of a packet on a server.
const (
	Pending  PacketState = "pending"  // stored; its secrets are not yet on the volume
	Verified PacketState = "verified" // its secrets were proved to open the volume
	Obsolete PacketState = "obsolete" // replaced by a newer packet, or marked so
)

// Entry is a packet as a server keeps it: what its clear header says, and what
// became of it. The packet's bytes stand beside it, unchanged.
type Entry struct {
	ID         string `json:"id"`
	Supersedes string `json:"supersedes,omitempty"`
	// SupersededBy is the packet that replaced this one.
	SupersededBy string         `json:"superseded_by,omitempty"`
	Machine      string         `json:"machine"`
	KeyID        identity.KeyID `json:"key_id"`
	Group        string         `json:"group,omitempty"`
	Volume       Volume         `json:"volume"`
	Digest       string         `json:"digest"` // SHA-256 of the packet's bytes, hex
	Size         int            `json:"size"`
	Created      time.Time      `json:"created"`
	Stored       time.Time      `json:"stored"`
	State        PacketState    `json:"state"`
	VerifiedAt   time.Time      `json:"verified_at,omitzero"`
	ObsoleteAt   time.Time      `json:"obsolete_at,omitzero"`
	Hold         bool           `json:"hold"`
	// Imported: no machine uploaded it. It never takes a machine's packet's place.
	Imported bool `json:"imported,omitempty"`
	// CheckedAt is when the machine last compared volume and packet, by the server's
	// clock; CheckFailed is what was wrong then, in words, or "".
	CheckedAt   time.Time `json:"checked_at,omitzero"`
	CheckFailed string    `json:"check_failed,omitempty"`
	// RevealedAt has, for each payload that was released, when it was first.
	RevealedAt map[string]time.Time `json:"revealed_at,omitempty"`
}

// Volume names a volume in clear.
type Volume struct {
	UUID  string `json:"uuid"`
	Label string `json:"label,omitempty"`
	ByID  string `json:"by_id,omitempty"`
}

// NewEntry is the entry of a packet that is stored now: pending.
func NewEntry(p *Packet, stored time.Time) Entry {
	return Entry{
		ID: p.ID, Supersedes: p.Supersedes, Machine: p.Machine, KeyID: p.KeyID, Volume: p.Volume,
		Digest: hex.EncodeToString(p.Digest[:]), Size: p.Size,
		Created: p.Created, Stored: stored.UTC(), State: Pending,
	}
}

// CheckLimits refuses one more packet of size bytes for a machine that has
// stored count packets.
func CheckLimits(count, size int) error {
	switch {
	case count >= MaxPackets:
		return fmt.Errorf("escrow: %w: the machine has %d packets, %d are allowed", ErrLimit, count, MaxPackets)
	case size > MaxPacketSize:
		return fmt.Errorf("escrow: %w: a packet of %d bytes, %d are allowed", ErrLimit, size, MaxPacketSize)
	}
	return nil
}

// Supersede says whether successor may replace old: it is of the same machine
// and volume, names old, and no other packet replaced old before.
func Supersede(old, successor Entry) error {
	switch {
	case successor.ID == old.ID || successor.Supersedes != old.ID:
		return fmt.Errorf("escrow: packet %s: %w %s: it does not name it", successor.ID, ErrNotSuccessor, old.ID)
	case successor.KeyID != old.KeyID:
		return fmt.Errorf("escrow: packet %s: %w %s: it is of another machine", successor.ID, ErrNotSuccessor, old.ID)
	case successor.Volume.UUID != old.Volume.UUID:
		return fmt.Errorf("escrow: packet %s: %w %s: it is of another volume", successor.ID, ErrNotSuccessor, old.ID)
	case old.SupersededBy != "" && old.SupersededBy != successor.ID:
		return fmt.Errorf("escrow: packet %s: %w: %s; this is %s", old.ID, ErrFork, old.SupersededBy, successor.ID)
	}
	return nil
}

// Verify records that the packet's secrets were proved to open the volume. The
// first proof's time stays.
func (e Entry) Verify(now time.Time) (Entry, error) {
	switch e.State {
	case Verified:
	case Pending:
		e.State, e.VerifiedAt = Verified, now.UTC()
	default:
		return e, fmt.Errorf("escrow: verify packet %s: %w: %s", e.ID, ErrState, e.State)
	}
	return e, nil
}

// Replace makes e obsolete, because successor took its place. Only a verified
// packet takes another's place: until then the old one is what opens the
// volume.
func (e Entry) Replace(successor Entry, now time.Time) (Entry, error) {
	if err := Supersede(e, successor); err != nil {
		return e, err
	}
	if successor.State != Verified {
		return e, fmt.Errorf("escrow: replace packet %s: successor %s: %w: %s", e.ID, successor.ID, ErrState, successor.State)
	}
	e.SupersededBy = successor.ID
	return e.MarkObsolete(now), nil
}

// MarkObsolete makes e obsolete; the time of the first call stays.
func (e Entry) MarkObsolete(now time.Time) Entry {
	if e.State != Obsolete {
		e.State, e.ObsoleteAt = Obsolete, now.UTC()
	}
	return e
}

// Reveal records that a payload was released; the time of the first call stays.
func (e Entry) Reveal(payload string, now time.Time) Entry {
	if _, before := e.RevealedAt[payload]; before {
		return e
	}
	revealed := map[string]time.Time{payload: now.UTC()}
	maps.Copy(revealed, e.RevealedAt)
	e.RevealedAt = revealed
	return e
}
