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

// saying answers over TLS with fixed bytes, whatever it is asked.
func saying(config *tls.Config, data []byte) func(net.Conn) {
	return func(raw net.Conn) {
		conn := tls.Server(raw, config)
		defer conn.Close()
		if _, err := readFrame(conn, MaxRequest, nil); err == nil {
			_, _ = conn.Write(data)
		}
	}
}

// releasing answers with a release of these blobs.
func releasing(config *tls.Config, blobs ...[]byte) func(net.Conn) {
	reply, err := Reply{Released: true, Nonce: attemptID, Blobs: blobs}.Bytes()
	if err != nil {
		panic(err)
	}
	return saying(config, frame(reply))
}

func refusing(config *tls.Config) func(net.Conn) { return saying(config, refusedFrame) }

// silent finishes the handshake and says nothing.
func silent(config *tls.Config) func(net.Conn) {
	return func(raw net.Conn) {
		conn := tls.Server(raw, config)
		_, _ = readFrame(conn, MaxRequest, nil)
		_, _ = conn.Read(make([]byte, 1))
	}
}

// TestFetch has 2 servers of 4 that are needed, unless a case says otherwise.
func TestFetch(t *testing.T) {
	for name, c := range map[string]struct {
		n, m    int
		prepare func(s *site)
		want    error // nil: the passphrase
		within  time.Duration
	}{
		"1 of 1":                          {1, 1, func(*site) {}, nil, 0},
		"all answer":                      {2, 4, func(*site) {}, nil, 0},
		"a liar and a black hole":         {2, 4, func(s *site) { s.lie(0); s.network[address(1)] = nil }, nil, 0},
		"2 of 3, a liar":                  {2, 3, func(s *site) { s.lie(1) }, nil, 0},
		"2 of 3, a black hole":            {2, 3, func(s *site) { s.network[address(0)] = nil }, nil, 0},
		"2 of 3, a liar and a black hole": {2, 3, func(s *site) { s.lie(1); s.network[address(2)] = nil }, ErrUnreachable, connectTime},
		"2 of 3, one refuses":             {2, 3, func(s *site) { s.refuse(0) }, nil, 0},
		"2 of 3, two refuse":              {2, 3, func(s *site) { s.refuse(0); s.refuse(1); s.network[address(2)] = nil }, ErrRefused, 0},
		"2 of 3, one refuses, one down":   {2, 3, func(s *site) { s.refuse(0); delete(s.network, address(1)) }, ErrUnreachable, 0},
		"1 of 2, one refuses, one down":   {1, 2, func(s *site) { s.refuse(0); delete(s.network, address(1)) }, ErrUnreachable, 0},
		"1 of 2, both refuse":             {1, 2, func(s *site) { s.refuse(0); s.refuse(1) }, ErrRefused, 0},
		"1 of 1, refuses":                 {1, 1, func(s *site) { s.refuse(0) }, ErrRefused, 0},
		"1 of 1, down":                    {1, 1, func(s *site) { delete(s.network, address(0)) }, ErrUnreachable, 0},
		"1 of 1, a liar":                  {1, 1, func(s *site) { s.lie(0) }, ErrBlob, 0},
		"2 of 3, two liars":               {2, 3, func(s *site) { s.lie(0); s.lie(2) }, ErrBlob, 0},
		"2 of 2, one replays another set": {2, 2, func(s *site) { s.replay(t, 1) }, ErrUnreachable, 0},
		"2 of 3, one replays another set": {2, 3, func(s *site) { s.replay(t, 1) }, nil, 0},
		"another server's key":            {1, 1, func(s *site) { s.network[address(0)] = serving(serverTLS(t, newKey(t)), s.sources[0]) }, ErrUnreachable, 0},
		"not TLS":                         {1, 1, func(s *site) { s.network[address(0)] = func(c net.Conn) { _, _ = c.Write([]byte("SSH-2.0-x\r\n")) } }, ErrUnreachable, connectTime},
		"closes at once":                  {1, 1, func(s *site) { s.network[address(0)] = func(net.Conn) {} }, ErrUnreachable, 0},
		"garbage in TLS":                  {1, 1, func(s *site) { s.network[address(0)] = saying(s.configs[0], []byte("HTTP/1.1 200 OK\r\n\r\n")) }, ErrUnreachable, 0},
		"garbage in a frame":              {1, 1, func(s *site) { s.network[address(0)] = saying(s.configs[0], framed(9, "released\n")) }, ErrUnreachable, 0},
		"reply cut off":                   {1, 1, func(s *site) { s.network[address(0)] = saying(s.configs[0], framed(len(refusedText), "mandos")) }, ErrUnreachable, 0},
		"silent after the request":        {1, 1, func(s *site) { s.network[address(0)] = silent(s.configs[0]) }, ErrUnreachable, replyWait},
		"silent in the handshake": {1, 1, func(s *site) {
			s.network[address(0)] = func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }
		}, ErrUnreachable, connectTime},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t, c.n, c.m)
				c.prepare(s)
				start := time.Now()
				result, err := s.client.Fetch(t.Context())
				if took := time.Since(start); took > c.within {
					t.Errorf("took %v, want at most %v", took, c.within)
				}
				if c.want == nil {
					if err != nil || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) {
						t.Errorf("%v", err)
					}
					return
				}
				var failed *FetchError
				if result != nil || !errors.Is(err, c.want) || !errors.As(err, &failed) || strings.Contains(err.Error(), "\n") {
					t.Errorf("%v, %q", result, err)
				}
			})
		})
	}
}

