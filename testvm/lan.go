package testvm

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
)

// Addresses on a LAN. Each LAN has its own namespaces, so all use the same.
var (
	ServerAddr = netip.MustParseAddr("10.77.0.2")
	firstGuest = netip.MustParseAddr("10.77.0.11")
)

// lanPrefix begins the names of the network namespaces; the process ID of
// their owner follows.
const lanPrefix = "testvm-"

// lanCount numbers the LANs of this process.
var lanCount atomic.Int32

// LAN is a network of its own: a bridge that machines are plugged into by tap
// devices, and beside it a namespace for servers. Nothing of it shows in the
// host's own network.
type LAN struct {
	guests  string // namespace with the bridge and the tap devices
	servers string // namespace that has ServerAddr
	next    netip.Addr
	taps    int
}

// Port is a machine's place on a LAN.
type Port struct {
	lan  *LAN
	tap  string
	mac  string
	Addr netip.Prefix // address for the guest to take
}

// NewLAN makes a network. Close removes it; what a killed run left behind is
// removed here.
func NewLAN(ctx context.Context) (*LAN, error) {
	sweep(ctx)
	base := fmt.Sprintf("%s%d-%d-", lanPrefix, os.Getpid(), lanCount.Add(1))
	l := &LAN{guests: base + "guests", servers: base + "servers", next: firstGuest}
	for _, command := range []string{
		"netns add " + l.guests,
		"netns add " + l.servers,
		// Without snooping, multicast reaches every port at once.
		"-n " + l.guests + " link add br0 type bridge mcast_snooping 0",
		"-n " + l.guests + " link set br0 up",
		"-n " + l.servers + " link add eth0 type veth peer name servers netns " + l.guests,
		"-n " + l.guests + " link set servers master br0 up",
		"-n " + l.servers + " address add " + ServerAddr.String() + "/24 dev eth0",
		"-n " + l.servers + " link set eth0 up",
		"-n " + l.servers + " link set lo up",
	} {
		if err := ip(ctx, command); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

// Close removes the network. Processes in it must have ended.
func (l *LAN) Close() error {
	// The test's own context may be over by now.
	ctx := context.Background()
	return errors.Join(removeNamespace(ctx, l.guests), removeNamespace(ctx, l.servers))
}

// Plug makes a port for one more machine.
func (l *LAN) Plug(ctx context.Context) (*Port, error) {
	p := &Port{
		lan:  l,
		tap:  fmt.Sprintf("tap%d", l.taps),
		mac:  fmt.Sprintf("52:54:00:77:00:%02x", l.taps),
		Addr: netip.PrefixFrom(l.next, 24),
	}
	l.taps++
	l.next = l.next.Next()
	for _, command := range []string{
		"-n " + l.guests + " tuntap add dev " + p.tap + " mode tap",
		"-n " + l.guests + " link set " + p.tap + " master br0 up",
	} {
		if err := ip(ctx, command); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// ServerCommand is a command that runs where servers run; it shares the file
// system with the host.
func (l *LAN) ServerCommand(ctx context.Context, argv ...string) *exec.Cmd {
	return inNamespace(ctx, l.servers, argv...)
}

// Swallow makes the network take every packet for addr, an address of the
// guests' own network, and answer none: neither a refusal nor a missing host.
func (l *LAN) Swallow(ctx context.Context, addr netip.Addr) error {
	for _, command := range []string{
		"-n " + l.servers + " link add swallow type bridge", // without a port
		"-n " + l.servers + " link set swallow up",
		"-n " + l.servers + " route add " + addr.String() + " dev swallow",
		// The servers' side answers for the address, and forwards to nobody.
		"netns exec " + l.servers + " sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.eth0.proxy_arp=1",
	} {
		if err := ip(ctx, command); err != nil {
			return err
		}
	}
	return nil
}

// Swallowed returns how many packets Swallow took.
func (l *LAN) Swallowed(ctx context.Context) (int, error) {
	out, err := run(ctx, "", nil, "ip", "netns", "exec", l.servers, "cat", "/sys/class/net/swallow/statistics/tx_packets")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}

// WithoutIPv4 takes the servers' IPv4 address away: only link-local IPv6 is left.
func (l *LAN) WithoutIPv4(ctx context.Context) error {
	return ip(ctx, "-4 -n "+l.servers+" address flush dev eth0")
}

// Counter returns a TCP counter of the servers' namespace: PassiveOpens counts
// connections that were accepted, OutRsts ones that nobody listened for
// (RFC 4022).
func (l *LAN) Counter(ctx context.Context, name string) (int, error) {
	out, err := run(ctx, "", nil, "ip", "netns", "exec", l.servers, "cat", "/proc/net/snmp")
	if err != nil {
		return 0, err
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "Tcp:" {
			continue
		}
		for i := range names {
			if names[i] == name {
				return strconv.Atoi(fields[i])
			}
		}
		names = fields
	}
	return 0, fmt.Errorf("testvm: no TCP counter %s", name)
}

// inNamespace is a command in a network namespace. ip replaces itself by the
// program, so the process ID is that of the program.
func inNamespace(ctx context.Context, namespace string, argv ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", namespace}, argv...)...)
}

// ip runs one ip(8) command.
func ip(ctx context.Context, command string) error {
	_, err := run(ctx, "", nil, append([]string{"ip"}, strings.Fields(command)...)...)
	return err
}

// removeNamespace removes a namespace and every device in it.
func removeNamespace(ctx context.Context, name string) error {
	if _, err := os.Stat("/run/netns/" + name); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return ip(ctx, "netns del "+name)
}

// sweep removes the namespaces of processes that no longer run. A failure
// shows when names collide, and costs nothing before.
func sweep(ctx context.Context) {
	entries, _ := os.ReadDir("/run/netns")
	for _, entry := range entries {
		rest, ours := strings.CutPrefix(entry.Name(), lanPrefix)
		owner, _, _ := strings.Cut(rest, "-")
		if _, err := os.Stat("/proc/" + owner); ours && errors.Is(err, os.ErrNotExist) {
			_ = removeNamespace(ctx, entry.Name())
		}
	}
}
