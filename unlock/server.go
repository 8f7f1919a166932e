package unlock

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/secret"
)

// Deadlines of the server's side.
const (
	requestTime = 10 * time.Second // handshake and request together
	replyTime   = 10 * time.Second
)

// Source is what Serve needs of a server's store. An error of any method
// refuses.
type Source interface {
	// Lookup returns the record of the machine whose boot identity has the
	// key, or ErrUnknown.
	Lookup(id identity.KeyID) (Machine, error)

	// Release decides again, commits Machine.Released and the audit record in
	// one transaction, and returns the sealed blobs once that is on disk.
	Release(ctx context.Context, id identity.KeyID, requested time.Time, nonce string) (blobs [][]byte, err error)

	// Waiting is told, once a request, that it waits for an administrator
	// until a time; it commits Machine.ApprovalRequested.
	Waiting(id identity.KeyID, until time.Time)

	// Changed is closed when the machine's record changes the next time.
	Changed(id identity.KeyID) <-chan struct{}

	// Refused is told why a request was refused, also of unknown keys: anybody
	// can cause such calls, so what they cost must be bounded. For ReasonTimedOut it commits Machine.Expire.
	Refused(id identity.KeyID, reason string)
}

// ErrUnknown: no machine has this key.
var ErrUnknown = errors.New("no machine has this key")

// errNothingAsked: a client that tries several addresses of a server closes
// all connections but the first without a word.
var errNothingAsked = errors.New("the connection was closed without a request")

// Serve answers the one request of a connection and closes it: a list of
// refusals, then one write. A release is committed before a byte of it is
// sent. The error says why nothing was released; it wraps ErrRefused when the
// other end was told so, and is for the log only.
func Serve(ctx context.Context, conn *tls.Conn, source Source) error {
	defer conn.Close()
	id, err := peer(ctx, conn)
	if err != nil {
		return fmt.Errorf("unlock: %w", err)
	}
	reply, err := answer(ctx, conn, id, source)
	if ctx.Err() != nil && err != nil {
		return fmt.Errorf("unlock: %s: %w", id.Short(), err) // a server that stops is no refusal
	}
	if sendErr := send(conn, reply); sendErr != nil {
		err = errors.Join(err, fmt.Errorf("send reply: %w", sendErr))
	}
	if err != nil {
		return fmt.Errorf("unlock: %s: %w", id.Short(), err)
	}
	return nil
}

// peer finishes the handshake and says who is there.
func peer(ctx context.Context, conn *tls.Conn) (identity.KeyID, error) {
	if err := conn.SetDeadline(time.Now().Add(requestTime)); err != nil {
		return "", err
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		return "", err
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != Protocol {
		return "", fmt.Errorf("%w: application protocol %q", ErrProtocol, state.NegotiatedProtocol)
	}
	return identity.PeerKeyID(state)
}

// answer returns the reply to send. With an error it is the refusal.
func answer(ctx context.Context, conn *tls.Conn, id identity.KeyID, source Source) ([]byte, error) {
	refusal, err := Reply{}.Bytes()
	if err != nil {
		return nil, err
	}
	nonce := secret.ID()
	blobs, reason, err := release(ctx, conn, id, nonce, source)
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, errNothingAsked) {
			source.Refused(id, reason)
		}
		return refusal, err
	}
	reply, err := Reply{Released: true, Nonce: nonce, Blobs: blobs}.Bytes()
	if err != nil {
		return refusal, err
	}
	return reply, nil
}

func send(conn *tls.Conn, reply []byte) error {
	if err := conn.SetDeadline(time.Now().Add(replyTime)); err != nil {
		return err
	}
	_, err := conn.Write(frame(reply))
	return err
}

// release is the list of refusals; reason is for the audit record.
func release(ctx context.Context, conn *tls.Conn, id identity.KeyID, nonce string, source Source) (blobs [][]byte, reason string, err error) {
	data, err := readFrame(conn, MaxRequest, nil)
	if errors.Is(err, io.EOF) {
		return nil, ReasonMalformed, fmt.Errorf("%w: %w", ErrRefused, errNothingAsked)
	}
	if err == nil {
		_, err = ParseRequest(data)
	}
	if err != nil {
		return nil, ReasonMalformed, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	requested := time.Now()
	reason, err = permission(ctx, conn, id, requested, source)
	if err != nil {
		return nil, reason, err
	}
	blobs, err = source.Release(ctx, id, requested, nonce)
	if err != nil {
		return nil, ReasonNotReleased, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return blobs, "", nil
}

// permission waits until the decision is to release, which is nil, or to
// refuse.
func permission(ctx context.Context, conn *tls.Conn, id identity.KeyID, requested time.Time, source Source) (reason string, err error) {
	var gone <-chan struct{}
	for {
		changed := source.Changed(id) // before Lookup, so that no change is missed
		machine, err := source.Lookup(id)
		if errors.Is(err, ErrUnknown) {
			return ReasonUnknown, fmt.Errorf("%w: %w", ErrRefused, err)
		}
		if err != nil {
			return ReasonNotFound, fmt.Errorf("%w: %w", ErrRefused, err)
		}
		decision := machine.Decide(requested, time.Now())
		if decision.Action != Wait {
			return decision.Reason, decision.Err()
		}
		if gone == nil {
			source.Waiting(id, decision.Until)
			stop, closed := watch(conn)
			defer stop()
			gone = closed
		}
		if reason, err := pause(ctx, decision.Until, changed, gone); err != nil {
			return reason, err
		}
	}
}

// pause returns nil when it is time to decide again.
func pause(ctx context.Context, until time.Time, changed, gone <-chan struct{}) (reason string, err error) {
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-changed:
	case <-gone:
		return ReasonGone, fmt.Errorf("%w: %s", ErrRefused, ReasonGone)
	case <-ctx.Done():
		return ReasonStopped, ctx.Err()
	}
	return "", nil
}

// watch reports that the other end closed the connection, or sent what it may
// not. stop ends it; nothing can be read afterwards.
func watch(conn *tls.Conn) (stop func(), gone <-chan struct{}) {
	closed := make(chan struct{})
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		close(closed)
		return func() {}, closed
	}
	go func() {
		defer close(closed)
		// Whatever comes, a byte or an error, ends the wait.
		_, _ = conn.Read(make([]byte, 1))
	}()
	return func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		<-closed
	}, closed
}
