// Package recovery is the life of a request for an escrowed secret: asked
// with a reason, known by six words, approved or denied by other people,
// released to the one who asked.
//
// It is not the opening of a packet's format (package escrow) and not a
// mailbox (the server). It knows no database, HTTP, command line or other
// process, and imports only escrow and the leaves record, seal, secret and
// identity.
package recovery

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
)

// Errors of a request, an approval or a re-sealed share that is not what it
// must be. Each is an integrity failure: the bytes were changed, or they
// belong to something else.
var (
	ErrRequest  = errors.New("not a valid recovery request")
	ErrApproval = errors.New("not a valid approval of this request")
	ErrShare    = errors.New("not a share that was re-sealed for this request")
)

const (
	requestKind = "mandos-escrow-request"
	maxRequest  = 16 << 10

	// MaxReason is the longest reason of a request or a denial, in bytes.
	MaxReason = 500
	// Lifetime is how long a request lives when nothing else is said.
	Lifetime = 24 * time.Hour
	// MaxLifetime is the longest that a request may live.
	MaxLifetime = 7 * 24 * time.Hour
)

// Request is what a requester asks for. Its signed bytes bind all of it, and
// the six words are taken from their digest.
type Request struct {
	ID            string // 32 hex digits
	PacketID      string
	PacketDigest  [32]byte // of the packet's bytes
	HeaderDigest  [32]byte // of the packet's clear header
	Payload       string   // escrow's name of the payload
	PayloadDigest [32]byte // of the payload's message
	VolumeUUID    string
	Machine       string
	Requester     string
	RequesterID   identity.KeyID
	Reason        string
	Created       time.Time
	Expires       time.Time
	Recipient     *seal.PublicKey // the one-off key that shares are re-sealed to
}

// Sign returns the request's bytes, signed by the requester.
func (r Request) Sign(by *identity.Key) ([]byte, error) {
	key, err := r.Recipient.Armor()
	if err != nil {
		return nil, err
	}
	w := record.New(requestKind, 1).
		Text("id", r.ID).
		Text("packet", r.PacketID).
		Hex("packet-sha256", r.PacketDigest[:]).
		Hex("header-sha256", r.HeaderDigest[:]).
		Text("payload", r.Payload).
		Hex("payload-sha256", r.PayloadDigest[:]).
		Text("volume-uuid", r.VolumeUUID).
		Text("machine-name", r.Machine).
		Text("requester", r.Requester).
		Text("requester-key-id", string(r.RequesterID)).
		Text("reason", r.Reason).
		Time("created", r.Created).
		Time("expires", r.Expires).
		Text("recipient", r.Recipient.Fingerprint()).
		Base64("recipient-key", key)
	data, err := signRecord(w, "request", by)
	if err != nil {
		return nil, fmt.Errorf("recovery: sign request: %w", err)
	}
	if _, err := ParseRequest(data); err != nil {
		return nil, err
	}
	return data, nil
}

// ParseRequest reads a signed request and checks its signature and all that
// can be checked without asking anybody.
func ParseRequest(data []byte) (*Request, error) {
	in := record.Parse(data, requestKind, 1, maxRequest)
	r := &Request{
		ID:            idField(in, "id"),
		PacketID:      idField(in, "packet"),
		PacketDigest:  digestField(in, "packet-sha256"),
		HeaderDigest:  digestField(in, "header-sha256"),
		Payload:       in.Text("payload"),
		PayloadDigest: digestField(in, "payload-sha256"),
		VolumeUUID:    in.Text("volume-uuid"),
		Machine:       in.Text("machine-name"),
		Requester:     in.Text("requester"),
		RequesterID:   identity.KeyID(in.Text("requester-key-id")),
		Reason:        in.Text("reason"),
		Created:       in.Time("created"),
		Expires:       in.Time("expires"),
	}
	fingerprint, armored := in.Text("recipient"), in.Base64("recipient-key")
	signer, err := verifyRecord(in, data, "request")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if r.Recipient, err = seal.ParsePublic(armored); err != nil {
		return nil, fmt.Errorf("%w: recipient: %w", ErrRequest, err)
	}
	switch {
	case r.Recipient.Fingerprint() != fingerprint:
		return nil, fmt.Errorf("%w: recipient-key is not the key that recipient names", ErrRequest)
	case signer.KeyID() != r.RequesterID:
		return nil, fmt.Errorf("%w: signed by %s, requester is %s", ErrRequest, signer.KeyID().Short(), r.RequesterID.Short())
	case len(r.Reason) > MaxReason:
		return nil, fmt.Errorf("%w: reason is longer than %d bytes", ErrRequest, MaxReason)
	case !r.Expires.After(r.Created) || r.Expires.Sub(r.Created) > MaxLifetime:
		return nil, fmt.Errorf("%w: lives from %s to %s; at most %s is allowed", ErrRequest,
			r.Created.Format(record.TimeFormat), r.Expires.Format(record.TimeFormat), MaxLifetime)
	}
	return r, nil
}

// Digest names a signed request.
func Digest(signed []byte) [32]byte { return sha256.Sum256(signed) }

// signRecord closes a record with the signer's key and signature.
func signRecord(w *record.Writer, context string, by *identity.Key) ([]byte, error) {
	w.Base64("signer", by.Public())
	data, err := w.Bytes()
	if err != nil {
		return nil, err
	}
	w.Base64("signature", by.Sign(context, data))
	return w.Bytes()
}

// verifyRecord reads what signRecord wrote, to the end of the record, and
// returns the signer.
func verifyRecord(in *record.Reader, data []byte, context string) (identity.Public, error) {
	der := in.Base64("signer")
	body := data[:len(data)-len(in.Rest())]
	signature := in.Base64("signature")
	if err := in.End(); err != nil {
		return nil, err
	}
	signer, err := identity.ParsePublic(der)
	if err != nil {
		return nil, err
	}
	return signer, signer.Verify(context, body, signature)
}

func digestField(in *record.Reader, name string) (digest [32]byte) {
	copy(digest[:], in.Hex(name, len(digest)))
	return digest
}

func idField(in *record.Reader, name string) string {
	return hex.EncodeToString(in.Hex(name, 16))
}
