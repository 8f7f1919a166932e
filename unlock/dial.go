package unlock

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/identity"
)

// Deadlines of the client's side.
const (
	connectTime = 5 * time.Second        // connection and handshake, for each address
	stagger     = 250 * time.Millisecond // before the next address is tried too (RFC 8305, section 5)
	replyWait   = MaxApprovalDelay + 30*time.Second
	deadTime    = 30 * time.Second // a connection that is silent so long on TCP's level is dead
)

// Limits of what a Finder can cause: addresses that one attempt dials, and
// failures at them that are told.
const (
	maxFound      = 16
	maxFoundTales = 2
)

// ask sends one request and reads its reply.
func (c *Client) ask(ctx context.Context, s Server, attempt string) (Answer, error) {
	request, err := Request{Attempt: attempt}.Bytes()
	if err != nil {
		return Answer{}, err
	}
	conn, err := c.connect(ctx, s)
	if err != nil {
		return Answer{}, err
	}
	// Closed below TLS: a close_notify could block, and frames tell what is whole.
	defer conn.NetConn().Close()
	defer context.AfterFunc(ctx, func() { _ = conn.NetConn().Close() })()

	if err := conn.SetDeadline(time.Now().Add(requestTime)); err != nil {
		return Answer{}, fmt.Errorf("send request: %w", err)
	}
	if _, err := conn.Write(frame(request)); err != nil {
		return Answer{}, fmt.Errorf("send request: %w", err)
	}
	if err := conn.SetDeadline(time.Now().Add(replyWait)); err != nil {
		return Answer{}, fmt.Errorf("read reply: %w", err)
	}
	data, err := readFrame(conn, MaxReply, func() { _ = conn.SetDeadline(time.Now().Add(replyTime)) })
	if err != nil {
		return Answer{}, fmt.Errorf("read reply: %w", err)
	}
	reply, err := ParseReply(data)
	if err != nil {
		return Answer{}, err
	}
	if !reply.Released {
		return Answer{}, ErrRefused
	}
	return Answer{Server: s.KeyID, Nonce: reply.Nonce, Blobs: reply.Blobs}, nil
}

type dialed struct {
	conn  *tls.Conn
	err   error
	found bool // the address was a Finder's
}

// connect tries a server's addresses; the first behind which the server proves
// its key wins.
func (c *Client) connect(ctx context.Context, s Server) (*tls.Conn, error) {
	config, err := c.Keys.TLS.ClientTLS(s.KeyID, Protocol)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := newRace(c, s, func(address string) dialed { return c.dialTLS(ctx, address, config) })
	return r.run()
}

// race is one attempt to connect. Known addresses are tried in their order, one
// more each time that one failed or nothing came for a while; found ones all at
// once, when they are there.
type race struct {
	finder  Finder
	server  identity.KeyID
	dial    func(address string) dialed
	known   []string // not tried yet
	tried   map[string]bool
	results chan dialed // has room for all, so that no loser waits for a reader
	running int
	found   int // found addresses that were tried
	failed  failures
}

func newRace(c *Client, s Server, dial func(string) dialed) *race {
	known := s.Addresses
	if c.First != "" {
		known = append([]string{c.First}, known...)
	}
	return &race{
		finder: c.Finder, server: s.KeyID, dial: dial, known: known,
		tried: map[string]bool{}, results: make(chan dialed, len(known)+maxFound),
	}
}

func (r *race) run() (*tls.Conn, error) {
	timer := time.NewTimer(stagger)
	defer timer.Stop()
	r.startKnown()
	for {
		changed := r.startFound()
		if r.running == 0 && !r.startKnown() {
			return nil, r.failed.join()
		}
		var more <-chan time.Time
		if len(r.known) > 0 {
			more = timer.C
		}
		select {
		case d := <-r.results:
			r.running--
			if d.err == nil {
				go closeAll(r.results, r.running)
				return d.conn, nil
			}
			r.failed.add(d)
			if !d.found {
				r.startKnown()
				timer.Reset(stagger)
			}
		case <-more:
			r.startKnown()
			timer.Reset(stagger)
		case <-changed:
		}
	}
}

// startKnown tries the next known address.
func (r *race) startKnown() bool {
	for len(r.known) > 0 {
		next := r.known[0]
		r.known = r.known[1:]
		if r.start(next, false) {
			return true
		}
	}
	return false
}

// startFound tries all found addresses that are new, and returns what is closed
// when there may be more.
func (r *race) startFound() <-chan struct{} {
	if r.finder == nil {
		return nil
	}
	changed := r.finder.Changed() // before the list, so that nothing is missed
	for _, a := range r.finder.Addresses(r.server) {
		if r.found < maxFound && r.start(a, true) {
			r.found++
		}
	}
	return changed
}

func (r *race) start(address string, found bool) bool {
	if r.tried[address] {
		return false
	}
	r.tried[address] = true
	r.running++
	go func() {
		d := r.dial(address)
		d.found = found
		r.results <- d
	}()
	return true
}

// failures are those of one race. Anybody on the link can have any number of
// addresses found, so only a few of them are told.
type failures struct {
	errs  []error
	found int
}

func (f *failures) add(d dialed) {
	if d.found {
		f.found++
		if f.found > maxFoundTales {
			return
		}
		d.err = fmt.Errorf("found by discovery: %w", d.err)
	}
	f.errs = append(f.errs, d.err)
}

func (f *failures) join() error {
	if more := f.found - maxFoundTales; more > 0 {
		f.errs = append(f.errs, fmt.Errorf("and %d more found by discovery", more))
	}
	return joinErrors(f.errs...)
}

func closeAll(results <-chan dialed, count int) {
	for range count {
		if d := <-results; d.err == nil {
			d.conn.NetConn().Close()
		}
	}
}

func (c *Client) dialTLS(ctx context.Context, address string, config *tls.Config) dialed {
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	dial := c.Dial
	if dial == nil {
		dial = dialer().DialContext
	}
	raw, err := dial(ctx, "tcp", address)
	if err != nil {
		return dialed{err: err}
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return dialed{err: fmt.Errorf("%s: %w", address, err)}
	}
	return dialed{conn: conn}
}

// dialer finds out that the other end is gone while it waits for an approval:
// keepalive probes when nothing is under way, tcp(7) TCP_USER_TIMEOUT else.
func dialer() *net.Dialer {
	return &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: deadTime / 2, Interval: deadTime / 6, Count: 3},
		Control: func(_, _ string, raw syscall.RawConn) error {
			var failed error
			err := raw.Control(func(fd uintptr) {
				failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadTime.Milliseconds()))
			})
			return errors.Join(err, failed)
		},
	}
}
