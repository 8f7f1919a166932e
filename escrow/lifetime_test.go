package escrow

import (
	"errors"
	"testing"
	"time"
)

func entry(id, supersedes string, state PacketState) Entry {
	return Entry{ID: id, Supersedes: supersedes, KeyID: "k", Volume: Volume{UUID: testUUID}, State: state}
}

func TestSupersede(t *testing.T) {
	old := entry("1", "", Verified)
	replaced := old
	replaced.SupersededBy = "2"
	otherKey, otherVolume := entry("2", "1", Verified), entry("2", "1", Verified)
	otherKey.KeyID, otherVolume.Volume.UUID = "l", "other"
	for name, c := range map[string]struct {
		old, successor Entry
		want           error
	}{
		"successor":         {old, entry("2", "1", Verified), nil},
		"once more":         {replaced, entry("2", "1", Verified), nil},
		"names another":     {old, entry("2", "3", Verified), ErrNotSuccessor},
		"names none":        {old, entry("2", "", Verified), ErrNotSuccessor},
		"itself":            {old, entry("1", "1", Verified), ErrNotSuccessor},
		"another machine":   {old, otherKey, ErrNotSuccessor},
		"another volume":    {old, otherVolume, ErrNotSuccessor},
		"second successor":  {replaced, entry("3", "1", Verified), ErrFork},
		"second, not known": {replaced, entry("3", "1", Pending), ErrFork},
	} {
		if err := Supersede(c.old, c.successor); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestReplaceNeedsProof(t *testing.T) {
	old, successor := entry("1", "", Verified), entry("2", "1", Pending)
	if got, err := old.Replace(successor, now); !errors.Is(err, ErrState) || got.State != Verified {
		t.Errorf("by a pending packet: %v, %v", got.State, err)
	}
	successor, err := successor.Verify(now)
	if err != nil {
		t.Fatal(err)
	}
	got, err := old.Replace(successor, now)
	if err != nil || got.State != Obsolete || got.SupersededBy != "2" || !got.ObsoleteAt.Equal(now) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := got.Replace(entry("3", "1", Verified), now); !errors.Is(err, ErrFork) {
		t.Errorf("a clone's packet: %v", err)
	}
}

func TestStates(t *testing.T) {
	later := now.Add(time.Hour)
	p := newFixture(1, 1).packet(passphrasePayload())
	e := NewEntry(p, now)
	if e.State != Pending || e.ID != p.ID || e.Size != p.Size || e.Volume != p.Volume || len(e.Digest) != 64 {
		t.Errorf("new: %+v", e)
	}
	e, err := e.Verify(now)
	if err != nil || e.State != Verified {
		t.Fatal(e.State, err)
	}
	if e, err = e.Verify(later); err != nil || !e.VerifiedAt.Equal(now) {
		t.Errorf("verified twice: %v, %v", e.VerifiedAt, err)
	}
	before := e
	e = e.Reveal(ForPassphrase, now).Reveal(ForPassphrase, later).Reveal(ForVolumeKey, later)
	if !e.RevealedAt[ForPassphrase].Equal(now) || !e.RevealedAt[ForVolumeKey].Equal(later) || before.RevealedAt != nil {
		t.Errorf("revealed: %v", e.RevealedAt)
	}
	e = e.MarkObsolete(now).MarkObsolete(later)
	if e.State != Obsolete || !e.ObsoleteAt.Equal(now) {
		t.Errorf("obsolete: %+v", e)
	}
	if _, err := e.Verify(now); !errors.Is(err, ErrState) {
		t.Errorf("verify an obsolete packet: %v", err)
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		count, size int
		want        error
	}{
		{0, 1, nil},
		{MaxPackets - 1, MaxPacketSize, nil},
		{MaxPackets, 1, ErrLimit},
		{0, MaxPacketSize + 1, ErrLimit},
	} {
		if err := CheckLimits(c.count, c.size); !errors.Is(err, c.want) {
			t.Errorf("%d packets, %d bytes: %v", c.count, c.size, err)
		}
	}
}
