package initrd

// rtnetlink and DHCPv4 are small code of our own, because the boot program is to stay below 7,000,000 bytes: on top of a bare TLS program
// vishvananda/netlink adds 336 KB, jsimonetti/rtnetlink 283 KB, and the nclient4 of insomniacslk/dhcp 369 KB.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// link is a network interface as the kernel lists it (RTM_NEWLINK, rtnetlink(7)).
type link struct {
	index  int
	name   string
	flags  uint32 // IFF_*
	arp    uint16 // ARPHRD_*
	kind   string // "vlan", "bridge"...; empty: hardware
	master int    // index of its bridge or bond; 0: none
	mtu    uint32
	mac    []byte
}

func (l link) up() bool { return l.flags&unix.IFF_UP != 0 }

// carrier: packets go out. The kernel sets IFF_LOWER_UP before that, and IFF_RUNNING also while it does not know yet.
func (l link) carrier() bool {
	return l.flags&(unix.IFF_RUNNING|unix.IFF_LOWER_UP) == unix.IFF_RUNNING|unix.IFF_LOWER_UP
}

// address is one that a link has (RTM_NEWADDR).
type address struct {
	index  int
	prefix netip.Prefix
	flags  uint32 // IFA_F_*
}

// usable: duplicate address detection has neither failed nor to be waited for.
func (a address) usable() bool { return a.flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 }

// listLinks is a dump of all links.
func listLinks() ([]link, error) {
	messages, err := dump(unix.RTM_GETLINK)
	if err != nil {
		return nil, fmt.Errorf("initrd: list links: %w", err)
	}
	var links []link
	for _, m := range messages {
		if l, ok := parseLink(m); ok {
			links = append(links, l)
		}
	}
	return links, nil
}

// listAddresses is a dump of the addresses of all links.
func listAddresses() ([]address, error) {
	messages, err := dump(unix.RTM_GETADDR)
	if err != nil {
		return nil, fmt.Errorf("initrd: list addresses: %w", err)
	}
	var addresses []address
	for _, m := range messages {
		if a, ok := parseAddressMessage(m); ok {
			addresses = append(addresses, a)
		}
	}
	return addresses, nil
}

func dump(kind int) ([]syscall.NetlinkMessage, error) {
	data, err := syscall.NetlinkRIB(kind, unix.AF_UNSPEC)
	if err != nil {
		return nil, err
	}
	return syscall.ParseNetlinkMessage(data)
}

func parseLink(m syscall.NetlinkMessage) (link, bool) {
	if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
		return link{}, false
	}
	native := binary.NativeEndian
	l := link{arp: native.Uint16(m.Data[2:]), index: int(native.Uint32(m.Data[4:])), flags: native.Uint32(m.Data[8:])}
	for kind, value := range attributes(m.Data[unix.SizeofIfInfomsg:]) {
		switch {
		case kind == unix.IFLA_IFNAME:
			l.name = text(value)
		case kind == unix.IFLA_ADDRESS:
			l.mac = value
		case kind == unix.IFLA_MASTER && len(value) == 4:
			l.master = int(native.Uint32(value))
		case kind == unix.IFLA_MTU && len(value) == 4:
			l.mtu = native.Uint32(value)
		case kind == unix.IFLA_LINKINFO:
			l.kind = text(attributes(value)[unix.IFLA_INFO_KIND])
		}
	}
	return l, l.name != ""
}

func parseAddressMessage(m syscall.NetlinkMessage) (address, bool) {
	if m.Header.Type != unix.RTM_NEWADDR || len(m.Data) < unix.SizeofIfAddrmsg {
		return address{}, false
	}
	a := address{flags: uint32(m.Data[2]), index: int(binary.NativeEndian.Uint32(m.Data[4:]))}
	list := attributes(m.Data[unix.SizeofIfAddrmsg:])
	// The local address, which on a point-to-point link is another than IFA_ADDRESS; IPv6 has it only there.
	value := list[unix.IFA_LOCAL]
	if value == nil {
		value = list[unix.IFA_ADDRESS]
	}
	if flags := list[unix.IFA_FLAGS]; len(flags) == 4 {
		a.flags = binary.NativeEndian.Uint32(flags)
	}
	ip, ok := netip.AddrFromSlice(value)
	a.prefix = netip.PrefixFrom(ip, int(m.Data[1]))
	return a, ok && a.prefix.IsValid()
}

