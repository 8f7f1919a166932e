package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// entered lets so many connections of an address in, each of which must find a
// place.
func entered(t *testing.T, c *caps, from string, n int) (all []*counted) {
	t.Helper()
	for range n {
		conn := &counted{caps: c, from: from}
		if _, ok := c.enter(conn); !ok {
			t.Fatalf("%s: refused after %d", from, len(all))
		}
		all = append(all, conn)
	}
	return all
}

func TestCaps(t *testing.T) {
	c := newCaps()
	if c.limits != (limits{all: 4096, strangers: 3072, address: 256, key: 16}) {
		t.Errorf("%+v", c.limits)
	}
	c.limits = limits{all: 8, strangers: 6, address: 3, key: 2}
	a, b := entered(t, c, "a", 3), entered(t, c, "b", 1)
	if _, ok := c.enter(&counted{from: "a"}); ok {
		t.Error("an address got more than its limit")
	}
	other := entered(t, c, "c", 2)
	evicts := func(from string, want *counted) *counted {
		t.Helper()
		conn := &counted{from: from}
		if got, ok := c.enter(conn); !ok || got != want {
			t.Errorf("%s: let in %t, closed %+v", from, ok, got)
		}
		return conn
	}
	d := evicts("d", a[0]) // the oldest of the address that has most
	e := evicts("e", a[1]) // the oldest of two addresses with most
	f := evicts("f", other[0])
	g := evicts("g", a[2]) // all have one: the oldest of all
	c.leave(a[0])
	if len(c.strangers) != 6 {
		t.Errorf("one that was closed before is counted: %d", len(c.strangers))
	}
	for _, conn := range []*counted{d, e, f} {
		c.vouch(conn, "key 1")
		c.vouch(conn, "key 1")
	}
	if c.known != 2 || f.account != strangers {
		t.Errorf("%d of one key, %d", c.known, f.account)
	}
	c.vouch(f, "key 2")
	c.vouch(a[0], "key 2") // it is closed already
	if c.known != 3 || c.from["d"] != 0 {
		t.Errorf("%d are known; %v", c.known, c.from)
	}
	h := entered(t, c, "h", 2)
	evicts("i", h[0]) // strangers have room, but all places are taken
	for _, conn := range append(c.strangers[:0:0], c.strangers...) {
		c.leave(conn)
	}
	for n := range 5 {
		c.vouch(entered(t, c, "x", 1)[0], identity.KeyID(fmt.Sprint(n)))
	}
	if _, ok := c.enter(&counted{from: "y"}); ok || c.known != 8 {
		t.Errorf("a known one was closed for a stranger; %d are known", c.known)
	}
	for _, conn := range []*counted{d, e, f, b[0], g} {
		c.leave(conn)
	}
	if c.known != 5 || len(c.strangers)+len(c.from) != 0 || c.of["key 1"] != 0 || len(c.of) != 5 {
		t.Errorf("%+v", c)
	}
}

// lower makes the caps of a running server small.
func (s *site) lower(l limits) {
	s.server.caps.mu.Lock()
	defer s.server.caps.mu.Unlock()
	s.server.caps.limits = l
}

func fromAddress(last int) *net.Dialer {
	return &net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(last))}}
}

