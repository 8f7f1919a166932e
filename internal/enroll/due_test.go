package enroll

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/luks"
	"mandos-escrow/store"
)

// TestJudge: what servers say makes a volume due, each of them once in its respite.
func TestJudge(t *testing.T) {
	now := time.Date(2026, 5, 1, 3, 17, 0, 0, time.UTC)
	good := api.MachineVolume{UUID: "u", PacketID: "p", Digest: "d", Boot: true, Blob: true}
	says := func(name string, change func(*api.MachineVolume)) holding {
		volume := good
		change(&volume)
		return holding{ServerKnown: ServerKnown{Name: name, KeyID: identity.KeyID(name)}, volumes: []api.MachineVolume{volume}}
	}
	fine := says("fine", func(*api.MachineVolume) {})
	expired := func(v *api.MachineVolume) { v.Expired = true }
	missing := func(v *api.MachineVolume) { *v = api.MachineVolume{} }
	away := says("away", missing)
	away.err = api.ErrUnreachable
	ago := func(name string, d time.Duration) causes { return causes{identity.KeyID(name): now.Add(-d)} }
	for name, c := range map[string]struct {
		held   []holding
		owed   *uploads
		causes causes
		why    string
		by     []identity.KeyID
		until  time.Duration // from now
	}{
		"nothing":             {held: []holding{fine}},
		"released":            {held: []holding{fine, says("a", func(v *api.MachineVolume) { v.Revealed = true })}, why: "released", by: []identity.KeyID{"a"}},
		"expired":             {held: []holding{says("a", expired)}, why: "expired", by: []identity.KeyID{"a"}},
		"missing":             {held: []holding{fine, says("a", missing)}, why: "a does not hold", by: []identity.KeyID{"a"}},
		"another packet":      {held: []holding{says("a", func(v *api.MachineVolume) { v.PacketID = "q" })}, why: "a does not hold", by: []identity.KeyID{"a"}},
		"other bytes":         {held: []holding{says("a", func(v *api.MachineVolume) { v.Digest = "e" })}, why: "a does not hold", by: []identity.KeyID{"a"}},
		"damaged":             {held: []holding{says("a", func(v *api.MachineVolume) { v.Digest, v.Damaged = "", true })}, why: "a does not hold", by: []identity.KeyID{"a"}},
		"no blob":             {held: []holding{says("a", func(v *api.MachineVolume) { v.Blob = false })}, why: "a does not hold", by: []identity.KeyID{"a"}},
		"no answer":           {held: []holding{fine, away}},
		"owed":                {held: []holding{says("a", missing)}, owed: &uploads{blobs: map[identity.KeyID][]byte{"a": nil}}},
		"another is owed":     {held: []holding{says("a", missing)}, owed: &uploads{blobs: map[identity.KeyID][]byte{"b": nil}}, why: "a does not", by: []identity.KeyID{"a"}},
		"two":                 {held: []holding{says("a", missing), says("b", expired)}, why: "a does not", by: []identity.KeyID{"a", "b"}},
		"lately":              {held: []holding{says("a", missing)}, causes: ago("a", time.Hour), why: "a does not", until: respite - time.Hour},
		"lately, other words": {held: []holding{says("a", expired)}, causes: ago("a", time.Hour), why: "expired", until: respite - time.Hour},
		"yesterday":           {held: []holding{says("a", expired)}, causes: ago("a", respite), why: "expired", by: []identity.KeyID{"a"}},
		"tomorrow":            {held: []holding{says("a", expired)}, causes: ago("a", -time.Second), why: "expired", by: []identity.KeyID{"a"}},
		"lately, another one": {held: []holding{says("a", missing), says("b", expired)}, causes: ago("a", time.Hour), why: "expired", by: []identity.KeyID{"b"}},
		"the same reversed":   {held: []holding{says("b", expired), says("a", missing)}, causes: ago("a", time.Hour), why: "expired", by: []identity.KeyID{"b"}},
		"both lately": {
			held: []holding{says("a", missing), says("b", expired)}, causes: causes{"a": now.Add(-time.Hour), "b": now.Add(-2 * time.Hour)},
			why: "expired", until: respite - 2*time.Hour,
		},
	} {
		j := &journal{uuid: "u", packet: "p", digest: "d", committed: true, causes: c.causes}
		got := j.judge(c.held, c.owed, now)
		until := time.Time{}
		if c.until != 0 {
			until = now.Add(c.until)
		}
		if (got.why == "") != (c.why == "") || !strings.Contains(got.why, c.why) || !slices.Equal(got.by, c.by) || !got.until.Equal(until) {
			t.Errorf("%s: %+v", name, got)
		}
		j.committed = false
		if got := j.judge(c.held, c.owed, now); got.why == "" || got.by != nil || !got.until.IsZero() {
			t.Errorf("%s, interrupted: %+v", name, got)
		}
	}
	kept := causes{"old": now.Add(-respite), "lately": now.Add(-time.Hour), "now": now.Add(-time.Hour)}.and([]identity.KeyID{"now", "new"}, now)
	if want := (causes{"lately": now.Add(-time.Hour), "now": now, "new": now}); fmt.Sprint(kept) != fmt.Sprint(want) {
		t.Errorf("kept %v, want %v", kept, want)
	}
}

