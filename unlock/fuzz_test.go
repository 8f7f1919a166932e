package unlock

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"
)

// seeds are the vectors of one input.
func seeds(f *testing.F, input string) {
	for _, v := range vectors(&testing.T{}) {
		if v.input == input {
			f.Add(v.data)
		}
	}
}

// sameAgain: what is read is refused by name, or written again unchanged.
func sameAgain(t *testing.T, input string, data []byte, named error) {
	again, err := vector{input: input, data: data}.outcome()
	switch {
	case err != nil && !errors.Is(err, named):
		t.Fatalf("%q: unnamed error %v", data, err)
	case err == nil && !bytes.Equal(again, data):
		t.Fatalf("%q was read, and written as %q", data, again)
	}
}

func FuzzRequest(f *testing.F) {
	seeds(f, "request")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "request", data, ErrProtocol) })
}

func FuzzReply(f *testing.F) {
	seeds(f, "reply")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "reply", data, ErrProtocol) })
}

func FuzzBlob(f *testing.F) {
	seeds(f, "blob")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "blob", data, ErrBlob) })
}

func FuzzConfig(f *testing.F) {
	seeds(f, "config")
	f.Fuzz(func(t *testing.T, data []byte) { sameAgain(t, "config", data, ErrConfig) })
}

// FuzzDiscover: whatever comes from a link is dropped, or gives addresses that
// are well-formed, few, and of that link.
func FuzzDiscover(f *testing.F) {
	f.Add(announced().bytes())
	f.Add(announced("192.0.2.7", "2001:db8::7", "fe80::7", "198.51.100.1").bytes())
	f.Add(query(questionID))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, s := newBrowser()
		b.take(s, data, linkLocal, epoch)
		found := b.Addresses(testKeyID)
		if len(found) > 2*maxCandidates {
			t.Fatalf("%d addresses", len(found))
		}
		for _, a := range found {
			if err := CheckAddress(a); err != nil {
				t.Fatal(err)
			}
			host, _, _ := net.SplitHostPort(a)
			bare, zone, _ := strings.Cut(host, "%")
			if ip := net.ParseIP(bare); !s.plausible(ip) || (zone == s.link) != isLinkLocal6(ip) {
				t.Fatalf("found %s", a)
			}
		}
	})
}