// attributes are the type-length-value records of a message; a broken one ends them. Nested ones have a flag in their type.
func attributes(b []byte) map[uint16][]byte {
	found := map[uint16][]byte{}
	for len(b) >= unix.SizeofRtAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofRtAttr || length > len(b) {
			break
		}
		found[binary.NativeEndian.Uint16(b[2:])&^unix.NLA_F_NESTED] = b[unix.SizeofRtAttr:length]
		b = b[min(align(length), len(b)):]
	}
	return found
}

func appendAttribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, align(len(value))-len(value))...)
}

func appendUint32(b []byte, kind uint16, value uint32) []byte {
	return appendAttribute(b, kind, binary.NativeEndian.AppendUint32(nil, value))
}

func align(n int) int { return (n + 3) &^ 3 }

// text is a string that ends in a zero byte.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// rtnetlink changes links, addresses and routes. Its errors are the kernel's.
type rtnetlink struct {
	fd  int
	seq uint32
}

func openRtnetlink() (*rtnetlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("initrd: netlink socket: %w", err)
	}
	return &rtnetlink{fd: fd}, nil
}

func (r *rtnetlink) close() { _ = unix.Close(r.fd) }

// do sends one request and waits for the kernel's acknowledgement, which it gives at once.
func (r *rtnetlink) do(kind, flags uint16, body []byte) error {
	r.seq++
	native := binary.NativeEndian
	m := native.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	m = native.AppendUint16(m, kind)
	m = native.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	m = native.AppendUint32(m, r.seq)
	m = native.AppendUint32(m, 0)
	if err := unix.Sendto(r.fd, append(m, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(r.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			if m.Header.Type == unix.NLMSG_ERROR && m.Header.Seq == r.seq && len(m.Data) >= 4 {
				if code := int32(native.Uint32(m.Data)); code != 0 {
					return unix.Errno(-code)
				}
				return nil
			}
		}
	}
}

// linkMessage is an ifinfomsg and what follows it.
func linkMessage(index int, flags, change uint32, attrs []byte) []byte {
	b := make([]byte, 4, unix.SizeofIfInfomsg+len(attrs))
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint32(b, flags)
	b = binary.NativeEndian.AppendUint32(b, change)
	return append(b, attrs...)
}

func (r *rtnetlink) setUp(index int, up bool) error {
	flags := uint32(0)
	if up {
		flags = unix.IFF_UP
	}
	return r.do(unix.RTM_NEWLINK, 0, linkMessage(index, flags, unix.IFF_UP, nil))
}

// setNumber sets an attribute that is one number: IFLA_MTU, or IFLA_MASTER (0: none).
func (r *rtnetlink) setNumber(index int, attribute uint16, value uint32) error {
	return r.do(unix.RTM_NEWLINK, 0, linkMessage(index, 0, 0, appendUint32(nil, attribute, value)))
}

// setPrimary names the preferred port of a bond.
func (r *rtnetlink) setPrimary(bond, port int) error {
	info := linkInfo("bond", appendUint32(nil, unix.IFLA_BOND_PRIMARY, uint32(port)))
	return r.do(unix.RTM_NEWLINK, 0, linkMessage(bond, 0, 0, info))
}

func linkInfo(kind string, data []byte) []byte {
	info := appendAttribute(nil, unix.IFLA_INFO_KIND, []byte(kind))
	if len(data) != 0 {
		info = appendAttribute(info, unix.IFLA_INFO_DATA, data)
	}
	return appendAttribute(nil, unix.IFLA_LINKINFO, info)
}

// newDevice makes a device; parent is that of a VLAN. The kernel asks modprobe for the driver.
func (r *rtnetlink) newDevice(d *deviceConfig, parent int) error {
	attrs := appendAttribute(nil, unix.IFLA_IFNAME, append([]byte(d.name), 0))
	var data []byte
	switch d.kind {
	case "vlan":
		attrs = appendUint32(attrs, unix.IFLA_LINK, uint32(parent))
		data = appendAttribute(nil, unix.IFLA_VLAN_ID, binary.NativeEndian.AppendUint16(nil, d.id))
	case "bond":
		for _, o := range d.options {
			data = appendAttribute(data, o.attribute, o.data)
		}
	}
	if d.mtu != 0 {
		attrs = appendUint32(attrs, unix.IFLA_MTU, d.mtu)
	}
	return r.do(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, linkMessage(0, 0, 0, append(attrs, linkInfo(d.kind, data)...)))
}

func (r *rtnetlink) deleteDevice(index int) error {
	return r.do(unix.RTM_DELLINK, 0, linkMessage(index, 0, 0, nil))
}

// addAddress fails with EEXIST when the link has it already. The kernel makes the route to the prefix.
func (r *rtnetlink) addAddress(index int, prefix netip.Prefix, peer netip.Addr) error {
	return r.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, addressMessage(index, prefix, peer))
}

