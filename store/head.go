package store

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

// Hash is a SHA-256; its text is 64 lower-case hex digits.
type Hash [sha256.Size]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText is String.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads what String gives, and no other spelling.
func (h *Hash) UnmarshalText(text []byte) error {
	raw, err := hex.DecodeString(string(text))
	if err != nil || len(raw) != len(h) || hex.EncodeToString(raw) != string(text) {
		return errors.New("a hash is 64 lower-case hex digits")
	}
	copy(h[:], raw)
	return nil
}

// Head names a state of a server's audit log, and so everything that the
// server had done by then. Every reply to an agent or an administrator carries
// one, signed; they keep the newest and show it with every call.
type Head struct {
	Epoch uint64 `json:"epoch"`
	Seq   uint64 `json:"seq"`
	Hash  Hash   `json:"hash"`
}

const (
	headKind = "mandos-escrow-head"
	headSize = 1024 // more than any head has, in bytes
)

// Newer reports whether h is of a later state than other, going by epoch and
// number alone.
func (h Head) Newer(other Head) bool {
	return h.Epoch > other.Epoch || h.Epoch == other.Epoch && h.Seq > other.Seq
}

// Sign returns the head as the server's signed record: version, server, epoch,
// seq, hash; then the line signature, made in context "head" over the lines
// before it.
func (h Head) Sign(server *identity.Key) ([]byte, error) {
	w := record.New(headKind, 1).
		Text("server", string(server.KeyID())).
		Uint("epoch", h.Epoch).
		Uint("seq", h.Seq).
		Hex("hash", h.Hash[:])
	body, err := w.Bytes()
	if err != nil {
		return nil, fmt.Errorf("store: sign head: %w", err)
	}
	signed, err := w.Base64("signature", server.Sign("head", body)).Bytes()
	if err != nil {
		return nil, fmt.Errorf("store: sign head: %w", err)
	}
	return signed, nil
}

// ParseHead reads what Sign wrote without checking who signed it.
func ParseHead(signed []byte) (Head, error) {
	head, _, _, _, err := parseHead(signed)
	return head, err
}

func parseHead(signed []byte) (head Head, signer string, body, signature []byte, err error) {
	r := record.Parse(signed, headKind, 1, headSize)
	signer = r.Text("server")
	head = Head{Epoch: r.Uint("epoch"), Seq: r.Uint("seq")}
	copy(head.Hash[:], r.Hex("hash", sha256.Size))
	body = signed[:len(signed)-len(r.Rest())]
	signature = r.Base64("signature")
	if err := r.End(); err != nil {
		return Head{}, "", nil, nil, fmt.Errorf("store: head: %w", err)
	}
	return head, signer, body, signature, nil
}

// VerifyHead reads what Sign wrote and checks that this server signed it.
// Errors: record.ErrFormat, identity.ErrSignature.
func VerifyHead(signed []byte, server identity.Public) (Head, error) {
	head, signer, body, signature, err := parseHead(signed)
	if err != nil {
		return Head{}, err
	}
	if signer != string(server.KeyID()) {
		return Head{}, fmt.Errorf("store: head: %w: it names another server", identity.ErrSignature)
	}
	if err := server.Verify("head", body, signature); err != nil {
		return Head{}, fmt.Errorf("store: head: %w", err)
	}
	return head, nil
}
