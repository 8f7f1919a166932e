package initrd

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"
)

// drivers are the kernel's modules for the kinds of devices.
var drivers = map[string]string{"vlan": "8021q", "bridge": "bridge", "bond": "bonding"}

// makeDevices makes the first device that is not there yet and can be: a bridge or a bond at once, a VLAN as soon as its link is there. It tries
// once, and says whether it tried, after which the list of links is out of date. A device of that name that somebody else made is left to them,
// but not an idle bond: the driver makes a bond0 of its own accord when it is loaded.
func (n *Network) makeDevices(links []link) bool {
	for _, d := range n.plan.devices {
		if _, tried := n.made[d.name]; tried {
			continue
		}
		parent, ok := find(links, d.parent)
		if d.kind == "vlan" && (!ok || !n.ready(parent)) {
			continue
		}
		if l, there := find(links, d.name); there && !(d.kind == "bond" && idleBond(l, links)) {
			n.made[d.name] = false
			continue
		}
		index, err := n.makeDevice(d, parent.index)
		n.made[d.name] = err == nil
		if errors.Is(err, unix.EOPNOTSUPP) {
			n.options.Report("network: make %s %s: %v: is the module %s in the boot image?", d.kind, d.name, err, drivers[d.kind])
		} else if n.try(d.name, "make the "+d.kind, err) {
			n.later(func() error { return n.rt.deleteDevice(index) })
		}
		return true
	}
	return false
}

func idleBond(l link, links []link) bool {
	return l.kind == "bond" && !l.up() && !slices.ContainsFunc(links, func(port link) bool { return port.master == l.index })
}

// makeDevice makes a device and finds its index. An idle bond of that name, which may also come with the driver just now, is made anew with the
// right options.
func (n *Network) makeDevice(d *deviceConfig, parent int) (int, error) {
	err := n.rt.newDevice(d, parent)
	if errors.Is(err, unix.EEXIST) {
		links, listErr := listLinks()
		if l, ok := find(links, d.name); listErr == nil && ok && idleBond(l, links) {
			err = errors.Join(n.rt.deleteDevice(l.index), n.rt.newDevice(d, parent))
		}
	}
	if err != nil {
		return 0, err
	}
	links, err := listLinks()
	if err != nil {
		return 0, err
	}
	l, ok := find(links, d.name)
	if !ok {
		return 0, unix.ENODEV
	}
	return l.index, nil
}

// makePort puts a link into its bridge or bond, unless somebody else uses it already.
func (n *Network) makePort(l link, d *deviceConfig, links []link, addresses []address) {
	master, ok := find(links, d.name)
	h := &held{link: l}
	if !ok || !n.made[d.name] || l.master != 0 || n.held[l.index] != nil || h.foreign(addresses) {
		return
	}
	n.held[l.index] = h
	if d.kind == "bond" && l.up() { // a bond takes only links that are down
		if !n.try(l.name, "take it down", n.rt.setUp(l.index, false)) {
			return
		}
		n.later(func() error { return n.rt.setUp(l.index, true) })
		l.flags &^= unix.IFF_UP
	}
	if !n.try(l.name, "put it into "+d.name, n.rt.setNumber(l.index, unix.IFLA_MASTER, uint32(master.index))) {
		return
	}
	if !l.up() {
		// A bond takes its ports down when it lets go of them, and a bridge does not.
		n.later(func() error { return n.rt.setUp(l.index, false) })
	}
	n.later(func() error { return n.rt.setNumber(l.index, unix.IFLA_MASTER, 0) })
	if d.primary == l.name {
		n.try(d.name, "prefer "+l.name, n.rt.setPrimary(master.index, l.index))
	}
	if !l.up() {
		n.try(l.name, "bring it up", n.rt.setUp(l.index, true))
	}
}

func find(links []link, name string) (link, bool) {
	for _, l := range links {
		if l.name == name {
			return l, true
		}
	}
	return link{}, false
}
