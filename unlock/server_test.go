package unlock

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mandos-escrow/internal/identity"
)

var refusedFrame = framed(len(refusedText), refusedText)

func TestRefusedFrameIsAsDocumented(t *testing.T) {
	if len(refusedFrame) != 48 || !bytes.HasPrefix(refusedFrame, []byte{0, 0, 0, 0x2c}) {
		t.Errorf("%d bytes: %x", len(refusedFrame), refusedFrame[:4])
	}
}

// serveOnce runs Serve for one raw exchange, over a pipe.
func serveOnce(s *site, key *identity.Key, data []byte) (reply []byte, served error) {
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(context.Background(), tls.Server(far, s.configs[0]), s.sources[0]) }()
	reply, err := exchange(near, key, s.serverKeys[0].KeyID(), data)
	return reply, errors.Join(err, <-done)
}

func requestFrame() []byte { return framed(len(goodRequest), goodRequest) }

func TestServeReleases(t *testing.T) {
	s := newSite(t, 1, 1)
	got, err := serveOnce(s, s.keys.TLS, requestFrame())
	if err != nil {
		t.Fatal(err)
	}
	reply, err := ParseReply(got[frameHeader:])
	if err != nil || !reply.Released || !slices.Equal(s.sources[0].nonces, []string{reply.Nonce}) || !bytes.Equal(reply.Blobs[0], s.blobs[0]) {
		t.Errorf("%+v, %v", reply, err)
	}
}

func TestAllRefusalsAreTheSameBytes(t *testing.T) {
	approvalOnly := func(m Machine) Machine { m.ApprovedByDefault = false; return m }
	for name, c := range map[string]struct {
		prepare func(s *site)
		request string
		reason  string
	}{
		"unknown key":     {func(s *site) { s.sources[0].machine.KeyID = testKeyID }, "", ReasonUnknown},
		"disabled":        {func(s *site) { s.sources[0].machine = s.machine().Disable(epoch, "stolen") }, "", ReasonDisabled},
		"timed out":       {func(s *site) { s.sources[0].machine.Expires = epoch }, "", ReasonTimedOut},
		"denied":          {func(s *site) { s.sources[0].machine.Approval.Until = time.Now().Add(time.Hour) }, "", ReasonDenied},
		"not approved":    {func(s *site) { s.sources[0].machine = approvalOnly(s.machine()) }, "", ReasonNotApproved},
		"store broken":    {func(s *site) { s.sources[0].lookup = errors.New("disk") }, "", ReasonNotFound},
		"cannot commit":   {func(s *site) { s.sources[0].release = errors.New("disk full") }, "", ReasonNotReleased},
		"malformed":       {nil, string(framed(5, "hello")), ReasonMalformed},
		"too long":        {nil, string(framed(MaxRequest+1, "")), ReasonMalformed},
		"empty":           {nil, string(framed(0, "")), ReasonMalformed},
		"another version": {nil, string(framed(len(goodRequest), strings.Replace(goodRequest, "boot: 1", "boot: 2", 1))), ReasonMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, 1, 1)
			if c.prepare != nil {
				c.prepare(s)
			}
			request := requestFrame()
			if c.request != "" {
				request = []byte(c.request)
			}
			got, err := serveOnce(s, s.keys.TLS, request)
			if !errors.Is(err, ErrRefused) || !bytes.Equal(got, refusedFrame) {
				t.Errorf("%q, %v", got, err)
			}
			if source := s.sources[0]; !slices.Equal(source.reasons, []string{c.reason}) || len(source.nonces) != 0 {
				t.Errorf("reasons %q, releases %q", source.reasons, source.nonces)
			}
		})
	}
}

func TestNothingIsSentThatCannotBeEncoded(t *testing.T) {
	s := newSite(t, 1, 1)
	s.sources[0].blobs = make([][]byte, MaxBlobs+1)
	got, err := serveOnce(s, s.keys.TLS, requestFrame())
	if err == nil || !bytes.Equal(got, refusedFrame) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestApproval runs a request that waits, and an event at second 5.
func TestApproval(t *testing.T) {
	for name, c := range map[string]struct {
		byDefault bool
		timeout   int
		event     func(Machine) Machine
		released  bool
		took      time.Duration
	}{
		"approved":                  {false, 0, func(m Machine) Machine { return m.Approve(time.Now(), "alice") }, true, 5 * time.Second},
		"denied":                    {true, 0, func(m Machine) Machine { return m.Deny(time.Now(), "alice") }, false, 5 * time.Second},
		"disabled":                  {true, 0, func(m Machine) Machine { return m.Disable(time.Now(), "stolen") }, false, 5 * time.Second},
		"nobody cares, by default":  {true, 0, nil, true, 30 * time.Second},
		"nobody cares, not default": {false, 0, nil, false, 30 * time.Second},
		"another change":            {true, 0, func(m Machine) Machine { m.Host = "h"; return m }, true, 30 * time.Second},
		"delay made longer":         {true, 0, func(m Machine) Machine { m.ApprovalDelay = seconds(60); return m }, true, 60 * time.Second},
		"times out meanwhile":       {true, 12, nil, false, 12 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t, 1, 1)
				settings := Settings{ApprovedByDefault: c.byDefault, ApprovalDelay: seconds(30), ApprovalDuration: seconds(10), Timeout: seconds(c.timeout)}
				source := s.sources[0]
				source.machine = Machine{KeyID: s.keys.TLS.KeyID(), Settings: settings}.Enable(time.Now())
				if c.event != nil {
					time.AfterFunc(5*time.Second, func() { source.change(c.event) })
				}
				start := time.Now()
				got, err := serveOnce(s, s.keys.TLS, requestFrame())
				if released := err == nil; released != c.released || !released && !bytes.Equal(got, refusedFrame) {
					t.Errorf("%q, %v", got, err)
				}
				if took := time.Since(start); took != c.took {
					t.Errorf("took %v, want %v", took, c.took)
				}
				if len(source.waiting) != 1 {
					t.Errorf("told to wait %d times", len(source.waiting))
				}
			})
		})
	}
}

