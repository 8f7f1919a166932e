package initrd

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseCmdline(t *testing.T) {
	for text, want := range map[string]Cmdline{
		"":                                    {},
		"root=/dev/vda1 ro quiet splash":      {},
		"quiet mandos-escrow=off\n":           {Off: true},
		"mandos-escrow=connect:10.0.0.2:7625": {Connect: "10.0.0.2:7625"},
		"mandos-escrow=connect:[fe80::1%eth0]:7625 x": {Connect: "[fe80::1%eth0]:7625"},
		"mandos-escrow=connect:srv.example.org:1":     {Connect: "srv.example.org:1"},
		"ip=dhcp a vlan=vlan5:eth0 rd.neednet=1":      {Words: []string{"ip=dhcp", "vlan=vlan5:eth0"}},
		`x="a ip=dhcp b" "ip=off"`:                    {Words: []string{"ip=off"}},
		"bridge=br0:eth0,eth1 bond nameserver=10.0.0.1": {Words: []string{
			"bridge=br0:eth0,eth1", "bond", "nameserver=10.0.0.1",
		}},
		"single -- mandos-escrow=off ip=dhcp": {},
	} {
		got, err := ParseCmdline(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
}

// TestBadCmdline: a bad word is named, and the good ones count all the same.
func TestBadCmdline(t *testing.T) {
	for _, word := range []string{
		"mandos-escrow", "mandos-escrow=on", "mandos-escrow=connect", "mandos-escrow=connect:", "mandos-escrow=connect:10.0.0.2",
		"mandos-escrow=connect:fe80::1:7625", "mandos-escrow=connect:srv:0", "mandos-escrow=connect:srv:65536", "mandos-escrow=connect::7625",
		"ip=eth0:frobnicate", "ip=eth0:ibft", "ip=eth/0:dhcp", "ip=..", "ip=averyveryverylongname:dhcp", "ip=eth0:dhcp:9000:52:54:00:00:00:01",
		"ip=10.0.0.300::::host:eth0:off", "ip=10.0.0.5:::255.0.255.0::eth0:off", "ip=10.0.0.5:::33::eth0", "ip=10.0.0.5::fe80", "ip=10.0.0.5::[fe80::1]:24::eth0:none",
		"ip=[2001:db8::1", "ip=2001:db8::1]:::64::eth0", "ip=:::::eth0:static", "ip=127.0.0.1:::8::eth0", "ip=10.0.0.5:::24::eth0:off:x.y", "ip=a:b:c:d:e:f:g:h:i:j:k:l",
		"vlan=", "vlan=vlan5", "vlan=vlan0:eth0", "vlan=vlan4095:eth0", "vlan=eth0.x:eth0", "vlan=office:eth0",
		"bridge=br0", "bridge=br0:eth0,", "bridge=br0:eth0,eth0", "bridge=br0:br0",
		"bond=bond0:eth0:mode=fast", "bond=bond0:eth0:frobnicate=1", "bond=bond0:eth0:miimon=-1", "bond=bond0:eth0:mode=1,primary=eth1",
		"bond=bond0:eth0:arp_ip_target=::1", "bond=bond0:eth0:mode=1:67", "bond=a:b:mode=1:1500:x", "nameserver=x", "nameserver=0.0.0.0",
	} {
		got, err := ParseCmdline("ip=dhcp " + word + " vlan=vlan5:eth0")
		name, _, _ := strings.Cut(word, "=")
		if !errors.Is(err, ErrWord) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", word, err)
		}
		if want := (Cmdline{Words: []string{"ip=dhcp", "vlan=vlan5:eth0"}}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the others became %+v", word, got)
		}
	}
}

func TestParseIP(t *testing.T) {
	a, p := netip.MustParseAddr, netip.MustParsePrefix
	for value, want := range map[string]ipConfig{
		"":              {mode: modeAuto},
		"on":            {mode: modeAuto},
		"none":          {mode: modeOff},
		"link6":         {mode: modeIPv6},
		"eth0":          {device: "eth0"},
		"enp1s0:auto6":  {device: "enp1s0", mode: modeIPv6},
		"eth0:off":      {device: "eth0", mode: modeOff},
		"eth0:any:1400": {device: "eth0", mtu: 1400},
		"::::laptop:eth0:dhcp": {
			device: "eth0", host: "laptop",
		},
		":::::eth0": {device: "eth0"},
		"10.0.0.5":  {mode: modeStatic, address: p("10.0.0.5/8")},
		"10.0.0.5:10.0.0.2:10.0.0.1:255.255.255.0:h:eth0:off:10.0.0.3:10.0.0.4:10.0.0.9": {
			device: "eth0", host: "h", mode: modeStatic, address: p("10.0.0.5/24"), gateway: a("10.0.0.1"), dns: []netip.Addr{a("10.0.0.3"), a("10.0.0.4")},
		},
		"192.168.7.5::192.168.7.1:26::eth0:none:1300": {
			device: "eth0", mode: modeStatic, address: p("192.168.7.5/26"), gateway: a("192.168.7.1"), mtu: 1300,
		},
		"[2001:db8::5]::[2001:db8::1]:48:h:eth0:none:[2001:db8::53]": {
			device: "eth0", host: "h", mode: modeStatic, address: p("2001:db8::5/48"), gateway: a("2001:db8::1"), dns: []netip.Addr{a("2001:db8::53")},
		},
		"[2001:db8::5/56]::::h:eth0:none":      {device: "eth0", host: "h", mode: modeStatic, address: p("2001:db8::5/56")},
		"10.9.0.1:10.9.0.2/32::32::ppp0:off":   {device: "ppp0", mode: modeStatic, address: p("10.9.0.1/32"), peer: a("10.9.0.2")},
		"10.0.0.5::10.0.0.1:24:h:eth0:dhcp":    {device: "eth0", host: "h"},
		"172.16.0.5:::255.255.0.0::eth0.5:off": {device: "eth0.5", mode: modeStatic, address: p("172.16.0.5/16")},
	} {
		got, err := parseIP(value)
		if err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%s: %+v, %v; want %+v", value, got, err, want)
		}
	}
}

