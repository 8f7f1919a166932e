package initrd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// NetworkOptions say what network to bring up.
type NetworkOptions struct {
	Words   []string                      // of the kernel command line: Cmdline.Words
	File    string                        // more of them, one or several on a line, with # comments; may be absent
	Hooks   string                        // folder of network hooks; may be absent
	Connect string                        // Cmdline.Connect, for the hooks
	Report  func(format string, a ...any) // is called by several goroutines at once
}

// Network is what was brought up. One goroutine owns all of it; whatever it changes, it also notes how to take back.
type Network struct {
	options NetworkOptions
	system  system
	stop    context.CancelFunc
	done    chan struct{}

	mu      sync.Mutex
	changed chan struct{}
	err     error // of putting things back

	// The rest is run's alone.
	plan     *plan
	rt       *rtnetlink
	leases   chan leased
	clients  sync.WaitGroup
	undo     []func() error // in reverse order it leaves things as they were
	held     map[int]*held  // by index: links that we deal with
	first    map[int]time.Time
	made     map[string]bool // devices of the plan: whether it is there
	resolver resolver
	usable   map[string]bool
}

// system is where things are, and how long others are waited for; tests have their own.
type system struct {
	sysctl    string
	udev      string
	resolv    string
	hookWait  time.Duration // how long links wait for the hooks
	hookLimit time.Duration // how long one hook may run
	udevWait  time.Duration // how long udev may take over a link
	stopLimit time.Duration // how long the hooks may take to stop
}

var realSystem = system{
	sysctl: "/proc/sys", udev: "/run/udev", resolv: "/etc/resolv.conf",
	hookWait: 2500 * time.Millisecond, hookLimit: hookLimit, udevWait: 5 * time.Second, stopLimit: 3 * time.Second,
}

// held is a link that was taken up.
type held struct {
	link
	configs   []*ipConfig
	fixed     []*ipConfig // static ones that have been applied
	addresses []ours
	routes    []route
	lease     *lease
	client    context.CancelFunc // ends the DHCP client; nil: none runs
	yielded   bool               // somebody else gave the link an address
}

// ours is an address that we added.
type ours struct {
	prefix netip.Prefix
	peer   netip.Addr
}

// leased is what a DHCP client says.
type leased struct {
	to    *held
	lease *lease
}

// StartNetwork begins to bring up the network, and returns at once. When ctx ends, or Stop is called, all is put back as it was.
func StartNetwork(ctx context.Context, o NetworkOptions) *Network {
	return startNetwork(ctx, o, realSystem)
}

func startNetwork(ctx context.Context, o NetworkOptions, s system) *Network {
	ctx, stop := context.WithCancel(ctx)
	n := &Network{
		options: o, system: s, stop: stop, done: make(chan struct{}), changed: make(chan struct{}), leases: make(chan leased),
		held: map[int]*held{}, first: map[int]time.Time{}, made: map[string]bool{}, resolver: resolver{path: s.resolv}, usable: map[string]bool{},
	}
	go n.run(ctx)
	return n
}

// Changed returns a channel that is closed when the next link gets a carrier, or the next address can be used.
func (n *Network) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

// Stop puts everything back as it was found: addresses, routes, the state of links, devices, sysctls, name servers; then it stops the hooks.
// The error says what could not be put back; when ctx ends first, it is the context's, and the work goes on.
func (n *Network) Stop(ctx context.Context) error {
	n.stop()
	select {
	case <-n.done:
		return n.err
	case <-ctx.Done():
		return fmt.Errorf("initrd: put the network back: %w", ctx.Err())
	}
}

// run lets the hooks come first, and links wait for them, but not for ever.
func (n *Network) run(ctx context.Context) {
	defer close(n.done)
	n.plan = readPlan(n.options.Words, n.options.File, n.options.Report)
	h := &hooks{dir: n.options.Hooks, device: n.plan.names(), connect: n.options.Connect, limit: n.system.hookLimit, report: n.options.Report}
	started := make(chan struct{})
	go func() {
		defer close(started)
		h.run(ctx, "start")
	}()
	timer := time.NewTimer(n.system.hookWait)
	defer timer.Stop()
	select {
	case <-started:
	case <-timer.C:
	case <-ctx.Done():
	}
	if err := n.manage(ctx); err != nil {
		n.options.Report("network: %v", err)
	}
	<-started
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.system.stopLimit)
	defer cancel()
	h.run(limited, "stop")
}

