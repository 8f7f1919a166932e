package initrd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

const bootID = "11111111-2222-4333-8444-555555555555"

// format makes a LUKS2 volume in a file; cryptsetup must be installed.
func format(t testing.TB, disk string, options ...string) unlock.Volume {
	t.Helper()
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 18<<20); err != nil {
		t.Fatal(err)
	}
	args := []string{"luksFormat", "-q", "--pbkdf-force-iterations", "1000"}
	if len(options) == 0 {
		options = []string{"--type", "luks2", "--pbkdf", "pbkdf2"}
	}
	cmd := exec.Command("cryptsetup", append(append(args, options...), disk, "-")...)
	cmd.Stdin = strings.NewReader("a passphrase")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("install cryptsetup 2.6 or later: %v: %s", err, out)
	}
	return read(t, disk)
}

func read(t testing.TB, disk string) unlock.Volume {
	t.Helper()
	h, err := luks.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	e := h.Enrolled()
	return unlock.Volume{
		UUID: e.UUID, Type: e.Type, Cipher: e.Cipher, KeyBits: e.KeyBits, Offset: e.Offset, SectorSize: e.SectorSize, Digest: e.Digest,
	}
}

// machine is an enrolled machine with two volumes in a root of its own: /proc,
// /sys and /dev are folders. Its server is real.
type machine struct {
	t       testing.TB
	root    root
	config  *unlock.Config
	key     *seal.PrivateKey
	server  *server
	network *fakeNetwork

	mu    sync.Mutex
	lines []string // on the console
}

// passphrase of a volume of a machine.
func passphrase(uuid string) string { return "boot passphrase of " + uuid }

func newMachine(t testing.TB) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "boot") // short, because sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &machine{t: t, root: root(dir), network: &fakeNetwork{changed: make(chan struct{})}}
	for _, folder := range []string{
		"proc/sys/kernel/random", "sys/class/block", "dev/disk/by-uuid", "lib/cryptsetup", "etc/mandos-escrow", "run/systemd/ask-password",
	} {
		if err := os.MkdirAll(m.root.path(folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.write("proc/sys/kernel/random/boot_id", bootID+"\n")
	m.write("proc/cmdline", "root=/dev/mapper/root quiet\n")
	m.write("lib/cryptsetup/askpass", "")
	m.enroll()
	return m
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(m.root.path(path)), 0o755), os.WriteFile(m.root.path(path), []byte(text), 0o600)); err != nil {
		m.t.Fatal(err)
	}
}

// enroll makes identity, volumes vda and vdb, server and configuration.
func (m *machine) enroll() {
	m.t.Helper()
	boot, server := newKey(m.t), newKey(m.t)
	var err error
	if m.key, err = seal.Generate("machine", time.Now()); err != nil {
		m.t.Fatal(err)
	}
	m.config = &unlock.Config{Machine: boot.KeyID(), Threshold: 1}
	for _, disk := range []string{"dev/vda", "dev/vdb"} {
		m.config.Volumes = append(m.config.Volumes, format(m.t, m.root.path(disk)))
	}
	m.server = newServer(m.t, server, boot.KeyID())
	m.server.blobs = m.blobs()
	m.config.Servers = []unlock.Server{{Name: "srv1", KeyID: server.KeyID(), Addresses: []string{m.server.address}}}
	tlsKey, err1 := boot.PrivatePEM()
	openPGP, err2 := m.key.Armor()
	if err := errors.Join(err1, err2); err != nil {
		m.t.Fatal(err)
	}
	m.write("etc/mandos-escrow/"+unlock.TLSPrivateKeyFile, string(tlsKey))
	m.write("etc/mandos-escrow/"+unlock.PrivateKeyFile, string(openPGP))
	m.save()
}

func (m *machine) save() {
	m.t.Helper()
	data, err := m.config.Bytes()
	if err != nil {
		m.t.Fatal(err)
	}
	m.write("etc/mandos-escrow/"+unlock.ConfigFile, string(data))
}

