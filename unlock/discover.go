package unlock

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"mandos-escrow/internal/identity"
)

// When a Browser asks on each link: after 0, 0.25, 0.5, 1, 2 seconds and so on,
// then every minute; and anew when something is. An announcement makes it ask
// at once, but not within askGap of the last time.
const (
	firstAsk = 250 * time.Millisecond
	lastAsk  = time.Minute
	askGap   = time.Second
	pollTime = time.Second            // between looks at what interfaces there are
	waitTime = 100 * time.Millisecond // the same while an address cannot be used yet
)

// What a Browser keeps. A candidate that was seen within settleTime makes no
// room for another, so that who asks for addresses once a second sees it.
const (
	maxLinks      = 8 // interfaces
	maxCandidates = 8 // of one server on one link
	maxPerAnswer  = 4 // of one service in one answer
	settleTime    = 2 * time.Second
)

// Browser finds servers on the links of this machine by multicast DNS. It trusts
// nobody: anyone on a link may answer, and only the pinned key tells who it was.
//
// It is small code over the standard library's sockets and x/net's DNS parser,
// because grandcat/zeroconf adds 594 KB to the boot program, and returns
// addresses without the zone that a link-local one needs.
//
// Addresses are taken only from answers to its own questions. Each question
// comes from a port of its own and has a new random ID, so that a sender must
// have seen it; an announcement only makes it ask. Whoever floods the link
// therefore has to be faster than the server with maxCandidates addresses each
// time that it is asked: if he is once not, the server is kept for settleTime at
// least, and a Client has tried it by then. Goodbyes (TTL 0) are ignored:
// they would let others unsay a server.
type Browser struct {
	servers []identity.KeyID

	mu      sync.Mutex
	found   []candidate
	changed chan struct{}
	again   bool // a server was announced: the next answer is news, whatever it says
}

type candidate struct {
	server  identity.KeyID // empty: any
	link    string         // interface
	address string
	seen    time.Time
}

// Browse looks for servers with these keys, and for those that do not say which
// key they have, until ctx ends. links returns a channel that is closed when a
// link or an address next comes up; nil: it finds out by itself, within a
// second.
func Browse(ctx context.Context, links func() <-chan struct{}, servers []identity.KeyID) *Browser {
	b := &Browser{servers: servers, changed: make(chan struct{})}
	if links == nil {
		links = func() <-chan struct{} { return nil }
	}
	go b.run(ctx, links)
	return b
}

// Changed is Finder's.
func (b *Browser) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

// Addresses is Finder's. The newest of each link stand first, then the second
// newest and so on, so that one link cannot hide another.
func (b *Browser) Addresses(id identity.KeyID) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var ranks [maxCandidates * 2][]string // those of this key, and those without one
	for i, c := range b.found {
		if !c.of(id) {
			continue
		}
		newer := 0
		for j, other := range b.found {
			if other.of(id) && other.link == c.link && (other.seen.After(c.seen) || j < i && other.seen.Equal(c.seen)) {
				newer++
			}
		}
		ranks[newer] = append(ranks[newer], c.address)
	}
	return slices.Concat(ranks[:]...)
}

func (c candidate) of(id identity.KeyID) bool { return c.server == id || c.server == "" }

// run asks on all links that there are. Should anything in it fail that never
// should, the machine does without discovery.
func (b *Browser) run(ctx context.Context, links func() <-chan struct{}) {
	defer func() { _ = recover() }()
	sockets := map[socketID]*socket{}
	defer func() {
		for _, s := range sockets {
			s.close()
		}
	}()
	heard := make(chan struct{}, 1) // an announcement
	var asked, due time.Time
	for n := 0; ; {
		up := links()
		fresh, waiting := b.refresh(sockets, heard)
		if fresh {
			n, due = 0, time.Now()
		}
		poll := pollTime
		if waiting {
			poll = waitTime
		}
		if now := time.Now(); !now.Before(due) {
			for _, s := range sockets {
				s.ask(b)
			}
			asked, due = now, now.Add(askDelay(n))
			n++
		}
		timer := time.NewTimer(min(poll, time.Until(due)))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-up:
			n, due = 0, earlier(due, asked.Add(firstAsk))
		case <-heard:
			n, due = min(n, 2), earlier(due, asked.Add(askGap))
		}
		timer.Stop()
	}
}

