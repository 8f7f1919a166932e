//go:build vm

package testvm

import (
	"testing"
	"time"
)

func TestBootLUKS2(t *testing.T) { bootAlone(t, 2) }

func TestBootLUKS1(t *testing.T) { bootAlone(t, 1) }

func bootAlone(t *testing.T, luks int) {
	s := newSite(t, luks)
	s.initServer("srv")
	s.startServer("srv")
	s.enroll("srv")
	s.mustReachRoot(s.boot())
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
