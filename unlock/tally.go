package unlock

import (
	"errors"
	"fmt"
	"strings"

	"mandos-escrow/internal/identity"
)

// ErrUnreachable: too few servers released, and too few said no.
var ErrUnreachable = errors.New("not enough servers answered")

// ServerError is what one server did instead of releasing.
type ServerError struct {
	Server Server
	Err    error
}

// FetchError says for each server why it released nothing of use. Its cause is
// ErrRefused or ErrBlob when M-N+1 servers refused, or gave blobs that are not
// this machine's, so that asking the others is of no use; else ErrUnreachable.
type FetchError struct {
	Cause   error
	Servers []ServerError
}

func (e *FetchError) Error() string {
	texts := []string{}
	for _, s := range e.Servers {
		texts = append(texts, s.Server.Name+": "+s.Err.Error())
	}
	return fmt.Sprintf("%v (%s)", e.Cause, strings.Join(texts, "; "))
}

// Unwrap returns the cause alone: one server's refusal is not a refusal.
func (e *FetchError) Unwrap() error { return e.Cause }

// manyErrors are shown on one line.
type manyErrors []error

func (e manyErrors) Error() string {
	texts := []string{}
	for _, err := range e {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

func (e manyErrors) Unwrap() []error { return e }

// joinErrors is errors.Join on one line.
func joinErrors(errs ...error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return manyErrors(errs)
}

// tally is what the servers gave so far.
type tally struct {
	client *Client
	once   bool
	blobs  []*blob
	nonces map[identity.KeyID]string
	failed map[identity.KeyID]error // the last failure of each server that gave nothing
}

func (t *tally) wipe() { wipeBlobs(t.blobs) }

// add returns neither result nor error while there is hope.
func (t *tally) add(o outcome) (*Result, error) {
	if o.err != nil {
		t.failed[o.server.KeyID] = o.err
		if t.client.Report != nil {
			t.client.Report(o.server, o.err)
		}
		return nil, t.verdict(nil)
	}
	delete(t.failed, o.server.KeyID)
	t.nonces[o.server.KeyID] = o.answer.Nonce
	t.blobs = append(t.blobs, o.blobs...)
	result := &Result{Passphrases: map[string][]byte{}, Nonces: t.nonces}
	var incomplete error
	for _, v := range t.client.Volumes {
		if passphrase, err := combine(t.blobs, v); err == nil {
			result.Passphrases[v] = passphrase
		} else if incomplete == nil {
			incomplete = err
		}
	}
	if incomplete == nil || t.client.Any && len(result.Passphrases) > 0 {
		return result, nil
	}
	result.Wipe()
	return nil, t.verdict(incomplete)
}

// verdict ends a gathering that cannot succeed any more: never while a server
// is still asked again. incomplete is why good answers are not enough.
func (t *tally) verdict(incomplete error) error {
	all := len(t.client.Config.Servers)
	hopeless := all - t.client.Config.Threshold + 1
	e := &FetchError{Cause: ErrUnreachable, Servers: t.failures()}
	settled := len(t.nonces)
	if t.once {
		settled += len(t.failed)
	}
	switch {
	case t.once && t.count(ErrRefused) >= hopeless:
		e.Cause = ErrRefused
	case settled < all:
		return nil
	case t.count(ErrBlob) >= hopeless:
		e.Cause = ErrBlob
	case incomplete != nil:
		e.Cause = fmt.Errorf("%w: %w", ErrUnreachable, incomplete)
	}
	return e
}

// failures are in the order of the configuration.
func (t *tally) failures() []ServerError {
	var list []ServerError
	for _, s := range t.client.Config.Servers {
		if err := t.failed[s.KeyID]; err != nil {
			list = append(list, ServerError{s, err})
		}
	}
	return list
}

func (t *tally) count(kind error) int {
	n := 0
	for _, err := range t.failed {
		if errors.Is(err, kind) {
			n++
		}
	}
	return n
}
