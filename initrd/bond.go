package initrd

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// bondOption is one option of a bond as rtnetlink takes it.
type bondOption struct {
	attribute uint16
	data      []byte
}

// bondOptions are the options that can be given: the kernel's names and numbers (Documentation/networking/bonding.rst, and
// tools of the bonding driver: bond_options.c). A value is one of names, or a number of size bytes.
var bondOptions = map[string]struct {
	attribute uint16
	size      int
	names     []string
}{
	"mode": {unix.IFLA_BOND_MODE, 1, []string{
		"balance-rr", "active-backup", "balance-xor", "broadcast", "802.3ad", "balance-tlb", "balance-alb",
	}},
	"miimon":           {unix.IFLA_BOND_MIIMON, 4, nil},
	"updelay":          {unix.IFLA_BOND_UPDELAY, 4, nil},
	"downdelay":        {unix.IFLA_BOND_DOWNDELAY, 4, nil},
	"arp_interval":     {unix.IFLA_BOND_ARP_INTERVAL, 4, nil},
	"min_links":        {unix.IFLA_BOND_MIN_LINKS, 4, nil},
	"lacp_rate":        {unix.IFLA_BOND_AD_LACP_RATE, 1, []string{"slow", "fast"}},
	"ad_select":        {unix.IFLA_BOND_AD_SELECT, 1, []string{"stable", "bandwidth", "count"}},
	"fail_over_mac":    {unix.IFLA_BOND_FAIL_OVER_MAC, 1, []string{"none", "active", "follow"}},
	"primary_reselect": {unix.IFLA_BOND_PRIMARY_RESELECT, 1, []string{"always", "better", "failure"}},
	"xmit_hash_policy": {unix.IFLA_BOND_XMIT_HASH_POLICY, 1, []string{"layer2", "layer3+4", "layer2+3", "encap2+3", "encap3+4", "vlan+srcmac"}},
}

// setOptions reads mode=802.3ad,miimon=100... A bond that watches neither carriers nor ARP never notices a dead port, so without a word on
// it carriers are watched every 100 ms.
func (d *deviceConfig) setOptions(text string) error {
	watched := false
	for option := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(option, "=")
		switch name {
		case "primary":
			d.primary = value
			if !slices.Contains(d.ports, value) {
				return fmt.Errorf("primary %q is no port of it", value)
			}
			continue
		case "miimon", "arp_interval":
			watched = true
		}
		o, err := parseBondOption(name, value)
		if err != nil {
			return err
		}
		d.options = append(d.options, o)
	}
	if !watched {
		d.options = append(d.options, bondOption{unix.IFLA_BOND_MIIMON, binary.NativeEndian.AppendUint32(nil, 100)})
	}
	return nil
}

func parseBondOption(name, value string) (bondOption, error) {
	if name == "arp_ip_target" {
		return parseARPTargets(value)
	}
	known, ok := bondOptions[name]
	if !ok {
		return bondOption{}, fmt.Errorf("unknown option %q", name)
	}
	number := uint64(max(0, slices.Index(known.names, value)))
	if !slices.Contains(known.names, value) {
		var err error
		if number, err = strconv.ParseUint(value, 10, 31); err != nil || known.names != nil && number >= uint64(len(known.names)) {
			return bondOption{}, fmt.Errorf("%q is no value of %s", value, name)
		}
	}
	if known.size == 1 {
		return bondOption{known.attribute, []byte{byte(number)}}, nil
	}
	return bondOption{known.attribute, binary.NativeEndian.AppendUint32(nil, uint32(number))}, nil
}

// parseARPTargets reads IPv4 addresses with semicolons between; the driver takes 16.
func parseARPTargets(value string) (bondOption, error) {
	var data []byte
	targets := strings.Split(value, ";")
	if len(targets) > 16 {
		return bondOption{}, fmt.Errorf("more than 16 ARP targets")
	}
	for i, text := range targets {
		addr, err := netip.ParseAddr(text)
		if err != nil || !addr.Is4() || !unicast(addr) {
			return bondOption{}, fmt.Errorf("%q is no ARP target", text)
		}
		data = appendAttribute(data, uint16(i), addr.AsSlice())
	}
	return bondOption{unix.IFLA_BOND_ARP_IP_TARGET, data}, nil
}