// lie makes a server release a blob that another key made.
func (s *site) lie(i int) { s.network[address(i)] = releasing(s.configs[i], []byte("not a blob")) }

func (s *site) refuse(i int) { s.network[address(i)] = refusing(s.configs[i]) }

// replay makes a server release a blob of another set, which the machine made.
func (s *site) replay(t *testing.T, i int) {
	config := s.client.Config
	other := makeBlobs(t, BlobSet{config.Machine, testUUID, 1, config.Threshold, len(config.Servers)}, s.passphrase, s.keys.OpenPGP)
	s.network[address(i)] = releasing(s.configs[i], other[i])
}

func TestFetchNamesWhoFailed(t *testing.T) {
	s := newSite(t, 2, 3)
	s.lie(1)
	delete(s.network, address(2))
	_, err := s.client.Fetch(t.Context())
	for _, part := range []string{"srv1: server " + s.serverKeys[1].KeyID().Short(), ErrBlob.Error(), "srv2: " + errNobody.Error()} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("no %q in %v", part, err)
		}
	}
	if strings.Contains(err.Error(), "srv0") || len(s.reports) != 2 {
		t.Errorf("%v; reports %q", err, s.reports)
	}
}

func TestNonceIsTheServers(t *testing.T) {
	s := newSite(t, 1, 1)
	result, err := s.client.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := result.Nonces[s.serverKeys[0].KeyID()]; got == "" || got != s.sources[0].nonces[0] {
		t.Errorf("nonce %q, released with %q", got, s.sources[0].nonces)
	}
	passphrase := result.Passphrases[testUUID]
	result.Wipe()
	if !bytes.Equal(passphrase, make([]byte, len(passphrase))) {
		t.Error("not wiped")
	}
}

func TestFetchSeveralVolumes(t *testing.T) {
	s := newSite(t, 1, 1)
	second := makeBlobs(t, BlobSet{s.keys.TLS.KeyID(), otherUUID, 1, 1, 1}, []byte("the second passphrase"), s.keys.OpenPGP)[0]
	s.sources[0].blobs = [][]byte{s.blobs[0], []byte("damaged"), second}
	s.client.Volumes = []string{testUUID, otherUUID}
	result, err := s.client.Fetch(t.Context())
	if err != nil || string(result.Passphrases[otherUUID]) != "the second passphrase" || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) {
		t.Errorf("%v", err)
	}
	s.sources[0].blobs = s.blobs
	if _, err := s.client.Fetch(t.Context()); !errors.Is(err, ErrBlob) {
		t.Errorf("without the second volume's blob: %v", err)
	}
	s.client.Any = true
	if result, err = s.client.Fetch(t.Context()); err != nil || len(result.Passphrases) != 1 || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) {
		t.Errorf("any, without the second volume's blob: %v", err)
	}
	s.sources[0].blobs = [][]byte{[]byte("damaged")}
	if _, err := s.client.Fetch(t.Context()); !errors.Is(err, ErrBlob) {
		t.Errorf("any, without a blob: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	for name, c := range map[string]struct {
		first func(s *site) func(net.Conn)
		took  time.Duration
	}{
		"black hole":        {func(*site) func(net.Conn) { return nil }, stagger},
		"another host":      {func(s *site) func(net.Conn) { return serving(s.configs[1], s.sources[1]) }, 0},
		"dies in handshake": {func(*site) func(net.Conn) { return func(net.Conn) {} }, 0},
		"slow": {func(s *site) func(net.Conn) {
			return func(c net.Conn) { time.Sleep(time.Second); serving(s.configs[0], s.sources[0])(c) }
		}, stagger},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t, 1, 2)
				s.network["first:1"] = c.first(s)
				s.client.Config.Servers = []Server{{"srv0", s.serverKeys[0].KeyID(), []string{"first:1", address(0)}}}
				start := time.Now()
				if _, err := s.client.Fetch(t.Context()); err != nil || time.Since(start) != c.took {
					t.Errorf("%v after %v, want %v", err, time.Since(start), c.took)
				}
				time.Sleep(time.Minute)
				if releases, refusals := s.sources[0].counts(); releases != 1 || refusals != 0 {
					t.Errorf("%d releases, %d refusals; the server was asked more than once", releases, refusals)
				}
			})
		})
	}
}

