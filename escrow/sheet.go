package escrow

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

const (
	sheetKind    = "mandos-escrow-sheet"
	sheetVersion = 1
	// MaxSheet bounds Sheet.Message, in bytes, so that a code of level Q fits on
	// the page in modules of 0.6 mm.
	MaxSheet = 400
)

// Sheet is one payload that fits on paper. All but Message is for people:
// nothing proves it.
type Sheet struct {
	ID, Supersedes string
	Created        time.Time
	Machine        string
	Volume         Volume
	Payload        string
	Message        []byte // binary OpenPGP message, at most MaxSheet bytes
}

// SealSheet seals one payload of what was opened or newly made. The same content
// and passphrase give the same bytes. Only secrets that were made at random are
// possible: see docs/packet-format.md. Errors: ErrLimit when it does not fit,
// ErrNoPayload, secret.ErrWeak for an empty passphrase.
func SealSheet(o *Opened, payload string, passphrase []byte) (*Sheet, error) {
	s, err := sealSheet(o, payload, passphrase)
	if err != nil {
		return nil, fmt.Errorf("escrow: sheet of packet %s: %w", o.Header.ID, err)
	}
	return s, nil
}

func sealSheet(o *Opened, payload string, passphrase []byte) (*Sheet, error) {
	if len(passphrase) == 0 {
		return nil, fmt.Errorf("%w: it is empty", secret.ErrWeak)
	}
	one := &Opened{Header: o.Header}
	switch {
	case payload == ForPassphrase && o.Passphrase != nil:
		one.Passphrase = o.Passphrase
	case payload == ForVolumeKey && o.VolumeKey != nil:
		one.VolumeKey = o.VolumeKey
	default:
		return nil, fmt.Errorf("%w: %s", ErrNoPayload, payload)
	}
	plain, err := one.encodeSheet()
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(plain)
	random, err := hkdf.Key(sha256.New, plain, nil, "mandos-escrow sheet 1 random", seal.CompactRandom)
	if err != nil {
		return nil, fmt.Errorf("derive the salt: %w", err)
	}
	message, err := seal.EncryptCompact(plain, passphrase, random, o.Header.Created)
	if err != nil {
		return nil, err
	}
	if len(message) > MaxSheet {
		return nil, fmt.Errorf("%w: %d bytes, and %d fit on a sheet", ErrLimit, len(message), MaxSheet)
	}
	h := o.Header
	return &Sheet{h.ID, h.Supersedes, h.Created, h.Machine, h.Volume, payload, message}, nil
}

// OpenSheet opens the message of a sheet. A wrong passphrase cannot be told from
// a changed message: both are ErrIntegrity.
func OpenSheet(message, passphrase []byte) (*Opened, error) {
	if len(message) > MaxSheet {
		return nil, fmt.Errorf("escrow: open sheet: %w: %d bytes, and %d fit on a sheet", ErrIntegrity, len(message), MaxSheet)
	}
	plain, err := seal.DecryptCompact(message, passphrase)
	if err == nil && record.Kind(plain) != sheetKind {
		err = fmt.Errorf("%w: it is no sheet", record.ErrFormat)
	}
	return openPlain("sheet", plain, err)
}

// encodeSheet is the plaintext of a sheet with the one payload that is there.
func (o *Opened) encodeSheet() ([]byte, error) {
	if err := errors.Join(o.Header.checkAlone(), o.checkSheet()); err != nil {
		return nil, err
	}
	w := record.New(sheetKind, sheetVersion)
	w.Text("id", o.Header.ID).Time("created", o.Header.Created).Text("volume-uuid", o.Header.Volume.UUID)
	if p := o.VolumeKey; p != nil {
		w.Base64("volume-key", p.Key).OptionalText("luks-type", p.LUKSType).Text("cipher", p.Cipher)
		p.writeGeometry(w)
	} else {
		o.Passphrase.writeRecovery(w)
	}
	plain, err := w.Bytes()
	if err != nil {
		w.Wipe()
	}
	return plain, err
}

// checkSheet holds that the payload cannot be guessed, because the salt of the
// message is made of it.
func (o *Opened) checkSheet() error {
	for _, p := range o.payloads() {
		if err := p.check(); err != nil {
			return err
		}
	}
	switch {
	case len(o.payloads()) != 1:
		return errors.New("a sheet has one payload")
	case o.VolumeKey != nil && len(o.VolumeKey.Key) < minVolumeKey:
		return fmt.Errorf("volume-key has %d bytes; a sheet has one of %d or more", len(o.VolumeKey.Key), minVolumeKey)
	case o.Passphrase != nil && (o.Passphrase.Foreign || CheckRecoveryPassphrase(o.Passphrase.Passphrase) != nil):
		return errors.New("a sheet has a recovery passphrase that was made at random, and no other passphrase")
	}
	return nil
}

// readSheet reads what encodeSheet wrote; a fault stays in r.
func (o *Opened) readSheet(r *record.Reader) {
	o.Header = Header{ID: r.Text("id"), Created: r.Time("created"), Volume: Volume{UUID: r.Text("volume-uuid")}}
	if r.Next("volume-key") {
		p := &VolumeKeyPayload{Key: r.Base64("volume-key"), LUKSType: r.OptionalText("luks-type"), Cipher: r.Text("cipher")}
		p.KeyBits = 8 * len(p.Key)
		p.readGeometry(r)
		o.VolumeKey = p
	} else {
		o.Passphrase = readRecovery(r)
	}
	if r.Err() != nil {
		return
	}
	if err := errors.Join(o.Header.checkAlone(), o.checkSheet()); err != nil {
		r.Fail("of the sheet", string(bytes.ReplaceAll([]byte(err.Error()), []byte("\n"), []byte("; "))))
	}
}