func newKey(t testing.TB) *identity.Key {
	t.Helper()
	key, err := identity.Generate()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (m *machine) blobs() [][]byte {
	m.t.Helper()
	var blobs [][]byte
	for _, v := range m.config.Volumes {
		set := unlock.BlobSet{Machine: m.config.Machine, Volume: v.UUID, Epoch: 1, Threshold: 1, Servers: 1}
		made, err := unlock.MakeBlobs(set, []byte(passphrase(v.UUID)), m.key, time.Now())
		if err != nil {
			m.t.Fatal(err)
		}
		blobs = append(blobs, made[0])
	}
	return blobs
}

func (m *machine) say(format string, a ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lines = append(m.lines, fmt.Sprintf(format, a...))
}

// console is what was said so far.
func (m *machine) console() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.lines, "\n")
}

func (m *machine) options() Options {
	return Options{
		Config: m.root.path("etc/mandos-escrow"), Say: m.say,
		Failed: func(s unlock.Server, err error) { m.say("server %s: %s", s.Name, Brief(err)) },
		root:   m.root, bringUp: m.network.bringUp, finder: m.network,
	}
}

// boot runs the boot program until it ends; its result comes on the channel.
func (m *machine) boot(ctx context.Context) <-chan error {
	done := make(chan error, 1)
	go func() { done <- Run(ctx, m.options()) }()
	return done
}

// ends waits for the end of a boot.
func (m *machine) ends(done <-chan error) {
	m.t.Helper()
	select {
	case err := <-done:
		if err != nil {
			m.t.Errorf("the boot program ends with %v", err)
		}
	case <-time.After(time.Minute):
		m.t.Fatalf("the boot program does not end; console:\n%s", m.console())
	}
	if m.network.up && !m.network.down {
		m.t.Error("the network was not put back")
	}
}

// until waits for something that another goroutine does.
func (m *machine) until(what string, is func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("never: %s; console:\n%s", what, m.console())
		}
	}
}

func (m *machine) saysSoon(text string) {
	m.t.Helper()
	m.until("says "+text, func() bool { return strings.Contains(m.console(), text) })
}

// open makes the mapping that cryptsetup would make.
func (m *machine) open(name, uuid string) {
	m.t.Helper()
	dir := "sys/class/block/dm-" + name
	m.write(dir+"/dm/name", name+"\n")
	m.write(dir+"/dev", "254:0\n")
	m.write(dir+"/dm/uuid", "CRYPT-LUKS2-"+strings.ReplaceAll(uuid, "-", "")+"-"+name+"\n")
}

func (m *machine) report() Report {
	m.t.Helper()
	data, err := os.ReadFile(m.root.path(RunFolder, ReportFile))
	if err != nil {
		m.t.Fatal(err)
	}
	r, err := ParseReport(data)
	if err != nil {
		m.t.Fatalf("%v: %q", err, data)
	}
	return r
}

// became checks outcomes, in the order of the volumes.
func (m *machine) became(want ...unlock.Outcome) {
	m.t.Helper()
	r := m.report()
	var got []unlock.Outcome
	for _, v := range r.Volumes {
		got = append(got, v.Outcome)
	}
	if r.BootID != bootID || fmt.Sprint(got) != fmt.Sprint(want) {
		m.t.Errorf("report %+v, want %v; console:\n%s", r, want, m.console())
	}
}

// noSecret: nothing that is read by people or left on the machine has a
// passphrase.
func (m *machine) noSecret() {
	m.t.Helper()
	texts := []byte(m.console())
	for _, name := range []string{ReportFile, ReleaseFile} {
		data, err := os.ReadFile(m.root.path(RunFolder, name))
		if err == nil {
			texts = append(texts, data...)
		}
	}
	for _, v := range m.config.Volumes {
		if bytes.Contains(texts, []byte(passphrase(v.UUID))) {
			m.t.Errorf("a passphrase is in %q", texts)
		}
	}
}

// fakeNetwork is neither touched nor searched.
type fakeNetwork struct {
	changed  chan struct{}
	options  NetworkOptions
	up, down bool
}

func (n *fakeNetwork) bringUp(_ context.Context, o NetworkOptions) network {
	n.up, n.options = true, o
	return n
}
func (n *fakeNetwork) Addresses(identity.KeyID) []string { return nil }
func (n *fakeNetwork) Changed() <-chan struct{}          { return n.changed }
func (n *fakeNetwork) Stop(context.Context) error        { n.down = true; return nil }

