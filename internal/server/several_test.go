package server

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/unlock"
)

// mergedPolicy is a first policy of this server's trustee and another one.
func mergedPolicy(t *testing.T, s *site, threshold int) (escrow.Policy, *seal.PrivateKey) {
	t.Helper()
	other := must(seal.Generate("another server's master", time.Now().Add(-time.Hour)))
	trustees := append(s.policy().Trustees, escrow.Trustee{Fingerprint: other.Public().Fingerprint(), Name: "srv2"})
	return must(escrow.NewPolicy(1, threshold, nil, trustees)), other
}

// sealTo is a packet of h under a policy.
func (h *host) sealTo(policy escrow.Policy, keys ...*seal.PublicKey) []byte {
	header := escrow.Header{Machine: h.name, KeyID: h.boot.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: siteVolume}}
	payload := &escrow.PassphrasePayload{Passphrase: []byte(sitePassphrase), Slot: 1, LUKSType: "luks2"}
	return must(escrow.Make(header, policy, keys, []escrow.Payload{payload}, h.running, time.Now()))
}

// TestMergedPolicy: a packet is taken under this server's policy, and under one
// that it was merged into; its own stays what it is.
func TestMergedPolicy(t *testing.T) {
	s := newSite(t)
	h := newHost(s, "laptop7")
	if err := h.register(s.token(1)); err != nil {
		t.Fatal(err)
	}
	master, _ := siteMaster()
	merged, other := mergedPolicy(t, s, 2)
	without := must(escrow.NewPolicy(1, 1, nil, []escrow.Trustee{{Fingerprint: other.Public().Fingerprint(), Name: "srv2"}}))
	later := must(escrow.NewPolicy(2, 2, make([]byte, 32), merged.Trustees))
	put := func(data []byte) error {
		return h.Call(t.Context(), "PUT", "/v1/self/volumes/"+siteVolume, api.Upload{Packet: data, Blob: h.blob}, nil)
	}
	wantCode(t, "without its trustee", put(h.sealTo(without, other.Public())), api.CodeRefused)
	wantCode(t, "a successor that nobody signed", put(h.sealTo(later, master.Public(), other.Public())), api.CodeRefused)
	if err := put(h.sealTo(merged, master.Public(), other.Public())); err != nil {
		t.Error(err)
	}
	if p := s.policy(); len(p.Trustees) != 1 || p.Threshold != 1 {
		t.Errorf("the merge replaced what the server has: %+v", p)
	}
}

