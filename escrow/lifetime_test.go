package escrow

import (
	"errors"
	"slices"
	"testing"
	"time"

	"mandos-escrow/internal/identity"
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

// States as people are told them, and what is due, on both sides of the moment.
func TestShown(t *testing.T) {
	life := Life{Lifetime: 24 * time.Hour}
	verified := entry("1", "", Verified)
	verified.VerifiedAt = now
	told, err := verified.Expire(now)
	if err != nil {
		t.Fatal(err)
	}
	obsolete := told.Reveal(ForPassphrase, now).MarkObsolete(now)
	for name, c := range map[string]struct {
		e    Entry
		life Life
		at   time.Time
		want PacketState
		due  bool
	}{
		"pending":                {entry("1", "", Pending), life, now, Pending, false},
		"verified":               {verified, life, now, Verified, false},
		"just before":            {verified, life, now.Add(24*time.Hour - 1), Verified, false},
		"just expired":           {verified, life, now.Add(24 * time.Hour), Expired, true},
		"without a lifetime":     {verified, Life{}, now.Add(1e6 * time.Hour), Verified, false},
		"expired by somebody":    {told, Life{}, now, Expired, true},
		"passphrase revealed":    {verified.Reveal(ForPassphrase, now), life, now, Revealed, true},
		"volume key revealed":    {verified.Reveal(ForVolumeKey, now), life, now, Revealed, false},
		"revealed, then expired": {verified.Reveal(ForPassphrase, now), life, now.Add(48 * time.Hour), Expired, true},
		"obsolete":               {obsolete, life, now.Add(48 * time.Hour), Obsolete, false},
	} {
		if got, due := c.e.Shown(c.life, c.at), c.e.RotateDue(c.life, c.at); got != c.want || due != c.due {
			t.Errorf("%s: %s, due %t", name, got, due)
		}
	}
}

func TestExpire(t *testing.T) {
	e, err := entry("1", "", Verified).Expire(now)
	if err != nil || !e.ExpiredAt.Equal(now) || !e.ReencryptSince.Equal(now) {
		t.Fatalf("%+v, %v", e, err)
	}
	if e, err = e.Expire(now.Add(time.Hour)); err != nil || !e.ExpiredAt.Equal(now) {
		t.Errorf("twice: %s, %v", e.ExpiredAt, err)
	}
	for _, state := range []PacketState{Obsolete, Purged} {
		if _, err := entry("1", "", state).Expire(now); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", state, err)
		}
	}
	e.VerifiedAt = now
	successor := entry("2", "1", Verified).Inherit(e)
	if !successor.ReencryptSince.Equal(now) || !successor.ExpiredAt.IsZero() {
		t.Errorf("the volume key is still the same: %+v", successor)
	}
	if again := successor.Inherit(entry("3", "", Verified)); !again.ReencryptSince.Equal(now) {
		t.Errorf("an older packet took it back: %+v", again)
	}
}

// TestInherit: the mark is the volume's, whatever becomes of packets; what was said
// of a later one counts, not what an old one still says.
func TestInherit(t *testing.T) {
	at := func(id string, state PacketState, hours int, marked bool) Entry {
		e := entry(id, "", state)
		e.Stored = now.Add(time.Duration(hours) * time.Hour)
		e.VerifiedAt = e.Stored
		if marked {
			e.ReencryptSince = now
		}
		return e
	}
	of := func(e Entry, machine string) Entry { e.KeyID = identity.KeyID(machine); return e }
	never := at("1", Obsolete, 3, true)
	never.VerifiedAt = time.Time{}
	imported := at("1", Verified, 3, true)
	imported.Imported = true
	for name, c := range map[string]struct {
		ofVolume []Entry
		want     bool
	}{
		"nothing":                          {nil, false},
		"in use":                           {[]Entry{at("1", Verified, 0, true)}, true},
		"in use, another machine's":        {[]Entry{of(at("1", Verified, 0, true), "l"), at("2", Verified, 1, false)}, true},
		"deleted":                          {[]Entry{at("1", Purged, 1, true), at("2", Obsolete, 0, false)}, true},
		"encrypted anew, then deleted":     {[]Entry{at("1", Obsolete, 0, true), at("2", Purged, 1, false)}, false},
		"encrypted anew, by another since": {[]Entry{of(at("1", Obsolete, 2, true), "l"), at("2", Purged, 1, false)}, false},
		"another machine's, deleted":       {[]Entry{of(at("1", Purged, 0, true), "l")}, true},
		"never verified":                   {[]Entry{never}, false},
		"imported":                         {[]Entry{imported}, false},
		"itself":                           {[]Entry{at("9", Purged, 0, true)}, false},
	} {
		if got := entry("9", "", Verified).Inherit(c.ofVolume...); got.ReencryptSince.IsZero() == c.want {
			t.Errorf("%s: since %s", name, got.ReencryptSince)
		}
		slices.Reverse(c.ofVolume)
		if got := entry("9", "", Verified).Inherit(c.ofVolume...); got.ReencryptSince.IsZero() == c.want {
			t.Errorf("%s, the other way round: since %s", name, got.ReencryptSince)
		}
	}
}

