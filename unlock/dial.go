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
)

// Deadlines of the client's side.
const (
	connectTime = 5 * time.Second        // connection and handshake, for each address
	stagger     = 250 * time.Millisecond // before the next address is tried too (RFC 8305, section 5)
	replyWait   = MaxApprovalDelay + 30*time.Second
	deadTime    = 30 * time.Second // a connection that is silent so long on TCP's level is dead
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
	conn *tls.Conn
	err  error
}

// connect tries a server's addresses, one more each time that the last failed
// or stays silent; the first behind which the server proves its key wins.
func (c *Client) connect(ctx context.Context, s Server) (*tls.Conn, error) {
	config, err := c.Keys.TLS.ClientTLS(s.KeyID, Protocol)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan dialed, len(s.Addresses))
	var errs []error
	next, running := 0, 0
	for {
		if next < len(s.Addresses) {
			go func(address string) { results <- c.dialTLS(ctx, address, config) }(s.Addresses[next])
			next, running = next+1, running+1
		}
		d, waited := await(results, next < len(s.Addresses))
		if waited {
			continue
		}
		running--
		if d.err == nil {
			go closeAll(results, running)
			return d.conn, nil
		}
		errs = append(errs, d.err)
		if running == 0 && next == len(s.Addresses) {
			return nil, joinErrors(errs...)
		}
	}
}

// await returns the next result, or when more addresses are left only waits
// for a while.
func await(results <-chan dialed, more bool) (d dialed, waited bool) {
	if !more {
		return <-results, false
	}
	timer := time.NewTimer(stagger)
	defer timer.Stop()
	select {
	case d = <-results:
		return d, false
	case <-timer.C:
		return dialed{}, true
	}
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
