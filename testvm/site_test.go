//go:build vm

package testvm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// site is a network with servers, and one machine with an encrypted root.
type site struct {
	t      *testing.T
	dir    string
	lan    *LAN
	root   Root
	uuid   string
	secret secrets // what no console may show
	boots  int

	passphrase []byte // of the user, on all volumes
	marker     string // what a machine says that has booted
}

// newSite makes the network and the disk. No server exists yet.
func newSite(t *testing.T, luks int) *site {
	t.Helper()
	s := newNetwork(t)
	s.root = Root{
		LUKS:       luks,
		Init:       filepath.Join(programs, "rootinit"),
		Marker:     s.marker, // stands on the encrypted root, and nowhere else
		Passphrase: s.passphrase,
	}
	if err := s.root.Write(t.Context(), s.path("disk.img")); err != nil {
		t.Fatal(err)
	}
	s.uuid = s.cryptsetup(nil, "luksUUID", "disk.img")
	s.mustNotHoldMarker("disk.img")
	return s
}

// newNetwork is a site without a machine.
func newNetwork(t *testing.T) *site {
	t.Helper()
	lan, err := NewLAN(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
	})
	passphrase := rand.Text()
	s := &site{t: t, dir: t.TempDir(), lan: lan, secret: secrets{}, passphrase: []byte(passphrase), marker: rand.Text()}
	s.write("user.pass", passphrase)
	s.write("master.pass", rand.Text())
	return s
}

