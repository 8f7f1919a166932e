package server

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

const aBoot = "6d1c0a9e-1f64-4f3b-9f6e-6c1b6f1e2d3c"

// shown is what the server keeps of a machine.
func (s *site) shown(h *host) api.Machine {
	s.t.Helper()
	var found []api.Machine
	s.local("GET", "/v1/machines?machine="+string(h.boot.KeyID()), nil, &found)
	if len(found) != 1 {
		s.t.Fatalf("%d machines", len(found))
	}
	return found[0]
}

func (s *site) packetState(id string) (e escrow.Entry) {
	s.t.Helper()
	if err := s.server.store.View(func(tx *store.Tx) (err error) {
		e, err = tx.Entry(id)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return e
}

// A machine that took itself back is given nothing, now and after a restart;
// its packet stays as it was.
func TestUnenroll(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	for range 2 { // said again it is the same
		var kept api.Unenrolled
		if err := h.Call(t.Context(), "DELETE", "/v1/self", nil, &kept); err != nil || kept.Packets != 1 {
			t.Fatalf("%+v, %v", kept, err)
		}
	}
	if actions := s.actions(string(h.boot.KeyID())); strings.Count(strings.Join(actions, " "), "machine.unenroll") != 1 {
		t.Errorf("audit: %v", actions)
	}
	s.restart()
	if reply, _ := s.boot(h); reply.Released {
		t.Error("released")
	}
	yes := true
	s.change(h, api.Change{Enable: &yes})
	if reply, _ := s.boot(h); reply.Released {
		t.Error("its blob is still there")
	}
	if m := s.shown(h); len(m.Volumes) != 0 || m.Unenrolled.IsZero() {
		t.Errorf("%+v", m)
	}
	if e := s.packetState(h.packetID()); e.State != escrow.Verified || e.Hold {
		t.Errorf("packet is %+v", e)
	}
}

// The reason for which somebody disabled a machine outlives its leaving, and
// no enrolment afterwards enables it.
func TestUnenrollRevivesNothing(t *testing.T) {
	s := newSite(t)
	disabled := s.enroll("stolen", siteVolume)
	s.change(disabled, api.Change{Enable: new(bool)})
	before := s.shown(disabled).State
	unfinished := newHost(s, "unfinished")
	if err := unfinished.register(s.token(1)); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*host{disabled, unfinished} {
		if err := h.Call(t.Context(), "DELETE", "/v1/self", nil, nil); err != nil {
			t.Fatal(err)
		}
		h.again(s, siteVolume)
		if reply, _ := s.boot(h); reply.Released || s.shown(h).Enabled {
			t.Errorf("%s: %+v", h.name, s.shown(h))
		}
	}
	if after := s.shown(disabled).State; after != before || !strings.HasPrefix(after, "disabled: by ") {
		t.Errorf("state %q, then %q", before, after)
	}
	if after := s.shown(unfinished).State; after != "disabled: unenrolled" {
		t.Errorf("state %q", after)
	}
}

// again uploads and commits a new packet of the machine.
func (h *host) again(s *site, volume string) {
	s.t.Helper()
	h.packet = h.makePacket(s.policy(), volume)
	path := "/v1/self/volumes/" + volume
	if err := h.Call(s.t.Context(), "PUT", path, api.Upload{Packet: h.packet, Blob: h.blob}, nil); err != nil {
		s.t.Fatal(err)
	}
	if err := h.Call(s.t.Context(), "POST", path+"/commit", api.Commit{Packet: h.packetID(), Boot: true}, nil); err != nil {
		s.t.Fatal(err)
	}
}

// Whoever enrolls a volume after its machine left raises no alarm; before, they
// do. The packet of the one that left is never deleted, and kept whatever happens.
func TestEnrollAfterUnenroll(t *testing.T) {
	for _, leaves := range []bool{true, false} {
		s := newSite(t)
		first := s.enroll("laptop7", siteVolume)
		if leaves {
			if err := first.Call(t.Context(), "DELETE", "/v1/self", nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		second := s.enroll("laptop7", siteVolume)
		if alarm := slices.Contains(s.actions(second.packetID()), "alarm.fork"); alarm == leaves {
			t.Errorf("left %t, alarm %t", leaves, alarm)
		}
		want := map[bool]escrow.PacketState{true: escrow.Obsolete, false: escrow.Verified}[leaves]
		if e := s.packetState(first.packetID()); e.State != want || !e.Hold {
			t.Errorf("left %t: the first packet is %+v", leaves, e)
		}
	}
}

// A boot identity, which lies in the boot image, can neither take its machine
// back nor say what became of a boot.
func TestBootIdentityIsNobody(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	boot := s.dial(h.boot, nil)
	for what, err := range map[string]error{
		"unenroll": boot.Call(t.Context(), "DELETE", "/v1/self", nil, nil),
		"boot":     boot.Call(t.Context(), "POST", "/v1/self/boot", unlock.Boot{ID: aBoot}, nil),
	} {
		if past(err) != "-" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if m := s.shown(h); !m.Enabled || m.LastBoot.ID != "" {
		t.Errorf("%+v", m)
	}
}

func TestBoot(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	report := unlock.Boot{ID: aBoot, Volumes: []unlock.VolumeBoot{
		{UUID: siteVolume, Outcome: unlock.Rejected, Reason: "keyslot 1 \x1b[2J opens it no more"},
		{UUID: strings.ReplaceAll(siteVolume, "0", "1"), Outcome: unlock.Mismatched, Reason: "cipher"},
		{UUID: strings.ReplaceAll(siteVolume, "0", "2"), Outcome: unlock.Opened},
	}}
	for range 2 {
		if err := h.Call(t.Context(), "POST", "/v1/self/boot", report, nil); err != nil {
			t.Fatal(err)
		}
	}
	if actions := s.actions(string(h.boot.KeyID())); strings.Join(actions[len(actions)-3:], " ") != "machine.boot alarm.rejected alarm.mismatch" {
		t.Errorf("audit: %v", actions)
	}
	events := s.audit()
	if e := events[len(events)-2]; e.Volume != siteVolume || strings.ContainsRune(e.Detail, '\x1b') || !strings.Contains(e.Detail, "opens it no more") {
		t.Errorf("%+v", e)
	}
	if got := s.shown(h).LastBoot; got.ID != aBoot || got.Told.IsZero() || len(got.Volumes) != 3 || got.Volumes[0].Outcome != unlock.Rejected {
		t.Errorf("%+v", got)
	}
	report.ID = strings.ReplaceAll(aBoot, "6", "7")
	report.Volumes = report.Volumes[2:]
	if err := h.Call(t.Context(), "POST", "/v1/self/boot", report, nil); err != nil {
		t.Fatal(err)
	}
	if got := s.shown(h).LastBoot; got.ID != report.ID || len(got.Volumes) != 1 {
		t.Errorf("%+v", got)
	}
}

func TestBootRefused(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	one := unlock.VolumeBoot{UUID: siteVolume, Outcome: unlock.Opened}
	many := []unlock.VolumeBoot{}
	for i := range unlock.MaxBlobs + 1 {
		many = append(many, unlock.VolumeBoot{UUID: siteVolume[:len(siteVolume)-2] + string("0123456789abcdef0"[i]) + "0", Outcome: unlock.Opened})
	}
	long := one
	long.Reason = strings.Repeat("n", unlock.MaxReason+1)
	for what, in := range map[string]any{
		"no boot id":      unlock.Boot{},
		"a long boot id":  unlock.Boot{ID: aBoot + "0"},
		"too many":        unlock.Boot{ID: aBoot, Volumes: many},
		"twice":           unlock.Boot{ID: aBoot, Volumes: []unlock.VolumeBoot{one, one}},
		"no volume":       unlock.Boot{ID: aBoot, Volumes: []unlock.VolumeBoot{{UUID: "x", Outcome: unlock.Opened}}},
		"another outcome": unlock.Boot{ID: aBoot, Volumes: []unlock.VolumeBoot{{UUID: siteVolume, Outcome: "lost"}}},
		"a long reason":   unlock.Boot{ID: aBoot, Volumes: []unlock.VolumeBoot{long}},
		"an unknown word": map[string]string{"boot_id": aBoot, "other": "x"},
		"a long text":     bytes.Repeat([]byte("x"), 64<<10),
	} {
		wantCode(t, what, h.Call(t.Context(), "POST", "/v1/self/boot", in, nil), api.CodeUsage)
	}
	if got := s.shown(h).LastBoot; got.ID != "" {
		t.Errorf("%+v", got)
	}
}
