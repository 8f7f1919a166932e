package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// fakeServer speaks HTTP over TLS with a key, on the loopback.
func fakeServer(t *testing.T, key *identity.Key, handler http.HandlerFunc) unlock.Server {
	t.Helper()
	config := must(key.ServerTLS(Protocol))
	listener := must(tls.Listen("tcp", "127.0.0.1:0", config))
	server := &http.Server{Handler: handler}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	return unlock.Server{Name: "fake", KeyID: key.KeyID(), Addresses: []string{listener.Addr().String()}}
}

func dial(t *testing.T, server unlock.Server, witness *Witness) *Client {
	t.Helper()
	c := must(Dial(server, must(identity.Generate()), witness))
	t.Cleanup(c.Close)
	return c
}

func head(t *testing.T, key *identity.Key, epoch, seq uint64, hash byte) []byte {
	t.Helper()
	return must(store.Head{Epoch: epoch, Seq: seq, Hash: store.Hash{hash}}.Sign(key))
}

func setHead(w http.ResponseWriter, signed []byte) {
	w.Header().Set(HeaderHead, base64.StdEncoding.EncodeToString(signed))
}

func TestWitness(t *testing.T) {
	key, other := must(identity.Generate()), must(identity.Generate())
	seen := head(t, key, 3, 50, 1)
	for name, c := range map[string]struct {
		reply  []byte
		status int
		named  error // nil: it passes
		kept   []byte
	}{
		"the same":                    {seen, 200, nil, seen},
		"newer":                       {head(t, key, 3, 51, 2), 200, nil, head(t, key, 3, 51, 2)},
		"newer, in a refusal":         {head(t, key, 3, 51, 2), 403, nil, head(t, key, 3, 51, 2)},
		"newer epoch, shorter log":    {head(t, key, 4, 7, 2), 200, nil, head(t, key, 4, 7, 2)},
		"older":                       {head(t, key, 3, 49, 1), 200, ErrSetBack, seen},
		"older, in a refusal":         {head(t, key, 3, 49, 1), 403, ErrSetBack, seen},
		"older epoch, longer log":     {head(t, key, 2, 99, 1), 200, ErrSetBack, seen},
		"same number, another hash":   {head(t, key, 3, 50, 2), 200, ErrSetBack, seen},
		"older, unconfirmed":          {head(t, key, 3, 49, 1), 503, nil, seen},
		"another server's":            {head(t, other, 3, 51, 2), 200, identity.ErrSignature, seen},
		"changed":                     {bytes.Replace(head(t, key, 3, 51, 2), []byte("seq: 51"), []byte("seq: 52"), 1), 200, identity.ErrSignature, seen},
		"no record":                   {[]byte("x"), 200, record.ErrFormat, seen},
		"none in what was served":     {nil, 200, ErrSetBack, seen},
		"none in a refusal":           {nil, 403, nil, seen},
		"newer, but of other content": {head(t, key, 3, 51, 9), 200, nil, head(t, key, 3, 51, 9)},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "head")
			if err := os.WriteFile(path, seen, 0o600); err != nil {
				t.Fatal(err)
			}
			var shown string
			server := fakeServer(t, key, func(w http.ResponseWriter, r *http.Request) {
				shown = r.Header.Get(HeaderSeen)
				if c.reply != nil {
					setHead(w, c.reply)
				}
				w.WriteHeader(c.status)
				if c.status != 200 {
					fmt.Fprint(w, `{"code":"refused","message":"no"}`)
				}
			})
			err := dial(t, server, NewWitness(path, key.KeyID())).Call(t.Context(), "GET", "/", nil, nil)
			switch {
			case c.named != nil && !errors.Is(err, c.named):
				t.Errorf("error %v, want %v", err, c.named)
			case c.named == nil && c.status == 200 && err != nil:
				t.Error(err)
			case c.named == nil && c.status != 200 && CodeOf(err) != CodeRefused:
				t.Error(err)
			}
			if shown != base64.StdEncoding.EncodeToString(seen) {
				t.Errorf("showed %q", shown)
			}
			if kept := must(os.ReadFile(path)); !bytes.Equal(kept, c.kept) {
				t.Errorf("kept %s", kept)
			}
		})
	}
}