func askDelay(n int) time.Duration { return min(firstAsk<<min(n, 10), lastAsk) }

func earlier(x, y time.Time) time.Time {
	if x.Before(y) {
		return x
	}
	return y
}

// socketID is what a socket is bound to: an interface, and an address of it.
// When a cable is plugged in it is a new one.
type socketID struct {
	index   int
	local   string
	carrier bool
}

// socket asks on one link in one family.
type socket struct {
	link   string
	conn   *net.UDPConn
	group  *net.UDPAddr
	notice *net.UDPConn // hears what is announced to all; nil: it could not be had

	// These are guarded by the browser's lock.
	id     uint16       // of the last question
	onLink []*net.IPNet // networks of the interface, each with its own address
}

// refresh opens sockets for addresses that are new and closes those of addresses
// that are gone. waiting: an address cannot be used yet, as IPv6 ones until it is
// proved that nobody else has them (RFC 4862, section 5.4).
func (b *Browser) refresh(sockets map[socketID]*socket, heard chan<- struct{}) (fresh, waiting bool) {
	here := map[socketID]bool{}
	for _, link := range multicastLinks() {
		for _, local := range link.locals() {
			id := socketID{link.Index, local.String(), link.Flags&net.FlagRunning != 0}
			here[id] = true
			s := sockets[id]
			if s == nil {
				if s = b.open(link, local, heard); s == nil {
					waiting = true
					continue
				}
				sockets[id], fresh = s, true
			}
			b.mu.Lock()
			s.onLink = link.networks
			b.mu.Unlock()
		}
	}
	for id, s := range sockets {
		if !here[id] {
			s.close()
			delete(sockets, id)
		}
	}
	return fresh, waiting
}

// link is an interface that is up and knows multicast.
type link struct {
	net.Interface
	networks []*net.IPNet // each with its own address
}

func multicastLinks() []link {
	var list []link
	all, _ := net.Interfaces() // none: there may be some the next time
	for _, i := range all {
		const want = net.FlagUp | net.FlagMulticast
		if i.Flags&(want|net.FlagLoopback) != want || len(list) == maxLinks {
			continue
		}
		l := link{Interface: i}
		addresses, _ := i.Addrs()
		for _, a := range addresses {
			if network, ok := a.(*net.IPNet); ok {
				l.networks = append(l.networks, network)
			}
		}
		list = append(list, l)
	}
	return list
}

// locals are the addresses to ask from: one of each family, in IPv6 the
// link-local one.
func (l link) locals() []net.IP {
	var four, six net.IP
	for _, n := range l.networks {
		switch {
		case n.IP.To4() != nil && four == nil:
			four = n.IP
		case isLinkLocal6(n.IP) && six == nil:
			six = n.IP
		}
	}
	return slices.DeleteFunc([]net.IP{six, four}, func(a net.IP) bool { return a == nil })
}

func isLinkLocal6(a net.IP) bool { return a.To4() == nil && a.IsLinkLocalUnicast() }

// open returns nil when the address cannot be used now. A socket that is bound
// to an interface's address sends its multicast there.
func (b *Browser) open(l link, local net.IP, heard chan<- struct{}) *socket {
	network, own, group := "udp4", &net.UDPAddr{IP: local}, &net.UDPAddr{IP: net.IPv4(224, 0, 0, 251), Port: 5353}
	if local.To4() == nil {
		network, own.Zone = "udp6", l.Name
		group = &net.UDPAddr{IP: net.IP{0xff, 0x02, 15: 0xfb}, Port: 5353, Zone: l.Name}
	}
	conn, err := net.ListenUDP(network, own)
	if err != nil {
		return nil
	}
	s := &socket{link: l.Name, conn: conn, group: group}
	go s.receive(conn, func(packet []byte, from net.IP) { b.take(s, packet, from, time.Now()) })
	if s.notice, err = net.ListenMulticastUDP(network, &l.Interface, group); err == nil {
		go s.receive(s.notice, func(packet []byte, _ net.IP) { b.notice(packet, heard) })
	}
	return s
}

