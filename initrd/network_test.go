package initrd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	n := start(t, testSystem(t), NetworkOptions{File: "/nonexistent", Hooks: "/nonexistent"})
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

// TestRouterAdvertisement: the kernel takes addresses from routers meanwhile, and they are gone afterwards.
func TestRouterAdvertisement(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	before := state(t)
	n := start(t, testSystem(t), NetworkOptions{})
	n.until(t, "the link-local address", func() bool { return has(t, "eth0", "fe80:") })
	advertise(t, lan, "far0")
	n.until(t, "the address of the router's prefix", func() bool { return has(t, "eth0", "2001:db8:5:") })
	n.end(t, before)
}

// advertise sends one router advertisement (RFC 4861 section 4.2) for 2001:db8:5::/64.
func advertise(t *testing.T, lan *elsewhere, name string) {
	t.Helper()
	lan.run(func() {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		i := index(t, name)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255); err != nil {
			t.Error(err)
		}
		message := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
		prefix := []byte{3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0}
		prefix = append(prefix, net.ParseIP("2001:db8:5::")...)
		to := &unix.SockaddrInet6{ZoneId: uint32(i)}
		copy(to.Addr[:], net.ParseIP("ff02::1"))
		// The other end has its own duplicate address detection to wait for.
		for {
			err := unix.Sendto(fd, append(message, prefix...), 0, to)
			if err == nil {
				return
			}
			if err != unix.EADDRNOTAVAIL {
				t.Error(err)
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
}

// TestWords: an address, a gateway and a name server by ip= go to their link, and other links stay down.
func TestWords(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	before := state(t)
	n := start(t, testSystem(t), NetworkOptions{Words: []string{
		"ip=10.2.0.5::10.2.0.1:255.255.255.0:h:eth0:off:10.2.0.53", "ip=[2001:db8::5]::[2001:db8::1]:64::eth0:off:[2001:db8::53]", "ip=::::::frobnicate",
	}})
	n.until(t, "the addresses", func() bool {
		return has(t, "eth0", "10.2.0.5/24") && has(t, "eth0", "2001:db8::5/64") && has(t, "eth0", "fe80:")
	})
	n.until(t, "the name servers", func() bool {
		data, _ := os.ReadFile(n.system.resolv)
		return string(data) == "nameserver 10.2.0.53\nnameserver 2001:db8::53\n"
	})
	for _, want := range []string{`"dst":"default","flags":["onlink"],"gateway":"10.2.0.1"`, `"gateway":"2001:db8::1"`} {
		if s := state(t); !strings.Contains(s, want) {
			t.Errorf("no %s in %s", want, s)
		}
	}
	if isUp(t, "eth1") {
		t.Error("eth1 is up")
	}
	if !n.reported("frobnicate") {
		t.Errorf("the bad word is not reported: %q", n.reports)
	}
	n.end(t, before)
}

// TestAddressForAnyLink goes to the link that has a carrier.
func TestAddressForAnyLink(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	lan.ip(t, "link set far0 down")
	before := state(t)
	n := start(t, testSystem(t), NetworkOptions{Words: []string{"ip=10.2.0.5:::24"}})
	n.until(t, "the address", func() bool { return has(t, "eth1", "10.2.0.5/24") })
	if has(t, "eth0", "10.2.0.5/24") {
		t.Error("eth0 has it, too")
	}
	n.end(t, before)
}

// TestFile: words of the network file count, but not its ip= when the command line has one.
func TestFile(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	before := state(t)
	file := filepath.Join(t.TempDir(), "network")
	text := "# the rack\nbridge=br0:eth0 nameserver=10.2.0.53 # both\n\nip=10.2.0.5:::24::br0:off\nbridge=br0:eth1\nfrobnicate\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for words, address := range map[string]string{"": "10.2.0.5/24", "ip=10.2.0.6:::24::br0:off": "10.2.0.6/24"} {
		n := start(t, testSystem(t), NetworkOptions{File: file, Words: strings.Fields(words)})
		n.until(t, "the bridge", func() bool {
			links, _ := listLinks()
			_, ok := find(links, "br0")
			return ok && has(t, "br0", address)
		})
		if !n.reported("another word has br0") || !n.reported("frobnicate") {
			t.Errorf("the bad words are not reported: %q", n.reports)
		}
		n.end(t, before)
	}
}

// TestBridge: it is made, gets its lease through its port, and is gone afterwards.
func TestBridge(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	before := state(t)
	serveDHCP(t, lan, "far1", dhcpServer{address: "10.1.0.7"})
	n := start(t, testSystem(t), NetworkOptions{Words: []string{"bridge=br0:eth0,eth1"}})
	n.until(t, "the bridge", func() bool {
		links, _ := listLinks()
		_, ok := find(links, "br0")
		return ok && has(t, "br0", "10.1.0.7/24") && has(t, "br0", "fe80:")
	})
	if has(t, "eth1", "10.") {
		t.Error("the port has an address")
	}
	n.end(t, before)
}

// TestVLANAndBond: where the kernel has the drivers, they are made, with what was asked for; where it has not, that is said, and the links are
// used as they are. The machines of testvm have them.
func TestVLANAndBond(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	lan.cable(t, "eth2", "far2")
	serveDHCP(t, lan, "far1", dhcpServer{address: "10.1.0.7"})
	before := state(t)
	n := start(t, testSystem(t), NetworkOptions{Words: []string{"vlan=eth0.5:eth0", "bond=bond7:eth1,eth2:mode=active-backup,primary=eth1", "vlan=vlan6:bond7"}})
	made := func(name string) bool {
		links, _ := listLinks()
		_, ok := find(links, name)
		return ok
	}
	n.until(t, "the VLAN, or a word about it", func() bool { return made("eth0.5") || n.reported("make vlan eth0.5") && n.reported("8021q") })
	n.until(t, "the bond, or a word about it", func() bool { return made("bond7") || n.reported("make bond bond7") && n.reported("bonding") })
	lease := "eth1"
	if made("bond7") {
		lease = "bond7"
		n.until(t, "the VLAN on the bond", func() bool { return made("vlan6") || n.reported("make vlan vlan6") })
	}
	n.until(t, "the lease", func() bool { return has(t, lease, "10.1.0.7/24") })
	n.until(t, "the link below the VLAN", func() bool { return has(t, "eth0", "fe80:") })
	n.end(t, before)
}

// TestForeign: what somebody else configured is left alone, whether before us or while we are at it.
func TestForeign(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	for _, i := range []string{"0", "1", "2"} {
		lan.cable(t, "eth"+i, "far"+i)
	}
	serveDHCP(t, lan, "far0", dhcpServer{address: "10.1.0.7"})
	serveDHCP(t, lan, "far1", dhcpServer{address: "10.1.1.7"})
	ip(t, "address add 192.0.2.1/24 dev eth0")
	ip(t, "link set eth0 up")
	for !has(t, "eth0", "fe80:") { // as nobody sets accept_dad on it, that takes a moment
		time.Sleep(20 * time.Millisecond)
	}
	before := state(t)
	n := start(t, testSystem(t), NetworkOptions{})
	n.until(t, "the lease", func() bool { return has(t, "eth1", "10.1.1.7/24") })
	if has(t, "eth0", "10.1.0.7") {
		t.Error("asked for a lease on somebody else's link")
	}
	n.end(t, before)

	n = start(t, testSystem(t), NetworkOptions{})
	n.until(t, "the lease", func() bool { return has(t, "eth1", "10.1.1.7/24") })
	ip(t, "address add 192.0.2.2/24 dev eth1")
	n.until(t, "the second link", func() bool { return has(t, "eth2", "fe80:") })
	if err := n.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !has(t, "eth1", "192.0.2.2") || !isUp(t, "eth1") || has(t, "eth1", "10.1.1.7") || isUp(t, "eth2") {
		t.Errorf("after the end: %s", state(t))
	}
}

// TestTakenOver: a DHCP client that gets the same lease, and sets it with its lifetime, keeps it.
func TestTakenOver(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	serveDHCP(t, lan, "far0", dhcpServer{address: "10.1.0.7"})
	n := start(t, testSystem(t), NetworkOptions{})
	n.until(t, "the lease", func() bool { return has(t, "eth0", "10.1.0.7/24") })
	ip(t, "address replace 10.1.0.7/24 dev eth0 valid_lft 600 preferred_lft 600")
	if err := n.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !has(t, "eth0", "10.1.0.7/24") || !isUp(t, "eth0") {
		t.Errorf("after the end: %s", state(t))
	}
}

// TestLate: links that come after the start are taken up, and those that go cost nothing.
func TestLate(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	n := start(t, testSystem(t), NetworkOptions{Words: []string{"bridge=br0:eth1"}})
	n.until(t, "the bridge", func() bool { return isUp(t, "br0") })
	lan.cable(t, "eth0", "far0")
	serveDHCP(t, lan, "far0", dhcpServer{address: "10.1.0.7"})
	n.until(t, "the lease", func() bool { return has(t, "eth0", "10.1.0.7/24") })
	lan.cable(t, "eth1", "far1")
	n.until(t, "the port", func() bool { return has(t, "br0", "fe80:") })
	ip(t, "link del eth0")
	lan.cable(t, "eth0", "far0")
	serveDHCP(t, lan, "far0", dhcpServer{address: "10.1.0.8"})
	n.until(t, "another lease", func() bool { return has(t, "eth0", "10.1.0.8/24") })
	ip(t, "link del eth0")
	if err := n.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	links, err := listLinks()
	if _, ok := find(links, "br0"); err != nil || ok || isUp(t, "eth1") {
		t.Errorf("after the end: %v, %s", err, state(t))
	}
}

// TestGarbage: behind many spoiled replies the good one is found.
func TestGarbage(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	before := state(t)
	spoil := func(good []byte) [][]byte {
		var all [][]byte
		for range 40 {
			bad := bytes.Clone(good)
			bad[ipHeader+udpHeader+rand.N(replyMin)] ^= byte(1 + rand.N(255))
			// With a cut option none of them is a whole reply, wherever else it is spoiled.
			bad[ipHeader+udpHeader+replyMin+1] = 250
			all = append(all, bad, bad[:rand.N(len(bad))])
		}
		return append(all, good)
	}
	serveDHCP(t, lan, "far0", dhcpServer{address: "10.1.0.7", spoil: spoil})
	n := start(t, testSystem(t), NetworkOptions{})
	n.until(t, "the lease", func() bool { return has(t, "eth0", "10.1.0.7/24") })
	n.end(t, before)
}

// TestOff: nothing is touched, but it is told what others do.
func TestOff(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	before := state(t)
	n := start(t, testSystem(t), NetworkOptions{Words: []string{"ip=off"}})
	changed := n.Changed()
	ip(t, "link set eth0 up")
	<-changed
	n.until(t, "somebody else's link", func() bool { return has(t, "eth0", "fe80:") })
	ip(t, "link set eth0 down")
	n.end(t, before)
}

// TestUdevFirst: a link is not taken up before udev has given it its name, but is in the end.
func TestUdevFirst(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	lan.cable(t, "eth1", "far1")
	before := strings.ReplaceAll(state(t), "eth0", "enp1s0")
	s := testSystem(t)
	s.udevWait = 4 * time.Second
	write := func(name string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(s.udev, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.udev, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("control")
	i := index(t, "eth0")
	n := start(t, s, NetworkOptions{Words: []string{"ip=enp1s0:dhcp", "ip=eth1:link6"}})
	ip(t, "link set eth0 name enp1s0")
	if isUp(t, "enp1s0") {
		t.Error("taken up before udev had done")
	}
	write(fmt.Sprintf("data/n%d", i))
	n.until(t, "the renamed link", func() bool { return has(t, "enp1s0", "fe80:") })
	n.until(t, "the link that udev never does", func() bool { return has(t, "eth1", "fe80:") })
	n.end(t, before)
}

// TestEndOfContext puts back as Stop does.
func TestEndOfContext(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lan := newElsewhere(t)
	lan.cable(t, "eth0", "far0")
	before := state(t)
	ctx, cancel := context.WithCancel(t.Context())
	n := startNetwork(ctx, NetworkOptions{Report: t.Logf}, testSystem(t))
	for changed := n.Changed(); !has(t, "eth0", "fe80:"); changed = n.Changed() {
		<-changed
	}
	cancel()
	<-n.done
	if after := state(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestNameServersOfOthers: a resolv.conf with something in it is left alone, and an empty one is empty again.
func TestNameServersOfOthers(t *testing.T) {
	dir := t.TempDir()
	servers := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"}
	var p plan
	for _, s := range servers {
		if err := p.add("nameserver=" + s); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"others": "nameserver 192.0.2.1\n", "empty": ""} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		r := resolver{path: path}
		if err := r.set(p.dns); err != nil {
			t.Fatal(err)
		}
		want := content
		if content == "" {
			want = "nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n"
		}
		if data, err := os.ReadFile(path); err != nil || string(data) != want {
			t.Errorf("%s: %q, %v", name, data, err)
		}
		if err := r.restore(); err != nil {
			t.Error(err)
		}
		if data, err := os.ReadFile(path); err != nil || string(data) != content {
			t.Errorf("%s afterwards: %q, %v", name, data, err)
		}
	}
	dangling := filepath.Join(dir, "link")
	if err := os.Symlink("nowhere", dangling); err != nil {
		t.Fatal(err)
	}
	r := resolver{path: dangling}
	if err := r.set(p.dns); err != nil || r.wrote != "" {
		t.Errorf("wrote through a link: %v", err)
	}
}

// TestAttributes: a broken list ends, and what stood before counts.
func TestAttributes(t *testing.T) {
	good := appendUint32(appendAttribute(nil, 3, []byte("eth0\x00")), 4, 1500)
	for cut := range len(good) {
		for kind, value := range attributes(good[:cut]) {
			if want := attributes(good)[kind]; !slices.Equal(value, want) {
				t.Errorf("cut at %d: %d is %q", cut, kind, value)
			}
		}
	}
	for _, length := range []uint16{0, 3, 5, 0xffff} {
		bad := binary.NativeEndian.AppendUint16(slices.Clone(good), length)
		if found := attributes(append(bad, 9, 0)); len(found) != 2 || text(found[3]) != "eth0" {
			t.Errorf("length %d: %v", length, found)
		}
	}
}
