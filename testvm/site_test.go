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

// bootLimit is far above the few seconds that a boot takes on a quiet host:
// a software CPU on a busy one is slower by an order of magnitude.
const bootLimit = 5 * time.Minute

// site is a network with servers, and one machine with an encrypted root.
type site struct {
	t      *testing.T
	dir    string
	lan    *LAN
	marker string // stands on the encrypted root, and nowhere else
	boots  int
}

// newSite makes the network and the disk. No server exists yet.
func newSite(t *testing.T, luks int) *site {
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
	s := &site{t: t, dir: t.TempDir(), lan: lan, marker: rand.Text()}
	passphrase := rand.Text()
	s.write("user.pass", passphrase)
	s.write("master.pass", rand.Text())
	root := Root{
		LUKS:       luks,
		Init:       filepath.Join(programs, "rootinit"),
		Marker:     s.marker,
		Passphrase: []byte(passphrase),
	}
	if err := root.Write(t.Context(), s.path("disk.img")); err != nil {
		t.Fatal(err)
	}
	s.mustNotHoldMarker("disk.img")
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// mustNotHoldMarker shows that printing the marker takes more than this file.
func (s *site) mustNotHoldMarker(name string) {
	s.t.Helper()
	data, err := os.ReadFile(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	if bytes.Contains(data, []byte(s.marker)) {
		s.t.Fatalf("%s holds the marker in clear", name)
	}
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
func (s *site) initServer(state string) {
	s.t.Helper()
	address := netip.AddrPortFrom(ServerAddr, 7625).String()
	s.must("server", "init", "--state", state, "--name", state, "--listen", address, "--address", address,
		"--master-passphrase-file", "master.pass")
}

// startServer returns when the server answers, with what stops it.
func (s *site) startServer(state string) (stop func()) {
	s.t.Helper()
	log, err := os.OpenFile(s.path(state+".log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := s.command(context.Background(), "server", "run", "--state", state)
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

// enroll enrolls the machine at a running server and packs its initramfs.
func (s *site) enroll(state string) {
	s.t.Helper()
	s.write("token", s.must("token", "create", "--state", state, "--uses", "1", "--ttl", "1h"))
	if err := os.Mkdir(s.path("root"), 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.must("enroll", "--token-file", "token", "--device", "disk.img", "--passphrase-file", "user.pass", "--root", "root")
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

// boot starts the machine. Its console is shown when the test fails, and kept
// in $MANDOS_ESCROW_TESTVM_LOGS.
func (s *site) boot(words ...string) *Machine {
	s.t.Helper()
	port, err := s.lan.Plug(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	m := &Machine{
		Kernel: kernel.Image,
		Initrd: s.path("initrd"),
		Disk:   s.path("disk.img"),
		Port:   port,
		Append: append([]string{"testvm.addr=" + port.Addr.String()}, words...),
	}
	s.boots++
	name := fmt.Sprintf("%s-%d.log", s.t.Name(), s.boots)
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
	return m
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

// mustReachRoot waits until the encrypted root's own init has run.
func (s *site) mustReachRoot(m *Machine) {
	s.t.Helper()
	s.mustEndWith(m, "testvm: marker "+s.marker+"\n")
}

// mustStayLocked waits until the boot program has given up with this exit
// code, and the machine with it.
func (s *site) mustStayLocked(m *Machine, exit int) {
	s.t.Helper()
	s.mustEndWith(m, fmt.Sprintf("testvm: unlock exit %d\n", exit))
	s.mustBeLocked(m)
}

func (s *site) mustBeLocked(m *Machine) {
	s.t.Helper()
	for _, sign := range []string{"testvm: volume opened", "testvm: marker", s.marker} {
		if m.Console.Contains(sign) {
			s.t.Fatalf("a machine that has to stay locked says %q", sign)
		}
	}
}

func (s *site) mustEndWith(m *Machine, text string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), bootLimit)
	defer cancel()
	if err := m.WaitFor(ctx, text); err != nil {
		s.t.Fatal(err)
	}
	if err := m.Wait(ctx); err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("%q, and power off after %.1f s", strings.TrimSpace(text), time.Since(m.Started).Seconds())
}

// counter reads a TCP counter of the servers' side.
func (s *site) counter(name string) int {
	s.t.Helper()
	n, err := s.lan.Counter(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}
