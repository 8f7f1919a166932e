package unlock

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/secret"
)

// fakeSource is a server's store with one machine.
type fakeSource struct {
	mu       sync.Mutex
	machine  Machine
	blobs    [][]byte
	lookup   error // of Lookup, if not nil
	release  error // of Release, if not nil
	changed  chan struct{}
	reasons  []string // of refusals
	nonces   []string // of releases
	waiting  []time.Time
	lookedUp int
}

func newSource(m Machine, blobs ...[]byte) *fakeSource {
	return &fakeSource{machine: m, blobs: blobs, changed: make(chan struct{})}
}

func (f *fakeSource) Lookup(id identity.KeyID) (Machine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lookedUp++
	if f.lookup != nil {
		return Machine{}, f.lookup
	}
	if id != f.machine.KeyID {
		return Machine{}, ErrUnknown
	}
	return f.machine, nil
}

func (f *fakeSource) Release(_ context.Context, _ identity.KeyID, requested time.Time, nonce string) ([][]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := errors.Join(f.release, f.machine.Decide(requested, time.Now()).Err()); err != nil {
		return nil, err
	}
	f.machine = f.machine.Released(time.Now(), nonce)
	f.nonces = append(f.nonces, nonce)
	return f.blobs, nil
}

func (f *fakeSource) Waiting(_ identity.KeyID, until time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting = append(f.waiting, until)
}

func (f *fakeSource) Changed(identity.KeyID) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fakeSource) Refused(_ identity.KeyID, reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reasons = append(f.reasons, reason)
}

// change commits a change of the machine.
func (f *fakeSource) change(transition func(Machine) Machine) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machine = transition(f.machine)
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeSource) counts() (releases, refusals int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.nonces), len(f.reasons)
}

func newKey(t testing.TB) *identity.Key {
	t.Helper()
	key, err := identity.Generate()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newKeys(t testing.TB) Keys { return Keys{TLS: newKey(t), OpenPGP: pgpKey(t)} }

func serverTLS(t testing.TB, key *identity.Key) *tls.Config {
	t.Helper()
	config, err := key.ServerTLS(Protocol)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// network maps addresses to what answers there; an address that is not in it
// refuses connections, and nil is a black hole.
type network map[string]func(net.Conn)

var errNobody = errors.New("nobody listens")

func (n network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	answer, found := n[address]
	switch {
	case !found:
		return nil, errNobody
	case answer == nil:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		answer(far)
	}()
	return near, nil
}

// serving answers as a server of ours.
func serving(config *tls.Config, source Source) func(net.Conn) {
	return func(conn net.Conn) { _ = Serve(context.Background(), tls.Server(conn, config), source) }
}

// site is a machine with M servers; server i listens at address(i).
type site struct {
	keys       Keys
	passphrase []byte
	blobs      [][]byte
	serverKeys []*identity.Key
	configs    []*tls.Config
	sources    []*fakeSource
	network    network
	client     *Client
	reports    []string
}

func address(i int) string { return fmt.Sprintf("server%d:7625", i) }

func newSite(t testing.TB, n, m int) *site {
	t.Helper()
	s := &site{keys: newKeys(t), passphrase: secret.BootPassphrase(), network: network{}}
	s.blobs = makeBlobs(t, BlobSet{s.keys.TLS.KeyID(), testUUID, 1, n, m}, s.passphrase, s.keys.OpenPGP)
	config := &Config{Machine: s.keys.TLS.KeyID(), Threshold: n, Volumes: []Volume{{UUID: testUUID}}}
	for i := range m {
		key := newKey(t)
		s.serverKeys = append(s.serverKeys, key)
		s.configs = append(s.configs, serverTLS(t, key))
		s.sources = append(s.sources, newSource(s.machine(), s.blobs[i]))
		s.network[address(i)] = serving(s.configs[i], s.sources[i])
		config.Servers = append(config.Servers, Server{fmt.Sprintf("srv%d", i), key.KeyID(), []string{address(i)}})
	}
	s.client = &Client{
		Config: config, Keys: s.keys, Volumes: []string{testUUID}, Dial: s.network.dial,
		Report: func(server Server, err error) { s.reports = append(s.reports, server.Name+": "+err.Error()) },
	}
	return s
}

// machine is the site's, enabled.
func (s *site) machine() Machine {
	return Machine{KeyID: s.keys.TLS.KeyID(), Settings: Defaults()}.Enable(epoch)
}

// exchange sends raw bytes over TLS with a key, and returns all that comes
// back until the end.
func exchange(conn net.Conn, key *identity.Key, server identity.KeyID, data []byte) ([]byte, error) {
	config, err := key.ClientTLS(server, Protocol)
	if err != nil {
		return nil, err
	}
	client := tls.Client(conn, config)
	defer client.Close()
	if _, err := client.Write(data); err != nil {
		return nil, err
	}
	return io.ReadAll(client)
}