// TestRunRetries: the delays grow to 15 to 30 s, differ, and end when a server
// comes back.
func TestRunRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1, 1)
		var attempts []time.Time
		start := time.Now()
		s.client.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			attempts = append(attempts, time.Now())
			if time.Since(start) < 10*time.Minute {
				return nil, errNobody
			}
			return s.network.dial(ctx, network, address)
		}
		result, err := s.client.Run(t.Context())
		if err != nil || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) {
			t.Fatal(err)
		}
		if took := time.Since(start); took < 10*time.Minute || took > 10*time.Minute+lastStep {
			t.Errorf("took %v", took)
		}
		step, different := firstStep, map[time.Duration]bool{}
		for i := 1; i < len(attempts); i++ {
			delay := attempts[i].Sub(attempts[i-1])
			if delay < step/2 || delay >= step {
				t.Errorf("delay %d is %v, want %v to %v", i, delay, step/2, step)
			}
			step = min(2*step, lastStep)
			different[delay] = true
		}
		if len(different) < 20 {
			t.Errorf("%d different delays of %d: no jitter", len(different), len(attempts))
		}
	})
}

// TestRunKeepsWhatItHas: a server that released is not asked again while the
// other is down, refuses or lies.
func TestRunKeepsWhatItHas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2, 2)
		good := s.network[address(1)]
		delete(s.network, address(1))
		phase := make(chan func(net.Conn), 1)
		s.client.Dial = func(ctx context.Context, network, a string) (net.Conn, error) {
			select {
			case f := <-phase:
				s.network[address(1)] = f
			default:
			}
			return s.network.dial(ctx, network, a)
		}
		for i, f := range []func(net.Conn){refusing(s.configs[1]), releasing(s.configs[1], []byte("lie")), good} {
			time.AfterFunc(time.Duration(i+1)*time.Hour, func() { phase <- f })
		}
		result, err := s.client.Run(t.Context())
		if err != nil || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) {
			t.Fatal(err)
		}
		if releases, _ := s.sources[0].counts(); releases != 1 {
			t.Errorf("the good server was asked %d times", releases)
		}
		if len(s.reports) < 300 || slices.ContainsFunc(s.reports, func(r string) bool { return strings.HasPrefix(r, "srv0") }) {
			t.Errorf("%d reports, among them some of the good server", len(s.reports))
		}
	})
}

// TestRunAsksAnew: good answers that do not fit together are no dead end.
func TestRunAsksAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2, 2)
		good := s.network[address(1)]
		s.replay(t, 1)
		replay := s.network[address(1)]
		asked := 0
		s.network[address(1)] = func(c net.Conn) {
			if asked++; asked < 4 {
				replay(c)
				return
			}
			good(c)
		}
		result, err := s.client.Run(t.Context())
		if err != nil || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) || asked != 4 {
			t.Errorf("%v, asked %d times", err, asked)
		}
	})
}

func TestRunStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2, 3)
		s.refuse(0)
		s.network[address(1)] = silent(s.configs[1])
		s.network[address(2)] = nil
		ctx, cancel := context.WithTimeout(t.Context(), 33*time.Minute)
		defer cancel()
		if result, err := s.client.Run(ctx); result != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, %v", result, err)
		}
	})
}

// TestWaitsForApprovalWhileOthersComeBack: one server holds the request open;
// the other, down at first, is asked all the same.
func TestWaitsForApprovalWhileOthersComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1, 2)
		s.sources[0].machine.ApprovalDelay = seconds(600)
		good := s.network[address(1)]
		delete(s.network, address(1))
		dial := s.client.Dial
		start := time.Now()
		s.client.Dial = func(ctx context.Context, network, a string) (net.Conn, error) {
			if a == address(1) && time.Since(start) > 40*time.Second {
				near, far := net.Pipe()
				go good(far)
				return near, nil
			}
			return dial(ctx, network, a)
		}
		if _, err := s.client.Run(t.Context()); err != nil || time.Since(start) > 75*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// TestOverLoopback is the real thing: TCP, and net.Dialer.
func TestOverLoopback(t *testing.T) {
	s := newSite(t, 1, 1)
	s.client.Dial = nil
	a := listen(t, s.configs[0], s.sources[0])
	s.client.Config.Servers[0].Addresses = []string{a}
	result, err := s.client.Fetch(t.Context())
	if err != nil || !bytes.Equal(result.Passphrases[testUUID], s.passphrase) {
		t.Fatal(err)
	}
	s.sources[0].change(func(m Machine) Machine { return m.Disable(time.Now(), "stolen") })
	if _, err := s.client.Fetch(t.Context()); !errors.Is(err, ErrRefused) {
		t.Errorf("disabled: %v", err)
	}
	s.client.Config.Servers[0].KeyID = testKeyID
	if _, err := s.client.Fetch(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), identity.ErrPin.Error()) {
		t.Errorf("another pin: %v", err)
	}
}

// listen serves on a loopback port until the test ends.
func listen(t testing.TB, config *tls.Config, source Source) (address string) {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { _ = Serve(context.Background(), conn.(*tls.Conn), source) }()
		}
	}()
	return listener.Addr().String()
}
