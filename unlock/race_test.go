package unlock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mandos-escrow/internal/identity"
)

// fakeFinder finds what a test tells it.
type fakeFinder struct {
	mu      sync.Mutex
	found   map[identity.KeyID][]string
	changed chan struct{}
}

func newFinder() *fakeFinder {
	return &fakeFinder{found: map[identity.KeyID][]string{}, changed: make(chan struct{})}
}

func (f *fakeFinder) Addresses(id identity.KeyID) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.found[id]...)
}

func (f *fakeFinder) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fakeFinder) add(id identity.KeyID, addresses ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.found[id] = append(f.found[id], addresses...)
	close(f.changed)
	f.changed = make(chan struct{})
}

// TestFoundAddressesRace has one server, which is only at a found address.
func TestFoundAddressesRace(t *testing.T) {
	const found = "[fe80::1%eth0]:7625"
	for name, c := range map[string]struct {
		known  func(net.Conn) // at its configured address; errors when it is not there
		absent bool
		at     time.Duration // when it is found
		took   time.Duration
	}{
		"found before":                          {absent: true},
		"while the known one hangs":             {at: 3 * time.Second, took: 3 * time.Second},
		"while the known one hangs in TLS":      {known: func(c net.Conn) { _, _ = c.Read(make([]byte, 1)); time.Sleep(time.Hour) }, at: time.Second, took: time.Second},
		"in the delay between attempts":         {absent: true, at: 100 * time.Millisecond, took: 100 * time.Millisecond},
		"in a long delay, minutes later":        {absent: true, at: 10 * time.Minute, took: 10 * time.Minute},
		"while the known one is another server": {known: func(c net.Conn) { c.Close() }, at: 10 * time.Minute, took: 10 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t, 1, 1)
				s.network[found] = s.network[address(0)]
				s.network[address(0)] = c.known
				if c.absent {
					delete(s.network, address(0))
				}
				finder := newFinder()
				s.client.Finder = finder
				announce := func() { finder.add(s.serverKeys[0].KeyID(), found) }
				if c.at == 0 {
					announce()
				} else {
					time.AfterFunc(c.at, announce)
				}
				start := time.Now()
				if _, err := s.client.Run(t.Context()); err != nil || time.Since(start) != c.took {
					t.Errorf("%v after %v, want %v", err, time.Since(start), c.took)
				}
				time.Sleep(time.Hour)
			})
		})
	}
}

// TestBlackHolesFirst: what swallows packets costs little, also when it was
// given on the kernel command line or was found.
func TestBlackHolesFirst(t *testing.T) {
	for name, prepare := range map[string]func(s *site, good string){
		"configured": func(s *site, good string) {
			s.client.Config.Servers[0].Addresses = []string{"hole1:1", "hole2:1", "hole3:1", good}
		},
		"first":   func(s *site, _ string) { s.client.First = "hole1:1" },
		"refuses": func(s *site, _ string) { s.client.First = "nobody:1" },
		"found": func(s *site, _ string) {
			finder := newFinder()
			finder.add(s.serverKeys[0].KeyID(), "hole1:1", "hole2:1", "hole3:1")
			s.client.Finder = finder
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t, 1, 1)
				s.network["hole1:1"], s.network["hole2:1"], s.network["hole3:1"] = nil, nil, nil
				prepare(s, address(0))
				start := time.Now()
				if _, err := s.client.Fetch(t.Context()); err != nil || time.Since(start) > 2*time.Second {
					t.Errorf("%v after %v", err, time.Since(start))
				}
			})
		})
	}
}

// TestFirst is tried first for every server, and only the one that is there is
// asked there.
func TestFirst(t *testing.T) {
	s := newSite(t, 2, 2)
	s.network["first:7"] = serving(s.configs[1], s.sources[1])
	s.network[address(1)] = nil
	s.client.First = "first:7"
	var mu sync.Mutex
	var dialed []string
	s.client.Dial = func(ctx context.Context, network, a string) (net.Conn, error) {
		mu.Lock()
		dialed = append(dialed, a)
		mu.Unlock()
		return s.network.dial(ctx, network, a)
	}
	if _, err := s.client.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(dialed) != 3 || strings.Count(strings.Join(dialed, " "), "first:7") != 2 {
		t.Errorf("dialed %q", dialed)
	}
}

// TestLiarsAreFound: others who announce the server's key are dialled, told in
// one line, and stop nobody.
func TestLiarsAreFound(t *testing.T) {
	s := newSite(t, 1, 1)
	finder := newFinder()
	s.client.Finder = finder
	delete(s.network, address(0))
	for i := range 40 {
		liar := fmt.Sprintf("liar%d:1", i)
		s.network[liar] = serving(serverTLS(t, s.serverKeys[0]), s.sources[0])
		if i < maxFound {
			s.network[liar] = serving(serverTLS(t, newKey(t)), s.sources[0])
		}
		finder.add(s.serverKeys[0].KeyID(), liar)
	}
	_, err := s.client.Fetch(t.Context())
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), identity.ErrPin.Error()) || !strings.Contains(err.Error(), "and 14 more found") {
		t.Errorf("%v", err)
	}
	if len(err.Error()) > 1000 {
		t.Errorf("%d bytes are told: %v", len(err.Error()), err)
	}
	finder.found[s.serverKeys[0].KeyID()] = []string{"liar0:1", "liar1:1", "liar39:1"}
	if _, err := s.client.Fetch(t.Context()); err != nil {
		t.Errorf("two liars and the server: %v", err)
	}
	if releases, refusals := s.sources[0].counts(); releases != 1 || refusals != 0 {
		t.Errorf("%d releases, %d refusals", releases, refusals)
	}
}

// TestLinkComesUp: nobody waits for the end of a delay when a link is there.
func TestLinkComesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1, 1)
		links := newFinder() // of which only the channel is used
		s.client.Links = links.Changed
		start, up := time.Now(), 10*time.Minute
		s.client.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if time.Since(start) < up {
				return nil, errNobody
			}
			return s.network.dial(ctx, network, address)
		}
		time.AfterFunc(up, func() { links.add("") })
		if _, err := s.client.Run(t.Context()); err != nil || time.Since(start) != up {
			t.Errorf("%v after %v, want %v", err, time.Since(start), up)
		}
	})
}

// TestNewsFlood: whoever makes news without end causes one attempt a second.
func TestNewsFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1, 1)
		finder := newFinder()
		var attempts atomic.Int64
		s.client.Finder, s.client.Links = finder, finder.Changed
		s.client.Dial = func(_ context.Context, _, address string) (net.Conn, error) {
			if !strings.HasPrefix(address, "found") {
				attempts.Add(1)
			}
			return nil, errNobody
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() {
			for ctx.Err() == nil {
				finder.add(s.serverKeys[0].KeyID(), "found:1")
				time.Sleep(10 * time.Millisecond)
			}
		}()
		if _, err := s.client.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if n := attempts.Load(); n < 50 || n > 65 {
			t.Errorf("%d attempts in a minute", n)
		}
		time.Sleep(time.Second) // the flood ends
	})
}
