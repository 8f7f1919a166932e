package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/record"
	"mandos-escrow/recovery"
	"mandos-escrow/store"
)

func nil2actor(*http.Request) string { return LocalActor() }

// cast is a site with who takes part in a recovery.
func cast(t *testing.T) (s *site, h *host, bob, alice *person) {
	s = newSite(t)
	return s, s.enroll("laptop7", siteVolume), s.person("bob", "helpdesk"), s.person("alice", "approver")
}

// stored is a request as the store has it.
func (s *site) stored(a ask) (rec recovery.Record) {
	s.t.Helper()
	if err := s.server.store.View(func(tx *store.Tx) (err error) {
		rec, err = tx.Request(a.id)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return rec
}

func shares(rec recovery.Record) (n int) {
	for _, a := range rec.Approvals {
		if a.Share != nil {
			n++
		}
	}
	return n
}

func TestRecovery(t *testing.T) {
	s, h, bob, alice := cast(t)
	a := bob.file(s, h)
	if _, err := bob.collect(a); api.CodeOf(err) != api.CodeNotApproved {
		t.Fatalf("collected before: %v", err)
	}
	var m api.Material
	if err := alice.Call(t.Context(), "GET", "/v1/requests/"+a.id+"/material", nil, &m); err != nil || !bytes.Equal(m.Request, a.signed) || len(m.Shares) != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	if err := alice.approve(a, h); err != nil {
		t.Fatal(err)
	}
	out, err := bob.collect(a)
	if err != nil || !bytes.Equal(out.Packet, h.packet) || !bytes.Equal(out.Request, a.signed) || len(out.Approvals) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	share, err := recovery.OpenResealed(out.Approvals[0].Share, a.oneOff, recovery.Digest(a.signed))
	if err != nil {
		t.Fatal(err)
	}
	opened, err := must(escrow.Parse(out.Packet)).Open(escrow.ForPassphrase, []*escrow.Share{share})
	if err != nil || string(opened.Passphrase.Passphrase) != sitePassphrase {
		t.Fatalf("%+v, %v", opened, err)
	}
	if rec := s.stored(a); shares(rec) != 0 || rec.State != recovery.Released {
		t.Errorf("the server keeps %+v", rec)
	}
	if _, err := bob.collect(a); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("a second time: %v", err)
	}
	var p api.Packet
	s.local("GET", "/v1/packets/"+h.packetID(), nil, &p)
	if p.RevealedAt[escrow.ForPassphrase].IsZero() || !p.RevealedAt[escrow.ForVolumeKey].IsZero() {
		t.Errorf("revealed: %v", p.RevealedAt)
	}
	want := []string{"recover.request", "recover.release.refused", "recover.view", "recover.approve", "recover.release", "recover.release.refused"}
	if got := s.actions(a.id); !slices.Equal(got, want) {
		t.Errorf("audit: %v", got)
	}
	secretsAreNowhere(t, s, share)
}

// secretsAreNowhere looks for what a packet holds, and for what opens it, in
// every form, in all files of the server and in its log.
func secretsAreNowhere(t *testing.T, s *site, share *escrow.Share) {
	t.Helper()
	s.stop()
	for name, secret := range map[string][]byte{
		"recovery passphrase": []byte(sitePassphrase), "volume key": siteVolumeKey, "content key": share.Data, "master key's passphrase": []byte("correct-horse-battery-staple"),
	} {
		forms := [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(strings.ToUpper(hex.EncodeToString(secret)))}
		for shift := range 3 {
			text := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), secret...))
			forms = append(forms, []byte(text[4:len(text)-4]))
		}
		for _, form := range forms {
			if strings.Contains(s.log.String(), string(form)) {
				t.Errorf("the %s stands in the log", name)
			}
			if err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() && contains(t, path, form) {
					t.Errorf("the %s stands in %s", name, path)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Each refusal of a recovery has its own name in the log, and changes nothing.
func TestRefusedRecoveries(t *testing.T) {
	s, h, bob, alice := cast(t)
	vera, carol, hugo := s.person("vera", "viewer"), s.person("carol", "approver"), s.person("hugo", "helpdesk")
	a, own := bob.file(s, h), alice.file(s, h)
	other := bob.file(s, h)
	ctx := context.Background()
	path := "/v1/requests/" + a.id
	replayed := alice.approval(other, h)
	stolen := carol.approval(a, h)
	foreign := alice.approval(a, h)
	foreign.Approval = bytes.Replace(foreign.Approval, []byte("alice"), []byte("alicE"), 1)
	for name, c := range map[string]struct {
		err    error
		code   api.Code
		about  ask
		action string
	}{
		"a viewer requests":                {vera.Call(ctx, "POST", "/v1/requests", api.Signed{Signed: newAsk(vera, h, escrow.ForPassphrase, time.Hour, s.now()).signed}, nil), api.CodeRefused, ask{}, "recover.request.refused"},
		"somebody files another's request": {hugo.Call(ctx, "POST", "/v1/requests", api.Signed{Signed: newAsk(bob, h, escrow.ForPassphrase, time.Hour, s.now()).signed}, nil), api.CodeRefused, ask{}, "recover.request.refused"},
		"helpdesk approves":                {hugo.approve(a, h), api.CodeRefused, a, "recover.approve.refused"},
		"who asked approves":               {alice.approve(own, h), api.CodeRefused, own, "recover.approve.refused"},
		"who asked looks at the share":     {alice.Call(ctx, "GET", "/v1/requests/"+own.id+"/material", nil, nil), api.CodeRefused, own, "recover.approve.refused"},
		"an approval that another signed":  {alice.Call(ctx, "POST", path+"/approve", stolen, nil), api.CodeRefused, a, "recover.approve.refused"},
		"an approval of another request":   {alice.Call(ctx, "POST", path+"/approve", replayed, nil), api.CodeIntegrity, ask{}, ""},
		"a changed approval":               {alice.Call(ctx, "POST", path+"/approve", foreign, nil), api.CodeIntegrity, ask{}, ""},
		"collected too early":              {func() error { _, err := bob.collect(a); return err }(), api.CodeNotApproved, a, "recover.release.refused"},
		"another collects":                 {func() error { _, err := alice.collect(a); return err }(), api.CodeRefused, a, "recover.release.refused"},
		"a viewer collects":                {func() error { _, err := vera.collect(a); return err }(), api.CodeRefused, a, "recover.release.refused"},
		"helpdesk denies another's":        {hugo.Call(ctx, "POST", path+"/deny", api.Deny{}, nil), api.CodeRefused, a, "recover.deny.refused"},
		"a viewer denies":                  {vera.Call(ctx, "POST", path+"/deny", api.Deny{}, nil), api.CodeRefused, a, "recover.deny.refused"},
		"a machine changes machines":       {h.Call(ctx, "POST", "/v1/machines", api.Change{All: true, Remove: true}, nil), api.CodeRefused, ask{}, "machine.change.refused"},
		"an approver disables":             {alice.Call(ctx, "POST", "/v1/machines", api.Change{All: true, Enable: new(bool)}, nil), api.CodeRefused, ask{}, "machine.change.refused"},
		"a viewer exports":                 {vera.Stream(ctx, "/v1/packets/"+h.packetID()+"/file", &bytes.Buffer{}), api.CodeRefused, ask{id: h.packetID()}, "packet.export.refused"},
	} {
		wantCode(t, name, c.err, c.code)
		if c.about.id != "" && !slices.Contains(s.actions(c.about.id), c.action) {
			t.Errorf("%s: no %s in the log of it: %v", name, c.action, s.actions(c.about.id))
		}
		if c.about.id == "" && c.action != "" && !slices.ContainsFunc(s.audit(), func(e store.Event) bool { return e.Action == c.action }) {
			t.Errorf("%s: no %s in the log", name, c.action)
		}
	}
	for _, a := range []ask{a, own, other} {
		if rec := s.stored(a); rec.State != recovery.Open || len(rec.Approvals) != 0 {
			t.Errorf("%+v", rec)
		}
	}
	if reply, _ := s.boot(h); !reply.Released {
		t.Error("a refused call changed a machine")
	}
	if head, err := store.VerifyChain(s.audit(), store.Head{}); err != nil || head.Seq < 20 {
		t.Errorf("the log is no chain: %+v, %v", head, err)
	}
}

// What is asked for must be there, bit for bit, and its times must fit.
func TestRequestsThatDoNotFit(t *testing.T) {
	s, h, bob, _ := cast(t)
	other := newHost(s, "laptop8") // its packet is not on the server
	other.packet = other.makePacket(s.policy(), siteVolume)
	renamed := *h
	file := func(signed []byte) error {
		return bob.Call(t.Context(), "POST", "/v1/requests", api.Signed{Signed: signed}, nil)
	}
	ask := newAsk(bob, &renamed, escrow.ForPassphrase, time.Hour, s.now())
	reSigned := func(old, replacement string) []byte {
		body := ask.signed[:bytes.Index(ask.signed, []byte("signature: "))]
		if !bytes.Contains(body, []byte(old)) {
			t.Fatalf("no %q", old)
		}
		body = bytes.Replace(body, []byte(old), []byte(replacement), 1)
		return append(bytes.Clone(body), fmt.Appendf(nil, "signature: %s\n", base64.StdEncoding.EncodeToString(bob.key.Sign("request", body)))...)
	}
	for name, c := range map[string]struct {
		signed []byte
		code   api.Code
	}{
		"another packet":         {newAsk(bob, other, escrow.ForPassphrase, time.Hour, s.now()).signed, api.CodeNotFound},
		"another machine's name": {reSigned("machine-name: laptop7", "machine-name: laptop9"), api.CodeConflict},
		"another volume":         {reSigned(siteVolume, "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"), api.CodeConflict},
		"another payload":        {reSigned("payload: passphrase", "payload: volume-key"), api.CodeConflict},
		"no payload":             {reSigned("payload: passphrase", "payload: everything"), api.CodeNotFound},
		"of tomorrow":            {newAsk(bob, h, escrow.ForPassphrase, time.Hour, s.now().Add(24*time.Hour)).signed, api.CodeUsage},
		"of yesterday":           {newAsk(bob, h, escrow.ForPassphrase, time.Hour, s.now().Add(-24*time.Hour)).signed, api.CodeUsage},
		"changed":                {bytes.Replace(ask.signed, []byte("forgot"), []byte("forgoT"), 1), api.CodeIntegrity},
		"cut":                    {ask.signed[:200], api.CodeIntegrity},
		"empty":                  {nil, api.CodeIntegrity},
	} {
		wantCode(t, name, file(c.signed), c.code)
	}
	if err := file(ask.signed); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "twice", file(ask.signed), api.CodeConflict)
}

// Two releases at once, many times: exactly one wins, and the other is told so.
func TestTwoReleasesAtOnce(t *testing.T) {
	s, h, bob, alice := cast(t)
	again := s.dial(bob.key, nil) // a second connection
	for range 10 {
		a := bob.file(s, h)
		var wait sync.WaitGroup
		if err := alice.approve(a, h); err != nil {
			t.Fatal(err)
		}
		errs := make([]error, 8)
		start := make(chan struct{})
		for n := range errs {
			client := []*api.Client{bob.Client, again}[n%2]
			wait.Go(func() {
				<-start
				errs[n] = client.Call(context.Background(), "POST", "/v1/requests/"+a.id+"/release", nil, nil)
			})
		}
		close(start)
		wait.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				wantCode(t, "a loser", err, api.CodeRefused)
			}
		}
		if got := s.actions(a.id); won != 1 || len(slices.DeleteFunc(got, func(a string) bool { return a != "recover.release" })) != 1 {
			t.Fatalf("%d releases won: %v", won, got)
		}
	}
}

