package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/unlock"
)

func TestPresence(t *testing.T) {
	network := func(text string) net.Addr {
		ip, n, err := net.ParseCIDR(text)
		if err != nil {
			t.Fatal(err)
		}
		n.IP = ip
		return n
	}
	const up = net.FlagUp | net.FlagMulticast | net.FlagRunning
	links := []link{
		{net.Interface{Index: 1, Name: "lo", Flags: up | net.FlagLoopback}, []net.Addr{network("127.0.0.1/8"), network("::1/128")}},
		{net.Interface{Index: 2, Name: "eth0", Flags: up}, []net.Addr{network("192.0.2.1/24"), network("fe80::1/64")}},
		{net.Interface{Index: 3, Name: "eth1", Flags: up}, []net.Addr{network("fe80::1/64")}},
		{net.Interface{Index: 4, Name: "down0", Flags: net.FlagMulticast}, nil},
		{net.Interface{Index: 5, Name: "wg0", Flags: net.FlagUp}, []net.Addr{network("198.51.100.1/24")}},
	}
	for listening, want := range map[string]string{
		"127.0.0.1:7625":                 "0 [] []",
		"127.0.0.1:7625 [::1]:7625":      "0 [] []",
		"[::]:7625":                      "7625 [eth0 eth1] []",
		"127.0.0.1:1 0.0.0.0:7626":       "7626 [eth0 eth1] []",
		"192.0.2.1:7625":                 "7625 [eth0] [192.0.2.1]",
		"192.0.2.1:7625 192.0.2.1:7626":  "7625 [eth0] [192.0.2.1]",
		"[fe80::1%eth1]:7625":            "7625 [eth1] [fe80::1]",
		"192.0.2.1:7 [fe80::1%eth1]:7":   "7 [eth0 eth1] [192.0.2.1 fe80::1]",
		"198.51.100.1:7625":              "7625 [] [198.51.100.1]",
		"203.0.113.1:7625":               "7625 [] [203.0.113.1]",
		"127.0.0.1:7625 203.0.113.1:765": "765 [] [203.0.113.1]",
	} {
		var addresses []*net.TCPAddr
		for _, a := range strings.Fields(listening) {
			host, port, _ := net.SplitHostPort(a)
			host, zone, _ := strings.Cut(host, "%")
			addresses = append(addresses, &net.TCPAddr{IP: net.ParseIP(host), Zone: zone, Port: must(net.LookupPort("tcp", port))})
		}
		p := presenceOf(addresses, links)
		if got := fmt.Sprintln(p.port, linkNames(p.links), p.ips); got != want+"\n" {
			t.Errorf("%s: %s, want %s", listening, got, want)
		}
	}
	everywhere := []*net.TCPAddr{{IP: net.IPv6unspecified, Port: 7625}}
	before := presenceOf(everywhere, links).print
	for name, change := range map[string]func(l *link){
		"an address":  func(l *link) { l.addresses = append(l.addresses, network("2001:db8::1/64")) },
		"no carrier":  func(l *link) { l.Flags &^= net.FlagRunning },
		"a new index": func(l *link) { l.Index = 9 },
	} {
		other := slices.Clone(links)
		if change(&other[1]); presenceOf(everywhere, other).print == before {
			t.Errorf("%s is not announced anew", name)
		}
	}
}

// TestNotAnnounced: a server on loopback, or one that was told so, is silent.
func TestNotAnnounced(t *testing.T) {
	s := newSite(t)
	s.stop()
	state := must(OpenState(s.dir))
	defer state.Close()
	var log logs
	srv := New(state, slog.New(slog.NewTextHandler(&log, nil)), time.Now)
	srv.Announce = true
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- srv.Run(ctx) }()
	awaitServer(t, s.control)
	cancel()
	if err := <-done; err != nil || strings.Contains(log.String(), "mDNS") {
		t.Errorf("%v, %s", err, log.String())
	}
}

