// Package escrow is the escrow packet: a volume's secrets, sealed so that N of
// M trustees give them back, and nobody else. It makes, checks and opens
// packets, and knows the policy they are sealed to, the digits that people
// read to each other, and what becomes of a packet in its life. The bytes are
// specified in docs/packet-format.md.
//
// It is not a store, and not the asking and approving around a release
// (package recovery). It knows no database, HTTP, command line or other
// process, and imports only the leaves record, seal, secret and identity.
package escrow

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
)

// MaxPacketSize bounds a packet in bytes. The largest possible one, with both
// payloads, 32 trustees and the largest header backup, has about 450 KB.
const MaxPacketSize = 512 << 10

// Errors that callers decide on.
var (
	// ErrIntegrity: not the bytes that were sealed.
	ErrIntegrity = errors.New("damaged, or not what was sealed")
	// ErrNoPayload: the packet does not have that payload.
	ErrNoPayload = errors.New("packet has no such payload")
	// ErrNoTrustee: nothing was sealed to that key.
	ErrNoTrustee = errors.New("not a trustee of this packet")
	// ErrOtherPolicy: the packet is sealed to other trustees than it must be.
	ErrOtherPolicy = errors.New("packet is sealed to another policy")
)

const signContext = "packet"

// Packet is a packet that Parse found whole and signed by the running identity
// that its header names. Whose identity that is, the caller must know.
type Packet struct {
	Header
	HeaderBytes  []byte
	HeaderDigest [32]byte
	Digest       [32]byte // SHA-256 of all its bytes
	Size         int
	Payloads     []SealedPayload
	Signer       identity.Public
}

// SealedPayload is a payload with its shares.
type SealedPayload struct {
	Name    string
	Message []byte   // OpenPGP message under the content key
	MAC     []byte   // HMAC-SHA256 over header and Message, from the content key
	Set     []byte   // Part.SetDigest of its shares
	Shares  [][]byte // OpenPGP messages, one for each trustee
}

// Parse reads a packet and checks all that can be checked without a trustee:
// one canonical form, bounds, and the signature. Every error is ErrIntegrity.
func Parse(data []byte) (*Packet, error) {
	p, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("escrow: packet: %w: %w", ErrIntegrity, err)
	}
	return p, nil
}

func parse(data []byte) (*Packet, error) {
	r := record.Parse(data, packetKind, packetVersion, MaxPacketSize)
	p := &Packet{Header: readHeader(r), Digest: sha256.Sum256(data), Size: len(data)}
	p.HeaderBytes = headerOf(data, r)
	p.HeaderDigest = sha256.Sum256(p.HeaderBytes)
	for _, name := range payloadNames {
		if r.Next(name + "-payload") {
			p.Payloads = append(p.Payloads, readSealed(r, name, len(p.Trustees)))
		}
	}
	p.Signer = identity.Public(r.Base64("signer"))
	signed := data[:len(data)-len(r.Rest())]
	signature := r.Base64("signature")
	if err := r.End(); err != nil {
		return nil, err
	}
	if len(p.Payloads) == 0 {
		return nil, fmt.Errorf("%w: it has no payload", record.ErrFormat)
	}
	if err := p.checkSigner(signed, signature); err != nil {
		return nil, err
	}
	again, err := p.encode(signature)
	if err != nil || !bytes.Equal(again, data) {
		return nil, errors.Join(fmt.Errorf("%w: it is not in canonical form", record.ErrFormat), err)
	}
	return p, nil
}

func (p *Packet) checkSigner(signed, signature []byte) error {
	if _, err := identity.ParsePublic(p.Signer); err != nil {
		return fmt.Errorf("field signer: %w", err)
	}
	if id := p.Signer.KeyID(); id != p.RunningKeyID {
		return fmt.Errorf("%w: signed by %s, not by %s", identity.ErrSignature, id.Short(), p.RunningKeyID.Short())
	}
	return p.Signer.Verify(signContext, signed, signature)
}

func readSealed(r *record.Reader, name string, m int) SealedPayload {
	s := SealedPayload{
		Name: name, Message: r.Base64(name + "-payload"),
		MAC: r.Hex(name+"-mac", sha256.Size), Set: r.Hex(name+"-set", sha256.Size),
	}
	for i := range m {
		s.Shares = append(s.Shares, r.Base64(shareField(name, i+1)))
	}
	return s
}

func shareField(name string, index int) string { return fmt.Sprintf("%s-share-%d", name, index) }

// encode is the packet up to what is signed, and the signature if there is one.
func (p *Packet) encode(signature []byte) ([]byte, error) {
	header, err := p.Header.encode()
	if err != nil {
		return nil, err
	}
	var w record.Writer
	w.Raw(header)
	for _, s := range p.Payloads {
		w.Base64(s.Name+"-payload", s.Message).Hex(s.Name+"-mac", s.MAC).Hex(s.Name+"-set", s.Set)
		for i, share := range s.Shares {
			w.Base64(shareField(s.Name, i+1), share)
		}
	}
	w.Base64("signer", p.Signer)
	if signature != nil {
		w.Base64("signature", signature)
	}
	return w.Bytes()
}

// Payload returns a payload by name.
func (p *Packet) Payload(name string) (*SealedPayload, error) {
	i := slices.IndexFunc(p.Payloads, func(s SealedPayload) bool { return s.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("escrow: packet %s: %w: %s", p.ID, ErrNoPayload, name)
	}
	return &p.Payloads[i], nil
}

// Share returns the message to one trustee, and its index, from 1.
func (p *Packet) Share(payload, fingerprint string) (index int, message []byte, err error) {
	s, err := p.Payload(payload)
	if err != nil {
		return 0, nil, err
	}
	i := slices.Index(p.Trustees, fingerprint)
	if i < 0 {
		return 0, nil, fmt.Errorf("escrow: packet %s: %w: %s", p.ID, ErrNoTrustee, fingerprint)
	}
	return i + 1, s.Shares[i], nil
}

// CheckPolicy refuses a packet that is not sealed to exactly this policy.
func (p *Packet) CheckPolicy(policy Policy) error { return p.Header.checkPolicy(policy) }

func (h *Header) checkPolicy(policy Policy) error {
	want := Header{}
	want.setPolicy(policy)
	if h.PolicyEpoch != want.PolicyEpoch || h.PolicyDigest != want.PolicyDigest ||
		h.Threshold != want.Threshold || !slices.Equal(h.Trustees, want.Trustees) {
		return fmt.Errorf("escrow: packet %s: %w: epoch %d, %d of %d trustees; the policy has epoch %d, %d of %d",
			h.ID, ErrOtherPolicy, h.PolicyEpoch, h.Threshold, len(h.Trustees),
			want.PolicyEpoch, want.Threshold, len(want.Trustees))
	}
	return nil
}

func (h *Header) setPolicy(policy Policy) {
	h.PolicyEpoch, h.PolicyDigest, h.Threshold = policy.Epoch, policy.Digest(), policy.Threshold
	h.Trustees = nil
	for _, t := range policy.Trustees {
		h.Trustees = append(h.Trustees, t.Fingerprint)
	}
}
