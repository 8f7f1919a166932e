package initrd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// errReply: a packet is no reply to this client, or not one that can be used.
var errReply = errors.New("initrd: bad DHCP reply")

// DHCP message types and options (RFC 2132, RFC 3442).
const (
	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpAck      = 5
	dhcpNak      = 6

	optionPad       = 0
	optionMask      = 1
	optionRouter    = 3
	optionDNS       = 6
	optionHost      = 12
	optionAddress   = 50
	optionLease     = 51
	optionOverload  = 52
	optionType      = 53
	optionServer    = 54
	optionWanted    = 55
	optionLargest   = 57
	optionRenewal   = 58
	optionRoutes    = 121
	optionEnd       = 255
	replyMin        = 240  // bytes of a BOOTP header with the magic cookie
	replyMax        = 1500 // bytes of a packet that is asked for
	maxRoutes       = 16   // of one lease
	clientPort      = 68
	serverPort      = 67
	broadcastFlag   = 0x8000
	magicCookie     = 0x63825363
	ipHeader        = 20
	udpHeader       = 8
	infiniteSeconds = 0xffffffff
)

// Delays between attempts: 1, 2, 4, 8 and then 16 seconds, each between half and one and a half of it. RFC 2131 section 4.1 has 4 to 64 seconds,
// with a second more or less, for 10 Mb/s Ethernet and machines that run already; here a port that has just come up loses the first packet, and
// a boot waits. The random wait before the first attempt is left out for the same reason.
const (
	dhcpFirstStep = time.Second
	dhcpLastStep  = 16 * time.Second
	dhcpRequests  = 3           // before an offer is given up
	dhcpSilence   = 4           // attempts before it is said that nobody answers
	dhcpShortest  = time.Minute // a lease below it counts as this long, lest a server keep us busy
)

// lease is what a DHCP server gave.
type lease struct {
	address  netip.Prefix
	server   netip.Addr
	routes   []route
	dns      []netip.Addr
	duration time.Duration // 0: for ever
	renewal  time.Duration // when to ask for more of it
}

// dhcpReply is a reply that belongs to this client.
type dhcpReply struct {
	kind byte
	lease
}

// packetConn carries IPv4 packets to and from one link.
type packetConn interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
}

// dhcpClient keeps one link's lease. It is none for long: it neither probes its address (RFC 5227) nor releases it, because the same machine
// asks for it again a minute later.
type dhcpClient struct {
	conn packetConn
	mac  [6]byte
	host string

	// leased is told of a lease, and of its end with nil.
	leased func(*lease)
	report func(format string, a ...any)
	xid    uint32
}

// run asks until the context ends, and closes the connection. The error is the connection's, or nil.
func (c *dhcpClient) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer func() {
		if stop() {
			c.conn.Close()
		}
	}()
	for {
		l, err := c.acquire(ctx)
		for err == nil {
			c.leased(l)
			l, err = c.hold(ctx, l)
		}
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, errLost) {
			return err
		}
		c.leased(nil)
	}
}

// errLost: a lease has run out, or a server has taken it back.
var errLost = errors.New("initrd: DHCP lease lost")

// acquire asks for a lease until there is one. All attempts have one transaction ID: a server that looks first whether an address is in use
// answers the first attempt after the second, and that answer is good.
func (c *dhcpClient) acquire(ctx context.Context) (*lease, error) {
	c.xid = rand.Uint32()
	for n := 0; ctx.Err() == nil; n++ {
		if n == dhcpSilence {
			c.report("no DHCP server answers")
		}
		offer, err := c.exchange(message{kind: dhcpDiscover}, dhcpDelay(n), dhcpOffer)
		for try := 0; err == nil && try < dhcpRequests; try++ {
			var reply *dhcpReply
			reply, err = c.exchange(message{kind: dhcpRequest, address: offer.address.Addr(), server: offer.server}, dhcpDelay(try), dhcpAck, dhcpNak)
			if err == nil && reply.kind == dhcpAck {
				return &reply.lease, nil
			}
			if err == nil { // refused: not at once again
				return nil, errors.Join(pause(ctx, dhcpDelay(n)), errLost)
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil
			}
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, err
		}
	}
	return nil, ctx.Err()
}

