package server

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/grandcat/zeroconf"

	"mandos-escrow/unlock"
)

// announceInterval is how often it is looked whether interfaces or their
// addresses are others than those that were announced.
const announceInterval = 3 * time.Second

// presence is what is announced: a port, on links.
type presence struct {
	port  int
	links []net.Interface
	ips   []string // all that is listened on; none: the addresses of each link
	print string   // differs when it has to be announced anew
}

// link is an interface with its addresses.
type link struct {
	net.Interface
	addresses []net.Addr
}

// announce tells the links of this host by multicast DNS that there is a server
// with this key (docs/unlock-protocol.md, section 11), until ctx ends. A failure
// is a line in the log: machines know addresses besides.
//
// The library reads what anybody on a link sends, in goroutines of its own, where
// a panic cannot be caught from here. `server run --no-announce` is for who does
// not want that.
func (s *Server) announce(ctx context.Context, listeners []net.Listener) {
	ticker := time.NewTicker(announceInterval)
	defer ticker.Stop()
	var announced presence
	var responder *zeroconf.Server
	defer func() { sayGoodbye(responder) }()
	var told string // the last failure
	for {
		next, err := currentPresence(listeners)
		if err == nil && next.print != announced.print {
			sayGoodbye(responder)
			if responder, err = s.announceOn(next); err == nil {
				announced, told = next, ""
			} else {
				announced = presence{}
			}
		}
		if err != nil && err.Error() != told {
			told = err.Error()
			s.log.Warn("not announced by mDNS", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// announceOn announces a presence; nothing when it has no links. Host and instance
// are named after the key, so that nothing else about this host is told.
func (s *Server) announceOn(p presence) (responder *zeroconf.Server, err error) {
	if len(p.links) == 0 {
		return nil, nil
	}
	defer func() {
		if fault := recover(); fault != nil {
			responder, err = nil, fmt.Errorf("mDNS library: %v", fault)
		}
	}()
	name := "mandos-escrow-" + s.key.KeyID().Short()
	text := []string{unlock.KeyIDText + string(s.key.KeyID())}
	responder, err = zeroconf.RegisterProxy(name, unlock.ServiceType, "local.", p.port, name, p.ips, text, p.links)
	if err != nil {
		return nil, err
	}
	s.log.Info("announced by mDNS", "port", p.port, "interfaces", strings.Join(linkNames(p.links), " "))
	return responder, nil
}

// sayGoodbye ends an announcement.
func sayGoodbye(responder *zeroconf.Server) {
	if responder == nil {
		return
	}
	defer func() { _ = recover() }() // it is gone either way
	responder.Shutdown()
}

func linkNames(links []net.Interface) []string {
	var list []string
	for _, l := range links {
		list = append(list, l.Name)
	}
	return list
}

func currentPresence(listeners []net.Listener) (presence, error) {
	var listening []*net.TCPAddr
	for _, l := range listeners {
		if a, ok := l.Addr().(*net.TCPAddr); ok {
			listening = append(listening, a)
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return presence{}, fmt.Errorf("list interfaces: %w", err)
	}
	var links []link
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil {
			continue // it went away just now
		}
		links = append(links, link{i, addresses})
	}
	return presenceOf(listening, links), nil
}

// presenceOf says what of the links is announced: those that have an address
// that is listened on, under the port of the first such address. Loopback never
// is.
func presenceOf(listening []*net.TCPAddr, links []link) presence {
	listening = slices.DeleteFunc(slices.Clone(listening), func(a *net.TCPAddr) bool { return a.IP.IsLoopback() })
	if len(listening) == 0 {
		return presence{}
	}
	p := presence{port: listening[0].Port}
	listening = slices.DeleteFunc(listening, func(a *net.TCPAddr) bool { return a.Port != p.port })
	everywhere := slices.ContainsFunc(listening, func(a *net.TCPAddr) bool { return a.IP.IsUnspecified() })
	for _, l := range links {
		const want = net.FlagUp | net.FlagMulticast
		if l.Flags&(want|net.FlagLoopback) != want {
			continue
		}
		if everywhere || l.hasOneOf(listening) {
			p.links = append(p.links, l.Interface)
			p.print += fmt.Sprint(l.Index, l.Name, l.Flags, l.addresses, ";")
		}
	}
	if !everywhere {
		for _, a := range listening {
			p.ips = append(p.ips, a.IP.String())
		}
	}
	return p
}

func (l link) hasOneOf(listening []*net.TCPAddr) bool {
	return slices.ContainsFunc(listening, func(a *net.TCPAddr) bool {
		return (a.Zone == "" || a.Zone == l.Name) && slices.ContainsFunc(l.addresses, func(own net.Addr) bool {
			network, ok := own.(*net.IPNet)
			return ok && network.IP.Equal(a.IP)
		})
	})
}
