package escrow

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
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
	// ErrPurged: the packet's bytes are gone; its entry says since when.
	ErrPurged = errors.New("packet is gone")
	// ErrHeld: a hold keeps the packet, its own or its group's.
	ErrHeld = errors.New("packet is held")
	// ErrNewest: the packet is the newest of its volume.
	ErrNewest = errors.New("packet is the newest of its volume")
	// ErrLife: settings that no group can have.
	ErrLife = errors.New("lifetime settings")
)

// PacketState is where a packet is in its life.
type PacketState string

// The states of a packet on a server. Revealed and Expired are never an
// Entry's State: they are how Shown calls a verified one.
const (
	Pending  PacketState = "pending"  // stored; its secrets are not yet on the volume
	Verified PacketState = "verified" // its secrets were proved to open the volume
	Revealed PacketState = "revealed" // verified, and a payload was released
	Expired  PacketState = "expired"  // its secrets are to be replaced; it still opens the volume
	Obsolete PacketState = "obsolete" // replaced by a newer packet, or marked so
	Purged   PacketState = "purged"   // its bytes are gone
)

// States are all of them, in the order of a packet's life.
var States = []PacketState{Pending, Verified, Revealed, Expired, Obsolete, Purged}

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
	// ExpiredAt is when somebody said that its secrets may be known to others.
	ExpiredAt  time.Time `json:"expired_at,omitzero"`
	ObsoleteAt time.Time `json:"obsolete_at,omitzero"`
	PurgedAt   time.Time `json:"purged_at,omitzero"`
	// ReencryptSince is since when the volume is due for re-encryption, because
	// its key was released or expired. Neither a newer packet nor deleting one
	// changes the key, so the newer one inherits this.
	ReencryptSince time.Time `json:"reencrypt_since,omitzero"`
	Hold           bool      `json:"hold"`
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

// Inherit gives a packet what the others of its volume say of the volume's key:
// those of machines that are in use, and the last that ever was verified, of its own
// machine or, where that had none, of any. That one may be obsolete or purged:
// the volume has its key, whatever becomes of packets.
func (e Entry) Inherit(ofVolume ...Entry) Entry {
	var last Entry
	for _, old := range ofVolume {
		if old.ID == e.ID || old.Imported || old.VerifiedAt.IsZero() {
			continue
		}
		if old.State == Verified && e.ReencryptSince.IsZero() {
			e.ReencryptSince = old.ReencryptSince
		}
		own, before := old.KeyID == e.KeyID, last.KeyID == e.KeyID
		if last.ID == "" || own && !before || own == before && old.Stored.After(last.Stored) {
			last = old
		}
	}
	if e.ReencryptSince.IsZero() {
		e.ReencryptSince = last.ReencryptSince
	}
	return e
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
	if e.State != Obsolete && e.State != Purged {
		e.State, e.ObsoleteAt = Obsolete, now.UTC()
	}
	return e
}

// Reveal records that a payload was released; the time of the first call stays.
func (e Entry) Reveal(payload string, now time.Time) Entry {
	if payload == ForVolumeKey && e.ReencryptSince.IsZero() {
		e.ReencryptSince = now.UTC()
	}
	if _, before := e.RevealedAt[payload]; before {
		return e
	}
	revealed := map[string]time.Time{payload: now.UTC()}
	maps.Copy(revealed, e.RevealedAt)
	e.RevealedAt = revealed
	return e
}

// Life is how long the packets of a group may live, and how long they are kept
// then. The zero Life is for ever.
type Life struct {
	// Lifetime is how old a verified packet's secrets may become before they are
	// due to be replaced; 0: any age.
	Lifetime time.Duration `json:"lifetime,omitempty"`
	// Retention is how long the bytes of an obsolete packet are kept; 0: for ever.
	Retention time.Duration `json:"retention,omitempty"`
	// Hold keeps all packets of the group, as if each were held.
	Hold bool `json:"hold,omitempty"`
}

// Shortest settings: below them a typing error would expire or purge what
// nobody had the time to replace or to miss.
const (
	minLifetime  = time.Hour
	minRetention = time.Hour
)

// Check refuses settings that nobody can mean: ErrLife.
func (l Life) Check() error {
	switch {
	case l.Lifetime != 0 && l.Lifetime < minLifetime:
		return fmt.Errorf("escrow: %w: a lifetime is at least PT1H", ErrLife)
	case l.Retention != 0 && l.Retention < minRetention:
		return fmt.Errorf("escrow: %w: a retention is at least PT1H", ErrLife)
	}
	return nil
}

// Lives are the settings of all groups; that of "" holds for groups without
// their own.
type Lives map[string]Life

// Of returns the settings that hold for a group.
func (l Lives) Of(group string) Life {
	if life, own := l[group]; own {
		return life
	}
	return l[""]
}

// Purges reports whether any packet is ever purged.
func (l Lives) Purges() bool {
	for _, life := range l {
		if life.Retention > 0 {
			return true
		}
	}
	return false
}

