package initrd

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// maxWords bounds the words of the command line and the network file together.
const maxWords = 64

// mode is how a link gets its addresses.
type mode int

const (
	modeAuto   mode = iota // DHCPv4; IPv6 by the kernel
	modeIPv6               // IPv6 by the kernel alone
	modeStatic             // the address that was given; IPv6 by the kernel
	modeOff                // the link is left alone
)

// modes are the words for it: of the kernel's ip= (klibc's ipconfig knows the same) and of dracut.cmdline(7). There is no client for BOOTP,
// RARP or DHCPv6 here: the first two get DHCPv4, which answers BOOTP's purpose, and dhcp6 gets what router advertisements give.
var modes = map[string]mode{
	"dhcp": modeAuto, "on": modeAuto, "any": modeAuto, "both": modeAuto, "bootp": modeAuto, "rarp": modeAuto, "single-dhcp": modeAuto,
	"dhcp6": modeIPv6, "auto6": modeIPv6, "either6": modeIPv6, "link6": modeIPv6, "link-local": modeIPv6,
	"static": modeStatic, "none": modeOff, "off": modeOff,
}

// ipConfig is one ip= word.
type ipConfig struct {
	device  string // empty: every link, or for an address the first link that has a carrier
	mode    mode
	address netip.Prefix
	peer    netip.Addr // of a point-to-point link; may be invalid
	gateway netip.Addr // may be invalid
	host    string     // to tell a DHCP server; may be empty
	dns     []netip.Addr
	mtu     uint32 // 0: as it is
}

// deviceConfig is one vlan=, bridge= or bond= word.
type deviceConfig struct {
	kind    string // as rtnetlink names it
	name    string
	parent  string // vlan: what it stands on
	id      uint16 // vlan
	ports   []string
	options []bondOption
	primary string // bond: the preferred port
	mtu     uint32 // bond; 0: as it is
}

// word is what one word says: exactly one field is set.
type word struct {
	ip     *ipConfig
	device *deviceConfig
	dns    netip.Addr
}

func networkWord(name string) bool {
	return slices.Contains([]string{"ip", "vlan", "bridge", "bond", "nameserver"}, name)
}

// parseWord reads one network word; its error is an ErrWord.
func parseWord(text string) (word, error) {
	name, value, _ := strings.Cut(text, "=")
	var w word
	var err error
	switch name {
	case "ip":
		w.ip, err = parseIP(value)
	case "vlan":
		w.device, err = parseVLAN(value)
	case "bridge":
		w.device, err = parseBridge(value)
	case "bond":
		w.device, err = parseBond(value)
	case "nameserver":
		w.dns, err = parseAddress(value)
	default:
		err = fmt.Errorf("not one of ip=, vlan=, bridge=, bond=, nameserver=")
	}
	if err != nil {
		return word{}, fmt.Errorf("%w %s: %w", ErrWord, text, err)
	}
	return w, nil
}

// parseIP reads ip=: one mode, one device, DEVICE:MODE[:MTU], or
// CLIENT:[SERVER or peer]:GATEWAY:NETMASK:HOST:DEVICE:MODE[:DNS[:DNS[:NTP]] or MTU].
func parseIP(value string) (*ipConfig, error) {
	fields, err := splitFields(value)
	if err != nil {
		return nil, err
	}
	first := fields[0]
	address, _, _ := strings.Cut(first, "/")
	_, err = netip.ParseAddr(address)
	isAddress := err == nil
	m, isMode := modes[first]
	switch {
	case len(fields) == 1 && (isMode || first == ""):
		return &ipConfig{mode: m}, nil
	case len(fields) == 1 && !isAddress:
		return &ipConfig{device: first}, checkName(first)
	case first != "" && !isAddress:
		return parseShortIP(fields)
	}
	return parseLongIP(append(fields, make([]string, 10)...)[:max(10, len(fields))])
}

