package server

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/unlock"
)

// What a machine says of its volumes is dated, logged when it changes, and shown;
// of another machine's packet it says nothing.
func TestSelfVerify(t *testing.T) {
	s := newSite(t)
	h, other := s.enroll("laptop7", siteVolume), s.enroll("laptop8", "22222222-3333-4444-5555-666666666666")
	tell := func(checks ...unlock.VolumeCheck) error {
		return h.Call(t.Context(), "POST", "/v1/self/verify", api.Verify{Volumes: checks}, nil)
	}
	good := unlock.VolumeCheck{UUID: siteVolume, Packet: h.packetID()}
	bad := good
	bad.Reason = "keyslot 3 is gone"
	for _, check := range []unlock.VolumeCheck{good, good, bad, bad, good} {
		if err := tell(check); err != nil {
			t.Fatal(err)
		}
		e, m := s.packetState(h.packetID()), s.shown(h)
		if e.CheckedAt.IsZero() || e.CheckFailed != check.Reason || len(m.Checks) != 1 || m.Checks[0].Reason != check.Reason {
			t.Errorf("%+v: %+v, %+v", check, e, m.Checks)
		}
	}
	log := strings.Join(s.actions(string(h.boot.KeyID())), " ")
	if strings.Count(log, "packet.check") != 3 || strings.Count(log, "alarm.verify") != 1 {
		t.Errorf("audit: %s", log)
	}
	foreign := unlock.VolumeCheck{UUID: "22222222-3333-4444-5555-666666666666", Packet: other.packetID(), Reason: "not mine"}
	if err := tell(foreign); err != nil {
		t.Fatal(err)
	}
	if e := s.packetState(other.packetID()); !e.CheckedAt.IsZero() {
		t.Errorf("another machine's packet: %+v", e)
	}
	if m := s.shown(h); len(m.Checks) != 2 || len(s.shown(other).Checks) != 0 {
		t.Errorf("%+v", m.Checks)
	}
	for _, wrong := range [][]unlock.VolumeCheck{
		nil,
		{good, good},
		{{UUID: "x"}},
		{{UUID: siteVolume, Reason: "two\nlines"}},
		{{UUID: siteVolume, Reason: strings.Repeat("x", 1001)}},
		{{UUID: siteVolume, Packet: strings.Repeat("x", 65)}},
	} {
		if err := tell(wrong...); api.CodeOf(err) != api.CodeUsage {
			t.Errorf("%+v: %v", wrong, err)
		}
	}
}

// Of what a machine says so much is written into the log that nothing else is hard
// to find there, and the disk does not fill; then it waits.
func TestSelfVerifyFloods(t *testing.T) {
	s := newSite(t)
	h, other := s.enroll("laptop7", siteVolume), s.enroll("laptop8", otherVolume)
	flood := func(h *host, rounds int) (err error) {
		for round := 0; round < rounds && err == nil; round++ {
			var checks []unlock.VolumeCheck
			for n := range unlock.MaxChecks {
				checks = append(checks, unlock.VolumeCheck{UUID: benchUUID(n), Packet: "x", Reason: fmt.Sprintf("%d", round)})
			}
			err = h.Call(t.Context(), "POST", "/v1/self/verify", api.Verify{Volumes: checks}, nil)
		}
		return err
	}
	wantCode(t, "20 times 64 failures", flood(h, 20), api.CodeLimit)
	if n := len(s.actions(string(h.boot.KeyID()))); n > eventLimit.burst {
		t.Errorf("%d entries in the log", n)
	}
	if err := flood(other, 1); err != nil {
		t.Errorf("another machine: %v", err)
	}
	s.offset.Store(int64(3 * time.Hour))
	if err := flood(h, 1); err != nil {
		t.Errorf("later: %v", err)
	}
}