// hold waits until the lease is to be renewed, and asks for that until it has run out. Every server is asked, as RFC 2131 has it for
// rebinding: a broadcast needs no neighbour's hardware address.
func (c *dhcpClient) hold(ctx context.Context, l *lease) (*lease, error) {
	if l.duration == 0 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	end := time.Now().Add(l.duration)
	if err := pause(ctx, l.renewal); err != nil {
		return nil, err
	}
	c.xid = rand.Uint32()
	for n := 0; ; n++ {
		left := time.Until(end)
		if left <= 0 {
			return nil, errLost
		}
		wait := min(left, max(left/2, dhcpShortest))
		reply, err := c.exchange(message{kind: dhcpRequest, current: l.address.Addr()}, wait, dhcpAck, dhcpNak)
		switch {
		case err == nil && reply.kind == dhcpAck:
			return &reply.lease, nil
		case err == nil:
			return nil, errLost
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, err
		}
	}
}

func dhcpDelay(n int) time.Duration {
	step := min(dhcpFirstStep<<min(n, 8), dhcpLastStep)
	return step/2 + rand.N(step)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// exchange sends a message and returns the first reply of a wanted kind. The error is the connection's, os.ErrDeadlineExceeded after wait.
func (c *dhcpClient) exchange(m message, wait time.Duration, kinds ...byte) (*dhcpReply, error) {
	m.xid, m.mac, m.host = c.xid, c.mac, c.host
	deadline := time.Now().Add(wait)
	if err := c.conn.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := c.conn.Write(m.packet()); err != nil {
		// The link may be down for a moment, so the failure waits as an answer would.
		if !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENOBUFS) {
			return nil, err
		}
	}
	buf := make([]byte, 65536)
	for {
		n, err := c.conn.Read(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			return nil, err
		}
		reply, err := parseReply(buf[:n], c.xid, c.mac)
		if err != nil {
			continue
		}
		for _, kind := range kinds {
			if reply.kind == kind {
				return reply, nil
			}
		}
	}
}

// message is one that a client sends.
type message struct {
	kind    byte
	xid     uint32
	mac     [6]byte
	host    string
	current netip.Addr // that the link has; may be invalid
	address netip.Addr // that was offered; may be invalid
	server  netip.Addr // that offered it; may be invalid
}

// packet is the message in UDP in IPv4, from nobody to everybody. The answer is wanted by broadcast: every server can do that, before the
// address is there.
func (m message) packet() []byte {
	b := make([]byte, replyMin, 320)
	b[0], b[1], b[2] = 1, 1, 6 // request, Ethernet, six bytes
	binary.BigEndian.PutUint32(b[4:], m.xid)
	source := netip.IPv4Unspecified()
	if m.current.IsValid() {
		source = m.current
		copy(b[12:], source.AsSlice())
	}
	binary.BigEndian.PutUint16(b[10:], broadcastFlag)
	copy(b[28:], m.mac[:])
	binary.BigEndian.PutUint32(b[236:], magicCookie)
	b = appendOption(b, optionType, m.kind)
	if m.address.IsValid() {
		b = appendOption(b, optionAddress, m.address.AsSlice()...)
	}
	if m.server.IsValid() {
		b = appendOption(b, optionServer, m.server.AsSlice()...)
	}
	if m.host != "" {
		b = appendOption(b, optionHost, []byte(m.host)...)
	}
	b = appendOption(b, optionLargest, replyMax>>8, replyMax&0xff)
	b = appendOption(b, optionWanted, optionMask, optionRoutes, optionRouter, optionDNS, optionLease, optionRenewal)
	b = append(b, optionEnd)
	b = append(b, make([]byte, max(0, 300-len(b)))...) // some relays drop what is shorter than BOOTP
	return appendUDP(source, netip.AddrFrom4([4]byte{255, 255, 255, 255}), clientPort, serverPort, b)
}

func appendOption(b []byte, code byte, data ...byte) []byte {
	return append(append(b, code, byte(len(data))), data...)
}

// appendUDP puts the headers of IPv4 and UDP before a payload. UDP's checksum is left out, which IPv4 allows.
func appendUDP(from, to netip.Addr, fromPort, toPort uint16, payload []byte) []byte {
	size := ipHeader + udpHeader + len(payload)
	b := make([]byte, ipHeader+udpHeader, size)
	b[0] = 0x45
	binary.BigEndian.PutUint16(b[2:], uint16(size))
	b[8], b[9] = 64, unix.IPPROTO_UDP
	copy(b[12:], from.AsSlice())
	copy(b[16:], to.AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(b[:ipHeader]))
	binary.BigEndian.PutUint16(b[20:], fromPort)
	binary.BigEndian.PutUint16(b[22:], toPort)
	binary.BigEndian.PutUint16(b[24:], uint16(udpHeader+len(payload)))
	return append(b, payload...)
}

