package server

import (
	"strings"
	"testing"
)

// A machine calls itself what it likes, and gives its volume the UUID that it
// likes. Neither makes a volume that is named by its whole UUID mean another one,
// or several; not to a rescue, which has nothing else to ask by, either.
func TestNobodyTakesAUUIDAsAName(t *testing.T) {
	s, h, bob, _ := cast(t)
	s.enroll(siteVolume, otherVolume)
	s.enroll("laptop9", strings.ToUpper(siteVolume))
	r := s.rescued(bob, h.packetID())
	for _, p := range []*person{bob, r} {
		if id, err := p.recoverable(siteVolume); err != nil || id != h.packetID() {
			t.Errorf("%s: %s, and not %s; %v", p.name, id, h.packetID(), err)
		}
	}
	// Nor where nobody but an administrator brought a packet of it.
	adam := s.person("adam", "admin")
	const carriedVolume = "2f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
	brought, err := adam.bring(s.carried("old", carriedVolume), true)
	if err != nil {
		t.Fatal(err)
	}
	s.enroll(carriedVolume, "3f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
	if id, err := bob.recoverable(carriedVolume); err != nil || id != brought.ID {
		t.Errorf("an imported volume: %s, and not %s; %v", id, brought.ID, err)
	}
}