// Approving and releasing race too: a release has all shares or is refused.
func TestApproveAndReleaseAtOnce(t *testing.T) {
	s, h, bob, alice := cast(t)
	for range 10 {
		a := bob.file(s, h)
		var wait sync.WaitGroup
		wait.Go(func() {
			if err := alice.approve(a, h); err != nil {
				t.Error(err)
			}
		})
		for {
			out, err := bob.collect(a)
			if err == nil {
				if len(out.Approvals) != 1 || len(out.Approvals[0].Share) == 0 {
					t.Errorf("released without a share: %+v", out)
				}
				break
			}
			if api.CodeOf(err) != api.CodeNotApproved {
				t.Fatal(err)
			}
		}
		wait.Wait()
	}
}

// Shares of requests that are over are deleted, also when nobody asks.
func TestSharesAreDeleted(t *testing.T) {
	s, h, bob, alice := cast(t)
	denied, expired, withdrawn := bob.file(s, h), bob.file(s, h), bob.file(s, h)
	for _, a := range []ask{denied, expired, withdrawn} {
		if err := alice.approve(a, h); err != nil {
			t.Fatal(err)
		}
		if shares(s.stored(a)) != 1 {
			t.Fatal("no share")
		}
	}
	if err := alice.Call(t.Context(), "POST", "/v1/requests/"+denied.id+"/deny", api.Deny{Reason: "it was not her"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := bob.Call(t.Context(), "POST", "/v1/requests/"+withdrawn.id+"/deny", api.Deny{}, nil); err != nil {
		t.Fatal(err)
	}
	s.offset.Store(int64(time.Hour + time.Second))
	if _, err := bob.collect(expired); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("collected what had expired: %v", err)
	}
	if err := s.server.expireRequests(s.now()); err != nil {
		t.Fatal(err)
	}
	for a, state := range map[*ask]recovery.State{&denied: recovery.Denied, &expired: recovery.Expired, &withdrawn: recovery.Denied} {
		if rec := s.stored(*a); shares(rec) != 0 || rec.State != state {
			t.Errorf("%s: %+v", state, rec)
		}
	}
	// and no clock that is set back brings the request back
	s.offset.Store(0)
	if _, err := bob.collect(expired); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("an expired request was revived: %v", err)
	}
	if got := s.actions(expired.id); !slices.Contains(got, "recover.expire") {
		t.Errorf("audit: %v", got)
	}
	if err := s.server.expireRequests(s.now()); err != nil {
		t.Fatal(err)
	}
}

