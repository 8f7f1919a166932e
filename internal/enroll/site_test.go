package enroll

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/server"
	"mandos-escrow/store"
)

// site is a real server on loopback, with its store in a folder.
type site struct {
	dir     string
	address string
	master  *seal.PrivateKey
	log     *syncBuffer

	state  *server.State
	server *server.Server
	cancel context.CancelFunc
	done   chan error
}

// syncBuffer is what a log may be written to while it is read.
type syncBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *syncBuffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.text.Bytes())
}

var (
	shared     *site
	sharedOnce sync.Once
)

// sharedSite is one server for all tests that do not stop or spoil it.
func sharedSite(t *testing.T) *site {
	t.Helper()
	sharedOnce.Do(func() {
		dir, err := os.MkdirTemp("", "enroll-site-*")
		if err != nil {
			t.Fatal(err)
		}
		shared = makeSite(t, dir)
	})
	if shared == nil {
		t.Fatal("no server")
	}
	return shared
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := makeSite(t, t.TempDir())
	t.Cleanup(s.stop)
	return s
}

func makeSite(t *testing.T, dir string) *site {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{dir: filepath.Join(dir, "state"), address: listener.Addr().String(), log: &syncBuffer{}}
	listener.Close()
	if s.master, err = seal.Generate("master", time.Now()); err != nil {
		t.Fatal(err)
	}
	settings := server.Settings{Name: "srv1", Listen: []string{s.address}, Addresses: []string{s.address}}
	if err := server.Init(s.dir, settings, server.Master{Public: s.master.Public()}, time.Now()); err != nil {
		t.Fatal(err)
	}
	s.start(t)
	return s
}

func (s *site) start(t *testing.T) {
	t.Helper()
	var err error
	if s.state, err = server.OpenState(s.dir); err != nil {
		t.Fatal(err)
	}
	s.server = server.New(s.state, slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug})), time.Now)
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel, s.done = cancel, make(chan error, 1)
	go func() { s.done <- s.server.Run(ctx) }()
	for range 200 {
		conn, err := net.Dial("tcp", s.address)
		if err == nil {
			conn.Close()
			return
		}
		select {
		case err := <-s.done:
			t.Fatalf("server: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatal("server does not listen")
}

// stop ends the server; a stopped one stays so.
func (s *site) stop() {
	if s.cancel == nil {
		return
	}
	s.cancel()
	<-s.done
	s.state.Close()
	s.cancel = nil
}

// local calls the API as the control socket does.
func (s *site) local(t *testing.T, method, path string, in, out any) {
	t.Helper()
	client := api.InProcess(s.server.Handler(true, func(*http.Request) string { return "local:test" }))
	if err := client.Call(context.Background(), method, path, in, out); err != nil {
		t.Fatal(err)
	}
}

// token makes a token for one machine.
func (s *site) token(t *testing.T) string {
	t.Helper()
	var text api.Text
	s.local(t, "POST", "/v1/tokens", api.NewToken{Uses: 1, TTL: time.Hour}, &text)
	return text.Text
}

// changeToken does to the token what only time or an administrator can.
func (s *site) changeToken(t *testing.T, text string, change func(*store.Token)) {
	t.Helper()
	s.update(t, func(tx *store.Tx) error {
		parsed, err := api.ParseToken([]byte(text))
		if err != nil {
			return err
		}
		token, err := tx.TokenBySecret(hash(parsed.Servers[0].Secret))
		if err != nil {
			return err
		}
		change(&token)
		return tx.PutToken(token)
	})
}

func (s *site) update(t *testing.T, change func(*store.Tx) error) {
	t.Helper()
	err := s.state.Store.Update(func(tx *store.Tx) error {
		if err := change(tx); err != nil {
			return err
		}
		return tx.Audit(store.Event{Time: time.Now(), Actor: "test", Action: "test"})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// entries are the packets of one machine's volume, by state.
func (s *site) entries(t *testing.T, machine identity.KeyID, uuid string) map[escrow.PacketState][]escrow.Entry {
	t.Helper()
	out := map[escrow.PacketState][]escrow.Entry{}
	err := s.state.Store.View(func(tx *store.Tx) error {
		for e, err := range tx.EntriesOf(machine) {
			if err != nil {
				return err
			}
			if e.Volume.UUID == uuid {
				out[e.State] = append(out[e.State], e)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// lose makes the server forget a packet.
func (s *site) lose(t *testing.T, id string) {
	t.Helper()
	s.update(t, func(tx *store.Tx) error {
		e, err := tx.Entry(id)
		if err != nil {
			return err
		}
		e.State = escrow.Purged
		return tx.PurgePacket(e)
	})
}

// open opens a packet as its only trustee can.
func (s *site) open(t *testing.T, id, payload string) *escrow.Opened {
	t.Helper()
	var data []byte
	err := s.state.Store.View(func(tx *store.Tx) (err error) {
		_, data, err = tx.Packet(id)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := escrow.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	_, message, err := p.Share(payload, s.master.Public().Fingerprint())
	if err != nil {
		t.Fatal(err)
	}
	share, err := escrow.OpenShare(message, s.master, p, payload)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := p.Open(payload, []*escrow.Share{share})
	if err != nil {
		t.Fatal(err)
	}
	return opened
}

// fakeServer is a corrupt server that has a real one's key: it answers every
// call as it likes.
func fakeServer(t *testing.T, key *identity.Key, handler http.HandlerFunc) (address string) {
	t.Helper()
	settings, err := key.ServerTLS(api.Protocol)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fake := &http.Server{Handler: handler, TLSConfig: settings, ErrorLog: slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelDebug)}
	go fake.ServeTLS(listener, "", "") //nolint:errcheck // ends with Close
	t.Cleanup(func() { fake.Close() })
	return listener.Addr().String()
}

// tokenFor makes a token by hand.
func tokenFor(t *testing.T, key identity.KeyID, address string, policy [32]byte) string {
	t.Helper()
	token := api.Token{PolicyDigest: policy, Threshold: 1, Servers: []api.TokenServer{{Secret: make([]byte, 16)}}}
	s := &token.Servers[0]
	s.Name, s.KeyID, s.Addresses = "srv1", key, []string{address}
	text, err := token.Text()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func identityOf(t *testing.T, folder string) *config.Identity {
	t.Helper()
	id, err := config.LoadIdentity(folder)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func sprint(format string, args []any) string { return fmt.Sprintf(format, args...) }

func hexOf(b []byte) []byte { return hex.AppendEncode(nil, b) }
