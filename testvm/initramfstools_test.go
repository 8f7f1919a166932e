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
