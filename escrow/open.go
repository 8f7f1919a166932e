package escrow

import (
	"bytes"
	"crypto/hmac"
	"errors"
	"fmt"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// maxPlain bounds a payload's plaintext: header and header backup in base64.
const maxPlain = 192 << 10

// Opened is an opened payload: one of Passphrase and VolumeKey is there.
type Opened struct {
	Header     Header
	Plain      []byte // the readable lines
	Passphrase *PassphrasePayload
	VolumeKey  *VolumeKeyPayload
}

// Wipe clears all secrets in it.
func (o *Opened) Wipe() {
	secret.Wipe(o.Plain)
	if o.Passphrase != nil {
		o.Passphrase.Wipe()
	}
	if o.VolumeKey != nil {
		o.VolumeKey.Wipe()
	}
}

// Open opens a payload with the shares of at least Threshold trustees. Nothing
// is decrypted before the shares, the commitment and the MAC are found right. A
// bad share is named in a ShareError; the caller wipes the shares and what is
// returned.
func (p *Packet) Open(payload string, shares []*Share) (*Opened, error) {
	o, err := p.open(payload, shares)
	if err != nil {
		return nil, fmt.Errorf("escrow: open packet %s: %w", p.ID, err)
	}
	return o, nil
}

func (p *Packet) open(payload string, shares []*Share) (*Opened, error) {
	sealed, err := p.Payload(payload)
	if err != nil {
		return nil, err
	}
	contentKey, err := p.combine(payload, shares)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(contentKey)
	mac, err := p.mac(sealed, contentKey)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(mac, sealed.MAC) {
		return nil, fmt.Errorf("%w: payload %s does not fit its MAC", ErrIntegrity, payload)
	}
	plain, err := seal.DecryptKey(sealed.Message, contentKey)
	if err != nil {
		return nil, fmt.Errorf("%w: payload %s: %w", ErrIntegrity, payload, err)
	}
	o, err := parsePlain(plain)
	if err == nil && (!bytes.HasPrefix(plain, p.HeaderBytes) || o.name() != payload) {
		err = errors.New("it repeats another header, or is another payload")
	}
	if err != nil {
		secret.Wipe(plain)
		return nil, fmt.Errorf("%w: payload %s: %w", ErrIntegrity, payload, err)
	}
	return o, nil
}

func (p *Packet) combine(payload string, shares []*Share) ([]byte, error) {
	parts := make([]*Part, len(shares))
	for i, s := range shares {
		if err := p.CheckShare(payload, s); err != nil {
			return nil, err
		}
		parts[i] = &s.Part
	}
	contentKey, err := Combine(parts, commitmentInfo(payload))
	var bad *ShareError
	if errors.As(err, &bad) {
		return nil, p.nameShare(bad.Index, bad.Err)
	}
	return contentKey, err
}

func (o *Opened) name() string {
	if o.Passphrase != nil {
		return ForPassphrase
	}
	return ForVolumeKey
}

// parsePlain reads the one canonical form of a payload's plaintext. What it
// returns keeps plain.
func parsePlain(plain []byte) (*Opened, error) {
	r := record.Parse(plain, packetKind, packetVersion, maxPlain)
	o := &Opened{Header: readHeader(r), Plain: plain}
	payload := readPayload(r)
	err := r.End()
	if err == nil {
		err = sameAgain(o.Header, payload, plain)
	}
	if err != nil {
		payload.Wipe()
		return nil, err
	}
	switch p := payload.(type) {
	case *PassphrasePayload:
		o.Passphrase = p
	case *VolumeKeyPayload:
		o.VolumeKey = p
	}
	return o, nil
}

func sameAgain(h Header, payload Payload, plain []byte) error {
	header, err := h.encode()
	if err != nil {
		return err
	}
	again, err := plaintext(header, payload)
	if err != nil {
		return err
	}
	defer secret.Wipe(again)
	if !bytes.Equal(again, plain) {
		return fmt.Errorf("%w: it is not in canonical form", record.ErrFormat)
	}
	return nil
}