func parseShortIP(fields []string) (*ipConfig, error) {
	m, ok := modes[fields[1]]
	if !ok || m == modeStatic {
		return nil, fmt.Errorf("%q is no way to configure a link", fields[1])
	}
	c := &ipConfig{device: fields[0], mode: m}
	if len(fields) > 3 {
		return nil, fmt.Errorf("hardware addresses are not changed here")
	}
	if len(fields) == 3 {
		if err := c.setMTU(fields[2]); err != nil {
			return nil, err
		}
	}
	return c, checkName(c.device)
}

func parseLongIP(f []string) (*ipConfig, error) {
	c := &ipConfig{host: f[4], device: f[5]}
	if len(f) > 10 {
		return nil, fmt.Errorf("more than 10 fields")
	}
	if c.device != "" {
		if err := checkName(c.device); err != nil {
			return nil, err
		}
	}
	if len(c.host) > 63 {
		return nil, fmt.Errorf("host name %q is longer than 63 bytes", c.host)
	}
	m, ok := modes[f[6]]
	if !ok && f[6] != "" {
		return nil, fmt.Errorf("%q is no way to configure a link", f[6])
	}
	c.mode = m
	if f[0] != "" && (f[6] == "" || m == modeOff || m == modeStatic) {
		c.mode = modeStatic
		return c, c.setStatic(f)
	}
	if c.mode == modeStatic {
		return nil, fmt.Errorf("static, but no address")
	}
	return c, c.setRest(f[7:])
}

func (c *ipConfig) setStatic(f []string) error {
	client, length, _ := strings.Cut(f[0], "/")
	addr, err := parseAddress(client)
	if err != nil {
		return err
	}
	if length == "" {
		length = f[3]
	}
	bits, err := parseMask(addr, length)
	if err != nil {
		return err
	}
	c.address = netip.PrefixFrom(addr, bits)
	if f[2] != "" {
		if c.gateway, err = parseAddress(f[2]); err != nil {
			return err
		}
		if c.gateway.Is4() != addr.Is4() {
			return fmt.Errorf("address and gateway are of two families")
		}
	}
	// The second field is a boot server to the kernel; to dracut it is the peer, if it has a prefix length.
	if peer, _, ok := strings.Cut(f[1], "/"); ok {
		if c.peer, err = parseAddress(peer); err != nil {
			return err
		}
		if c.peer.Is4() != addr.Is4() {
			return fmt.Errorf("address and peer are of two families")
		}
	}
	return c.setRest(f[7:])
}

// setRest takes an MTU, or name servers, of which the kernel has two and then a time server.
func (c *ipConfig) setRest(f []string) error {
	if f[0] != "" && !strings.ContainsAny(f[0], ".:") {
		if f[1] != "" {
			return fmt.Errorf("hardware addresses are not changed here")
		}
		return c.setMTU(f[0])
	}
	for _, text := range f[:2] {
		if text == "" {
			continue
		}
		addr, err := parseAddress(text)
		if err != nil {
			return err
		}
		c.dns = append(c.dns, addr)
	}
	return nil
}

func (c *ipConfig) setMTU(text string) error {
	if text == "" {
		return nil
	}
	var err error
	c.mtu, err = parseMTU(text)
	return err
}

func parseMTU(text string) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n < 68 {
		return 0, fmt.Errorf("%q is no MTU", text)
	}
	return uint32(n), nil
}

// parseAddress reads an address that a link or a neighbour may have.
func parseAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(strings.Trim(text, "[]"))
	if err != nil || !unicast(addr) {
		return netip.Addr{}, fmt.Errorf("%q is no address of a machine", text)
	}
	return addr, nil
}

func unicast(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && !(a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240))
}