// checksum is that of RFC 1071; over a good header it is 0. The length is even.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// parseReply reads an IPv4 packet from a server to this client. Everything in it may be an attacker's; errors are errReply.
func parseReply(packet []byte, xid uint32, mac [6]byte) (*dhcpReply, error) {
	b, err := udpPayload(packet)
	if err != nil {
		return nil, err
	}
	switch {
	case len(b) < replyMin || b[0] != 2 || b[1] != 1 || b[2] != 6 || binary.BigEndian.Uint32(b[236:]) != magicCookie:
		return nil, fmt.Errorf("%w: not one", errReply)
	case binary.BigEndian.Uint32(b[4:]) != xid || [6]byte(b[28:34]) != mac:
		return nil, fmt.Errorf("%w: not to us", errReply)
	}
	options, err := parseOptions(b)
	if err != nil {
		return nil, err
	}
	if len(options[optionType]) != 1 {
		return nil, fmt.Errorf("%w: no type", errReply)
	}
	r := &dhcpReply{kind: options[optionType][0]}
	if r.kind == dhcpNak {
		return r, nil
	}
	return r, r.lease.parse(netip.AddrFrom4([4]byte(b[16:20])), options)
}

// udpPayload checks the headers. UDP's checksum is not looked at: a server on the same host leaves it to hardware that is not there, and an
// attacker can compute it.
func udpPayload(p []byte) ([]byte, error) {
	if len(p) < ipHeader || p[0]>>4 != 4 {
		return nil, fmt.Errorf("%w: no IPv4", errReply)
	}
	header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
	if header < ipHeader || total > len(p) || total < header+udpHeader || checksum(p[:header]) != 0 {
		return nil, fmt.Errorf("%w: IPv4 header", errReply)
	}
	if p[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(p[6:])&0x3fff != 0 {
		return nil, fmt.Errorf("%w: a fragment, or no UDP", errReply)
	}
	u := p[header:total]
	size := int(binary.BigEndian.Uint16(u[4:]))
	if binary.BigEndian.Uint16(u) != serverPort || binary.BigEndian.Uint16(u[2:]) != clientPort || size < udpHeader || size > len(u) {
		return nil, fmt.Errorf("%w: UDP header", errReply)
	}
	return u[udpHeader:size], nil
}

// parseOptions reads the options, also those in the fields file and sname where they say so. An option that comes more than once is put
// together (RFC 3396).
func parseOptions(b []byte) (map[byte][]byte, error) {
	options := map[byte][]byte{}
	if err := addOptions(options, b[replyMin:]); err != nil {
		return nil, err
	}
	overload := options[optionOverload]
	if len(overload) == 1 && overload[0]&1 != 0 {
		if err := addOptions(options, b[108:236]); err != nil {
			return nil, err
		}
	}
	if len(overload) == 1 && overload[0]&2 != 0 {
		if err := addOptions(options, b[44:108]); err != nil {
			return nil, err
		}
	}
	return options, nil
}

func addOptions(options map[byte][]byte, b []byte) error {
	for len(b) > 0 && b[0] != optionEnd {
		if b[0] == optionPad {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return fmt.Errorf("%w: option %d is cut", errReply, b[0])
		}
		value := b[2 : 2+int(b[1])]
		options[b[0]] = append(options[b[0]], value...)
		b = b[2+len(value):]
	}
	return nil
}

// parse takes the lease from the options of an offer or an acknowledgement.
func (l *lease) parse(addr netip.Addr, options map[byte][]byte) error {
	var ok bool
	if l.server, ok = netip.AddrFromSlice(options[optionServer]); !ok || !l.server.Is4() || !unicast(l.server) {
		return fmt.Errorf("%w: no server", errReply)
	}
	mask := net.IPMask(options[optionMask])
	if mask == nil {
		mask = net.IP(addr.AsSlice()).DefaultMask()
	}
	bits, size := mask.Size()
	if !unicast(addr) || size != 32 || bits == 0 {
		return fmt.Errorf("%w: address %s, mask %s", errReply, addr, mask)
	}
	l.address = netip.PrefixFrom(addr, bits)
	if bits < 31 && (addr == l.address.Masked().Addr() || addr == broadcast(l.address)) {
		return fmt.Errorf("%w: %s is no address of a machine", errReply, l.address)
	}
	l.dns = addresses(options[optionDNS], 3)
	l.parseTimes(options)
	return l.parseRoutes(options)
}

// parseTimes: a lease without a time, which RFC 2131 forbids, is one for ever, as BOOTP's are.
func (l *lease) parseTimes(options map[byte][]byte) {
	l.duration = 0
	if t := options[optionLease]; len(t) == 4 && binary.BigEndian.Uint32(t) != infiniteSeconds {
		l.duration = max(dhcpShortest, time.Duration(binary.BigEndian.Uint32(t))*time.Second)
	}
	l.renewal = l.duration / 2
	if t := options[optionRenewal]; len(t) == 4 {
		if d := time.Duration(binary.BigEndian.Uint32(t)) * time.Second; d >= dhcpShortest/2 && d < l.duration {
			l.renewal = d
		}
	}
}

// parseRoutes reads the classless static routes; where they are given, the router option does not count (RFC 3442).
func (l *lease) parseRoutes(options map[byte][]byte) error {
	l.routes = nil
	b, ok := options[optionRoutes]
	if !ok {
		for _, router := range addresses(options[optionRouter], 1) {
			l.routes = append(l.routes, route{netip.PrefixFrom(netip.IPv4Unspecified(), 0), router})
		}
		return nil
	}
	for len(b) > 0 {
		bits := int(b[0])
		significant := (bits + 7) / 8
		if bits > 32 || len(b) < 1+significant+4 || len(l.routes) == maxRoutes {
			return fmt.Errorf("%w: static routes", errReply)
		}
		var network [4]byte
		copy(network[:], b[1:1+significant])
		r := route{to: netip.PrefixFrom(netip.AddrFrom4(network), bits).Masked()}
		gateway := netip.AddrFrom4([4]byte(b[1+significant : 5+significant]))
		b = b[5+significant:]
		if gateway.IsUnspecified() {
			l.routes = append(l.routes, r)
			continue
		}
		if !unicast(gateway) {
			return fmt.Errorf("%w: gateway %s", errReply, gateway)
		}
		r.gateway = gateway
		l.routes = append(l.routes, r)
	}
	return nil
}

// addresses reads the first few of a list; what is no address of a machine is left out.
func addresses(b []byte, most int) []netip.Addr {
	var list []netip.Addr
	for ; len(b) >= 4 && len(list) < most; b = b[4:] {
		if a := netip.AddrFrom4([4]byte(b[:4])); unicast(a) {
			list = append(list, a)
		}
	}
	return list
}

// linkConn is a packet socket on one link (packet(7)): the link has no address yet that a UDP socket could use.
type linkConn struct {
	*os.File
	to unix.SockaddrLinklayer
}

func openLink(index int) (*linkConn, error) { return openPort(index, clientPort) }

// openPort hears one UDP port of one link.
func openPort(index int, port uint32) (*linkConn, error) {
	protocol := binary.NativeEndian.Uint16([]byte{unix.ETH_P_IP >> 8, unix.ETH_P_IP & 0xff}) // in network byte order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("initrd: packet socket: %w", err)
	}
	c := &linkConn{to: unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index, Halen: 6, Addr: [8]byte{255, 255, 255, 255, 255, 255}}}
	// The filter stands before the socket hears anything, so that nothing else is ever queued.
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, onlyPort(port))
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index})
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("initrd: packet socket: %w", err)
	}
	c.File = os.NewFile(uintptr(fd), "packet")
	return c, nil
}

// Write sends to everybody on the link.
func (c *linkConn) Write(b []byte) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	sent := raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), b, 0, &c.to)
		return !errors.Is(err, unix.EAGAIN)
	})
	return len(b), errors.Join(sent, err)
}

// onlyPort lets pass what is UDP, no later fragment, and to one port; without it every packet of a busy link would wake us.
func onlyPort(port uint32) *unix.SockFprog {
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jf: 6},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 6},
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x1fff, Jt: 4},
		{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 0},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 2},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: port, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 65535},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
}