func TestFirstHeadIsKept(t *testing.T) {
	key := must(identity.Generate())
	path := filepath.Join(t.TempDir(), "head")
	witness := NewWitness(path, key.KeyID())
	if seen, err := witness.Kept(); err != nil || seen != (store.Head{}) {
		t.Fatalf("%+v, %v", seen, err)
	}
	with := false
	server := fakeServer(t, key, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(HeaderSeen) != "" {
			t.Error("showed a head that nobody has seen")
		}
		if with {
			setHead(w, head(t, key, 1, 2, 3))
		}
	})
	c := dial(t, server, witness)
	for range 2 { // a first login has no head, being a stranger's
		if err := c.Call(t.Context(), "GET", "/", nil, nil); err != nil {
			t.Fatal(err)
		}
		with = true
	}
	if seen, err := witness.Kept(); err != nil || seen.Seq != 2 {
		t.Fatalf("%+v, %v", seen, err)
	}
	if info := must(os.Stat(path)); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode())
	}
}

// A damaged file must be found before the call does anything at the server.
func TestDamagedHeadFileSendsNothing(t *testing.T) {
	key := must(identity.Generate())
	path := filepath.Join(t.TempDir(), "head")
	if err := os.WriteFile(path, []byte("mandos-escrow-head: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var calls atomic.Int32
	server := fakeServer(t, key, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	err := dial(t, server, NewWitness(path, key.KeyID())).Call(t.Context(), "POST", "/", nil, nil)
	if !errors.Is(err, record.ErrFormat) || !strings.Contains(err.Error(), path) || calls.Load() != 0 {
		t.Errorf("%v after %d calls", err, calls.Load())
	}
}

// Replies overtake each other: that is no alarm, and the newest head stays.
func TestConcurrentCallsRaiseNoAlarm(t *testing.T) {
	key := must(identity.Generate())
	path := filepath.Join(t.TempDir(), "head")
	var seq atomic.Uint64
	server := fakeServer(t, key, func(w http.ResponseWriter, r *http.Request) {
		n := seq.Add(1)
		time.Sleep(time.Duration(n*7919%13) * time.Millisecond) // later ones are often answered earlier
		setHead(w, head(t, key, 1, n, byte(n)))
	})
	c := dial(t, server, NewWitness(path, key.KeyID()))
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 8 {
				if err := c.Call(context.Background(), "GET", "/", nil, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if seen, err := NewWitness(path, key.KeyID()).Kept(); err != nil || seen.Seq != 64 {
		t.Errorf("kept %+v, %v", seen, err)
	}
}

func TestWrongKeyIsRefused(t *testing.T) {
	server := fakeServer(t, must(identity.Generate()), func(http.ResponseWriter, *http.Request) {
		t.Error("something was sent to another key")
	})
	server.KeyID = must(identity.Generate()).KeyID()
	if err := dial(t, server, nil).Call(t.Context(), "POST", "/", Text{"secret"}, nil); !errors.Is(err, identity.ErrPin) || errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}

func TestAddressesAreTriedInOrder(t *testing.T) {
	server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"text":"here"}`) })
	dead := must(net.Listen("tcp", "127.0.0.1:0"))
	dead.Close()
	server.Addresses = append([]string{dead.Addr().String()}, server.Addresses...)
	var out Text
	if err := dial(t, server, nil).Call(t.Context(), "GET", "/", nil, &out); err != nil || out.Text != "here" {
		t.Errorf("%+v, %v", out, err)
	}
	server.Addresses = server.Addresses[:1]
	if err := dial(t, server, nil).Call(t.Context(), "GET", "/", nil, nil); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}

// endless writes what looks like a string of JSON for ever.
func endless(w io.Writer) {
	fmt.Fprint(w, `{"text":"`)
	chunk := bytes.Repeat([]byte("x"), 1<<20)
	for {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func TestHugeReply(t *testing.T) {
	server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refusal" {
			w.WriteHeader(http.StatusForbidden)
		}
		if r.URL.Path == "/stream" {
			w.Header().Set(HeaderSize, "1000")
		}
		endless(w)
	})
	c := dial(t, server, nil)
	var out Text
	if err := c.Call(t.Context(), "GET", "/", nil, &out); !errors.Is(err, ErrReply) || out.Text != "" {
		t.Errorf("%v, %d bytes", err, len(out.Text))
	}
	if err := c.Call(t.Context(), "GET", "/refusal", nil, nil); CodeOf(err) != CodeInternal || len(err.Error()) > 100 {
		t.Error(err)
	}
	var stream bytes.Buffer
	if err := c.Stream(t.Context(), "/stream", &stream); err != nil || stream.Len() != 1000 {
		t.Errorf("%d bytes, %v", stream.Len(), err)
	}
}

func TestStreamOfAnotherSize(t *testing.T) {
	for size, named := range map[string]error{
		"4": io.ErrUnexpectedEOF, "": ErrReply, "-1": ErrReply, "x": ErrReply, "70000000000": ErrReply,
	} {
		server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(HeaderSize, size)
			fmt.Fprint(w, "abc")
		})
		var out bytes.Buffer
		if err := dial(t, server, nil).Stream(t.Context(), "/", &out); !errors.Is(err, named) {
			t.Errorf("size %q: %v", size, err)
		}
	}
}

func TestSlowServer(t *testing.T) {
	release := make(chan struct{})
	server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			fmt.Fprint(w, `{"te`)
			http.NewResponseController(w).Flush()
		}
		<-release
	})
	t.Cleanup(func() { close(release) }) // before the server's, so that it can end
	c := dial(t, server, nil)
	if c.http.Timeout != replyTimeout {
		t.Errorf("no time limit: %s", c.http.Timeout)
	}
	c.http.Timeout = 200 * time.Millisecond
	for _, path := range []string{"/", "/body"} {
		if err := c.Call(t.Context(), "GET", path, nil, &Text{}); !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// The reply of one server must not send a caller's words anywhere else.
func TestNoRedirect(t *testing.T) {
	var calls atomic.Int32
	server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		http.Redirect(w, r, "https://evil.example/", http.StatusTemporaryRedirect)
	})
	if err := dial(t, server, nil).Call(t.Context(), "POST", "/", Text{"secret"}, nil); CodeOf(err) != CodeInternal || calls.Load() != 1 {
		t.Errorf("%v after %d calls", err, calls.Load())
	}
}