func (s *socket) close() {
	s.conn.Close()
	if s.notice != nil {
		s.notice.Close()
	}
}

// ask sends a question. An error is as good as a lost packet.
func (s *socket) ask(b *Browser) {
	id := uint16(rand.N(1 << 16))
	b.mu.Lock()
	s.id = id
	b.mu.Unlock()
	_, _ = s.conn.WriteToUDP(query(id), s.group)
}

// receive hands over packets until the socket is closed. No packet ends it.
func (s *socket) receive(conn *net.UDPConn, take func(packet []byte, from net.IP)) {
	buffer := make([]byte, maxPacket+1)
	for {
		n, from, err := conn.ReadFromUDP(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(firstAsk) // it may go on when the link is back
			continue
		}
		func() {
			defer func() { _ = recover() }()
			take(buffer[:n], from.IP)
		}()
	}
}

// notice makes the browser ask when somebody announces a server to all, and
// hears nothing for a while then: whoever floods the link costs little.
func (b *Browser) notice(packet []byte, heard chan<- struct{}) {
	_, list, err := parseAnswer(packet)
	if err != nil || !slices.ContainsFunc(list, b.wanted) {
		return
	}
	b.mu.Lock()
	b.again = true
	b.mu.Unlock()
	select {
	case heard <- struct{}{}:
	default: // it will ask anyway
	}
	time.Sleep(askGap)
}

func (b *Browser) wanted(s service) bool { return s.key == "" || slices.Contains(b.servers, s.key) }

// take keeps what an answer to the last question says.
func (b *Browser) take(s *socket, packet []byte, from net.IP, now time.Time) {
	id, list, err := parseAnswer(packet)
	if err != nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if id != s.id || !s.plausible(from) {
		return
	}
	fresh := false
	for _, found := range list {
		if b.wanted(found) {
			fresh = b.takeService(s, found, from, now) || b.again || fresh
		}
	}
	if fresh {
		close(b.changed)
		b.changed, b.again = make(chan struct{}), false
	}
}

// takeService keeps where the answer came from, and what else it says. The
// first is what a machine without any address but a link-local one can reach.
func (b *Browser) takeService(s *socket, found service, from net.IP, now time.Time) (fresh bool) {
	taken := 0
	for _, a := range append([]net.IP{from}, found.addresses...) {
		if taken == maxPerAnswer {
			break
		}
		if !s.plausible(a) {
			continue
		}
		taken++
		host := a.String()
		if isLinkLocal6(a) {
			host += "%" + s.link
		}
		address := net.JoinHostPort(host, strconv.Itoa(int(found.port)))
		fresh = b.keep(candidate{found.key, s.link, address, now}) || fresh
	}
	return fresh
}

// plausible: an address that a machine on this link can have.
func (s *socket) plausible(a net.IP) bool {
	if isLinkLocal6(a) {
		return true
	}
	return !a.IsLoopback() && !a.IsMulticast() && slices.ContainsFunc(s.onLink, func(n *net.IPNet) bool { return n.Contains(a) })
}

// keep says whether the candidate is one that was not there before.
func (b *Browser) keep(c candidate) bool {
	count, oldest := 0, -1
	for i := range b.found {
		old := &b.found[i]
		if old.server != c.server || old.link != c.link {
			continue
		}
		if old.address == c.address {
			old.seen = c.seen
			return false
		}
		if count++; oldest < 0 || old.seen.Before(b.found[oldest].seen) {
			oldest = i
		}
	}
	switch {
	case count < maxCandidates:
		b.found = append(b.found, c)
	case c.seen.Sub(b.found[oldest].seen) < settleTime:
		return false
	default:
		b.found[oldest] = c
	}
	return true
}