// manage looks at all links whenever something changed, does what is to be done, and puts it back when ctx ends.
func (n *Network) manage(ctx context.Context) error {
	var err error
	if n.rt, err = openRtnetlink(); err != nil {
		return err
	}
	defer n.rt.close()
	socket, err := watchLinks()
	if err != nil {
		return err
	}
	defer socket.Close()
	events := make(chan struct{}, 1)
	go pump(socket, events)
	defer n.putBack()
	defer n.clients.Wait()
	for ctx.Err() == nil {
		again, err := n.look(ctx)
		if err != nil {
			n.options.Report("network: %v", err)
			again = time.Second
		}
		n.wait(ctx, events, again)
	}
	return nil
}

// wait returns at the next event, or after again if that is not 0.
func (n *Network) wait(ctx context.Context, events <-chan struct{}, again time.Duration) {
	var timeout <-chan time.Time
	if again > 0 {
		timer := time.NewTimer(again)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-ctx.Done():
	case <-events:
	case <-timeout:
	case l := <-n.leases:
		n.leased(l)
	}
}

// udevPoll is how often it is looked whether udev has done with a link, of which it tells nobody else.
const udevPoll = 50 * time.Millisecond

// look compares what there is with what is wanted, and does the difference. It returns when to look again; 0: at the next event.
func (n *Network) look(ctx context.Context) (time.Duration, error) {
	links, err := listLinks()
	for err == nil && ctx.Err() == nil && !n.plan.off() && n.makeDevices(links) {
		links, err = listLinks()
	}
	if err != nil {
		return 0, err
	}
	addresses, err := listAddresses()
	if err != nil {
		return 0, err
	}
	n.forget(links)
	again := time.Duration(0)
	for _, l := range links {
		if ctx.Err() != nil || n.plan.off() {
			break
		}
		if !n.ready(l) {
			again = udevPoll
			continue
		}
		n.consider(ctx, l, links, of(addresses, l.index))
	}
	n.tell(links, addresses)
	return again, nil
}

func of(addresses []address, index int) []address {
	var found []address
	for _, a := range addresses {
		if a.index == index {
			found = append(found, a)
		}
	}
	return found
}

// forget drops links that are gone.
func (n *Network) forget(links []link) {
	for index, h := range n.held {
		if !slices.ContainsFunc(links, func(l link) bool { return l.index == index }) {
			h.endClient()
			h.addresses, h.routes = nil, nil
			delete(n.held, index)
			n.setNameServers()
		}
	}
}

// ready: udev does not run, or has done with the link. A link that is up cannot be renamed by older kernels, so one is not taken up before
// udev has given it its name. udev says that it has done by a file in its database (sd_device_get_is_initialized(3)).
func (n *Network) ready(l link) bool {
	if n.made[l.name] || n.held[l.index] != nil {
		return true
	}
	if _, err := os.Stat(filepath.Join(n.system.udev, "control")); err != nil {
		return true
	}
	if _, err := os.Stat(filepath.Join(n.system.udev, "data", fmt.Sprintf("n%d", l.index))); err == nil {
		return true
	}
	if n.first[l.index].IsZero() {
		n.first[l.index] = time.Now()
	}
	return time.Since(n.first[l.index]) >= n.system.udevWait
}

// consider deals with one link.
func (n *Network) consider(ctx context.Context, l link, links []link, addresses []address) {
	if d := n.plan.masterOf(l.name); d != nil {
		if made, tried := n.made[d.name]; made || !tried {
			n.makePort(l, d, links, addresses)
			return
		}
	}
	h := n.held[l.index]
	if h == nil {
		if h = n.take(l, addresses); h == nil {
			return
		}
	}
	carried := h.carrier()
	h.link = l
	if l.master != 0 || h.foreign(addresses) {
		h.yielded = true
		h.endClient()
		return
	}
	n.applyStatic(h)
	if h.wantsDHCP() && !h.yielded && l.carrier() && (h.client == nil || !carried && h.lease == nil) {
		h.endClient()
		n.startClient(ctx, h)
	}
}

// take brings up a link that is wanted. One that somebody else has configured, or has made and not brought up, is left alone.
func (n *Network) take(l link, addresses []address) *held {
	configs := n.plan.configs(l.name)
	h := &held{link: l, configs: configs}
	switch {
	case len(configs) == 0, l.master != 0, l.flags&unix.IFF_LOOPBACK != 0, l.flags&unix.IFF_BROADCAST == 0, l.flags&unix.IFF_NOARP != 0:
		return nil
	case h.foreign(addresses):
		return nil
	case !l.up() && !n.made[l.name] && slices.Contains([]string{"bridge", "bond", "vlan"}, l.kind):
		return nil
	}
	n.held[l.index] = h
	// A link that we bring up is noted as having no carrier before.
	if !l.up() {
		n.raise(h)
	} else {
		h.flags &^= unix.IFF_RUNNING
	}
	n.later(func() error { return n.clear(h) })
	return h
}

