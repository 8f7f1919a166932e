package escrow

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// Brief is as much of a packet as a trustee needs to judge a share of one
// payload: the payload itself, which the trustee could open alone when N is 1,
// is not in it.
type Brief struct {
	Header
	HeaderDigest  [32]byte
	Payload       string
	PayloadDigest [32]byte // SHA-256 of the payload's message
	Set           []byte   // Part.SetDigest of its shares
}

// Brief returns the brief of one payload.
func (p *Packet) Brief(payload string) (*Brief, error) {
	sealed, err := p.Payload(payload)
	if err != nil {
		return nil, err
	}
	return &Brief{p.Header, p.HeaderDigest, payload, sha256.Sum256(sealed.Message), sealed.Set}, nil
}

// ParseBrief makes a brief of a clear header's bytes and of what stands in the
// packet about one payload. Nothing vouches for it but the digests that its
// caller knows from elsewhere.
func ParseBrief(header []byte, payload string, payloadDigest [32]byte, set []byte) (*Brief, error) {
	in := record.Parse(header, packetKind, packetVersion, MaxPacketSize)
	b := &Brief{Header: readHeader(in), HeaderDigest: sha256.Sum256(header), Payload: payload, PayloadDigest: payloadDigest, Set: set}
	if err := in.End(); err != nil {
		return nil, fmt.Errorf("escrow: clear header: %w: %w", ErrIntegrity, err)
	}
	return b, nil
}

// CheckShare judges a share against the packet: it must be of this packet, this
// payload, and the set that was split when the packet was made. Every fault is
// a ShareError that names the trustee.
func (b *Brief) CheckShare(s *Share) (err error) {
	set := s.SetDigest()
	switch {
	case s.HeaderDigest != b.HeaderDigest:
		err = fmt.Errorf("%w: another packet", ErrForeignShare)
	case s.Payload != b.Payload:
		err = fmt.Errorf("%w: payload %q", ErrForeignShare, s.Payload)
	case s.PayloadDigest != b.PayloadDigest:
		err = fmt.Errorf("%w: another payload message", ErrForeignShare)
	case s.Threshold != b.Threshold || len(s.Digests) != len(b.Trustees):
		err = fmt.Errorf("%w: %d of %d instead of %d of %d", ErrForeignShare,
			s.Threshold, len(s.Digests), b.Threshold, len(b.Trustees))
	case !bytes.Equal(set[:], b.Set):
		err = fmt.Errorf("%w: not of the set that the packet names", ErrForeignShare)
	default:
		err = s.checkAlone()
	}
	return b.nameShare(s.Index, err)
}

func (h *Header) nameShare(index int, err error) error {
	if err == nil {
		return nil
	}
	e := &ShareError{Index: index, Err: err}
	if index >= 1 && index <= len(h.Trustees) {
		e.Trustee = h.Trustees[index-1]
	}
	return e
}

// OpenShare opens the message to a trustee and checks what is in it. The caller
// wipes the share.
func (b *Brief) OpenShare(message []byte, trustee *seal.PrivateKey) (*Share, error) {
	fingerprint := trustee.Public().Fingerprint()
	index := slices.Index(b.Trustees, fingerprint) + 1
	if index == 0 {
		return nil, fmt.Errorf("escrow: packet %s: %w: %s", b.ID, ErrNoTrustee, fingerprint)
	}
	plain, err := seal.Decrypt(message, trustee, nil)
	if err != nil {
		return nil, fmt.Errorf("escrow: open the share of trustee %s: %w", fingerprint, err)
	}
	defer secret.Wipe(plain)
	s, err := ParseShare(plain)
	if err != nil {
		return nil, fmt.Errorf("escrow: open the share of trustee %s: %w", fingerprint, err)
	}
	if err := b.CheckShare(s); err != nil {
		s.Wipe()
		return nil, err
	}
	if s.Index != index {
		s.Wipe()
		return nil, b.nameShare(index, fmt.Errorf("%w: it is share %d", ErrForeignShare, s.Index))
	}
	return s, nil
}

// OpenShare opens the message to a trustee of a whole packet.
func OpenShare(message []byte, trustee *seal.PrivateKey, p *Packet, payload string) (*Share, error) {
	b, err := p.Brief(payload)
	if err != nil {
		return nil, err
	}
	return b.OpenShare(message, trustee)
}

// CheckShare is Brief.CheckShare for a whole packet.
func (p *Packet) CheckShare(payload string, s *Share) error {
	b, err := p.Brief(payload)
	if err != nil {
		return err
	}
	return b.CheckShare(s)
}
