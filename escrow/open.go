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

// Opened is what was opened: of a packet's payload, one of Passphrase and
// VolumeKey; of a stand-alone packet, one or both. Header.KeyID of a stand-alone
// packet and of a sheet is "", and then only ID, Supersedes, Created, Machine and
// Volume are set.
type Opened struct {
	Header     Header
	Plain      []byte // the readable lines
	Passphrase *PassphrasePayload
	VolumeKey  *VolumeKeyPayload
}

// Wipe clears all secrets in it.
func (o *Opened) Wipe() {
	secret.Wipe(o.Plain)
	o.wipePayloads()
}

func (o *Opened) wipePayloads() {
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
	if err == nil && (!bytes.HasPrefix(plain, p.HeaderBytes) || len(o.payloads()) != 1 || o.payloads()[0].Name() != payload) {
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

// payloads are those that are there, in the packet's order.
func (o *Opened) payloads() []Payload {
	var found []Payload
	if o.Passphrase != nil {
		found = append(found, o.Passphrase)
	}
	if o.VolumeKey != nil {
		found = append(found, o.VolumeKey)
	}
	return found
}

// add takes a payload that was read; one that is there twice is the reader's
// fault.
func (o *Opened) add(r *record.Reader, payload Payload) {
	switch p := payload.(type) {
	case *PassphrasePayload:
		if o.Passphrase == nil {
			o.Passphrase = p
			return
		}
	case *VolumeKeyPayload:
		if o.VolumeKey == nil {
			o.VolumeKey = p
			return
		}
	}
	payload.Wipe()
	r.Fail("payload", "is there twice")
}

// parsePlain reads the one canonical form of a plaintext: of a packet's
// payload, a stand-alone packet or a sheet. What it returns keeps plain.
func parsePlain(plain []byte) (*Opened, error) {
	o, kind := &Opened{Plain: plain}, record.Kind(plain)
	var r *record.Reader
	switch kind {
	case standAloneKind:
		r = record.Parse(plain, kind, standAloneVersion, maxPlain)
		o.Header = readAlone(r)
		for o.add(r, readPayload(r)); r.Next("payload"); {
			o.add(r, readPayload(r))
		}
	case sheetKind:
		r = record.Parse(plain, kind, sheetVersion, maxPlain)
		o.readSheet(r)
	default:
		r = record.Parse(plain, packetKind, packetVersion, maxPlain)
		o.Header = readHeader(r)
		o.add(r, readPayload(r))
		checkWhole(r, o)
	}
	err := r.End()
	if err == nil {
		err = o.sameAgain(kind)
	}
	if err != nil {
		o.wipePayloads()
		return nil, err
	}
	return o, nil
}

func checkWhole(r *record.Reader, o *Opened) {
	if r.Err() != nil || !o.Header.ofMachine() {
		return
	}
	for _, p := range o.payloads() {
		if err := p.whole(); err != nil {
			r.Fail("of the payload", err.Error())
		}
	}
}

func (o *Opened) sameAgain(kind string) error {
	again, err := o.encode(kind)
	if err != nil {
		return err
	}
	defer secret.Wipe(again)
	if !bytes.Equal(again, o.Plain) {
		return fmt.Errorf("%w: it is not in canonical form", record.ErrFormat)
	}
	return nil
}

// encode is the plaintext of this kind.
func (o *Opened) encode(kind string) ([]byte, error) {
	var header []byte
	var err error
	switch kind {
	case sheetKind:
		return o.encodeSheet()
	case standAloneKind:
		header, err = o.Header.encodeAlone()
	default:
		header, err = o.Header.encode()
	}
	if err != nil {
		return nil, err
	}
	return plaintext(header, o.payloads()...)
}
