package initrd

import (
	"os"
	"strings"
	"testing"
)

// TestAllLinks: without a word every link comes up, has its link-local address without duplicate address detection, and its lease.
func TestAllLinks(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	before := state(t)
	serveDHCP(t, lan, "far0", dhcpServer{address: "10.1.0.7"})
	n := start(t, testSystem(t), NetworkOptions{})
	n.until(t, "link-local addresses", func() bool { return has(t, "eth0", "fe80:") && has(t, "eth1", "fe80:") })
	n.until(t, "the lease", func() bool { return has(t, "eth0", "10.1.0.7/24") })
	n.until(t, "the name server", func() bool {
		data, _ := os.ReadFile(n.system.resolv)
		return string(data) == "nameserver 10.1.0.1\n"
	})
	if s := state(t); !strings.Contains(s, `"dev":"eth0","dst":"default","flags":["onlink"],"gateway":"10.1.0.1"`) {
		t.Errorf("no default route in %s", s)
	}
	n.end(t, before)
}
