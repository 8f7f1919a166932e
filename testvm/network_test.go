//go:build vm

package testvm

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What a boot image's network may be made of, one on the other, with the
// drivers of a distribution's kernel: a bridge on a VLAN on a bond.
func TestNetworkDevices(t *testing.T) {
	s := newNetwork(t)
	if err := os.Mkdir(s.path("config"), 0o700); err != nil {
		t.Fatal(err)
	}
	initramfs := Initramfs{
		Kernel: kernel, Init: filepath.Join(programs, "init"), Unlock: filepath.Join(programs, "mandos-escrow-unlock"), Config: s.path("config"),
		Modules: []string{"bonding", "8021q", "bridge"},
	}
	if err := initramfs.Write(t.Context(), s.path("initrd")); err != nil {
		t.Fatal(err)
	}
	port, err := s.lan.Plug(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := &Machine{Kernel: kernel.Image, Initrd: s.path("initrd"), Memory: 512, Port: port, Append: []string{
		"testvm.network=10.9.0.1/24", "bond=bond0:eth0:mode=active-backup,primary=eth0,miimon=50", "vlan=bond0.0005:bond0", "bridge=br0:bond0.0005", "ip=10.9.0.1:::24::br0:off",
	}}
	s.start(m)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := m.WaitFor(ctx, "testvm: network is as it was"); err != nil {
		t.Fatal(err)
	}
	console := strings.ReplaceAll(m.Console.String(), "\r", "")
	for _, want := range []string{
		"Bonding Mode: fault-tolerance (active-backup)", "Primary Slave: eth0", "MII Polling Interval (ms): 50", "Slave Interface: eth0", "bond0.0005     | 5  | bond0\n",
	} {
		if !strings.Contains(console, want) {
			t.Errorf("the console does not say %q", want)
		}
	}
}