func (r *rtnetlink) deleteAddress(index int, prefix netip.Prefix, peer netip.Addr) error {
	return r.do(unix.RTM_DELADDR, 0, addressMessage(index, prefix, peer))
}

func addressMessage(index int, prefix netip.Prefix, peer netip.Addr) []byte {
	addr := prefix.Addr()
	b := []byte{family(addr), byte(prefix.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	if addr.Is6() {
		b[2] = unix.IFA_F_NODAD // as accept_dad=0 elsewhere: nobody waits for it
	}
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = appendAttribute(b, unix.IFA_LOCAL, addr.AsSlice())
	switch {
	case peer.IsValid():
		b = appendAttribute(b, unix.IFA_ADDRESS, peer.AsSlice())
	default:
		b = appendAttribute(b, unix.IFA_ADDRESS, addr.AsSlice())
		if addr.Is4() && prefix.Bits() < 31 {
			b = appendAttribute(b, unix.IFA_BROADCAST, broadcast(prefix).AsSlice())
		}
	}
	return b
}

// broadcast is the last address of an IPv4 network.
func broadcast(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) | (1<<(32-p.Bits()) - 1)
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}

// route is one that a lease or an ip= word brings.
type route struct {
	to      netip.Prefix
	gateway netip.Addr // invalid: the network is on the link
}

// addRoute gives each link's routes a metric of their own, so that two links may both have a default route. A gateway that no address reaches
// is taken to be on the link: some providers hand out such ones.
func (r *rtnetlink) addRoute(index int, to route) error {
	return r.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, routeMessage(index, to))
}

func (r *rtnetlink) deleteRoute(index int, to route) error {
	return r.do(unix.RTM_DELROUTE, 0, routeMessage(index, to))
}

const routeMetric = 2048 // more than anybody else's

func routeMessage(index int, to route) []byte {
	addr := to.to.Addr()
	scope, flags := byte(unix.RT_SCOPE_LINK), uint32(0)
	if to.gateway.IsValid() {
		scope, flags = unix.RT_SCOPE_UNIVERSE, unix.RTNH_F_ONLINK
	}
	b := []byte{family(addr), byte(to.to.Bits()), 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, scope, unix.RTN_UNICAST}
	b = binary.NativeEndian.AppendUint32(b, flags)
	if to.to.Bits() > 0 {
		b = appendAttribute(b, unix.RTA_DST, addr.AsSlice())
	}
	if to.gateway.IsValid() {
		b = appendAttribute(b, unix.RTA_GATEWAY, to.gateway.AsSlice())
	}
	b = appendUint32(b, unix.RTA_OIF, uint32(index))
	return appendUint32(b, unix.RTA_PRIORITY, routeMetric+uint32(index))
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// watchLinks opens a socket that becomes readable at each change of a link or an address (rtnetlink(7), multicast groups).
func watchLinks() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("initrd: netlink socket: %w", err)
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("initrd: watch links: %w", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// pump tells changed of what the socket reads, until it is closed. What was lost for want of room (ENOBUFS) is a change, too; several may be
// told as one.
func pump(socket *os.File, changed chan<- struct{}) {
	buf := make([]byte, 8192)
	for {
		_, err := socket.Read(buf)
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}
