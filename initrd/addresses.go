package initrd

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

func (h *held) wantsDHCP() bool {
	return h.arp == unix.ARPHRD_ETHER && len(h.mac) == 6 && slices.ContainsFunc(h.configs, func(c *ipConfig) bool { return c.mode == modeAuto })
}

// startClient begins to ask for a lease.
func (n *Network) startClient(ctx context.Context, h *held) {
	conn, err := openLink(h.index)
	if !n.try(h.name, "DHCP", err) {
		return
	}
	ctx, h.client = context.WithCancel(ctx)
	name := h.name
	client := &dhcpClient{
		conn: conn, mac: [6]byte(h.mac),
		leased: func(l *lease) {
			select {
			case n.leases <- leased{h, l}:
			case <-ctx.Done():
			}
		},
		report: func(format string, a ...any) { n.options.Report("network: "+name+": "+format, a...) },
	}
	for _, c := range h.configs {
		client.host = c.host
	}
	n.clients.Go(func() {
		if err := client.run(ctx); err != nil {
			client.report("DHCP: %v", err)
		}
	})
}

func (h *held) endClient() {
	if h.client != nil {
		h.client()
		h.client = nil
	}
}

// leased puts a lease on its link in place of the one before.
func (n *Network) leased(l leased) {
	h := l.to
	if n.held[h.index] != h || h.client == nil {
		return // the link is gone, or somebody else's by now
	}
	before := h.lease
	h.lease = l.lease
	if before != nil && (l.lease == nil || before.address != l.lease.address || !slices.Equal(before.routes, l.lease.routes)) {
		n.try(h.name, "take back "+before.address.String(), n.dropLease(h, before))
	}
	if l.lease != nil && n.addAddress(h, ours{prefix: l.lease.address}) {
		for _, r := range l.lease.routes {
			n.addRoute(h, r)
		}
		n.options.Report("network: %s: %s by DHCP from %s", h.name, l.lease.address, l.lease.server)
	}
	n.setNameServers()
}

// applyStatic adds the addresses that ip= words give. One for no link in particular goes to the first that has a carrier.
func (n *Network) applyStatic(h *held) {
	for _, c := range h.configs {
		if c.mode != modeStatic || n.applied(c) || c.device == "" && !h.carrier() {
			continue
		}
		h.fixed = append(h.fixed, c)
		if n.addAddress(h, ours{c.address, c.peer}) && c.gateway.IsValid() {
			n.addRoute(h, route{to: netip.PrefixFrom(anyAddress(c.gateway), 0), gateway: c.gateway})
		}
		n.setNameServers()
	}
}

func (n *Network) applied(c *ipConfig) bool {
	for _, h := range n.held {
		if slices.Contains(h.fixed, c) {
			return true
		}
	}
	return false
}

func anyAddress(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// addAddress says whether the address is ours now; one that is there already is somebody else's.
func (n *Network) addAddress(h *held, a ours) bool {
	if slices.Contains(h.addresses, a) {
		return false
	}
	err := n.rt.addAddress(h.index, a.prefix, a.peer)
	if errors.Is(err, unix.EEXIST) || !n.try(h.name, "add "+a.prefix.String(), err) {
		return false
	}
	h.addresses = append(h.addresses, a)
	return true
}

func (n *Network) addRoute(h *held, r route) {
	err := n.rt.addRoute(h.index, r)
	if !errors.Is(err, unix.EEXIST) && n.try(h.name, "add a route to "+r.to.String(), err) {
		h.routes = append(h.routes, r)
	}
}

// dropAddress takes an address of ours away, unless somebody else has taken it over: ours has no lifetime, that of a DHCP client has one.
func (n *Network) dropAddress(h *held, a ours) error {
	i := slices.Index(h.addresses, a)
	if i < 0 {
		return nil
	}
	h.addresses = slices.Delete(h.addresses, i, i+1)
	present, err := listAddresses()
	if err != nil {
		return err
	}
	if slices.ContainsFunc(of(present, h.index), func(p address) bool { return p.prefix == a.prefix && p.flags&unix.IFA_F_PERMANENT == 0 }) {
		return nil
	}
	return n.rt.deleteAddress(h.index, a.prefix, a.peer)
}

func (n *Network) dropRoute(h *held, r route) error {
	i := slices.Index(h.routes, r)
	if i < 0 {
		return nil
	}
	h.routes = slices.Delete(h.routes, i, i+1)
	return n.rt.deleteRoute(h.index, r)
}

func (n *Network) dropLease(h *held, l *lease) error {
	var errs []error
	for _, r := range slices.Backward(l.routes) {
		errs = append(errs, n.dropRoute(h, r))
	}
	return firstReal(append(errs, n.dropAddress(h, ours{prefix: l.address})))
}

// clear takes all our addresses and routes off a link.
func (n *Network) clear(h *held) error {
	var errs []error
	for _, r := range slices.Backward(slices.Clone(h.routes)) {
		errs = append(errs, n.dropRoute(h, r))
	}
	for _, a := range slices.Backward(slices.Clone(h.addresses)) {
		errs = append(errs, n.dropAddress(h, a))
	}
	return firstReal(errs)
}

// firstReal is the first error that is not that something is gone already.
func firstReal(errs []error) error {
	for _, err := range errs {
		if err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

// setNameServers writes those of the words, then those of the leases.
func (n *Network) setNameServers() {
	servers := slices.Clone(n.plan.dns)
	for _, h := range n.held {
		for _, c := range h.configs {
			servers = append(servers, c.dns...)
		}
	}
	for _, h := range n.held {
		if h.lease != nil {
			servers = append(servers, h.lease.dns...)
		}
	}
	if err := n.resolver.set(distinct(servers)); err != nil {
		n.options.Report("network: %v", err)
	}
}
