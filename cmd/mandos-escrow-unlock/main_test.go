package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

// TestMain lets the test binary be the program.
func TestMain(m *testing.M) {
	if os.Getenv("BE_MANDOS_ESCROW_UNLOCK") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program runs the program.
func program(t testing.TB, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), "BE_MANDOS_ESCROW_UNLOCK=1")
	var out, diag bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &diag
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), diag.String()
}

// store is a server's store with one machine.
type store struct {
	mu      sync.Mutex
	machine unlock.Machine
	blobs   [][]byte
	during  func() // called in Release, if not nil
}

func (s *store) Lookup(id identity.KeyID) (unlock.Machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != s.machine.KeyID {
		return unlock.Machine{}, unlock.ErrUnknown
	}
	return s.machine, nil
}

func (s *store) Release(context.Context, identity.KeyID, time.Time, string) ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.during != nil {
		s.during()
	}
	return s.blobs, nil
}

func (s *store) Waiting(identity.KeyID, time.Time)      {}
func (s *store) Changed(identity.KeyID) <-chan struct{} { return nil }
func (s *store) Refused(_ identity.KeyID, _ string)     {}
func (s *store) set(change func(*store))                { s.mu.Lock(); defer s.mu.Unlock(); change(s) }
func (s *store) enable(on bool)                         { s.set(func(s *store) { s.machine.Enabled = on }) }
func (s *store) give(blobs ...[]byte)                   { s.set(func(s *store) { s.blobs = blobs }) }

// fixture is an enrolled machine with a volume and a server.
type fixture struct {
	dir, disk, passphrase string
	config                *unlock.Config
	key                   *seal.PrivateKey
	store                 *store
	serverTLS             *tls.Config
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	machine, server := newKey(t), newKey(t)
	openPGP, err := seal.Generate("machine", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{dir: t.TempDir(), passphrase: "a boot passphrase, random they say", key: openPGP}
	f.disk = filepath.Join(f.dir, "disk.img")
	volume := format(t, f.disk)
	volume.Path = f.disk
	if f.serverTLS, err = server.ServerTLS(unlock.Protocol); err != nil {
		t.Fatal(err)
	}
	f.config = &unlock.Config{Machine: machine.KeyID(), Threshold: 1, Volumes: []unlock.Volume{volume}}
	f.store = &store{machine: unlock.Machine{KeyID: machine.KeyID(), Enabled: true, Settings: unlock.Defaults()}}
	f.store.give(f.blob(t, volume.UUID))
	f.config.Servers = []unlock.Server{{Name: "srv1", KeyID: server.KeyID(), Addresses: []string{f.listen(t, "127.0.0.1:0")}}}
	tlsKey, err := machine.PrivatePEM()
	if err != nil {
		t.Fatal(err)
	}
	seckey, err := openPGP.Armor()
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, unlock.TLSPrivateKeyFile, tlsKey)
	f.write(t, unlock.PrivateKeyFile, seckey)
	f.save(t)
	return f
}

func newKey(t testing.TB) *identity.Key {
	t.Helper()
	key, err := identity.Generate()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// format makes a LUKS2 volume in a file; cryptsetup must be installed.
func format(t testing.TB, disk string) unlock.Volume {
	t.Helper()
	if err := os.WriteFile(disk, make([]byte, 18<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", disk, "-")
	cmd.Stdin = bytes.NewReader([]byte("a passphrase"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("install cryptsetup 2.6 or later: %v: %s", err, out)
	}
	h, err := luks.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	e := h.Enrolled()
	return unlock.Volume{
		UUID: e.UUID, Type: e.Type, Cipher: e.Cipher, KeyBits: e.KeyBits, Offset: e.Offset, SectorSize: e.SectorSize, Digest: e.Digest,
	}
}

func (f *fixture) blob(t testing.TB, uuid string) []byte {
	t.Helper()
	set := unlock.BlobSet{Machine: f.config.Machine, Volume: uuid, Epoch: 1, Threshold: 1, Servers: 1}
	blobs, err := unlock.MakeBlobs(set, []byte(f.passphrase), f.key, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return blobs[0]
}

func (f *fixture) write(t testing.TB, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// save writes unlock.conf.
func (f *fixture) save(t testing.TB) {
	t.Helper()
	data, err := f.config.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, unlock.ConfigFile, data)
}

// listen serves until the test ends, and returns the address.
func (f *fixture) listen(t testing.TB, address string) string {
	t.Helper()
	listener, err := net.Listen("tcp", address)
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
			go func() { _ = unlock.Serve(context.Background(), tls.Server(conn, f.serverTLS), f.store) }()
		}
	}()
	return listener.Addr().String()
}
