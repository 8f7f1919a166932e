package server

import (
	"bytes"
	"context"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

const otherVolume = "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"

// inviteRescue makes a rescue invite as p, which must work.
func (s *site) inviteRescue(p *person, word string) (*api.RescueInvite, []byte) {
	s.t.Helper()
	var out api.NewRescueInvite
	if err := p.Call(context.Background(), "POST", "/v1/rescues", api.NewRescue{Volume: word, Reason: "ticket 4711", Lifetime: time.Hour}, &out); err != nil {
		s.t.Fatal(err)
	}
	invite := must(api.ParseRescueInvite([]byte(out.Text)))
	if out.Volume != invite.Volume || invite.Servers[0].KeyID != s.key || invite.Servers[0].PolicyDigest != s.policy().Digest() {
		s.t.Fatalf("%+v", out)
	}
	return invite, invite.Servers[0].Secret
}

// rescued is a rescue system that logged in with an invite of p's.
func (s *site) rescued(p *person, word string) *person {
	s.t.Helper()
	r := &person{key: must(identity.Generate())}
	r.Client = s.dial(r.key, nil)
	_, secret := s.inviteRescue(p, word)
	var reply api.LoginReply
	if err := r.Call(context.Background(), "POST", "/v1/login", api.Login{Secret: secret}, &reply); err != nil {
		s.t.Fatal(err)
	}
	if r.name = reply.Name; reply.Role != string(store.Rescuer) || reply.Expires.IsZero() {
		s.t.Fatalf("%+v", reply)
	}
	return r
}

func (p *person) fileErr(s *site, h *host) (ask, error) {
	a := newAsk(p, h, escrow.ForPassphrase, time.Hour, s.now())
	return a, p.Call(context.Background(), "POST", "/v1/requests", api.Signed{Signed: a.signed}, nil)
}

func TestRescue(t *testing.T) {
	s, h, bob, alice := cast(t)
	r := s.rescued(bob, "laptop7")
	if r.name != "rescue of "+siteVolume+", invited by bob" {
		t.Errorf("it is called %q", r.name)
	}
	var head api.PacketHead
	for _, word := range []string{siteVolume, h.packetID()} {
		if err := r.Call(t.Context(), "GET", "/v1/recoverable?volume="+word, nil, &head); err != nil || len(head.Header) == 0 {
			t.Fatalf("%s: %v", word, err)
		}
	}
	first := r.file(s, h)
	a := r.file(s, h) // takes the place of the first
	if rec := s.stored(first); rec.State != recovery.Denied || !slices.Equal(s.actions(first.id), []string{"recover.request", "recover.deny"}) {
		t.Errorf("the first request is %s: %v", rec.State, s.actions(first.id))
	}
	wantCode(t, "an approval of the first", alice.approve(first, h), api.CodeRefused)
	var shown api.Request
	if err := r.Call(t.Context(), "GET", "/v1/requests/"+a.id, nil, &shown); err != nil || shown.State != recovery.Open || shown.Requester != r.name {
		t.Fatalf("%+v, %v", shown, err)
	}
	_, err := r.collect(a)
	wantCode(t, "collected too early", err, api.CodeNotApproved)
	if err := alice.approve(a, h); err != nil {
		t.Fatal(err)
	}
	out, err := r.collect(a)
	if err != nil || !bytes.Equal(out.Packet, h.packet) || len(out.Approvals) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	want := []string{"recover.request", "recover.release.refused", "recover.approve", "recover.release"}
	if got := s.actions(a.id); !slices.Equal(got, want) {
		t.Errorf("audit: %v", got)
	}
	for action, detail := range map[string]string{
		"rescue.invite": "ticket 4711", "rescue.login": string(r.key.KeyID()), "recover.request": r.name + ": forgot it", "recover.release": "to " + r.name,
	} {
		if !slices.ContainsFunc(s.audit(), func(e store.Event) bool { return e.Action == action && strings.Contains(e.Detail, detail) }) {
			t.Errorf("no %s with %q in the log", action, detail)
		}
	}
}

// Every route but the five that a rescue needs is refused as to a stranger, and
// these are, too, about anything that is not its own.
func TestRescueRoutes(t *testing.T) {
	s, h, bob, _ := cast(t)
	other := s.enroll("laptop8", otherVolume)
	r := s.rescued(bob, "laptop7")
	a, foreign := r.file(s, h), bob.file(s, other)
	tried := 0
	for _, rt := range routes {
		if rescueRoutes[rt.pattern] || rt.access == anyone {
			continue
		}
		tried++
		method, path, _ := strings.Cut(rt.pattern, " ")
		path = strings.NewReplacer("{uuid}", siteVolume, "{id}", a.id).Replace(path)
		if err := r.Call(t.Context(), method, path, struct{}{}, nil); err == nil || err.Error() != errStranger.Message {
			t.Errorf("%s: %v", rt.pattern, err)
		}
	}
	if tried < 30 {
		t.Fatalf("only %d routes were tried", tried)
	}
	stranger := func(what, method, path string, in any) {
		t.Helper()
		if err := r.Call(t.Context(), method, path, in, nil); err == nil || err.Error() != errStranger.Message {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, id := range []string{foreign.id, foreign.id[:8], "0000", strings.Repeat("0", 32)} {
		stranger("another request "+id, "GET", "/v1/requests/"+id, nil)
		stranger("another request "+id, "POST", "/v1/requests/"+id+"/deny", api.Deny{})
		stranger("another request "+id, "POST", "/v1/requests/"+id+"/release", nil)
	}
	for _, word := range []string{otherVolume, "laptop8", "laptop7", other.packetID(), siteVolume[:8], "nosuch", ""} {
		stranger("recoverable "+word, "GET", "/v1/recoverable?volume="+url.QueryEscape(word), nil)
	}
	if rec := s.stored(foreign); rec.State != recovery.Open {
		t.Errorf("another's request is %s", rec.State)
	}
	// A request of another volume, or in another name.
	if err := r.Call(t.Context(), "POST", "/v1/requests/"+a.id+"/deny", api.Deny{}, nil); err != nil {
		t.Fatal(err)
	}
	_, err := r.fileErr(s, other)
	wantCode(t, "a request of another volume", err, api.CodeRefused)
	as := *r
	as.name = "bob"
	_, err = as.fileErr(s, h)
	wantCode(t, "a request in the inviter's name", err, api.CodeRefused)
	for n := 2; n <= 10; n++ {
		if _, err := r.fileErr(s, h); err != nil {
			t.Fatalf("after it withdrew its request, number %d: %v", n, err)
		}
	}
	_, err = r.fileErr(s, h)
	wantCode(t, "an 11th request", err, api.CodeRefused)
}

// A rescue is over at release, denial by somebody else, expiry, and removal.
func TestRescueEnds(t *testing.T) {
	s, h, bob, alice := cast(t)
	gone := func(what string, r *person, a ask) {
		t.Helper()
		for _, path := range []string{"/v1/requests/" + a.id, "/v1/recoverable?volume=" + siteVolume} {
			if err := r.Call(t.Context(), "GET", path, nil, nil); err == nil || err.Error() != errStranger.Message {
				t.Errorf("%s: %s: %v", what, path, err)
			}
		}
		if _, err := r.fileErr(s, h); err == nil || err.Error() != errStranger.Message {
			t.Errorf("%s: files a request: %v", what, err)
		}
	}
	released := s.rescued(bob, "laptop7")
	a := released.file(s, h)
	if err := alice.approve(a, h); err != nil {
		t.Fatal(err)
	}
	must(released.collect(a))
	gone("released", released, a)

	denied := s.rescued(bob, "laptop7")
	a = denied.file(s, h)
	if err := alice.Call(t.Context(), "POST", "/v1/requests/"+a.id+"/deny", api.Deny{Reason: "voice not known"}, nil); err != nil {
		t.Fatal(err)
	}
	var shown api.Request
	if err := denied.Call(t.Context(), "GET", "/v1/requests/"+a.id, nil, &shown); err != nil || shown.Note != "voice not known" {
		t.Errorf("a denied rescue may see why: %+v, %v", shown, err)
	}
	_, err := denied.fileErr(s, h)
	wantCode(t, "another request after a denial", err, api.CodeRefused)

	removed := s.rescued(bob, "laptop7")
	a = removed.file(s, h)
	var admins []api.AdminInfo
	s.local("GET", "/v1/admins", nil, &admins)
	i := slices.IndexFunc(admins, func(i api.AdminInfo) bool { return i.KeyID == removed.key.KeyID() })
	if i < 0 || admins[i].Rescue == nil || admins[i].Rescue.Volume != siteVolume || admins[i].Rescue.InvitedBy != "bob" || admins[i].Rescue.Reason != "ticket 4711" {
		t.Fatalf("listed as %+v", admins)
	}
	s.local("DELETE", "/v1/admins", api.Name{Name: admins[i].Name}, nil)
	gone("removed", removed, a)
	if rec := s.stored(a); rec.State != recovery.Denied {
		t.Errorf("its request is %s", rec.State)
	}

	invite, secret := s.inviteRescue(bob, "laptop7")
	late := s.rescued(bob, "laptop7")
	a = late.file(s, h)
	s.offset.Store(int64(time.Hour))
	gone("expired", late, a)
	wantCode(t, "login with an expired invite", (&person{Client: s.dial(must(identity.Generate()), nil)}).login(secret), api.CodeRefused)
	if invite.Volume != siteVolume {
		t.Errorf("%+v", invite)
	}
	if err := s.server.expireRescues(s.now()); err != nil {
		t.Fatal(err)
	}
	s.offset.Store(0)
	gone("expired, and then the clock is set back", late, a)
	wantCode(t, "login with an invite that had expired", (&person{Client: s.dial(must(identity.Generate()), nil)}).login(secret), api.CodeRefused)
}

// A removed administrator does not come back by a rescue that they invited before,
// used or not; those of others go on.
func TestRescueEndsWithItsInviter(t *testing.T) {
	s, h, bob, alice := cast(t)
	used, others := s.rescued(bob, "laptop7"), s.rescued(alice, "laptop7")
	_, unused := s.inviteRescue(bob, "laptop7")
	a := used.file(s, h)
	s.local("DELETE", "/v1/admins", api.Name{Name: "bob"}, nil)
	if err := used.Call(t.Context(), "GET", "/v1/requests/"+a.id, nil, nil); err == nil || err.Error() != errStranger.Message {
		t.Errorf("a used invite: %v", err)
	}
	if rec := s.stored(a); rec.State != recovery.Denied {
		t.Errorf("its request is %s", rec.State)
	}
	wantCode(t, "an unused invite", (&person{Client: s.dial(must(identity.Generate()), nil)}).login(unused), api.CodeRefused)
	if _, err := others.fileErr(s, h); err != nil {
		t.Errorf("a rescue of somebody else's: %v", err)
	}
	ended := 0
	for _, e := range s.audit() {
		if e.Action == "rescue.end" && e.Volume == siteVolume && strings.HasSuffix(e.Detail, "invited by bob, who is removed") {
			ended++
		}
	}
	if ended != 2 {
		t.Errorf("%d ended rescues in the log", ended)
	}
}

// The first key that logs in is the only one, and it is nobody else.
func TestRescueLogin(t *testing.T) {
	s, _, bob, alice := cast(t)
	_, secret := s.inviteRescue(bob, "laptop7")
	first := &person{Client: s.dial(must(identity.Generate()), nil)}
	for range 2 {
		if err := first.login(secret); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, "another key", (&person{Client: s.dial(must(identity.Generate()), nil)}).login(secret), api.CodeRefused)
	_, second := s.inviteRescue(bob, "laptop7")
	wantCode(t, "a key of another rescue", first.login(second), api.CodeRefused)
	wantCode(t, "an administrator's key", alice.login(second), api.CodeRefused)
	for _, name := range []string{"rescue of x, invited by bob", "rescue-1"} {
		wantCode(t, name, s.control.Call(t.Context(), "POST", "/v1/admins", api.NewAdmin{Name: name, Role: "viewer"}, nil), api.CodeUsage)
	}
	wantCode(t, "the role by itself", s.control.Call(t.Context(), "POST", "/v1/admins", api.NewAdmin{Name: "x", Role: "rescue"}, nil), api.CodeUsage)
	for _, lifetime := range []time.Duration{0, time.Second, recovery.MaxRescueLifetime + 1} {
		wantCode(t, "lifetime", bob.Call(t.Context(), "POST", "/v1/rescues", api.NewRescue{Volume: "laptop7", Lifetime: lifetime}, nil), api.CodeUsage)
	}
	wantCode(t, "no such volume", bob.Call(t.Context(), "POST", "/v1/rescues", api.NewRescue{Volume: "nosuch", Lifetime: time.Hour}, nil), api.CodeNotFound)
}

// Whoever invited a rescue counts as who asks.
func TestNobodyApprovesWhatTheyInvited(t *testing.T) {
	s, h, bob, alice := cast(t)
	carol := s.person("carol", "approver")
	r := s.rescued(alice, "laptop7")
	a := r.file(s, h)
	for name, err := range map[string]error{
		"the inviter approves":          alice.approve(a, h),
		"the inviter looks at material": alice.Call(t.Context(), "GET", "/v1/requests/"+a.id+"/material", nil, nil),
	} {
		if api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), recovery.ErrInvited.Error()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.approve(a, h); err == nil || err.Error() != errStranger.Message {
		t.Errorf("the rescue approves: %v", err)
	}
	wantCode(t, "helpdesk approves", bob.approve(a, h), api.CodeRefused)
	if rec := s.stored(a); len(rec.Approvals) != 0 {
		t.Fatalf("%+v", rec)
	}
	if err := carol.approve(a, h); err != nil {
		t.Error(err)
	}
}