// cryptsetup runs cryptsetup, which has to succeed, and returns what it printed.
func (s *site) cryptsetup(stdin []byte, args ...string) string {
	s.t.Helper()
	out, err := run(s.t.Context(), s.dir, stdin, append([]string{"cryptsetup", "-q"}, args...)...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) read(name string) []byte {
	s.t.Helper()
	data, err := os.ReadFile(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return data
}

// command is mandos-escrow with these arguments, where the servers are.
func (s *site) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := s.lan.ServerCommand(ctx, append([]string{filepath.Join(programs, "mandos-escrow")}, args...)...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "HOME="+s.dir, "XDG_CONFIG_HOME="+s.path(".config"))
	return cmd
}

// must runs mandos-escrow, which has to succeed, and returns what it printed.
func (s *site) must(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := s.command(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("mandos-escrow %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out)
}

// initServer makes a server with keys of its own; all have the same address.
func (s *site) initServer(state string) { s.t.Helper(); s.initServerAt(state, ServerAddr) }

// initServerAt is initServer with the addresses that machines learn. It listens
// on all that the servers' side has.
func (s *site) initServerAt(state string, addresses ...netip.Addr) {
	s.t.Helper()
	args := []string{"server", "init", "--state", state, "--name", state, "--listen", "[::]:7625", "--master-passphrase-file", "master.pass"}
	for _, address := range addresses {
		args = append(args, "--address", netip.AddrPortFrom(address, 7625).String())
	}
	s.must(args...)
}

// startServer returns when the server answers, with what stops it.
func (s *site) startServer(state string, flags ...string) (stop func()) {
	s.t.Helper()
	log, err := os.OpenFile(s.path(state+".log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := s.command(context.Background(), append([]string{"server", "run", "--state", state}, flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		timer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			s.t.Errorf("server %s did not stop well: %v", state, err)
		}
		if text, err := os.ReadFile(log.Name()); s.t.Failed() {
			s.t.Logf("%s.log (%v):\n%s", state, err, text)
		}
		_ = log.Close()
	}
	s.t.Cleanup(stop)
	s.must("server", "status", "--state", state, "--wait", "30s")
	return stop
}

// enroll enrolls the machine at a running server, as an installer does from
// outside of the new system, and packs its initramfs.
func (s *site) enroll(state string) {
	s.t.Helper()
	s.write("token", s.must("token", "create", "--state", state, "--uses", "1", "--ttl", "1h"))
	if err := os.Mkdir(s.path("root"), 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.must("enroll", "--token-file", "token", "--device", "disk.img", "--passphrase-file", "user.pass", "--root", "root")
	// The guest has no such file: there the volume has to be found by its UUID.
	if want := "\nvolume-path: " + s.path("disk.img") + "\n"; !bytes.Contains(s.read("root/etc/mandos-escrow/unlock.conf"), []byte(want)) {
		s.t.Fatalf("unlock.conf has no line %q", want)
	}
	s.learnSecrets(s.lan.ServerCommand(s.t.Context(), filepath.Join(programs, "mandos-escrow-unlock"),
		"--config", s.path("root/etc/mandos-escrow"), "--print", "--once"), "disk.img", "root/etc/mandos-escrow")
	initramfs := Initramfs{
		Kernel: kernel,
		Init:   filepath.Join(programs, "init"),
		Unlock: filepath.Join(programs, "mandos-escrow-unlock"),
		Config: s.path("root/etc/mandos-escrow"),
	}
	if err := initramfs.Write(s.t.Context(), s.path("initrd")); err != nil {
		s.t.Fatal(err)
	}
	s.mustNotHoldMarker("initrd")
}

// learnSecrets collects what a console may not show. The boot passphrase is
// fetched as the machine will, by the boot program as given, and
// has to open the volume in image. Config is the folder of the boot identity.
func (s *site) learnSecrets(unlock *exec.Cmd, image, config string) {
	s.t.Helper()
	passphrase, err := unlock.Output()
	if err != nil {
		s.t.Fatalf("fetch the boot passphrase: %v", err)
	}
	s.cryptsetup(passphrase, "open", "--test-passphrase", "--key-file", "-", image)
	key := image + ".key"
	s.cryptsetup(passphrase, "luksDump", "--dump-volume-key", "--volume-key-file", key, "--key-file", "-", image)
	s.secret["boot passphrase of "+image] = passphrase
	for _, name := range []string{key, "user.pass", "master.pass"} {
		s.secret[name] = s.read(name)
	}
	for _, name := range []string{"tls-privkey.pem", "seckey.txt"} {
		s.secret.addLines(config+name, s.read(filepath.Join(config, name)))
	}
}

// exchangeDisk puts another volume with the same UUID in the place of the disk.
func (s *site) exchangeDisk() {
	s.t.Helper()
	if err := os.Remove(s.path("disk.img")); err != nil {
		s.t.Fatal(err)
	}
	if err := s.root.Write(s.t.Context(), s.path("disk.img")); err != nil {
		s.t.Fatal(err)
	}
	s.cryptsetup(nil, "luksUUID", "--uuid", s.uuid, "disk.img")
}

// boot starts the machine.
func (s *site) boot(words ...string) *Machine {
	s.t.Helper()
	port, err := s.lan.Plug(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	m := &Machine{
		Kernel: kernel.Image,
		Initrd: s.path("initrd"),
		Disks:  []string{s.path("disk.img")},
		Memory: 512,
		Port:   port,
		Append: append([]string{"testvm.addr=" + port.Addr.String()}, words...),
	}
	s.start(m)
	return m
}

// start starts a machine. Its console is shown when the test fails, and kept
// in $MANDOS_ESCROW_TESTVM_LOGS.
func (s *site) start(m *Machine) {
	s.t.Helper()
	s.boots++
	name := fmt.Sprintf("%s-%d.log", strings.ReplaceAll(s.t.Name(), "/", "-"), s.boots)
	if err := m.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		m.Close()
		if s.t.Failed() {
			s.t.Logf("last lines of the console, %s:\n%s", name, m.Console.Tail(200))
		}
		if dir := os.Getenv("MANDOS_ESCROW_TESTVM_LOGS"); dir != "" {
			s.keep(dir, name, m.Console.String())
		}
	})
}

func (s *site) keep(dir, name, text string) {
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)
	}
	if err != nil {
		s.t.Error(err)
	}
}
