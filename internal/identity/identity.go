// Package identity is who somebody is on the wire: an Ed25519 key, its key ID,
// the signatures it makes, and TLS 1.3 in which both ends are pinned by key ID.
//
// It is not a store of identities and decides nothing about what they may do.
// It imports no other package of this program.
package identity

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
)

// Errors of parsing and checking.
var (
	ErrKey       = errors.New("not a usable key")
	ErrSignature = errors.New("signature is not by this key")
)

// KeyID is the SHA-256 of a key's DER SubjectPublicKeyInfo in 64 lower-case
// hex digits: what mandos-clients.conf(5) calls key_id.
type KeyID string

// ParseKeyID checks the form of a key ID.
func ParseKeyID(text string) (KeyID, error) {
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != sha256.Size || hex.EncodeToString(raw) != text {
		return "", fmt.Errorf("%w: a key ID is 64 lower-case hex digits", ErrKey)
	}
	return KeyID(text), nil
}

// Short is the form for people: the first 16 digits.
func (id KeyID) Short() string {
	if len(id) < 16 {
		return string(id)
	}
	return string(id[:16])
}

// Public is a public key: the DER of its SubjectPublicKeyInfo (44 bytes).
type Public []byte

// KeyID returns the key's ID.
func (p Public) KeyID() KeyID {
	sum := sha256.Sum256(p)
	return KeyID(hex.EncodeToString(sum[:]))
}

// ParsePublic checks that der is the one SubjectPublicKeyInfo of an Ed25519 key.
func ParsePublic(der []byte) (Public, error) {
	parsed, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	if _, ok := parsed.(ed25519.PublicKey); !ok {
		return nil, fmt.Errorf("%w: %T is not Ed25519", ErrKey, parsed)
	}
	// package x509 takes a bit string that is padded, which would give one key two key IDs
	if again, err := x509.MarshalPKIXPublicKey(parsed); err != nil || !bytes.Equal(again, der) {
		return nil, fmt.Errorf("%w: its encoding is not canonical", ErrKey)
	}
	return Public(der), nil
}

// Verify checks a signature that Key.Sign made in the same context.
func (p Public) Verify(context string, message, signature []byte) error {
	parsed, err := x509.ParsePKIXPublicKey(p)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrKey, err)
	}
	key, ok := parsed.(ed25519.PublicKey)
	if !ok || !ed25519.Verify(key, signed(context, message), signature) {
		return fmt.Errorf("%w %s (%s)", ErrSignature, p.KeyID().Short(), context)
	}
	return nil
}

// Key is a private key.
type Key struct {
	private ed25519.PrivateKey
	public  Public
}

// Generate makes a key.
func Generate() (*Key, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("identity: generate: %w", err)
	}
	return newKey(private)
}

func newKey(private ed25519.PrivateKey) (*Key, error) {
	spki, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		return nil, fmt.Errorf("identity: encode public key: %w", err)
	}
	return &Key{private: private, public: spki}, nil
}

// Public returns the public half.
func (k *Key) Public() Public { return k.public }

// KeyID returns the key's ID.
func (k *Key) KeyID() KeyID { return k.public.KeyID() }

// Sign signs message for one use, which context names; a signature made for
// one context is none in another. What is signed with Ed25519 (RFC 8032) is
// "mandos-escrow/1/" context NUL message.
func (k *Key) Sign(context string, message []byte) []byte {
	signature, err := k.private.Sign(nil, signed(context, message), crypto.Hash(0))
	if err != nil {
		panic("identity: Ed25519 refused to sign: " + err.Error()) // it fails only for wrong options
	}
	return signature
}

func signed(context string, message []byte) []byte {
	return append([]byte("mandos-escrow/1/"+context+"\x00"), message...)
}

// PrivatePEM returns the private key as mandos-keygen(8) writes
// tls-privkey.pem: PKCS #8 in PEM.
func (k *Key) PrivatePEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.private)
	if err != nil {
		return nil, fmt.Errorf("identity: encode private key: %w", err)
	}
	defer clear(der)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// PublicPEM returns the public key as mandos-keygen(8) writes tls-pubkey.pem.
func (k *Key) PublicPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.public})
}

// ParsePrivatePEM reads what PrivatePEM wrote.
func ParsePrivatePEM(text []byte) (*Key, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
		return nil, fmt.Errorf("%w: not one PEM block PRIVATE KEY", ErrKey)
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%w: %T is not Ed25519", ErrKey, parsed)
	}
	return newKey(private)
}
