//go:build vm

package testvm

import (
	"testing"
)

// The point of it all: nobody types, and the real system comes up. Its network
// is as it would be without us.
func TestInitramfsTools(t *testing.T) {
	s := newNetwork(t)
	s.initServer("srv")
	s.startServer("srv")
	d := s.newDebian("machine", InitramfsTools, 0)
	d.install()
	d.enroll("srv")
	d.finish()
	m := d.boot(d.staticAddress())
	d.mustReachRoot(m)
	d.mustReport(m, "opened")
	d.mustBeAsFound(m)
}