// A message of a server is shown on a terminal: it may not deceive there.
func TestRefusalIsHarmless(t *testing.T) {
	const evil = "no\x1b[2J\rmandos-escrow: approved\u202e\nmandos-escrow: all is well"
	server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(Error{CodeRefused, evil})
	})
	err := dial(t, server, nil).Call(t.Context(), "GET", "/", nil, nil)
	const want = `no\x1b[2J\rmandos-escrow: approved\u202e` + "\n  mandos-escrow: all is well"
	if err == nil || err.Error() != want {
		t.Errorf("%q", err)
	}
	if got := harmless("ambiguous:\n  a of ünï\n  b"); got != "ambiguous:\n  a of ünï\n  b" {
		t.Errorf("%q", got)
	}
}

func TestNotUnderstoodReplies(t *testing.T) {
	for _, body := range []string{"", "{", "null and more", `{"text":1}`} {
		server := fakeServer(t, must(identity.Generate()), func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) })
		if err := dial(t, server, nil).Call(t.Context(), "GET", "/", nil, &Text{}); !errors.Is(err, ErrReply) {
			t.Errorf("%q: %v", body, err)
		}
	}
}

func TestInProcess(t *testing.T) {
	c := InProcess(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/refused":
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"code":"refused","message":"no"}`)
		case "/stream":
			w.Header().Set(HeaderSize, "3")
			fmt.Fprint(w, "abc")
		case "/echo":
			_, _ = io.Copy(w, r.Body)
		}
	}))
	var out Text
	if err := c.Call(t.Context(), "POST", "/echo", Text{"x"}, &out); err != nil || out.Text != "x" {
		t.Errorf("%+v, %v", out, err)
	}
	if err := c.Call(t.Context(), "GET", "/nothing", nil, nil); err != nil {
		t.Error(err)
	}
	if err := c.Call(t.Context(), "GET", "/refused", nil, nil); CodeOf(err) != CodeRefused {
		t.Error(err)
	}
	var stream bytes.Buffer
	if err := c.Stream(t.Context(), "/stream", &stream); err != nil || stream.String() != "abc" {
		t.Errorf("%q, %v", stream.String(), err)
	}
}

func TestStatusOfEachCode(t *testing.T) {
	for code, status := range map[Code]int{
		CodeRefused: 403, CodeUsage: 400, CodeNotFound: 404, CodeAmbiguous: 409, CodeConflict: 409, CodeNotApproved: 409,
		CodeIntegrity: 400, CodeLimit: 429, CodeUnconfirmed: 503, CodeInternal: 500, "new": 500,
	} {
		if code.Status() != status {
			t.Errorf("%s: %d", code, code.Status())
		}
	}
	if CodeOf(fmt.Errorf("x: %w", Errorf(CodeLimit, "y"))) != CodeLimit || CodeOf(io.EOF) != "" {
		t.Error("CodeOf")
	}
}