// The processes of TestDiscovery: two hosts on one link, in network namespaces
// of a user namespace.
const (
	discoveryEnv    = "SERVER_TEST_DISCOVERY"
	discoveryServer = "server"
	discoveryClient = "client"
	hostilePackets  = 20000
)

// TestDiscovery: a machine finds a server with nothing but IPv6 link-local
// addresses on their link, whoever is there first, after floods, and when the
// link comes up; and with nothing but IPv4 addresses.
func TestDiscovery(t *testing.T) {
	cmd := discoveryProcess(discoveryServer, syscall.CLONE_NEWUSER|syscall.CLONE_NEWNET)
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("%v: it needs ip (iproute2) and user namespaces", err)
	}
	for _, want := range []string{"there before: found", "there later: found", "after a flood: found", "flooded itself: found", "the link comes up: found", "IPv4 only: found 192.0.2.1:7625"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q", want)
		}
	}
}

func discoveryProcess(role string, namespaces uintptr) *exec.Cmd {
	cmd := exec.Command(must(os.Executable()), "-test.run=^TestDiscoveryProcess$")
	cmd.Env = append(os.Environ(), discoveryEnv+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// TestDiscoveryProcess is one of the two hosts when TestDiscovery started it.
func TestDiscoveryProcess(t *testing.T) {
	switch os.Getenv(discoveryEnv) {
	case discoveryServer:
		serveOnALink(t)
	case discoveryClient:
		browse(t)
	}
}

// serveOnALink is the server's host, and the attacker's. It has the other in a
// process, which it tells when to browse.
func serveOnALink(t *testing.T) {
	client := discoveryProcess(discoveryClient, syscall.CLONE_NEWNET)
	orders, answers := must(client.StdinPipe()), must(client.StdoutPipe())
	client.Stderr = os.Stderr
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(answers)
	ip(t, "link", "add", "here", "type", "veth", "peer", "name", "there")
	ip(t, "link", "set", "there", "netns", fmt.Sprint(client.Process.Pid))
	ip(t, "link", "set", "here", "up")
	fmt.Fprintln(orders, "up")
	a := eavesdrop(t, "here")
	dir := filepath.Join(t.TempDir(), "srv")
	master, private := siteMaster()
	settings := Settings{Name: "srv", Listen: []string{":7625"}, Addresses: []string{"nowhere:7625"}}
	if err := Init(dir, settings, Master{master.Public(), private}, time.Now()); err != nil {
		t.Fatal(err)
	}
	key := must(config.LoadKey(filepath.Join(dir, keysFolder))).KeyID()
	order := func() { fmt.Fprintln(orders, key) }
	found := func(when string) {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		fmt.Printf("%s: %s", when, line)
	}

	stop := runAnnounced(t, dir)
	time.Sleep(3 * time.Second) // both ends prove that nobody else has their address
	order()
	found("there before")
	stop()
	order()
	time.Sleep(2 * time.Second)
	stop = runAnnounced(t, dir)
	found("there later")
	stop()
	order()
	a.flood(t)
	stop = runAnnounced(t, dir)
	found("after a flood")
	a.flood(t)
	order()
	found("flooded itself")

	ip(t, "link", "set", "here", "down")
	order()
	time.Sleep(time.Second)
	ip(t, "link", "set", "here", "up")
	found("the link comes up")
	ip(t, "-6", "address", "flush", "dev", "here")
	ip(t, "address", "add", "192.0.2.1/24", "dev", "here")
	fmt.Fprintln(orders, "IPv4")
	order()
	found("IPv4 only")
	stop()
	orders.Close()
	if _, err := io.Copy(os.Stdout, lines); err != nil {
		t.Error(err)
	}
	if err := client.Wait(); err != nil {
		t.Error(err)
	}
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %q: %v: %s", args, err, out)
	}
}

func runAnnounced(t *testing.T, dir string) (stop func()) {
	t.Helper()
	state := must(OpenState(dir))
	srv := New(state, slog.New(slog.NewTextHandler(io.Discard, nil)), time.Now)
	srv.Announce = true
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- srv.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		state.Close()
	}
}