// dueRotation rotates what is due of the machine's one volume.
func (m *machine) dueRotation(t *testing.T) Rotated {
	t.Helper()
	j := m.rotation(t)
	j.Due, j.Passphrase = true, user
	results := mustRotate(t, j)
	if len(results) != 1 {
		t.Fatalf("%+v", results)
	}
	return results[0]
}

// TestRotateNotHeld: a server that does not hold the packet whole makes the volume
// due, once, and the rotation mends it.
func TestRotateNotHeld(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, m *machine, packet string){
		"lost":        func(t *testing.T, m *machine, packet string) { m.site.lose(t, packet) },
		"other bytes": func(t *testing.T, m *machine, packet string) { m.site.swap(t, packet, []byte("other bytes")) },
		"no blob": func(t *testing.T, m *machine, _ string) {
			m.site.update(t, func(tx *store.Tx) error {
				return tx.DeleteBlob(identityOf(t, m.boot()).Key.KeyID(), m.uuids[0])
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type2)
			mustRun(t, m.job())
			spoil(t, m, m.journal(t, 0).packet)
			if v := verified(t, m, VerifyOptions{}); v.OK || len(v.Due) != 1 || !strings.Contains(v.Due[0], "run mandos-escrow rotate") {
				t.Errorf("verify names no remedy: %+v", v)
			}
			if r := m.dueRotation(t); !r.Rotated || !strings.Contains(r.Why, "does not hold the packet whole") || !r.Until.IsZero() {
				t.Errorf("%+v", r)
			}
			m.check(t, true, userSlot, colleagueSlot)
			if v := verified(t, m, VerifyOptions{}); !v.OK || len(v.Due) != 0 {
				t.Errorf("%+v", v)
			}
			spoil(t, m, m.journal(t, 0).packet)
			if r := m.dueRotation(t); r.Rotated || r.Why == "" || r.Until.IsZero() {
				t.Errorf("again at once: %+v", r)
			}
		})
	}
}

// TestRotateForLiar: a server that always says that the packet expired does not keep
// the machine rotating, nor another server from being heard.
func TestRotateForLiar(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	mustRun(t, r.job())
	lie := func(i int) {
		t.Helper()
		packet := r.journal(t, 0).packet
		r.sites[i].update(t, func(tx *store.Tx) error {
			e, err := tx.Entry(packet)
			if err != nil {
				return err
			}
			if e, err = e.Expire(time.Now()); err != nil {
				return err
			}
			return tx.PutEntry(e)
		})
	}
	rotations := 0
	for range 3 {
		lie(1)
		if r.dueRotation(t).Rotated {
			rotations++
		}
	}
	if rotations != 1 {
		t.Errorf("%d rotations", rotations)
	}
	lie(0)
	if done := r.dueRotation(t); !done.Rotated {
		t.Errorf("another server is not heard: %+v", done)
	}
	lie(1)
	mustRotate(t, r.rotation(t)) // a person's word; what servers caused is still known
	lie(1)
	if again := r.dueRotation(t); again.Rotated || again.Until.IsZero() {
		t.Errorf("%+v", again)
	}
	j := r.journal(t, 0)
	for server := range j.causes {
		j.causes[server] = j.causes[server].Add(-respite)
	}
	if err := (&enrolment{Options: Options{Root: r.root}}).writeJournal(j); err != nil {
		t.Fatal(err)
	}
	if done := r.dueRotation(t); !done.Rotated {
		t.Errorf("on the next day: %+v", done)
	}
	r.check(t, []int{0, 1, 2}, userSlot, colleagueSlot)
}