// flood keeps as many connections as it can get, from 16 addresses, half of
// them with a key that nobody knows; closed ones are replaced until ctx ends.
func (s *site) flood(ctx context.Context, each int) (wait func()) {
	config := must(must(identity.Generate()).ClientTLS(s.key, api.Protocol))
	var all sync.WaitGroup
	for n := range 16 * each {
		all.Go(func() {
			for ctx.Err() == nil {
				raw, err := fromAddress(2+n/each).DialContext(ctx, "tcp", s.address)
				if err != nil {
					continue
				}
				stop := context.AfterFunc(ctx, func() { raw.Close() })
				conn := raw
				if n%2 == 0 {
					conn = tls.Client(raw, config)
					_, _ = io.WriteString(conn, "GET /v1/status HTTP/1.1\r\nHost: s\r\nX: ")
				}
				_, _ = io.Copy(io.Discard, conn) // until it is cut off
				stop()
				raw.Close()
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	return all.Wait
}

// Strangers who hold all the connections that they get keep nobody out: neither
// who is known and there, nor who comes.
func TestStrangersHoldAllConnections(t *testing.T) {
	s := newSite(t)
	adam, waits := s.person("adam", "admin"), s.enroll("laptop8", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	h := s.enroll("laptop7", siteVolume)
	no, delay := false, unlock.Duration(5*time.Minute)
	s.change(waits, api.Change{Set: &api.MachineSettings{ApprovedByDefault: &no, ApprovalDelay: &delay}})
	waiting := must(bootConn(s.address, s.key, waits.boot))
	kept := must(tls.Dial("tcp", s.address, must(adam.key.ClientTLS(s.key, api.Protocol))))
	defer kept.Close()
	ask := func() {
		t.Helper()
		_ = kept.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(kept, "GET /v1/status HTTP/1.1\r\nHost: s\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if status, closes, _ := readReply(t, bufio.NewReader(kept)); status != http.StatusOK || closes {
			t.Fatalf("an administrator's connection: %d, closes %t", status, closes)
		}
	}
	ask()
	const share = 48
	s.lower(limits{all: 64, strangers: share, address: 4, key: 16})
	ctx, cancel := context.WithCancel(t.Context())
	defer s.flood(ctx, 4)()
	defer cancel()
	s.awaitStrangers(share)
	for range 10 {
		ask()
		h.Close()
		adam.Close()
		if err := errors.Join(adam.Call(ctx, "GET", "/v1/status", nil, nil), h.Call(ctx, "GET", "/v1/self", nil, nil)); err != nil {
			t.Fatal(err)
		}
		if reply, err := unlockReply(s, h.boot); err != nil || !reply.Released {
			t.Fatalf("a boot: released %t, %v", reply.Released, err)
		}
	}
	s.awaitStrangers(share)
	yes := true
	s.change(waits, api.Change{Approve: &yes})
	if reply, err := unlock.ParseReply(must(bootReply(waiting))); err != nil || !reply.Released {
		t.Errorf("the boot that waited: released %t, %v", reply.Released, err)
	}
}

// awaitStrangers waits until strangers hold so many connections.
func (s *site) awaitStrangers(n int) {
	s.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s.server.caps.mu.Lock()
		got := len(s.server.caps.strangers)
		s.server.caps.mu.Unlock()
		if got == n {
			return
		}
		if got > n || time.Now().After(deadline) {
			s.t.Fatalf("strangers hold %d connections, want %d", got, n)
		}
	}
}

// A stranger's connection ends with the first reply; a known one stays, until
// it is not known any more.
func TestStrangersKeepNoConnection(t *testing.T) {
	s := newSite(t)
	request := "GET /v1/status HTTP/1.1\r\nHost: s\r\n\r\n"
	for name, sent := range map[string]string{
		"a route": request, "nowhere": "GET /x HTTP/1.1\r\nHost: s\r\n\r\n",
		"login": "POST /v1/login HTTP/1.1\r\nHost: s\r\nContent-Length: 2\r\n\r\n{}",
	} {
		got := s.raw(must(identity.Generate()), sent+request) // which fails unless the server closes
		if !strings.Contains(got, "\r\nConnection: close\r\n") || strings.Count(got, "HTTP/1.1") != 1 {
			t.Errorf("%s: %q", name, got)
		}
	}
	rita := s.person("rita", "admin")
	conn := must(tls.Dial("tcp", s.address, must(rita.key.ClientTLS(s.key, api.Protocol))))
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	read := bufio.NewReader(conn)
	for n, status := range []int{200, 200, 403} {
		if n == 2 {
			s.local("DELETE", "/v1/admins", api.Name{Name: "rita"}, nil)
		}
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		if got, closes, _ := readReply(t, read); got != status || closes != (n == 2) {
			t.Errorf("call %d: %d, closes %t", n, got, closes)
		}
	}
	if _, err := read.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("after the removal: %v", err)
	}
}

// What strangers send is kept short.
func TestStrangersBody(t *testing.T) {
	s := newSite(t)
	stranger := s.dial(must(identity.Generate()), nil)
	for _, path := range []string{"/v1/login", "/v1/enroll"} {
		for size, code := range map[int]api.Code{5 << 10: api.CodeRefused, 7 << 10: api.CodeLimit, 1 << 20: api.CodeLimit} {
			err := stranger.Call(t.Context(), "POST", path, api.Login{Secret: make([]byte, size)}, nil)
			if path == "/v1/enroll" && code == api.CodeRefused {
				code = api.CodeIntegrity
			}
			wantCode(t, fmt.Sprintf("%s with %d bytes", path, size), err, code)
		}
	}
}

// A boot identity cannot fill the audit log with boots that are begun and cut
// off.
func TestBootsThatWaitAreNotedSeldom(t *testing.T) {
	s := newSite(t)
	h, _ := s.wait("laptop7")
	noted := func() (n int, at time.Time) {
		for _, action := range s.actions(string(h.boot.KeyID())) {
			if action == "boot.wait" {
				n++
			}
		}
		if err := s.server.store.View(func(tx *store.Tx) error {
			m, err := tx.Machine(h.boot.KeyID())
			at = m.LastApprovalRequest
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n, at
	}
	again := func(logged int) {
		t.Helper()
		conn := must(bootConn(s.address, s.key, h.boot))
		defer conn.Close()
		for deadline := time.Now().Add(5 * time.Second); strings.Count(s.log.String(), "waiting for approval") < logged; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("boot %d does not wait", logged)
			}
		}
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("boot %d was answered: %v", logged, err)
		}
	}
	_, first := noted()
	for n := range 5 {
		again(n + 2)
	}
	if n, at := noted(); n != 1 || first.IsZero() || !at.Equal(first) {
		t.Errorf("%d entries; %s, then %s", n, first, at)
	}
	s.offset.Add(int64(refusalPause))
	again(7)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if n, at := noted(); n == 2 && at.After(first) {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("%d entries; %s, then %s", n, first, at)
		}
	}
}
