package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

func TestBodyTooLong(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	path := "/v1/self/volumes/" + siteVolume
	wantCode(t, "a packet of 3 MB", h.Call(t.Context(), "PUT", path, api.Upload{Packet: make([]byte, 3<<20)}, nil), api.CodeLimit)
	wantCode(t, "a blob of 9 KB", h.Call(t.Context(), "PUT", path, api.Upload{Packet: h.makePacket(s.policy(), siteVolume), Blob: make([]byte, 9<<10)}, nil), api.CodeLimit)
	wantCode(t, "a packet of 600 KB", h.Call(t.Context(), "PUT", path, api.Upload{Packet: make([]byte, 600<<10)}, nil), api.CodeIntegrity)
	for body, part := range map[string]string{
		"{": "not understood", `{"uses":1} x`: "not understood", `{"uses":1}{}`: "after its end", `{"uzes":1}`: "unknown field", `{"uses":"1"}`: "not understood", "": "not understood",
	} {
		got := s.raw(s.person("adam", "admin").key, rawRequest("POST /v1/tokens", body))
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.Contains(got, part) {
			t.Errorf("%q: %q", body, got)
		}
	}
	// and one that announces much and sends nothing is refused before it does
	if got := s.raw(s.people["adam"].key, "POST /v1/tokens HTTP/1.1\r\nHost: s\r\nContent-Length: 99999999999\r\nConnection: close\r\n\r\n"+strings.Repeat(" ", api.MaxBody+1)); !strings.HasPrefix(got, "HTTP/1.1 429 ") {
		t.Errorf("%q", got)
	}
}

func TestThousandAndFirstPacket(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	if err := s.server.store.Update(func(tx *store.Tx) error {
		for n := range escrow.MaxPackets - 2 {
			data := fmt.Appendf(nil, "packet %d", n)
			sum := sha256.Sum256(data)
			entry := escrow.Entry{ID: fmt.Sprintf("%032x", n), KeyID: h.boot.KeyID(), Volume: escrow.Volume{UUID: siteVolume}, Digest: hex.EncodeToString(sum[:]), Size: len(data), State: escrow.Pending}
			if err := tx.PutPacket(entry, data); err != nil {
				return err
			}
		}
		return tx.Audit(store.Event{Time: s.now(), Actor: "test", Action: "test"})
	}); err != nil {
		t.Fatal(err)
	}
	path := "/v1/self/volumes/" + siteVolume
	if err := h.Call(t.Context(), "PUT", path, api.Upload{Packet: h.makePacket(s.policy(), siteVolume)}, nil); err != nil {
		t.Errorf("the 1000th: %v", err)
	}
	err := h.Call(t.Context(), "PUT", path, api.Upload{Packet: h.makePacket(s.policy(), siteVolume)}, nil)
	wantCode(t, "the 1001st", err, api.CodeLimit)
	if err == nil || !strings.Contains(err.Error(), "1000") {
		t.Error(err)
	}
	if err := h.Call(t.Context(), "PUT", path, api.Upload{Packet: h.packet}, nil); err != nil {
		t.Errorf("one that is there, again: %v", err)
	}
	gone := fmt.Sprintf("%032x", 7)
	s.local("DELETE", "/v1/packets/"+gone, api.Delete{ID: gone}, nil)
	if err := h.Call(t.Context(), "PUT", path, api.Upload{Packet: h.makePacket(s.policy(), siteVolume)}, nil); err != nil {
		t.Errorf("in the place of a deleted one: %v", err)
	}
	other := s.enroll("laptop8", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	if reply, _ := s.boot(other); !reply.Released {
		t.Error("another machine does not boot")
	}
}

// One address cannot take the connections of others.
func TestTooManyConnectionsFromOneAddress(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	h.Close()
	var open []net.Conn
	defer func() { closeAll(open) }()
	refused := 0
	for range maxConnectionsAddress + 20 {
		conn := must(net.Dial("tcp", s.address))
		open = append(open, conn)
	}
	time.Sleep(500 * time.Millisecond)
	for _, conn := range open {
		_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			refused++
		}
	}
	if refused < 20 || refused > 25 {
		t.Errorf("%d of %d connections were refused", refused, len(open))
	}
	if _, err := bootConn(s.address, s.key, h.boot); err == nil {
		t.Error("one more was served")
	}
	dialer := &tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}, Config: must(h.boot.ClientTLS(s.key, unlock.Protocol))}
	conn, err := dialer.Dial("tcp", s.address)
	if err != nil {
		t.Fatalf("from another address: %v", err)
	}
	conn.Close()
	closeAll(open)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if reply, err := unlockReply(s, h.boot); err == nil && reply.Released {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("connections that ended are still counted")
		}
	}
}

func TestOrigin(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.7:1":              "192.0.2.7",
		"[::ffff:192.0.2.7]:1":     "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64",
		"[2001:db8:1:2:ffff::1]:1": "2001:db8:1:2::/64",
		"[2001:db8:1:3::1]:1":      "2001:db8:1:3::/64",
		"[fe80::1%lo]:1":           "fe80::1%lo",
		"[fe80::2%lo]:1":           "fe80::2%lo",
	} {
		parsed, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := origin(parsed); err != nil || got != want {
			t.Errorf("%s: %q, %v", address, got, err)
		}
	}
}

