// Package volumekey reads the escrow packets of the program volume_key, in all
// five formats that it ever wrote, and so those that Anaconda left with
// --escrowcert and --backuppassphrase. What it reads is specified in
// docs/packet-format.md, section "Packets of volume_key".
//
// It writes none: what is taken over is sealed anew in a format of ours. And it
// proves nothing: most of these formats authenticate nothing, so a key counts only
// after its digest was checked against the volume. It is a part of package escrow,
// and may import what that may.
package volumekey

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"mandos-escrow/escrow"
)

// MaxSize bounds a packet in bytes; volume_key's own have 371 to some 5,000.
const MaxSize = 64 << 10

const magic = "\x00volume_key"

// Format is how a packet is sealed: the byte after its magic.
type Format byte

// The formats. In the two that seal the secret only, all else stands in clear.
const (
	Clear           Format = iota // nothing is sealed
	Certificate                   // all of it, to a certificate, in CMS
	Passphrase                    // all of it, under a passphrase, in OpenPGP
	CertificateWrap               // the secret only, to a certificate
	SymmetricWrap                 // the secret only, under an AES key
)

var formatNames = []string{"cleartext", "certificate", "passphrase", "certificate, secret only", "symmetric key, secret only"}

func (f Format) String() string { return formatNames[f] }

// ErrKey: this is not what opens the packet.
var ErrKey = errors.New("not the key of this packet")

// Packet is a packet that Parse read. Of a Certificate and a Passphrase packet
// that is not more than to whom it is sealed.
type Packet struct {
	Format    Format
	Recipient *Recipient // of the two Certificate formats
	Facts     *Facts     // what stands in clear; nil where it is sealed
	body      []byte
}

// Recipient names the certificate that a packet is sealed to.
type Recipient struct {
	Issuer string `json:"issuer"` // as in RFC 2253
	Serial string `json:"serial"` // decimal
}

// Facts are what a packet says of its volume and of the secret.
type Facts struct {
	Payload string `json:"payload"` // escrow.ForVolumeKey or escrow.ForPassphrase
	Host    string `json:"host"`
	UUID    string `json:"uuid,omitempty"`
	Label   string `json:"label,omitempty"`
	Path    string `json:"path"` // as it was typed when the packet was made
	Cipher  string `json:"cipher,omitempty"`
	KeyBits int    `json:"key_bits,omitempty"`
	Slot    int    `json:"slot"` // escrow.NoSlot: not known
}

// Parse reads as much of a packet as nothing is needed for. Every error is
// escrow.ErrIntegrity. The packet keeps a part of data.
func Parse(data []byte) (*Packet, error) {
	p, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("volume_key packet: %w: %w", escrow.ErrIntegrity, err)
	}
	return p, nil
}

func parse(data []byte) (*Packet, error) {
	switch {
	case len(data) > MaxSize:
		return nil, fmt.Errorf("longer than %d bytes", MaxSize)
	case !bytes.HasPrefix(data, []byte(magic)):
		return nil, errors.New("it does not begin as one")
	case len(data) == len(magic):
		return nil, errors.New("too short")
	case int(data[len(magic)]) >= len(formatNames):
		return nil, fmt.Errorf("format %d is not known", data[len(magic)])
	}
	p := &Packet{Format: Format(data[len(magic)]), body: data[len(magic)+1:]}
	return p, p.readClear()
}

func (p *Packet) readClear() error {
	switch p.Format {
	case Passphrase:
		return nil
	case Certificate:
		sealed, err := parseCMS(p.body)
		if err != nil {
			return err
		}
		p.Recipient, err = newRecipient(sealed.issuer, sealed.serial)
		return err
	}
	c, err := p.content(p.body)
	if err != nil {
		return err
	}
	p.Facts = &c.facts
	if p.Format == CertificateWrap {
		p.Recipient, err = c.wrap.recipient()
	}
	return err
}

// content decodes what is not, or not any more, sealed as a whole.
func (p *Packet) content(plain []byte) (*content, error) {
	c, err := decode(plain)
	if err != nil {
		return nil, err
	}
	if wrapped := p.Format == CertificateWrap || p.Format == SymmetricWrap; wrapped != (c.wrap != nil) {
		return nil, fmt.Errorf("the secret in a packet of format %q is wrapped: %t", p.Format, c.wrap != nil)
	}
	return c, nil
}

// Unauthenticated names the fields that whoever had the packet in hand could have
// changed, or all of it made, without its key: in all formats but Passphrase these
// are all of them.
func (p *Packet) Unauthenticated() []string {
	if p.Format == Passphrase {
		return []string{}
	}
	return []string{
		"machine-name", "volume-uuid", "volume-label", "volume-by-id", "payload", "cipher", "key-bits", "slot", "volume-key", "passphrase",
	}
}

// issuerPrefix begins the identifier of a certificate: issuer and serial number
// follow, each in base64 of its DER.
const issuerPrefix = "x-redhat.com:volume_key issuer/SN:"

func (w *wrapping) recipient() (*Recipient, error) {
	text, found := strings.CutPrefix(w.identifier, issuerPrefix)
	issuer, serial, two := strings.Cut(text, " ")
	if !found || !two {
		return nil, errors.New("it does not name the certificate that its secret is sealed to")
	}
	rawIssuer, err1 := base64.StdEncoding.DecodeString(issuer)
	rawSerial, err2 := base64.StdEncoding.DecodeString(serial)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("name of the certificate: %w", err)
	}
	return newRecipient(rawIssuer, rawSerial)
}

func newRecipient(issuer, serial []byte) (*Recipient, error) {
	var name pkix.RDNSequence
	if rest, err := asn1.Unmarshal(issuer, &name); err != nil || len(rest) > 0 {
		return nil, errors.New("the issuer of its certificate is not a name")
	}
	if len(serial) == 0 || len(serial) > 64 {
		return nil, fmt.Errorf("the serial number of its certificate has %d bytes", len(serial))
	}
	return &Recipient{Issuer: name.String(), Serial: new(big.Int).SetBytes(serial).String()}, nil
}
