package volumekey

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"errors"
	"fmt"
	"strings"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// Keys are what may open a packet; its format says which of them it needs.
type Keys struct {
	Passphrase []byte            // of a Passphrase packet
	Private    crypto.PrivateKey // *rsa.PrivateKey: of a Certificate or CertificateWrap packet
	Symmetric  []byte            // 16, 24 or 32 bytes: of a SymmetricWrap packet
}

// Open opens a packet. What it returns has a new id, now as its date, and the
// volume key without geometry and digest, or a Foreign passphrase. It is as
// trustworthy as Unauthenticated says: nothing that was opened is proved. Errors:
// ErrKey, escrow.ErrIntegrity. The caller wipes what is returned, and the keys.
func (p *Packet) Open(k Keys, now time.Time) (*escrow.Opened, error) {
	o, err := p.open(k, now)
	if err != nil {
		return nil, fmt.Errorf("open volume_key packet (%s): %w", p.Format, err)
	}
	return o, nil
}

func (p *Packet) open(k Keys, now time.Time) (*escrow.Opened, error) {
	plain, err := p.unseal(k)
	if err != nil {
		return nil, err
	}
	if p.Format == Certificate || p.Format == Passphrase {
		defer secret.Wipe(plain)
	}
	c, err := p.content(plain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", escrow.ErrIntegrity, err)
	}
	value := bytes.Clone(c.secret)
	if c.wrap != nil {
		if value, err = c.unwrap(p.Format, k); err != nil {
			return nil, err
		}
	}
	o, err := c.opened(value, now)
	if err != nil {
		secret.Wipe(value)
		return nil, fmt.Errorf("%w: %w", escrow.ErrIntegrity, err)
	}
	return o, nil
}

// unseal returns the items of a packet; those of a format that seals the secret
// only are its own bytes.
func (p *Packet) unseal(k Keys) ([]byte, error) {
	switch p.Format {
	case Certificate:
		sealed, err := parseCMS(p.body)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", escrow.ErrIntegrity, err)
		}
		return sealed.open(k.Private)
	case Passphrase:
		if len(k.Passphrase) == 0 {
			return nil, fmt.Errorf("%w: it is sealed under a passphrase", ErrKey)
		}
		plain, err := seal.DecryptForeign(p.body, k.Passphrase)
		if err != nil {
			return nil, fmt.Errorf("%w: wrong passphrase, or a damaged packet (they cannot be told apart): %w", escrow.ErrIntegrity, err)
		}
		return plain, nil
	}
	return p.body, nil
}

func (c *content) unwrap(f Format, k Keys) ([]byte, error) {
	var value []byte
	var err error
	if f == CertificateWrap {
		value, err = c.unwrapRSA(k.Private)
	} else {
		value, err = c.unwrapAES(k.Symmetric)
	}
	if err != nil {
		return nil, err
	}
	if err := c.judgeSecret(value, false); err != nil {
		secret.Wipe(value)
		return nil, fmt.Errorf("%w: %w", escrow.ErrIntegrity, err)
	}
	return value, nil
}

func (c *content) unwrapRSA(key crypto.PrivateKey) ([]byte, error) {
	if w := c.wrap; w.algorithm != algorithmRSA || w.mode != 0 || w.padding != paddingPKCS1 {
		return nil, fmt.Errorf("%w: its secret is sealed by other means than RSA with PKCS#1 v1.5", escrow.ErrIntegrity)
	}
	return decryptRSA(key, c.secret)
}

func (c *content) unwrapAES(key []byte) ([]byte, error) {
	w := c.wrap
	switch {
	case len(key) == 0:
		return nil, fmt.Errorf("%w: it is sealed under an AES key", ErrKey)
	case w.algorithm != algorithmAES || w.mode != modeCBC || w.padding != paddingPKCS5 && w.padding != paddingNone:
		return nil, fmt.Errorf("%w: its secret is sealed by other means than AES-CBC", escrow.ErrIntegrity)
	case w.padding == paddingPKCS5:
		return decryptCBC(key, w.iv, c.secret)
	}
	plain, err := decryptBlocks(key, w.iv, c.secret)
	if err != nil {
		return nil, err
	}
	return c.withoutZeros(plain), nil
}

// withoutZeros takes off what NSS fills the last block with, where no padding is
// said: a key has the length that the packet says, a passphrase has no NUL.
func (c *content) withoutZeros(plain []byte) []byte {
	size := len(bytes.TrimRight(plain, "\x00"))
	if c.facts.Payload == escrow.ForVolumeKey {
		size = max(size, min(c.facts.KeyBits/8, len(plain)))
	}
	if len(plain)-size >= aes.BlockSize {
		return plain // that is no filling, and will be refused
	}
	return plain[:size]
}

// opened keeps value.
func (c *content) opened(value []byte, now time.Time) (*escrow.Opened, error) {
	if c.facts.UUID == "" {
		return nil, errors.New("it does not name the volume's UUID")
	}
	h := escrow.Header{
		Created: now, Machine: c.facts.Host,
		Volume: escrow.Volume{UUID: c.facts.UUID, Label: c.facts.Label},
	}
	if strings.HasPrefix(c.facts.Path, "/dev/disk/by-id/") {
		h.Volume.ByID = c.facts.Path
	}
	if c.facts.Payload == escrow.ForPassphrase {
		return escrow.NewStandAlone(h, &escrow.PassphrasePayload{Passphrase: value, Slot: c.facts.Slot, Foreign: true})
	}
	return escrow.NewStandAlone(h, &escrow.VolumeKeyPayload{
		Key: value, Cipher: c.facts.Cipher, KeyBits: c.facts.KeyBits, DataOffset: escrow.NoOffset,
	})
}