// Who dawdles is cut off. The port's own deadlines are too long to wait for,
// so they are looked at, and then made short.
func TestSlowloris(t *testing.T) {
	s := newSite(t)
	port := must(s.server.network(t.Context()))
	if port.ReadHeaderTimeout != headerTimeout || port.ReadTimeout != callTimeout || port.WriteTimeout != callTimeout || port.IdleTimeout != idleTimeout || port.MaxHeaderBytes > 64<<10 {
		t.Errorf("deadlines of the port: %+v", port)
	}
	const short = 200 * time.Millisecond
	port.ReadHeaderTimeout, port.ReadTimeout, port.IdleTimeout = short, short, short
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	go func() { _ = port.ServeTLS(l, "", "") }()
	defer port.Close()
	stranger := must(identity.Generate())
	for name, start := range map[string]string{
		"no handshake": "", "half a header": "GET /v1/status HTTP/1.1\r\nHost: s\r\nX: ",
		"half a body": "POST /v1/login HTTP/1.1\r\nHost: s\r\nContent-Length: 1000\r\n\r\n{", "nothing after the handshake": "-",
	} {
		raw := must(net.Dial("tcp", l.Addr().String()))
		conn := raw
		if start != "" {
			conn = tls.Client(raw, must(stranger.ClientTLS(s.key, api.Protocol)))
		}
		if start == "-" {
			if err := conn.(*tls.Conn).Handshake(); err != nil {
				t.Fatal(err)
			}
		} else if start != "" {
			if _, err := io.WriteString(conn, start); err != nil {
				t.Fatal(err)
			}
		}
		begun := time.Now()
		_ = conn.SetReadDeadline(begun.Add(10 * time.Second))
		reply, err := io.ReadAll(conn)
		if errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begun) > 5*time.Second {
			t.Errorf("%s: still there after %s", name, time.Since(begun))
		}
		if bytes.Contains(reply, []byte("200 OK")) {
			t.Errorf("%s: %q", name, reply)
		}
		raw.Close()
	}
	if got := s.raw(stranger, "GET /v1/status HTTP/1.1\r\nHost: s\r\nX: "+strings.Repeat("x", 100<<10)+"\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 431 ") {
		t.Errorf("a long header: %q", got)
	}
}

// Names and reasons that could deceive on a terminal are refused, and nothing
// of what they came with is done.
func TestControlCharacters(t *testing.T) {
	s := newSite(t)
	h, adam, hugo := s.enroll("laptop7", siteVolume), s.person("adam", "admin"), s.person("hugo", "helpdesk")
	asked := hugo.file(s, h)
	before := len(s.audit())
	for _, evil := range []string{"a\x1b[2Jb", "a\nb", "a\u202eb", "a\u200bb", " a", "a\x00", strings.Repeat("x", 501)} {
		calls := map[string]struct {
			method, path string
			body         any
		}{
			"administrator": {"POST", "/v1/admins", api.NewAdmin{Name: evil, Role: "viewer"}},
			"token's group": {"POST", "/v1/tokens", api.NewToken{Uses: 1, TTL: time.Hour, Group: evil}},
			"reason":        {"POST", "/v1/requests/" + asked.id + "/deny", api.Deny{Reason: evil}},
		}
		for name, set := range map[string]api.MachineSettings{"name": {Name: &evil}, "host": {Host: &evil}, "group": {Group: &evil}, "checker": {Checker: &evil}} {
			calls["machine's "+name] = struct {
				method, path string
				body         any
			}{"POST", "/v1/machines", api.Change{All: true, Set: &set}}
		}
		for name, c := range calls {
			wantCode(t, fmt.Sprintf("%s %.10q", name, evil), adam.Call(context.Background(), c.method, c.path, c.body, nil), api.CodeUsage)
		}
	}
	if n := len(s.audit()) - before; n != 0 {
		t.Errorf("%d entries in the audit log", n)
	}
	var shown api.Request
	s.local("GET", "/v1/requests/"+asked.id, nil, &shown)
	if shown.State != "open" {
		t.Errorf("%+v", shown)
	}
}

// A machine that took another's key ID, or volume, for its name does not stand
// in the way of who means that one.
func TestNamesThatLookLikeOthers(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	s.enroll(string(h.boot.KeyID()), "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	s.enroll(h.packetID(), "2f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	s.enroll("laptop7", "3f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	no := false
	s.change(h, api.Change{Enable: &no})
	if reply, _ := s.boot(h); reply.Released {
		t.Error("it was not this machine that was disabled")
	}
	hugo := s.person("hugo", "helpdesk")
	var head api.PacketHead
	if err := hugo.Call(t.Context(), "GET", "/v1/recoverable?volume="+h.packetID(), nil, &head); err != nil || !bytes.Contains(head.Header, []byte(siteVolume)) {
		t.Errorf("%s, %v", head.Header, err)
	}
	wantCode(t, "two of one name", s.control.Call(t.Context(), "POST", "/v1/machines", api.Change{Machines: []string{"laptop7"}, Enable: &no}, nil), api.CodeAmbiguous)
}

// A boot reply has room for so many volumes; one more would keep the machine
// from booting at all.
func TestMoreVolumesThanABootCarries(t *testing.T) {
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	for n := range unlock.MaxBlobs {
		volume := fmt.Sprintf("%08x-4b5a-4978-8695-a4b3c2d1e0ff", n+1)
		packet, path := h.makePacket(s.policy(), volume), "/v1/self/volumes/"+volume
		if err := h.Call(t.Context(), "PUT", path, api.Upload{Packet: packet, Blob: h.blob}, nil); err != nil {
			t.Fatal(err)
		}
		err := h.Call(t.Context(), "POST", path+"/commit", api.Commit{Packet: must(escrow.Parse(packet)).ID, Boot: true}, nil)
		if n+2 <= unlock.MaxBlobs && err != nil {
			t.Fatal(err)
		} else if n+2 > unlock.MaxBlobs {
			wantCode(t, "one too many", err, api.CodeLimit)
		}
	}
	if reply, _ := s.boot(h); !reply.Released || len(reply.Blobs) != unlock.MaxBlobs {
		t.Errorf("released %t, %d blobs", reply.Released, len(reply.Blobs))
	}
}