// parseMask reads a netmask or a prefix length; without one it is that of the address's class (RFC 791), or 64 for IPv6.
func parseMask(addr netip.Addr, text string) (int, error) {
	if text == "" && addr.Is6() {
		return 64, nil
	}
	if text == "" {
		bits, _ := net.IP(addr.AsSlice()).DefaultMask().Size()
		return bits, nil
	}
	if mask, err := netip.ParseAddr(text); err == nil && mask.Is4() && addr.Is4() {
		if bits, size := net.IPMask(mask.AsSlice()).Size(); size == 32 && bits > 0 {
			return bits, nil
		}
	}
	if bits, err := strconv.Atoi(text); err == nil && bits > 0 && bits <= addr.BitLen() {
		return bits, nil
	}
	return 0, fmt.Errorf("%q is no netmask for %s", text, addr)
}

// parseVLAN reads NAME:DEVICE. The number is in the name, in one of four styles: vlan0005, vlan5, eth0.0005, eth0.5.
func parseVLAN(value string) (*deviceConfig, error) {
	name, parent, _ := strings.Cut(value, ":")
	if err := checkNames(name, parent); err != nil {
		return nil, err
	}
	digits := name[strings.LastIndex(name, ".")+1:]
	if digits == name {
		digits = strings.TrimPrefix(name, "vlan")
	}
	id, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || id == 0 || id > 4094 {
		return nil, fmt.Errorf("the name %q does not end in the number of a VLAN, from 1 to 4094", name)
	}
	return &deviceConfig{kind: "vlan", name: name, parent: parent, id: uint16(id)}, nil
}

// parseBridge reads NAME:PORT,PORT...
func parseBridge(value string) (*deviceConfig, error) {
	if value == "" {
		value = "br0:eth0"
	}
	name, list, _ := strings.Cut(value, ":")
	d := &deviceConfig{kind: "bridge", name: name, ports: strings.Split(list, ",")}
	return d, d.check()
}

// parseBond reads NAME[:PORT,PORT...[:OPTION=VALUE,...[:MTU]]].
func parseBond(value string) (*deviceConfig, error) {
	if value == "" {
		value = "bond0"
	}
	fields := strings.Split(value, ":")
	if len(fields) > 4 {
		return nil, fmt.Errorf("more than 4 fields")
	}
	defaults := []string{"", "eth0,eth1", "mode=balance-rr", ""}
	for len(fields) < 4 {
		fields = append(fields, defaults[len(fields)])
	}
	d := &deviceConfig{kind: "bond", name: fields[0], ports: strings.Split(fields[1], ",")}
	if fields[3] != "" {
		var err error
		if d.mtu, err = parseMTU(fields[3]); err != nil {
			return nil, err
		}
	}
	if err := d.setOptions(fields[2]); err != nil {
		return nil, err
	}
	return d, d.check()
}

func (d *deviceConfig) check() error {
	if err := checkNames(append([]string{d.name}, d.ports...)...); err != nil {
		return err
	}
	for i, port := range d.ports {
		if port == d.name || slices.Contains(d.ports[:i], port) {
			return fmt.Errorf("%s twice", port)
		}
	}
	return nil
}

func checkNames(names ...string) error {
	for _, name := range names {
		if err := checkName(name); err != nil {
			return err
		}
	}
	return nil
}

// checkName holds a name to what the kernel takes (dev_valid_name), and to what can stand in the path of a sysctl.
func checkName(name string) error {
	if name == "" || len(name) > 15 || name == "." || name == ".." || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("/:[]%", r) }) {
		return fmt.Errorf("%q is no name of a link", name)
	}
	return nil
}

// splitFields splits at colons outside brackets, which are dropped.
func splitFields(value string) ([]string, error) {
	var fields []string
	var field strings.Builder
	inside := false
	for _, r := range value {
		switch {
		case r == '[' && !inside:
			inside = true
		case r == ']' && inside:
			inside = false
		case r == '[' || r == ']':
			return nil, fmt.Errorf("brackets do not match")
		case r == ':' && !inside:
			fields = append(fields, field.String())
			field.Reset()
		default:
			field.WriteRune(r)
		}
	}
	if inside {
		return nil, fmt.Errorf("brackets do not match")
	}
	return append(fields, field.String()), nil
}