// attacker hears what is said on a link.
type attacker struct {
	conn  *net.UDPConn
	group *net.UDPAddr

	mu      sync.Mutex
	heard   [][]byte
	flooded bool         // from here on it hears itself
	asker   *net.UDPAddr // whose question was the last
	id      uint16       // of that question
}

func eavesdrop(t *testing.T, name string) *attacker {
	t.Helper()
	a := &attacker{group: &net.UDPAddr{IP: net.ParseIP("ff02::fb"), Port: 5353, Zone: name}}
	i := must(net.InterfaceByName(name))
	a.conn = must(net.ListenMulticastUDP("udp6", i, a.group))
	go func() {
		buffer, own := make([]byte, 9000), ""
		for {
			n, from, err := a.conn.ReadFromUDP(buffer)
			if err != nil || n < 12 {
				return
			}
			a.mu.Lock()
			if !a.flooded {
				a.heard = append(a.heard, slices.Clone(buffer[:n]))
			}
			if own == "" {
				own = fmt.Sprint(must(i.Addrs()))
			}
			if !strings.Contains(own, from.IP.String()+"/") && from.Port != 5353 {
				a.asker, a.id = from, binary.BigEndian.Uint16(buffer)
			}
			a.mu.Unlock()
		}
	}()
	return a
}

// flood sends what it heard with mutations, to all and to who asked last, with
// the ID that it asked with.
func (a *attacker) flood(t *testing.T) {
	random := rand.New(rand.NewSource(7))
	conn := must(net.ListenUDP("udp6", nil))
	defer conn.Close()
	time.Sleep(300 * time.Millisecond) // a question comes by
	a.mu.Lock()
	a.flooded = true
	a.mu.Unlock()
	sent := 0
	for i := range hostilePackets {
		a.mu.Lock()
		packet := slices.Clone(a.heard[random.Intn(len(a.heard))])
		asker, id := a.asker, a.id
		a.mu.Unlock()
		for range random.Intn(4) {
			packet[random.Intn(len(packet))] = byte(random.Intn(256))
		}
		packet = packet[:len(packet)-random.Intn(2)*random.Intn(len(packet)/2)]
		to := a.group
		if i%2 == 0 {
			to = asker
			binary.BigEndian.PutUint16(packet, id)
			packet[2] |= 0x80
		}
		if _, err := conn.WriteToUDP(packet, to); err == nil {
			sent++
		}
	}
	if sent < hostilePackets/2 {
		t.Errorf("only %d of %d packets were sent", sent, hostilePackets)
	}
}

// browse is the other host. For each key that it is told it browses anew, until
// it has found the server that has the key.
func browse(t *testing.T) {
	key := must(identity.Generate())
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		switch orders.Text() {
		case "up":
			ip(t, "link", "set", "there", "up")
			continue
		case "IPv4":
			ip(t, "-6", "address", "flush", "dev", "there")
			ip(t, "address", "add", "192.0.2.2/24", "dev", "there")
			continue
		}
		id := must(identity.ParseKeyID(orders.Text()))
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		start := time.Now()
		address, err := reach(ctx, unlock.Browse(ctx, nil, []identity.KeyID{id}), must(key.ClientTLS(id, unlock.Protocol)), id)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("found %s after %v\n", address, time.Since(start).Round(100*time.Microsecond))
	}
}

// reach dials what is found until the pinned key is proved.
func reach(ctx context.Context, finder unlock.Finder, pinned *tls.Config, id identity.KeyID) (string, error) {
	for {
		changed := finder.Changed()
		for _, a := range finder.Addresses(id) {
			dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: time.Second}, Config: pinned}
			if conn, err := dialer.DialContext(ctx, "tcp", a); err == nil {
				conn.Close()
				return a, nil
			}
		}
		select {
		case <-changed:
		case <-time.After(2 * time.Second): // as a client that tries again
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}