// waiting starts a request that waits for approval, and returns the client's
// end and the result of Serve.
func waiting(t *testing.T, ctx context.Context, s *site) (*tls.Conn, <-chan error) {
	t.Helper()
	s.sources[0].machine.ApprovalDelay = seconds(300)
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, tls.Server(far, s.configs[0]), s.sources[0]) }()
	config, err := s.keys.TLS.ClientTLS(s.serverKeys[0].KeyID(), Protocol)
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(near, config)
	if _, err := conn.Write(requestFrame()); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return conn, done
}

func TestWaitEnds(t *testing.T) {
	for name, c := range map[string]struct {
		act     func(conn *tls.Conn, stop func())
		reasons []string
		reply   []byte
	}{
		"when the client closes":       {func(conn *tls.Conn, _ func()) { conn.Close() }, []string{ReasonGone}, nil},
		"when the connection breaks":   {func(conn *tls.Conn, _ func()) { conn.NetConn().Close() }, []string{ReasonGone}, nil},
		"when the client says more":    {func(conn *tls.Conn, _ func()) { _, _ = conn.Write([]byte("x")) }, []string{ReasonGone}, refusedFrame},
		"without a word at a shutdown": {func(_ *tls.Conn, stop func()) { stop() }, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				s := newSite(t, 1, 1)
				conn, done := waiting(t, ctx, s)
				defer conn.NetConn().Close()
				start := time.Now()
				c.act(conn, stop)
				got, _ := io.ReadAll(conn)
				if err := <-done; err == nil || time.Since(start) > 10*time.Second {
					t.Errorf("%v after %v", err, time.Since(start))
				}
				if !bytes.Equal(got, c.reply) || !slices.Equal(s.sources[0].reasons, c.reasons) || len(s.sources[0].nonces) != 0 {
					t.Errorf("reply %q, reasons %q", got, s.sources[0].reasons)
				}
			})
		})
	}
}

// TestSlowClients: nobody holds a connection longer than the limits say.
func TestSlowClients(t *testing.T) {
	for name, act := range map[string]func(s *site, conn net.Conn){
		"no handshake": func(*site, net.Conn) {},
		"half a handshake": func(_ *site, conn net.Conn) {
			_, _ = conn.Write([]byte{22, 3, 1, 0, 200})
		},
		"no request": func(s *site, conn net.Conn) {
			_ = client(s, conn).Handshake()
		},
		"a byte every second": func(s *site, conn net.Conn) {
			tlsConn := client(s, conn)
			for _, b := range requestFrame() {
				if _, err := tlsConn.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		},
		"reply not read": func(s *site, conn net.Conn) {
			_, _ = client(s, conn).Write(requestFrame())
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t, 1, 1)
				near, far := net.Pipe()
				defer near.Close()
				go act(s, near)
				start := time.Now()
				err := Serve(t.Context(), tls.Server(far, s.configs[0]), s.sources[0])
				if took := time.Since(start); err == nil || took > requestTime+replyTime+5*time.Second {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}

func client(s *site, conn net.Conn) *tls.Conn {
	config, err := s.keys.TLS.ClientTLS(s.serverKeys[0].KeyID(), Protocol)
	if err != nil {
		panic(err)
	}
	return tls.Client(conn, config)
}

// TestNotAsked: a client that tried two addresses closes one connection.
func TestNotAsked(t *testing.T) {
	s := newSite(t, 1, 1)
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(t.Context(), tls.Server(far, s.configs[0]), s.sources[0]) }()
	conn := client(s, near)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := <-done; !errors.Is(err, errNothingAsked) || len(s.sources[0].reasons) != 0 {
		t.Errorf("%v, reasons %q", err, s.sources[0].reasons)
	}
}

func TestWithoutALPN(t *testing.T) {
	s := newSite(t, 1, 1)
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(t.Context(), tls.Server(far, s.configs[0]), s.sources[0]) }()
	config, err := s.keys.TLS.ClientTLS(s.serverKeys[0].KeyID(), Protocol)
	if err != nil {
		t.Fatal(err)
	}
	config.NextProtos, config.VerifyConnection = nil, nil
	conn := tls.Client(near, config)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if len(got) != 0 || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := <-done; !errors.Is(err, ErrProtocol) || s.sources[0].lookedUp != 0 {
		t.Errorf("%v, %d lookups", err, s.sources[0].lookedUp)
	}
}