// foreign: somebody else gave the link an address: one of IPv4, or one of IPv6 that is neither link-local nor from a router.
func (h *held) foreign(addresses []address) bool {
	return slices.ContainsFunc(addresses, func(a address) bool {
		mine := slices.ContainsFunc(h.addresses, func(o ours) bool { return o.prefix == a.prefix && a.flags&unix.IFA_F_PERMANENT != 0 })
		ip := a.prefix.Addr()
		return !mine && (ip.Is4() || !ip.IsLinkLocalUnicast() && a.flags&unix.IFA_F_PERMANENT != 0)
	})
}

// raise brings a link up. Duplicate address detection would cost a second or two before the first packet, so it is off until the link is put
// back. A link-local address is made from the hardware address, or from a secret and as long, and is in use for seconds: who has the same one
// can keep this machine from its server, as anybody on that link can, and nothing else, because both ends prove their keys.
func (n *Network) raise(h *held) {
	n.setSysctl(h.index, h.name, "accept_dad", "0")
	for _, c := range h.configs {
		if before := h.mtu; c.mtu != 0 && c.mtu != before {
			if n.try(h.name, "set the MTU", n.rt.setNumber(h.index, unix.IFLA_MTU, c.mtu)) {
				n.later(func() error { return n.rt.setNumber(h.index, unix.IFLA_MTU, before) })
			}
			break
		}
	}
	if n.try(h.name, "bring it up", n.rt.setUp(h.index, true)) {
		n.later(func() error { return n.lower(h) })
	}
}

// lower takes a link down again, unless somebody else relies on it by now.
func (n *Network) lower(h *held) error {
	addresses, err := listAddresses()
	if err != nil {
		return err
	}
	links, err := listLinks()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.index == h.index && (l.master != 0 || h.foreign(of(addresses, h.index))) {
			return nil
		}
	}
	return n.rt.setUp(h.index, false)
}

// setSysctl sets one of a link's IPv6 settings. A kernel without IPv6 has none.
func (n *Network) setSysctl(index int, name, setting, value string) {
	before, err := os.ReadFile(n.sysctl(name, setting))
	if err != nil || string(before) == value+"\n" {
		return
	}
	if n.try(name, "set "+setting, os.WriteFile(n.sysctl(name, setting), []byte(value), 0)) {
		n.later(func() error {
			links, err := listLinks()
			for _, l := range links {
				if l.index == index { // by the name that it has now
					return os.WriteFile(n.sysctl(l.name, setting), before, 0)
				}
			}
			return err
		})
	}
}

func (n *Network) sysctl(name, setting string) string {
	return filepath.Join(n.system.sysctl, "net/ipv6/conf", name, setting)
}

// try reports an error, and whether there was none.
func (n *Network) try(name, what string, err error) bool {
	if err != nil {
		n.options.Report("network: %s: %s: %v", name, what, err)
	}
	return err == nil
}

// later notes how to take something back.
func (n *Network) later(undo func() error) { n.undo = append(n.undo, undo) }

// putBack takes everything back, the last thing first. What is gone already is fine.
func (n *Network) putBack() {
	var errs []error
	for _, undo := range slices.Backward(n.undo) {
		if err := undo(); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("initrd: put the network back: %w", err))
		}
	}
	if err := n.resolver.restore(); err != nil {
		errs = append(errs, err)
	}
	n.err = errors.Join(errs...)
}

func gone(err error) bool {
	for _, e := range []error{unix.ENODEV, unix.ENXIO, unix.ESRCH, unix.EADDRNOTAVAIL, unix.ENOENT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// tell closes the channel of Changed when there is a carrier or an address that was not there before.
func (n *Network) tell(links []link, addresses []address) {
	usable, found := map[string]bool{}, false
	note := func(key string) {
		usable[key] = true
		found = found || !n.usable[key]
	}
	for _, l := range links {
		if l.carrier() {
			note(fmt.Sprint(l.index))
		}
	}
	for _, a := range addresses {
		if a.usable() {
			note(fmt.Sprint(a.index, a.prefix))
		}
	}
	n.usable = usable
	if found {
		n.mu.Lock()
		defer n.mu.Unlock()
		close(n.changed)
		n.changed = make(chan struct{})
	}
}