// The sweep runs when the server starts: a request that expired while it was
// down has no share afterwards.
func TestSweepAtTheStart(t *testing.T) {
	s, h, bob, alice := cast(t)
	a := bob.file(s, h)
	if err := alice.approve(a, h); err != nil {
		t.Fatal(err)
	}
	s.offset.Store(int64(2 * time.Hour))
	s.restart()
	for deadline := time.Now().Add(5 * time.Second); shares(s.stored(a)) != 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the share stays")
		}
	}
}

func TestRemovedAdministrators(t *testing.T) {
	s, h, bob, alice := cast(t)
	a := bob.file(s, h)
	s.local("DELETE", "/v1/admins", api.Name{Name: "alice"}, nil)
	wantCode(t, "a removed approver approves", alice.approve(a, h), api.CodeRefused)
	if err := s.person("carol", "approver").approve(a, h); err != nil {
		t.Fatal(err)
	}
	s.local("DELETE", "/v1/admins", api.Name{Name: "bob"}, nil)
	_, err := bob.collect(a)
	wantCode(t, "a removed requester collects", err, api.CodeRefused)
	wantCode(t, "the name again", s.control.Call(t.Context(), "POST", "/v1/admins", api.NewAdmin{Name: "bob", Role: "admin"}, nil), api.CodeConflict)
	wantCode(t, "the key under a new name", bob.login(s.invite("robert", "helpdesk")), api.CodeRefused)
	wantCode(t, "removed twice", s.control.Call(t.Context(), "DELETE", "/v1/admins", api.Name{Name: "bob"}, nil), api.CodeNotFound)
}

