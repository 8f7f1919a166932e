//go:build vm

package testvm

import "testing"

// Installing changes nothing: a machine that is not enrolled asks at its
// console, and is opened there.
func TestInstalledNotEnrolled(t *testing.T) {
	s := newNetwork(t)
	d := s.newDebian("machine", InitramfsTools, 0)
	d.install()
	d.must("update-initramfs", "-u")
	d.finish()
	m := d.boot(nil)
	d.answerPrompt(m, "Please unlock disk root")
	d.mustReachMultiUser(m)
}

// The issue of it all: nobody types, and the real system comes up.
func TestInitramfsTools(t *testing.T) {
	s := newNetwork(t)
	s.initServer("srv")
	s.startServer("srv")
	d := s.newDebian("machine", InitramfsTools, 0)
	d.install()
	d.enroll("srv")
	d.finish()
	m := d.boot([]string{"ip=" + d.port.Addr.Addr().String() + ":::255.255.255.0::"})
	d.mustReachMultiUser(m)
	d.mustReport(m, "opened")
}
