package escrow

import (
	"crypto/sha256"
	"fmt"

	"mandos-escrow/internal/record"
)

const (
	shareKind    = "mandos-escrow-share"
	shareVersion = 1
	maxShareSize = 16 << 10
)

// Share is what a trustee finds in the message to them: a part of the content
// key of one payload of one packet.
type Share struct {
	HeaderDigest  [32]byte
	Payload       string
	PayloadDigest [32]byte // SHA-256 of the payload's message
	Part
}

// Bytes encodes a share; the caller wipes it.
func (s *Share) Bytes() ([]byte, error) {
	w := record.New(shareKind, shareVersion)
	w.Hex("header-sha256", s.HeaderDigest[:]).Text("payload", s.Payload).Hex("payload-sha256", s.PayloadDigest[:])
	s.Write(w)
	data, err := w.Bytes()
	if err != nil {
		w.Wipe()
		return nil, fmt.Errorf("escrow: encode share: %w", err)
	}
	return data, nil
}

// ParseShare reads the one canonical form of a share, and checks the share
// against its own digest. Every error is ErrIntegrity.
func ParseShare(data []byte) (*Share, error) {
	s, err := parseShare(data)
	if err != nil {
		s.Wipe()
		return nil, fmt.Errorf("escrow: share: %w: %w", ErrIntegrity, err)
	}
	return s, nil
}

func parseShare(data []byte) (*Share, error) {
	r := record.Parse(data, shareKind, shareVersion, maxShareSize)
	s := &Share{}
	copy(s.HeaderDigest[:], r.Hex("header-sha256", sha256.Size))
	s.Payload = r.Text("payload")
	copy(s.PayloadDigest[:], r.Hex("payload-sha256", sha256.Size))
	s.Part = *ReadPart(r)
	if err := r.End(); err != nil {
		return s, err
	}
	if err := s.checkAlone(); err != nil {
		return s, &ShareError{Index: s.Index, Err: err}
	}
	return s, nil
}
