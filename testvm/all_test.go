//go:build vm && vmall

package testvm

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// swallowed is an address whose packets nobody answers.
var swallowed = netip.MustParseAddr("10.77.0.66")

// newMachine is a machine with initramfs-tools and as many more disks as are
// wanted, enrolled at a server that runs.
func newMachine(t *testing.T, moreDisks int) (d *debian, stopServer func()) {
	s := newNetwork(t)
	s.initServer("srv")
	stop := s.startServer("srv")
	d = s.newDebian("machine", InitramfsTools, moreDisks)
	d.install()
	d.enroll("srv")
	d.finish()
	return d, stop
}

// Installing changes nothing: a machine that is not enrolled asks at its
// console, and is opened there.
func TestInstalledNotEnrolled(t *testing.T) {
	s := newNetwork(t)
	d := s.newDebian("machine", InitramfsTools, 0)
	d.install()
	d.must("update-initramfs", "-u")
	d.finish()
	m := d.boot(noSystem)
	d.answerPrompt(m, 1)
	d.mustReachRoot(m)
}

// Root and data disk of one machine: with a server both are opened, the data
// disk too, which the distribution would leave to the running system.
func TestTwoDisks(t *testing.T) {
	d, _ := newMachine(t, 1)
	m := d.boot(noSystem, d.staticAddress())
	d.mustReachRoot(m)
	d.mustReport(m, "opened", "opened")
	mapping := "testvm: mapping data1 CRYPT-LUKS2-" + strings.ReplaceAll(d.uuids[1], "-", "") + "-data1\n"
	if !m.Console.Contains(mapping) {
		t.Errorf("the console does not say %q", mapping)
	}
}

// The console asks all the time, and whoever answers first wins.
func TestPrompt(t *testing.T) {
	d, stop := newMachine(t, 0)
	t.Run("a disabled machine goes on asking", func(t *testing.T) {
		d := d.in(t)
		d.site.must("machine", "disable", "--state", "srv", "--all")
		m := d.boot(noSystem, d.staticAddress())
		d.mustSay(m, "server srv: refused")
		d.mustNotAnswer(m)
		d.answerPrompt(m, 1)
		d.mustReachRoot(m)
		d.mustReport(m, "answered")
		d.site.must("machine", "enable", "--state", "srv", "--all")
	})
	stop()
	t.Run("answered while the server is down", func(t *testing.T) {
		d := d.in(t)
		m := d.boot(noSystem, d.staticAddress())
		d.mustSay(m, "server srv: ")
		d.answerPrompt(m, 1)
		d.mustReachRoot(m)
		d.mustReport(m, "answered")
	})
	t.Run("no network at all", func(t *testing.T) {
		d := d.in(t)
		m := d.boot(noSystem, "mandos-escrow=off")
		d.answerPrompt(m, 1)
		d.mustReachRoot(m)
	})
	t.Run("server two minutes late", func(t *testing.T) {
		d := d.in(t)
		m := d.boot(noSystem, d.staticAddress())
		d.mustSay(m, d.prompt)
		time.Sleep(2 * time.Minute)
		d.mustNotAnswer(m)
		d.startServer("srv")
		d.mustReachRoot(m)
		d.mustReport(m, "opened")
	})
}

