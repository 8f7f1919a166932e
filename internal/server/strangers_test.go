package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

func unlockReply(s *site, key *identity.Key) (unlock.Reply, error) {
	conn, err := bootConn(s.address, s.key, key)
	if err != nil {
		return unlock.Reply{}, err
	}
	data, err := bootReply(conn)
	if err != nil {
		return unlock.Reply{}, err
	}
	return unlock.ParseReply(data)
}

var dateLine = regexp.MustCompile(`(?m)^Date: .*\r\n`)

// raw sends one request as it stands and returns every byte of the reply, but
// for the date.
func (s *site) raw(key *identity.Key, request string) string {
	s.t.Helper()
	conn := must(tls.Dial("tcp", s.address, must(key.ClientTLS(s.key, api.Protocol))))
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		s.t.Fatal(err)
	}
	reply, err := io.ReadAll(conn)
	if err != nil {
		s.t.Fatalf("%q: %v", request, err)
	}
	return dateLine.ReplaceAllString(string(reply), "")
}

func rawRequest(line, body string, headers ...string) string {
	return fmt.Sprintf("%s HTTP/1.1\r\nHost: server\r\nConnection: close\r\nContent-Length: %d\r\n%s\r\n%s", line, len(body), strings.Join(headers, ""), body)
}

