package escrow

import (
	"bytes"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

const (
	standAloneKind    = "mandos-escrow-stand-alone"
	standAloneVersion = 1
)

// NewStandAlone is the content of a stand-alone packet: of h it takes
// Supersedes, Created, Machine and Volume, and ID, which it makes if it is empty.
// What it returns has the payloads, not copies of them: Wipe clears them.
func NewStandAlone(h Header, payloads ...Payload) (*Opened, error) {
	o := &Opened{Header: Header{
		ID: h.ID, Supersedes: h.Supersedes, Created: h.Created.UTC().Truncate(time.Second),
		Machine: h.Machine, Volume: h.Volume,
	}}
	if o.Header.ID == "" {
		o.Header.ID = secret.ID()
	}
	if err := o.set(payloads); err != nil {
		return nil, fmt.Errorf("escrow: stand-alone packet: %w", err)
	}
	plain, err := o.encode(standAloneKind)
	if err != nil {
		return nil, fmt.Errorf("escrow: stand-alone packet: %w", err)
	}
	if _, err := parsePlain(plain); err != nil { // what cannot be read back is worth nothing
		secret.Wipe(plain)
		return nil, fmt.Errorf("escrow: stand-alone packet: %w", err)
	}
	o.Plain = plain
	return o, nil
}

func (o *Opened) set(payloads []Payload) error {
	for _, payload := range payloads {
		switch p := payload.(type) {
		case *PassphrasePayload:
			o.Passphrase = p
		case *VolumeKeyPayload:
			o.VolumeKey = p
		}
	}
	if n := len(o.payloads()); n == 0 || n != len(payloads) {
		return errors.New("it has one payload or two different ones")
	}
	return nil
}

// encodeAlone refuses a header that readAlone would refuse.
func (h *Header) encodeAlone() ([]byte, error) {
	w := record.New(standAloneKind, standAloneVersion)
	if err := h.writeAlone(w); err != nil {
		return nil, err
	}
	return w.Bytes()
}

func (h *Header) writeAlone(w *record.Writer) error {
	if err := h.checkAlone(); err != nil {
		return err
	}
	w.Text("id", h.ID).OptionalText("supersedes", h.Supersedes).Time("created", h.Created)
	w.OptionalText("machine-name", h.Machine).Text("volume-uuid", h.Volume.UUID)
	w.OptionalText("volume-label", h.Volume.Label).OptionalText("volume-by-id", h.Volume.ByID)
	return nil
}

// readAlone reads what writeAlone wrote; a fault stays in r.
func readAlone(r *record.Reader) Header {
	h := Header{
		ID: r.Text("id"), Supersedes: r.OptionalText("supersedes"), Created: r.Time("created"),
		Machine: r.OptionalText("machine-name"),
		Volume: Volume{
			UUID: r.Text("volume-uuid"), Label: r.OptionalText("volume-label"), ByID: r.OptionalText("volume-by-id"),
		},
	}
	if r.Err() == nil {
		if err := h.checkAlone(); err != nil {
			r.Fail("of the header", err.Error())
		}
	}
	return h
}

// SealRecipient seals what was opened or newly made to an OpenPGP key: one
// armored message, not signed, that `gpg -d` reads.
func SealRecipient(o *Opened, to *seal.PublicKey, now time.Time) ([]byte, error) {
	text, err := seal.EncryptText(o.Plain, to, now)
	if err != nil {
		return nil, fmt.Errorf("escrow: seal packet to a recipient: %w", err)
	}
	return text, nil
}

// OpenRecipient opens what SealRecipient made. Errors: ErrIntegrity,
// seal.ErrRecipient for another key.
func OpenRecipient(text []byte, key *seal.PrivateKey) (*Opened, error) {
	plain, err := seal.DecryptText(text, key)
	if errors.Is(err, seal.ErrRecipient) {
		return nil, fmt.Errorf("escrow: open packet to a recipient: %w than %s", err, key.Public().Fingerprint())
	}
	return openPlain("packet to a recipient", plain, err)
}

// openPlain reads what was decrypted; all that is wrong with it is ErrIntegrity.
func openPlain(what string, plain []byte, err error) (*Opened, error) {
	var o *Opened
	if err == nil {
		o, err = parsePlain(plain)
	}
	if err != nil {
		secret.Wipe(plain)
		return nil, fmt.Errorf("escrow: open %s: %w: %w", what, ErrIntegrity, err)
	}
	return o, nil
}

// Sealing is how a file is sealed, as far as its beginning tells.
type Sealing string

// What a file can be; "" is not known. A sheet is its typed lines or scanned
// text, or the message itself.
const (
	ByPassphrase  Sealing = "passphrase"
	ByRecipient   Sealing = "recipient"
	ByCertificate Sealing = "certificate"
	ByTrustees    Sealing = "trustees"
	ByVolumeKey   Sealing = "volume_key" // the format of the program volume_key
	BySheet       Sealing = "sheet"
)

// volumeKeyMagic begins all of volume_key's packets.
const volumeKeyMagic = "\x00volume_key"

// SealingOf says what a file seems to be, and so what opens it. It reads
// nothing secret and promises nothing: opening it finds out.
func SealingOf(text []byte) Sealing {
	switch record.Kind(text) {
	case packetKind:
		return ByTrustees
	case certificateKind:
		return ByCertificate
	}
	switch kind := seal.MessageKind(text); {
	case bytes.HasPrefix(text, []byte(volumeKeyMagic)):
		return ByVolumeKey
	case kind == seal.ToKey:
		return ByRecipient
	case kind == seal.UnderPassphrase:
		return ByPassphrase
	case kind == seal.UnderPassphraseBinary, utf8.Valid(text) && hasLines(text):
		return BySheet
	}
	return ""
}