func TestParseDevices(t *testing.T) {
	number := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	for text, want := range map[string]deviceConfig{
		"vlan=vlan0005:eth0":   {kind: "vlan", name: "vlan0005", parent: "eth0", id: 5},
		"vlan=vlan5:bond0":     {kind: "vlan", name: "vlan5", parent: "bond0", id: 5},
		"vlan=eth0.0007:eth0":  {kind: "vlan", name: "eth0.0007", parent: "eth0", id: 7},
		"vlan=eth0.4094:eth0":  {kind: "vlan", name: "eth0.4094", parent: "eth0", id: 4094},
		"bridge":               {kind: "bridge", name: "br0", ports: []string{"eth0"}},
		"bridge=br1:eth0,eth1": {kind: "bridge", name: "br1", ports: []string{"eth0", "eth1"}},
		"bond": {kind: "bond", name: "bond0", ports: []string{"eth0", "eth1"}, options: []bondOption{
			{unix.IFLA_BOND_MODE, []byte{0}},
			{unix.IFLA_BOND_MIIMON, number(100)},
		}},
		"bond=b:eth0:mode=802.3ad,lacp_rate=fast,miimon=50,xmit_hash_policy=layer3+4:9000": {
			kind: "bond", name: "b", ports: []string{"eth0"}, mtu: 9000, options: []bondOption{
				{unix.IFLA_BOND_MODE, []byte{4}},
				{unix.IFLA_BOND_AD_LACP_RATE, []byte{1}},
				{unix.IFLA_BOND_MIIMON, number(50)},
				{unix.IFLA_BOND_XMIT_HASH_POLICY, []byte{1}},
			},
		},
		"bond=b:e0,e1:mode=1,primary=e1,arp_interval=200,arp_ip_target=10.0.0.1;10.0.0.2": {
			kind: "bond", name: "b", ports: []string{"e0", "e1"}, primary: "e1", options: []bondOption{
				{unix.IFLA_BOND_MODE, []byte{1}},
				{unix.IFLA_BOND_ARP_INTERVAL, number(200)},
				{unix.IFLA_BOND_ARP_IP_TARGET, appendAttribute(appendAttribute(nil, 0, []byte{10, 0, 0, 1}), 1, []byte{10, 0, 0, 2})},
			},
		},
	} {
		got, err := parseWord(text)
		if err != nil || !reflect.DeepEqual(*got.device, want) {
			t.Errorf("%s: %+v, %v; want %+v", text, got.device, err, want)
		}
	}
}

// FuzzCmdline: what is taken from a command line, however odd, can be taken again, and names nothing outside its folder.
func FuzzCmdline(f *testing.F) {
	for _, seed := range []string{
		"ip=10.0.0.5:10.0.0.2:10.0.0.1:255.255.255.0:h:eth0:off:10.0.0.3:10.0.0.4:10.0.0.9", "ip=[2001:db8::5/56]::::h:eth0:none", "ip=eth0:dhcp:1400 ip",
		"vlan=eth0.5:eth0 bridge=br0:eth0", "bond=b:e0,e1:mode=1,primary=e1,arp_interval=200,arp_ip_target=10.0.0.1;10.0.0.2", `"x mandos-escrow=connect:[::1]:7`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, _ := ParseCmdline(text)
		again, err := ParseCmdline(strings.Join(c.Words, " "))
		if err != nil || !reflect.DeepEqual(again.Words, c.Words) {
			t.Fatalf("%q, then %q, %v", c.Words, again.Words, err)
		}
		for _, text := range c.Words {
			w, err := parseWord(text)
			if err != nil {
				t.Fatal(err)
			}
			if w.ip != nil && strings.ContainsAny(w.ip.device, "/ \n") || w.device != nil && strings.ContainsAny(w.device.name+w.device.parent+strings.Join(w.device.ports, ""), "/ \n") {
				t.Fatalf("%s: %+v", text, w)
			}
		}
	})
}