func TestUnproved(t *testing.T) {
	verified := entry("1", "", Verified)
	verified.VerifiedAt = now
	checked := verified
	checked.CheckedAt = now.Add(time.Hour)
	failed := checked
	failed.CheckFailed = "keyslot 3 is gone"
	for name, c := range map[string]struct {
		e      Entry
		within time.Duration
		at     time.Time
		want   bool
	}{
		"pending":        {entry("1", "", Pending), 0, now, true},
		"verified":       {verified, 0, now.Add(1e6 * time.Hour), false},
		"in time":        {verified, time.Hour, now.Add(time.Hour), false},
		"too long ago":   {verified, time.Hour, now.Add(time.Hour + 1), true},
		"checked since":  {checked, time.Hour, now.Add(2 * time.Hour), false},
		"found wrong":    {failed, 0, now, true},
		"and not lately": {checked, time.Hour, now.Add(2*time.Hour + 1), true},
		"obsolete":       {verified.MarkObsolete(now), time.Hour, now.Add(9 * time.Hour), false},
	} {
		if last := c.e.LastCheck(); last.Before(c.e.VerifiedAt) || last.Before(c.e.CheckedAt) {
			t.Errorf("%s: last checked %s", name, last)
		}
		if got := c.e.Unproved(c.within, c.at); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

func TestRemove(t *testing.T) {
	at := func(id string, state PacketState, verified bool, stored int) Entry {
		e := entry(id, "", state)
		e.Stored = now.Add(time.Duration(stored) * time.Minute)
		if verified {
			e.VerifiedAt = e.Stored
		}
		if state == Obsolete {
			e.ObsoleteAt = now
		}
		return e
	}
	old, current, left := at("1", Obsolete, true, 0), at("2", Verified, true, 1), at("3", Obsolete, false, 2)
	foreign := at("4", Verified, true, 9)
	foreign.KeyID = "another machine"
	imported := foreign
	imported.KeyID, imported.Imported = "its own", true
	held := old
	held.Hold = true
	purged := old
	purged.State = Purged
	for name, c := range map[string]struct {
		e      Entry
		life   Life
		others []Entry
		newest bool
		want   error
	}{
		"replaced":                       {old, Life{}, []Entry{old, current}, false, nil},
		"never finished":                 {left, Life{}, []Entry{old, current, left}, false, nil},
		"held":                           {held, Life{}, []Entry{held, current}, true, ErrHeld},
		"its group held":                 {old, Life{Hold: true}, []Entry{old, current}, true, ErrHeld},
		"the newest":                     {current, Life{}, []Entry{old, current, left}, false, ErrNewest},
		"the newest, named":              {current, Life{}, []Entry{old, current}, true, nil},
		"the only one":                   {old, Life{}, []Entry{old}, false, ErrNewest},
		"the last that was verified":     {old, Life{}, []Entry{old, left}, false, ErrNewest},
		"only another machine has newer": {old, Life{}, []Entry{old, foreign}, false, ErrNewest},
		"what is newer is gone":          {old, Life{}, []Entry{old, func() Entry { e := current; e.State = Purged; return e }()}, false, ErrNewest},
		"an import, beside a machine's":  {imported, Life{}, []Entry{imported, current}, false, nil},
		"an import, alone":               {imported, Life{}, []Entry{imported}, false, ErrNewest},
		"a machine's, beside an import":  {current, Life{}, []Entry{imported, current}, false, ErrNewest},
		"twice":                          {purged, Life{}, []Entry{purged, current}, true, ErrPurged},
	} {
		got, err := c.e.Remove(c.life, c.others, c.newest, now)
		if !errors.Is(err, c.want) || (err == nil) != (got.State == Purged && got.PurgedAt.Equal(now)) && !errors.Is(c.want, ErrPurged) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestPurgeDue(t *testing.T) {
	life := Life{Retention: 24 * time.Hour}
	e := entry("1", "", Verified).MarkObsolete(now)
	held := e
	held.Hold = true
	for name, c := range map[string]struct {
		e    Entry
		life Life
		at   time.Time
		want bool
	}{
		"at once":        {e, life, now, false},
		"just before":    {e, life, now.Add(24*time.Hour - 1), false},
		"after":          {e, life, now.Add(24 * time.Hour), true},
		"for ever":       {e, Life{}, now.Add(1e6 * time.Hour), false},
		"held":           {held, life, now.Add(1e6 * time.Hour), false},
		"its group held": {e, Life{Retention: time.Hour, Hold: true}, now.Add(1e6 * time.Hour), false},
		"in use":         {entry("1", "", Verified), life, now.Add(1e6 * time.Hour), false},
	} {
		if got := c.e.PurgeDue(c.life, c.at); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

func TestLives(t *testing.T) {
	lives := Lives{"": {Retention: time.Hour}, "servers": {Lifetime: time.Hour}}
	if lives.Of("laptops").Retention != time.Hour || lives.Of("servers").Retention != 0 || lives.Of("servers").Lifetime != time.Hour || (Lives)(nil).Of("x") != (Life{}) {
		t.Errorf("%v", lives)
	}
	if !lives.Purges() || (Lives{"servers": lives["servers"]}).Purges() {
		t.Error("who purges")
	}
	for life, ok := range map[Life]bool{
		{}: true, {Lifetime: time.Hour, Retention: time.Hour}: true, {Lifetime: time.Minute}: false, {Retention: time.Hour - 1}: false, {Lifetime: -time.Hour}: false,
	} {
		if err := life.Check(); ok != (err == nil) || !ok && !errors.Is(err, ErrLife) {
			t.Errorf("%+v: %v", life, err)
		}
	}
}