// An invite that expired is replaced; a name in use is not given again.
func TestInvites(t *testing.T) {
	s := newSite(t)
	expired := s.invite("anna", "viewer")
	again := func() error {
		return s.control.Call(t.Context(), "POST", "/v1/admins", api.NewAdmin{Name: "anna", Role: "admin"}, nil)
	}
	wantCode(t, "a second invite", again(), api.CodeConflict)
	s.offset.Store(int64(inviteLifetime))
	second := s.invite("anna", "approver")
	s.offset.Store(0)
	anna := &person{Client: s.dial(newHost(s, "").running, nil)}
	wantCode(t, "the invite that was replaced", anna.login(expired), api.CodeRefused)
	for range 2 { // a reply may get lost
		if err := anna.login(second); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, "with another key", (&person{Client: s.dial(newHost(s, "").running, nil)}).login(second), api.CodeRefused)
	s.offset.Store(2 * int64(inviteLifetime))
	wantCode(t, "a third", again(), api.CodeConflict)
	var out []api.AdminInfo
	s.local("GET", "/v1/admins", nil, &out)
	if len(out) != 1 || out[0].Role != "approver" {
		t.Errorf("%+v", out)
	}
}

// The master key is replaced by itself under another passphrase, and by
// nothing else.
func TestMasterKey(t *testing.T) {
	s := newSite(t)
	master, private := siteMaster()
	adam := s.person("adam", "admin")
	put := func(text []byte) error {
		return adam.Call(t.Context(), "PUT", "/v1/master", api.Text{Text: string(text)}, nil)
	}
	wantCode(t, "not protected", put(must(master.Armor())), api.CodeUsage)
	wantCode(t, "public half", put(must(master.Public().Armor())), api.CodeUsage)
	wantCode(t, "another key", put(must(askedOneOff().ArmorProtected([]byte("a long passphrase here")))), api.CodeRefused)
	wantCode(t, "no key", put([]byte("x")), api.CodeIntegrity)
	var out api.Text
	if err := adam.Call(t.Context(), "POST", "/v1/master/export", nil, &out); err != nil || out.Text != string(private) {
		t.Errorf("%v", err)
	}
	if err := put(must(master.ArmorProtected([]byte("another-passphrase-9")))); err != nil {
		t.Error(err)
	}
	if record.Kind([]byte(out.Text)) != "" {
		t.Error("not an armored key")
	}
}