// Two machines that have no address but the link-local one of IPv6, and that of
// the server is known to nobody.
func TestLinkLocal(t *testing.T) {
	s := newNetwork(t)
	s.initServer("srv")
	stop := s.startServer("srv")
	var machines []*debian
	for n := range 2 {
		d := s.newDebian(fmt.Sprintf("machine%d", n), InitramfsTools, 0)
		d.install()
		d.enroll("srv")
		d.finish()
		machines = append(machines, d)
	}
	stop()
	// The enrolled address leads nowhere now.
	if err := s.lan.WithoutIPv4(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.startServer("srv")
	var booted []*Machine
	for _, d := range machines {
		booted = append(booted, d.boot(noSystem))
	}
	for n, d := range machines {
		d.mustReachRoot(booted[n])
		d.mustReport(booted[n], "opened")
		d.mustBeAsFound(booted[n])
	}
}

// An address that swallows every packet stands before the right one. Nothing
// else leads to the server: it does not announce itself.
func TestSwallowedAddressFirst(t *testing.T) {
	s := newNetwork(t)
	if err := s.lan.Swallow(t.Context(), swallowed); err != nil {
		t.Fatal(err)
	}
	s.initServerAt("srv", swallowed, ServerAddr)
	s.startServer("srv", "--no-announce")
	d := s.newDebian("machine", InitramfsTools, 0)
	d.install()
	d.enroll("srv")
	d.finish()
	before, err := s.lan.Swallowed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := d.boot(noSystem, d.staticAddress())
	d.mustSay(m, d.prompt)
	asked := time.Now()
	d.mustSay(m, "passphrase handed over")
	t.Logf("handed over %.1f s after the console's question", time.Since(asked).Seconds())
	after, err := s.lan.Swallowed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after == before {
		t.Error("the first address was not tried")
	}
	if m.Console.Contains("server srv: ") {
		t.Error("the first address was given up before the second was tried")
	}
	d.mustReachRoot(m)
}

// The keyslot no longer takes the boot passphrase: that is said, it is not sent
// again, and the prompt goes on.
func TestRotatedBootPassphrase(t *testing.T) {
	d, _ := newMachine(t, 0)
	s := d.site
	s.write("boot.pass", string(s.secret["boot passphrase of "+d.disks[0]]))
	s.write("other.pass", "what nobody escrowed")
	s.cryptsetup(nil, "luksChangeKey", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--key-file", "boot.pass", d.disks[0], "other.pass")
	m := d.boot(noSystem, d.staticAddress())
	d.mustSay(m, "its keyslot does not take the boot passphrase any more")
	d.answerPrompt(m, 2)
	d.mustReachRoot(m)
	d.mustReport(m, "rejected")
	if n := strings.Count(m.Console.String(), "handed over"); n != 1 {
		t.Errorf("the passphrase was handed over %d times", n)
	}
}

// Who has the machine, but not the disk's passphrases, puts another volume in
// its place, to be given the boot passphrase or to be booted.
func TestRootSwap(t *testing.T) {
	d, _ := newMachine(t, 0)
	s := d.site
	attacker := []byte("of the attacker")
	evil := s.path("evil")
	// A root that would say the marker, so that booting it would be seen.
	root := Root{Init: filepath.Join(programs, "rootinit"), Marker: s.marker}
	if err := errors.Join(os.Mkdir(evil, 0o755), root.populate(evil)); err != nil {
		t.Fatal(err)
	}
	if err := FormatVolume(t.Context(), s.path("twin.img"), 64<<20, attacker); err != nil {
		t.Fatal(err)
	}
	s.cryptsetup(nil, "luksUUID", "--uuid", d.uuids[0], "twin.img")
	if err := WriteTree(t.Context(), s.path("twin.img"), attacker, evil); err != nil {
		t.Fatal(err)
	}
	d.copyDisk("null.img")
	if err := NullCipher(s.path("null.img")); err != nil {
		t.Fatal(err)
	}
	if err := WriteClear(t.Context(), s.path("null.img"), evil); err != nil {
		t.Fatal(err)
	}
	const notAnswered = "NOT ANSWERED: "
	t.Run("another volume under its UUID", func(t *testing.T) {
		d := d.in(t)
		before := d.counter("PassiveOpens")
		m := d.bootFrom([]string{"twin.img"}, d.staticAddress())
		d.mustSay(m, notAnswered)
		// Opened by hand it is looked at again, and not mounted.
		d.typeAt(m, 1, string(attacker))
		d.mustEndWith(m, "this machine does not boot from it")
		d.mustNotAnswer(m)
		d.mustNotHaveAsked(before)
	})
	t.Run("null cipher", func(t *testing.T) {
		d := d.in(t)
		before := d.counter("PassiveOpens")
		m := d.bootFrom([]string{"null.img"}, d.staticAddress())
		d.mustSay(m, notAnswered)
		d.answerPrompt(m, 1)
		d.mustEndWith(m, "this machine does not boot from it")
		d.mustNotAnswer(m)
		d.mustNotHaveAsked(before)
	})
	// Which of two disks with one UUID is opened, udev decides. Either it is the
	// right one, or it gets nothing.
	for name, disks := range map[string][]string{
		"the twin before the disk": {"twin.img", d.disks[0]},
		"the twin after the disk":  {d.disks[0], "twin.img"},
	} {
		t.Run(name, func(t *testing.T) {
			d := d.in(t)
			before := d.counter("PassiveOpens")
			m := d.bootFrom(disks, noSystem, d.staticAddress())
			d.mustSay(m, notAnswered, "handed over")
			if m.Console.Contains("handed over") {
				d.mustReachRoot(m)
				return
			}
			d.mustNotAnswer(m)
			d.mustNotHaveAsked(before)
		})
	}
}

// mustNotHaveAsked shows that no server was connected to since its counter
// PassiveOpens was before.
func (d *debian) mustNotHaveAsked(before int) {
	d.t.Helper()
	if d.counter("PassiveOpens") != before {
		d.t.Error("a server was asked for a volume that was not enrolled")
	}
}

// With the word that doctor advises, whoever types wrong passphrases for ever
// gets a reboot, and no shell.
func TestWrongPassphrases(t *testing.T) {
	s := newNetwork(t)
	s.initServer("srv")
	stop := s.startServer("srv")
	d := s.newDebian("machine", InitramfsTools, 0)
	// cryptsetup-initramfs asks that often before the root is waited for, and as
	// often while it is: half a minute, so how often altogether depends on the host.
	d.write("etc/crypttab", "root UUID="+d.uuids[0]+" none luks,initramfs,tries=15\n", 0o644)
	d.install()
	d.enroll("srv")
	d.finish()
	stop()
	m := d.boot(d.staticAddress()) // panic= is among a Machine's words
	tries := 0
	for {
		d.mustSayMore(m, tries+1, d.prompt, "Rebooting automatically due to panic=")
		if m.Console.Contains("Rebooting automatically due to panic=") {
			break
		}
		tries++
		time.Sleep(500 * time.Millisecond) // the echo is turned off after the prompt
		if err := m.Type("id"); err != nil {
			t.Fatal(err)
		}
	}
	d.mustEndWith(m, "Restarting system")
	d.mustBeLocked(m)
	t.Logf("%d wrong passphrases", tries)
	if tries < 30 {
		t.Errorf("only %d passphrases could be tried", tries)
	}
	for _, sign := range []string{"(initramfs)", "uid=0", "BusyBox"} {
		if m.Console.Contains(sign) {
			t.Errorf("there is a shell: the console says %q", sign)
		}
	}
}

// mustSayMore waits until text was shown n times, or other once.
func (d *debian) mustSayMore(m *Machine, n int, text, other string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), bootLimit)
	defer cancel()
	err := m.waitUntil(ctx, "a prompt or an end", func() bool {
		return strings.Count(m.Console.String(), text) >= n || m.Console.Contains(other)
	})
	if err != nil {
		d.t.Fatal(err)
	}
}

// dracut, with systemd in its image: the same by Password Agents.
func TestDracut(t *testing.T) {
	s := newNetwork(t)
	s.initServer("srv")
	stop := s.startServer("srv")
	d := s.newDebian("machine", Dracut, 0)
	d.install()
	d.enroll("srv")
	d.finish()
	t.Run("unattended", func(t *testing.T) {
		d := d.in(t)
		m := d.boot(d.staticAddress())
		d.mustReachRoot(m)
		d.mustReport(m, "opened")
		d.mustBeAsFound(m)
	})
	stop()
	t.Run("answered while the server is down", func(t *testing.T) {
		d := d.in(t)
		m := d.boot(noSystem, d.staticAddress())
		d.mustSay(m, "server srv: ")
		d.answerPrompt(m, 1)
		d.mustReachRoot(m)
		d.mustReport(m, "answered")
	})
}
