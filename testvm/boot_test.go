//go:build vm

package testvm

import (
	"testing"
	"time"
)

func TestBootLUKS2(t *testing.T) { bootAlone(t, 2) }

// Without udev's link, the boot program looks for the volume on all devices.
func TestBootLUKS1(t *testing.T) { bootAlone(t, 1, "testvm.nolink") }

func bootAlone(t *testing.T, luks int, words ...string) {
	s := newSite(t, luks)
	s.initServer("srv")
	s.startServer("srv")
	s.enroll("srv")
	s.mustReachRoot(s.boot(words...))
}

// A volume with the enrolled UUID but another key gets nothing: no server is
// even asked.
func TestAnotherVolumeUnderItsUUID(t *testing.T) {
	s := newSite(t, 2)
	s.initServer("srv")
	s.startServer("srv")
	s.enroll("srv")
	s.exchangeDisk()
	before := s.counter("PassiveOpens")
	m := s.boot("testvm.once", "testvm.nolink")
	s.mustStayLocked(m, 4)
	// All else was alike, so it was the key that the program minded.
	const reason = "/dev/vda: luks: not the volume that was enrolled: volume key digest is "
	if !m.Console.Contains(reason) {
		t.Errorf("the console does not say %q", reason)
	}
	if s.counter("PassiveOpens") != before {
		t.Error("a server was asked for a volume that was not enrolled")
	}
}

// What was opened is compared as well: another header beneath it, and the kernel
// loses the mapping before anything of it is mounted.
func TestExchangedAfterTheOpen(t *testing.T) {
	s := newSite(t, 2)
	s.initServer("srv")
	s.startServer("srv")
	s.enroll("srv")
	m := s.boot("testvm.exchange")
	s.mustEndWith(m, "testvm: init failed: check what is mapped: exit status 4, 0 mappings left\n")
	for _, sign := range []string{"testvm: root", "testvm: marker", s.marker} {
		if m.Console.Contains(sign) {
			t.Errorf("it says %q", sign)
		}
	}
	const reason = "mapping testvm-root: not the volume that was enrolled: /dev/vda: luks: not a LUKS volume"
	if !m.Console.Contains(reason) {
		t.Errorf("the console does not say %q", reason)
	}
}

// A disabled machine gets nothing. That it boots when it is enabled again
// shows that nothing else kept it locked.
func TestDisabledMachineStaysLocked(t *testing.T) {
	s := newSite(t, 2)
	s.initServer("srv")
	s.startServer("srv")
	s.enroll("srv")
	s.must("machine", "disable", "--state", "srv", "--all")
	s.mustStayLocked(s.boot("testvm.once"), 7)
	s.must("machine", "enable", "--state", "srv", "--all")
	s.mustReachRoot(s.boot("testvm.once"))
}

// A machine that finds no server goes on asking. The server is started only
// when a connection was seen to be turned away for want of a listener.
func TestServerDownThenUp(t *testing.T) {
	s := newSite(t, 2)
	s.initServer("srv")
	stop := s.startServer("srv")
	s.enroll("srv")
	stop()
	before := s.counter("OutRsts")
	m := s.boot()
	for deadline := time.Now().Add(bootLimit); s.counter("OutRsts") == before; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the machine never asked")
		}
	}
	s.mustBeLocked(m)
	s.startServer("srv")
	s.mustReachRoot(m)
}

// A server with another identity at the right address is no server: not even
// its refusal counts, so the exit code is 1 and not 7.
func TestWrongServerKey(t *testing.T) {
	s := newSite(t, 2)
	s.initServer("srv")
	stop := s.startServer("srv")
	s.enroll("srv")
	stop()
	s.initServer("impostor")
	stop = s.startServer("impostor")
	before := s.counter("PassiveOpens")
	s.mustStayLocked(s.boot("testvm.once"), 1)
	if s.counter("PassiveOpens") == before {
		t.Fatal("the machine never reached the impostor")
	}
	stop()
	s.startServer("srv")
	s.mustReachRoot(s.boot("testvm.once"))
}
