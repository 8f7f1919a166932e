//go:build vm

package testvm

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"time"
)

// bootLimit is far above the seconds that a boot takes on a quiet host, at most
// 60: a software CPU on a busy one is slower by an order of magnitude.
const bootLimit = 10 * time.Minute

// mustNotHoldMarker shows that printing the marker takes more than this file.
func (s *site) mustNotHoldMarker(name string) {
	s.t.Helper()
	if bytes.Contains(s.read(name), []byte(s.marker)) {
		s.t.Fatalf("%s holds the marker in clear", name)
	}
}

// mustReachRoot waits until the encrypted root's own init has run. What it runs
// from has to be a mapping of this volume, of this LUKS version.
func (s *site) mustReachRoot(m *Machine) {
	s.t.Helper()
	mapping := fmt.Sprintf("CRYPT-LUKS%d-%s-testvm-root", s.root.LUKS, strings.ReplaceAll(s.uuid, "-", ""))
	s.mustEndWith(m, "testvm: root on "+mapping+"\ntestvm: marker "+s.marker+"\n")
}

// mustStayLocked waits until the boot program has given up with this exit code
// and printed nothing, and the machine with it.
func (s *site) mustStayLocked(m *Machine, exit int) {
	s.t.Helper()
	s.mustEndWith(m, fmt.Sprintf("testvm: unlock exit %d, 0 bytes printed\n", exit))
	s.mustBeLocked(m)
}

func (s *site) mustBeLocked(m *Machine) {
	s.t.Helper()
	for _, sign := range []string{"testvm: volume opened", "testvm: root", "testvm: marker", s.marker} {
		if m.Console.Contains(sign) {
			s.t.Fatalf("a machine that has to stay locked says %q", sign)
		}
	}
}

// mustEndWith waits for text and for power off. Whatever the text is, the boot
// program has to have compared the volume's header, and nothing secret may
// stand on the console.
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
	if m.Console.Contains("was not compared") {
		s.t.Error("the boot program did not find the volume")
	}
	if shown := s.secret.in([]byte(m.Console.String())); shown != nil {
		s.t.Errorf("the console shows %q", shown)
	}
	s.t.Logf("%q, and power off after %.1f s, %.1f s of a processor", strings.TrimSpace(text), time.Since(m.Started).Seconds(), m.CPU().Seconds())
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