// server is a server's store with one machine, and its listener.
type server struct {
	mu       sync.Mutex
	machine  unlock.Machine
	blobs    [][]byte
	asked    int
	released func() // called at a release, if not nil
	address  string
}

func newServer(t testing.TB, key *identity.Key, machine identity.KeyID) *server {
	t.Helper()
	s := &server{machine: unlock.Machine{KeyID: machine, Enabled: true, Settings: unlock.Defaults()}}
	config, err := key.ServerTLS(unlock.Protocol)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	s.address = listener.Addr().String()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { _ = unlock.Serve(context.Background(), tls.Server(conn, config), s) }()
		}
	}()
	return s
}

func (s *server) Lookup(id identity.KeyID) (unlock.Machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if id != s.machine.KeyID {
		return unlock.Machine{}, unlock.ErrUnknown
	}
	return s.machine, nil
}

func (s *server) Release(context.Context, identity.KeyID, time.Time, string) ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.released != nil {
		s.released()
	}
	return s.blobs, nil
}

func (s *server) Waiting(identity.KeyID, time.Time)      {}
func (s *server) Changed(identity.KeyID) <-chan struct{} { return nil }
func (s *server) Refused(identity.KeyID, string)         {}
func (s *server) set(change func())                      { s.mu.Lock(); defer s.mu.Unlock(); change() }
func (s *server) count() (n int)                         { s.set(func() { n = s.asked }); return n }

// asker is a process askpass.
type asker struct {
	m   *machine
	pid string
	fd  int
}

// askpass starts to ask as cryptsetup-initramfs's program does.
func (m *machine) askpass(pid, device string) *asker {
	m.t.Helper()
	fifo := m.root.path("lib/cryptsetup/passfifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		m.t.Fatal(err)
	}
	fd, err := unix.Open(fifo, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	a := &asker{m: m, pid: pid, fd: fd}
	m.process(pid, m.root.path("lib/cryptsetup/askpass"), fifo, "CRYPTTAB_NAME=name\x00CRYPTTAB_SOURCE="+device+"\x00CRYPTTAB_TRIED=0\x00")
	return a
}

// process is a folder of /proc; it is complete when it appears.
func (m *machine) process(pid, exe, open, environ string) {
	m.t.Helper()
	part := "part/" + pid
	m.write(part+"/environ", environ)
	m.write(part+"/stat", pid+" (ask) pass) S 1 1 1 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1\n")
	err := errors.Join(
		os.MkdirAll(m.root.path(part, "fd"), 0o755), os.Symlink("/dev/console", m.root.path(part, "fd/0")),
		os.Symlink(open, m.root.path(part, "fd/3")), os.Symlink(exe, m.root.path(part, "exe")),
		os.Rename(m.root.path(part), m.root.path("proc", pid)),
	)
	if err != nil {
		m.t.Fatal(err)
	}
}

// reads waits for an answer by the FIFO, up to its end, and ends the process.
func (a *asker) reads() string {
	a.m.t.Helper()
	var text []byte
	buf := make([]byte, 4096)
	for deadline := time.Now().Add(time.Minute); ; {
		if time.Now().After(deadline) {
			a.m.t.Fatalf("askpass gets no answer; console:\n%s", a.m.console())
		}
		fds := []unix.PollFd{{Fd: int32(a.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 20); err != nil || n == 0 {
			continue
		}
		n, err := unix.Read(a.fd, buf)
		if err == nil && n == 0 {
			break
		}
		text = append(text, buf[:max(n, 0)]...)
	}
	a.ends()
	return string(text)
}

// now is what lies in the FIFO.
func (a *asker) now() string {
	buf := make([]byte, 4096)
	n, err := unix.Read(a.fd, buf)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		a.m.t.Fatal(err)
	}
	return string(buf[:max(n, 0)])
}

// ends is also what becomes of it when somebody types.
func (a *asker) ends() {
	a.m.t.Helper()
	unix.Close(a.fd)
	if err := os.Rename(a.m.root.path("proc", a.pid), a.m.root.path("part", a.pid+"ended")); err != nil {
		a.m.t.Fatal(err)
	}
}

func (m *machine) disk(i int) string { return m.root.path([]string{"dev/vda", "dev/vdb"}[i]) }