// TestPartOfARelease: of a packet under a merged policy this server hands out its
// own trustee's share, as soon as that was approved, and nothing before.
func TestPartOfARelease(t *testing.T) {
	s, h, bob, alice := cast(t)
	master, _ := siteMaster()
	merged, other := mergedPolicy(t, s, 2)
	h.packet = h.sealTo(merged, master.Public(), other.Public())
	path := "/v1/self/volumes/" + siteVolume
	for _, call := range []func() error{
		func() error { return h.Call(t.Context(), "PUT", path, api.Upload{Packet: h.packet, Blob: h.blob}, nil) },
		func() error {
			return h.Call(t.Context(), "POST", path+"/commit", api.Commit{Packet: h.packetID(), Boot: true}, nil)
		},
	} {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	a := bob.file(s, h)
	if _, err := bob.collect(a); api.CodeOf(err) != api.CodeNotApproved {
		t.Fatalf("collected before: %v", err)
	}
	if err := alice.approve(a, h); err != nil {
		t.Fatal(err)
	}
	var r api.Request
	if err := bob.Call(t.Context(), "GET", "/v1/requests/"+a.id, nil, &r); err != nil {
		t.Fatal(err)
	}
	if r.State != recovery.Open || r.Threshold != 2 || len(r.Approved) != 1 || len(r.CanStill) != 1 || r.CanStill[0] != other.Public().Fingerprint() {
		t.Errorf("%+v", r)
	}
	out, err := bob.collect(a)
	if err != nil || len(out.Approvals) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	share := must(recovery.OpenResealed(out.Approvals[0].Share, a.oneOff, recovery.Digest(a.signed)))
	if opened, err := must(escrow.Parse(out.Packet)).Open(escrow.ForPassphrase, []*escrow.Share{share}); err == nil {
		t.Errorf("one share of two opened it: %+v", opened)
	}
	if rec := s.stored(a); shares(rec) != 0 || rec.State != recovery.Released {
		t.Errorf("the server keeps %+v", rec)
	}
}

// TestNotLessThanOwnPolicy: where the threshold is that of the server's own policy, all of
// it must be approved here.
func TestNotLessThanOwnPolicy(t *testing.T) {
	rec := recovery.Record{ID: "a", Requester: "bob", RequesterID: "b", Threshold: 3, Here: 2, State: recovery.Open, Expires: time.Now().Add(time.Hour)}
	for i, approver := range []string{"alice", "carol"} {
		if _, _, err := rec.Release("b", time.Now()); err == nil {
			t.Errorf("released with %d approvals", i)
		}
		var err error
		rec, err = rec.Approve(recovery.StoredApproval{Approver: approver, ApproverID: identity.KeyID(approver), Trustee: approver}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, out, err := rec.Release("b", time.Now()); err != nil || len(out) != 2 {
		t.Errorf("%v, %v", out, err)
	}
}

// TestHolders: what a machine says of its other servers is bounded, and kept.
func TestHolders(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	elsewhere := must(identity.Generate()).KeyID()
	here, there := unlock.Holder{Name: "srv", KeyID: s.key}, unlock.Holder{Name: "srv2", KeyID: elsewhere}
	put := func(boot unlock.Holders) error {
		h.packet = h.makePacket(s.policy(), siteVolume)
		return h.Call(context.Background(), "PUT", "/v1/self/volumes/"+siteVolume, api.Upload{Packet: h.packet, Blob: h.blob, Boot: boot}, nil)
	}
	for name, boot := range map[string]unlock.Holders{
		"without this server": {Threshold: 1, Servers: []unlock.Holder{there}},
		"one twice":           {Threshold: 1, Servers: []unlock.Holder{here, here}},
		"threshold 0":         {Threshold: 0, Servers: []unlock.Holder{here, there}},
		"threshold 3 of 2":    {Threshold: 3, Servers: []unlock.Holder{here, there}},
		"17":                  {Threshold: 1, Servers: make([]unlock.Holder, 17)},
		"no key ID":           {Threshold: 1, Servers: []unlock.Holder{here, {Name: "x", KeyID: "ab"}}},
		"a name of two lines": {Threshold: 1, Servers: []unlock.Holder{here, {Name: "x\ny", KeyID: elsewhere}}},
	} {
		wantCode(t, name, put(boot), api.CodeUsage)
	}
	want := unlock.Holders{Threshold: 2, Servers: []unlock.Holder{here, there}}
	if err := put(want); err != nil {
		t.Fatal(err)
	}
	var found []api.Machine
	s.local("GET", "/v1/machines", nil, &found)
	if got := string(must(json.Marshal(found[0].Boots))); got != string(must(json.Marshal(want))) || found[0].Boots.ToDisable() != 1 {
		t.Errorf("%s", got)
	}
	if err := put(unlock.Holders{}); err != nil {
		t.Fatal(err)
	}
	found = nil
	s.local("GET", "/v1/machines", nil, &found)
	if len(found[0].Boots.Servers) != 0 || found[0].Boots.ToDisable() != 1 {
		t.Errorf("%+v", found[0].Boots)
	}
}

func TestToDisable(t *testing.T) {
	for _, c := range []struct{ n, m, want int }{{0, 0, 1}, {1, 1, 1}, {2, 3, 2}, {3, 5, 3}, {1, 3, 3}, {3, 3, 1}} {
		if got := (unlock.Holders{Threshold: c.n, Servers: make([]unlock.Holder, c.m)}).ToDisable(); got != c.want {
			t.Errorf("%d of %d: %d, want %d", c.n, c.m, got, c.want)
		}
	}
}

// TestTokenCarriesKeys: a machine seals to this server also while it does not
// answer.
func TestTokenCarriesKeys(t *testing.T) {
	s := newSite(t)
	var text api.Text
	s.local("POST", "/v1/tokens", api.NewToken{Uses: 1, TTL: time.Hour}, &text)
	token := must(api.ParseToken([]byte(text.Text)))
	keys := must(token.Servers[0].TrusteeKeys())
	master, _ := siteMaster()
	if len(keys) != 1 || keys[0].Fingerprint() != master.Public().Fingerprint() || must(token.FirstPolicy()).Digest() != token.PolicyDigest {
		t.Errorf("%v", keys)
	}
	if sum := sha256.Sum256(s.policy().Bytes()); sum != token.PolicyDigest {
		t.Error("the token is of another policy")
	}
}