// IsExpired reports whether a packet's secrets are to be replaced, because
// somebody said so or its lifetime passed. It opens its volume all the same.
func (e Entry) IsExpired(life Life, now time.Time) bool {
	switch {
	case e.State != Verified && e.State != Pending:
		return false
	case !e.ExpiredAt.IsZero():
		return true
	}
	return e.State == Verified && life.Lifetime > 0 && !now.Before(e.VerifiedAt.Add(life.Lifetime))
}

// Shown is the state as people are told it: of what is true of a packet the
// last in the order of States.
func (e Entry) Shown(life Life, now time.Time) PacketState {
	switch {
	case e.IsExpired(life, now):
		return Expired
	case e.State == Verified && len(e.RevealedAt) > 0:
		return Revealed
	}
	return e.State
}

// RotateDue reports whether the machine is to make a new recovery passphrase
// and packet: the one in this packet was released, or the packet expired.
func (e Entry) RotateDue(life Life, now time.Time) bool {
	if e.State != Verified || e.Imported { // no machine replaces an import
		return false
	}
	_, revealed := e.RevealedAt[ForPassphrase]
	return revealed || e.IsExpired(life, now)
}

// Expire says that others may know a packet's secrets, so that the machine
// replaces them; the time of the first call stays. Only a packet that is in use
// expires: ErrState.
func (e Entry) Expire(now time.Time) (Entry, error) {
	if e.State != Verified && e.State != Pending {
		return e, fmt.Errorf("escrow: expire packet %s: %w: %s", e.ID, ErrState, e.State)
	}
	if e.ExpiredAt.IsZero() {
		e.ExpiredAt = now.UTC()
	}
	if e.ReencryptSince.IsZero() {
		e.ReencryptSince = now.UTC()
	}
	return e, nil
}

// Unproved reports whether a packet that is in use was never proved to open its
// volume, or its machine found last that it does not, or, with within over 0, it
// was not proved in that time.
func (e Entry) Unproved(within time.Duration, now time.Time) bool {
	switch e.State {
	case Pending:
		return true
	case Verified:
		return e.CheckFailed != "" || within > 0 && e.LastCheck().Before(now.Add(-within))
	}
	return false
}

// LastCheck is when a packet was last compared with its volume: by its machine, or
// when it was proved. The zero time: never.
func (e Entry) LastCheck() time.Time {
	if e.CheckedAt.After(e.VerifiedAt) {
		return e.CheckedAt
	}
	return e.VerifiedAt
}

// Newest is the packet that a machine's volume depends on most: of those that
// one machine made of one volume the last stored verified one, or else the last
// that ever was verified, or else the last. An import, whose key is its own,
// stands with all packets of the volume, below those of machines. Purged ones are
// none. "": there is none.
func Newest(e Entry, ofVolume []Entry) string {
	rank := func(e Entry) int {
		switch {
		case e.State == Verified && !e.Imported:
			return 3
		case e.State == Verified:
			return 2
		case !e.VerifiedAt.IsZero():
			return 1
		}
		return 0
	}
	var own []Entry
	for _, other := range ofVolume {
		if (other.KeyID == e.KeyID || e.Imported) && other.Volume.UUID == e.Volume.UUID && other.State != Purged {
			own = append(own, other)
		}
	}
	if len(own) == 0 {
		return ""
	}
	return slices.MaxFunc(own, func(a, b Entry) int {
		if byRank := rank(a) - rank(b); byRank != 0 {
			return byRank
		}
		return a.Stored.Compare(b.Stored)
	}).ID
}

// PurgeDue reports whether a packet's time of retention has passed, as far as
// it is about this packet alone.
func (e Entry) PurgeDue(life Life, now time.Time) bool {
	return e.State == Obsolete && !e.Hold && !life.Hold && life.Retention > 0 && !now.Before(e.ObsoleteAt.Add(life.Retention))
}

// Remove makes e one whose bytes are gone. ofVolume are all packets of its
// volume; newest says that even the newest is meant. Errors: ErrHeld, ErrNewest,
// and ErrPurged when they are gone already.
func (e Entry) Remove(life Life, ofVolume []Entry, newest bool, now time.Time) (Entry, error) {
	switch {
	case e.State == Purged:
		return e, e.Gone()
	case e.Hold:
		return e, fmt.Errorf("escrow: packet %s: %w", e.ID, ErrHeld)
	case life.Hold:
		return e, fmt.Errorf("escrow: packet %s: %w with its group %q", e.ID, ErrHeld, e.Group)
	case !newest && Newest(e, ofVolume) == e.ID:
		return e, fmt.Errorf("escrow: packet %s: %w %s", e.ID, ErrNewest, e.Volume.UUID)
	}
	e.State, e.PurgedAt = Purged, now.UTC()
	return e, nil
}

// Gone is ErrPurged for a packet whose bytes are gone, nil for another.
func (e Entry) Gone() error {
	if e.State != Purged {
		return nil
	}
	return fmt.Errorf("escrow: %w: %s of volume %s was purged on %s", ErrPurged, e.ID, e.Volume.UUID, e.PurgedAt.Format("2006-01-02 15:04"))
}