// nobodies are all kinds of keys that mean nothing to the server.
func (s *site) nobodies() map[string]*identity.Key {
	s.t.Helper()
	h := s.enroll("laptop7", siteVolume)
	gone := s.enroll("laptop8", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	s.change(gone, api.Change{Remove: true})
	removed := s.person("rita", "admin")
	s.local("DELETE", "/v1/admins", api.Name{Name: "rita"}, nil)
	s.invite("ivan", "admin") // who never logged in
	return map[string]*identity.Key{
		"a new key": must(identity.Generate()), "a boot identity": h.boot, "a removed machine": gone.running,
		"a removed machine's boot identity": gone.boot, "a removed administrator": removed.key,
	}
}

// Strangers are told the same, byte for byte, whoever they are, whatever they
// ask for and why ever it is refused.
func TestStrangersAreToldNothing(t *testing.T) {
	s := newSite(t)
	nobodies := s.nobodies()
	want := s.raw(nobodies["a new key"], rawRequest("GET /v1/status", ""))
	if !strings.HasPrefix(want, "HTTP/1.1 403 ") || !strings.HasSuffix(want, `{"code":"refused","message":"refused"}`+"\n") || strings.Contains(want, api.HeaderHead) {
		t.Fatalf("%q", want)
	}
	lines := []string{
		"GET /", "GET /v1", "GET /v2/status", "POST /v1/status", "GET /v1/status/", "GET //v1/status", "GET /v1/../v1/status", "GET /v1/%2e%2e/x",
		"OPTIONS *", "OPTIONS /v1/status", "TRACE /", "PATCH /v1/admins", "GET /v1/machines?machine=laptop7", "GET /v1/packets/x%00y", "GET /v1/login",
	}
	for _, rt := range routes {
		if rt.access != anyone {
			lines = append(lines, strings.NewReplacer("{id}", "0000", "{uuid}", siteVolume).Replace(rt.pattern))
		}
	}
	check := func(when string) {
		t.Helper()
		for name, key := range nobodies {
			for _, line := range lines {
				if got := s.raw(key, rawRequest(line, "{}")); got != want {
					t.Errorf("%s, %s, %s: %q", when, name, line, got)
				}
			}
		}
	}
	check("running")
	for name, key := range nobodies {
		if err := s.dial(key, nil).Call(t.Context(), "PUT", "/v1/self/volumes/"+siteVolume, api.Upload{Packet: make([]byte, 150_000)}, nil); err == nil || err.Error() != "refused" {
			t.Errorf("%s, a long body: %v", name, err)
		}
	}
	if err := s.server.store.Update(func(tx *store.Tx) error {
		if err := store.Unconfirmed.Put(tx, "a test"); err != nil {
			return err
		}
		return tx.Audit(store.Event{Time: s.now(), Actor: "test", Action: "test"})
	}); err != nil {
		t.Fatal(err)
	}
	for _, rt := range routes {
		if rt.access == anyone {
			lines = append(lines, rt.pattern)
		}
	}
	check("unconfirmed")
}

// The two routes that anybody may call say nothing of administrators and
// machines to who has no secret of theirs.
func TestNoOracleForStrangers(t *testing.T) {
	s := newSite(t)
	nobodies := s.nobodies()
	used, expired, removed := s.invite("used", "viewer"), s.invite("expired", "viewer"), s.invite("removed", "viewer")
	if err := (&person{Client: s.dial(must(identity.Generate()), nil)}).login(used); err != nil {
		t.Fatal(err)
	}
	s.local("DELETE", "/v1/admins", api.Name{Name: "removed"}, nil)
	s.offset.Store(int64(inviteLifetime))
	logins := map[string][]byte{"unknown": make([]byte, 16), "empty": nil, "used": used, "expired": expired, "removed": removed}
	var first string
	for _, key := range nobodies {
		for name, secret := range logins {
			got := s.raw(key, rawRequest("POST /v1/login", string(must(json.Marshal(api.Login{Secret: secret})))))
			if first == "" {
				first = got
			}
			if got != first || !strings.HasPrefix(got, "HTTP/1.1 403 ") {
				t.Errorf("login, %s: %q", name, got)
			}
		}
	}
	first = ""
	for name, h := range map[string]*host{"of a new machine": newHost(s, "new"), "of a name that is there": newHost(s, "laptop7")} {
		for _, secret := range [][]byte{nil, make([]byte, 16), used} {
			registration := must(api.Registration{Name: h.name, MachineIDHash: strings.Repeat("ab", 32), Boot: h.boot.Public(), Running: h.running.KeyID()}.Sign(h.boot))
			got := s.raw(h.running, rawRequest("POST /v1/enroll", string(must(json.Marshal(api.Enroll{Secret: secret, Registration: registration})))))
			if first == "" {
				first = got
			}
			if got != first || !strings.HasPrefix(got, "HTTP/1.1 403 ") {
				t.Errorf("enroll, registration %s: %q", name, got)
			}
		}
	}
}

// Whoever may not boot is told the same bytes, known or not.
func TestBootRefusalsLookTheSame(t *testing.T) {
	s := newSite(t)
	nobodies := s.nobodies()
	no, hour := false, unlock.Duration(time.Hour)
	for name, change := range map[string]api.Change{
		"disabled": {Enable: &no}, "denied": {Approve: &no, Set: &api.MachineSettings{ApprovalDuration: &hour}},
		"not approved by default": {Set: &api.MachineSettings{ApprovedByDefault: &no}},
	} {
		h := s.enroll(name, strings.Replace(siteVolume, "0f1e", fmt.Sprintf("%04x", len(nobodies)), 1))
		s.change(h, change)
		nobodies[name] = h.boot
	}
	half := newHost(s, "half enrolled")
	if err := half.register(s.token(1)); err != nil {
		t.Fatal(err)
	}
	nobodies["half enrolled"] = half.boot
	delete(nobodies, "a boot identity")
	want := must(unlock.Reply{}.Bytes())
	for name, key := range nobodies {
		got, err := bootReply(must(bootConn(s.address, s.key, key)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, reason := range []string{unlock.ReasonUnknown, unlock.ReasonDisabled, unlock.ReasonDenied, unlock.ReasonNotApproved} {
		if !strings.Contains(s.log.String(), fmt.Sprintf("why=%q", reason)) && !strings.Contains(s.log.String(), "why="+reason) {
			t.Errorf("the log does not say %q", reason)
		}
	}
}

// What strangers cause costs no memory and no place on the disk that stays.
func TestStrangersLeaveNothing(t *testing.T) {
	s := newSite(t)
	before := len(s.audit())
	for range 20 {
		key := must(identity.Generate())
		if reply := must(unlockReply(s, key)); reply.Released {
			t.Fatal("released")
		}
		conn := must(tls.Dial("tcp", s.address, must(key.ClientTLS(s.key, unlock.Protocol))))
		if _, err := conn.Write([]byte("\x00\x00\x00\x04junk")); err != nil {
			t.Fatal(err)
		}
		if reply := must(unlock.ParseReply(must(bootReply(conn)))); reply.Released {
			t.Fatal("released")
		}
		_ = s.dial(key, nil).Call(context.Background(), "POST", "/v1/requests", struct{}{}, nil)
	}
	if after := len(s.audit()); after != before {
		t.Errorf("%d entries in the audit log", after-before)
	}
	s.server.refusals.mu.Lock()
	defer s.server.refusals.mu.Unlock()
	if n := len(s.server.refusals.last); n != 0 {
		t.Errorf("%d strangers are remembered", n)
	}
}

// A machine cannot fill the audit log with refusals either, also when it takes
// turns with their reasons.
func TestRefusalsOfAMachineAreWrittenNowAndThen(t *testing.T) {
	s := newSite(t)
	h, no := s.enroll("laptop7", siteVolume), false
	s.change(h, api.Change{Enable: &no})
	before := len(s.audit())
	for range 5 {
		s.boot(h)
		conn := must(tls.Dial("tcp", s.address, must(h.boot.ClientTLS(s.key, unlock.Protocol))))
		_, _ = conn.Write([]byte("\x00\x00\x00\x04junk"))
		_, _ = bootReply(conn)
		wantCode(t, "a machine requests", h.Call(t.Context(), "POST", "/v1/requests", struct{}{}, nil), api.CodeRefused)
		wantCode(t, "a machine changes", h.Call(t.Context(), "POST", "/v1/machines", struct{}{}, nil), api.CodeRefused)
	}
	if n := len(s.audit()) - before; n != 4 {
		t.Errorf("%d entries for 4 kinds of refusals: %v", n, s.actions(string(h.boot.KeyID())))
	}
	s.offset.Store(int64(refusalPause))
	s.boot(h)
	if n := len(s.audit()) - before; n != 5 {
		t.Errorf("%d entries after the pause", n)
	}
}
