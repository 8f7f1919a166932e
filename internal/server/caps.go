package server

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"

	"mandos-escrow/internal/identity"
)

// How many connections may be open at a time. What strangers leave is for
// those who are known.
const (
	maxConnections          = 4096
	maxConnectionsStrangers = maxConnections / 4 * 3
	maxConnectionsAddress   = 256 // of strangers from one address (IPv6: one /64): a NAT may stand before a rack
	maxConnectionsKey       = 16  // of one known key; more of them count as a stranger's
)

// limits are those numbers, for tests to lower.
type limits struct{ all, strangers, address, key int }

// caps counts connections, so that strangers cannot use up what boots and
// administrators need. Every connection is a stranger's until its key is found
// to be known.
type caps struct {
	mu        sync.Mutex
	limits    limits
	strangers []*counted // oldest first
	from      map[string]int
	known     int
	of        map[identity.KeyID]int
}

func newCaps() *caps {
	return &caps{
		limits: limits{maxConnections, maxConnectionsStrangers, maxConnectionsAddress, maxConnectionsKey},
		from:   map[string]int{}, of: map[identity.KeyID]int{},
	}
}

// enter lets a stranger's connection in. Where all places are taken, another
// stranger's is to be closed for it: who comes anew may be honest, and who holds
// most is most likely not.
func (c *caps) enter(conn *counted) (evicted *counted, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.from[conn.from] >= c.limits.address {
		return nil, false
	}
	if n := len(c.strangers); n >= c.limits.strangers || n+c.known >= c.limits.all {
		if n == 0 {
			return nil, false
		}
		evicted = c.oldestOfMost()
		c.remove(evicted)
	}
	conn.account = strangers
	c.strangers = append(c.strangers, conn)
	c.from[conn.from]++
	return evicted, true
}

// oldestOfMost is the oldest connection of the address that has most.
func (c *caps) oldestOfMost() (oldest *counted) {
	most := 0
	for _, conn := range c.strangers {
		if n := c.from[conn.from]; n > most {
			most, oldest = n, conn
		}
	}
	return oldest
}

// vouch moves the connection of a known key out of the strangers' share.
func (c *caps) vouch(conn *counted, key identity.KeyID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn.account != strangers || c.of[key] >= c.limits.key {
		return
	}
	c.remove(conn)
	conn.account, conn.key = vouched, key
	c.known++
	c.of[key]++
}

func (c *caps) leave(conn *counted) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(conn)
}

func (c *caps) remove(conn *counted) {
	switch conn.account {
	case strangers:
		c.strangers = slices.DeleteFunc(c.strangers, func(other *counted) bool { return other == conn })
		decrement(c.from, conn.from)
	case vouched:
		c.known--
		decrement(c.of, conn.key)
	}
	conn.account = none
}

func decrement[K comparable](counts map[K]int, key K) {
	if counts[key]--; counts[key] == 0 {
		delete(counts, key)
	}
}

// limited keeps a listener's connections within the caps.
type limited struct {
	net.Listener
	caps *caps
}

// Accept returns the next connection within the caps.
func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from, err := origin(conn.RemoteAddr())
		if err != nil {
			conn.Close()
			continue
		}
		entering := &counted{Conn: conn, caps: l.caps, from: from}
		evicted, ok := l.caps.enter(entering)
		if evicted != nil {
			evicted.Conn.Close()
		}
		if ok {
			return entering, nil
		}
		conn.Close()
	}
}

// origin is whom the caps count: an IPv4 address, or the /64 of an IPv6 address,
// which one host may have all of (RFC 6177). On a link each host counts.
func origin(address net.Addr) (string, error) {
	parsed, err := netip.ParseAddrPort(address.String())
	if err != nil {
		return "", err
	}
	ip := parsed.Addr().Unmap()
	if ip.Is6() && !ip.IsLinkLocalUnicast() {
		prefix, err := ip.WithZone("").Prefix(64)
		return prefix.String(), err
	}
	return ip.String(), nil
}

// account is where a connection is counted.
type account int

const (
	none account = iota
	strangers
	vouched
)

// counted is a connection that the caps count until it is closed.
type counted struct {
	net.Conn
	caps *caps
	from string

	account account        // guarded by caps.mu, as is key
	key     identity.KeyID // of a vouched one
}

// Close closes the connection and gives its place away.
func (c *counted) Close() error {
	defer c.caps.leave(c)
	return c.Conn.Close()
}

// countedKey is where a request's context has its counted connection.
type countedKey struct{}

func withCounted(ctx context.Context, conn net.Conn) context.Context {
	if c, err := beneath(conn); err == nil {
		return context.WithValue(ctx, countedKey{}, c)
	}
	return ctx
}

// beneath is the counted connection that carries a TLS connection.
func beneath(conn net.Conn) (*counted, error) {
	if t, ok := conn.(*tls.Conn); ok {
		if c, ok := t.NetConn().(*counted); ok {
			return c, nil
		}
	}
	return nil, errors.New("not a connection that is counted")
}

// vouch tells the caps that a request's caller is known.
func vouch(ctx context.Context, key identity.Public) {
	if c, ok := ctx.Value(countedKey{}).(*counted); ok {
		c.caps.vouch(c, key.KeyID())
	}
}

// vouchBoot tells the caps that a boot connection is a known machine's.
func (s *Server) vouchBoot(conn *tls.Conn) {
	c, err := beneath(conn)
	if err != nil {
		return
	}
	if id, err := identity.PeerKeyID(conn.ConnectionState()); err == nil && (source{s}).isMachine(id) {
		c.caps.vouch(c, id)
	}
}
