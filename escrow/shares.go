package escrow

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/hashicorp/vault/shamir"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
)

// Errors of shares. All but ErrTooFew and ErrCommitment come in a ShareError,
// which names the share.
var (
	ErrForeignShare   = errors.New("share belongs to something else")
	ErrCorruptShare   = errors.New("share is damaged")
	ErrDuplicateShare = errors.New("share is there twice")
	ErrTooFew         = errors.New("too few shares")
	ErrCommitment     = errors.New("shares do not give the secret that was split")
)

// ShareError names the share that makes combining impossible.
type ShareError struct {
	Index   int    // 1 to M
	Trustee string // fingerprint of its holder, if known
	Err     error
}

func (e *ShareError) Error() string {
	if e.Trustee == "" {
		return fmt.Sprintf("share %d: %v", e.Index, e.Err)
	}
	return fmt.Sprintf("share %d of trustee %s: %v", e.Index, e.Trustee, e.Err)
}

// Unwrap returns the cause.
func (e *ShareError) Unwrap() error { return e.Err }

const (
	setIDSize    = 16
	maxShareData = 1024
)

// Part is one share of a secret, with what all shares of one set say alike:
// SetID, Threshold, Digests and Commitment. That makes vault/shamir safe, which
// itself takes too few, foreign and damaged shares and returns wrong bytes, and
// lets a share with x = 0 choose the result.
type Part struct {
	SetID      []byte   // 16 random bytes
	Index      int      // 1 to M
	Threshold  int      // N
	Digests    [][]byte // SHA-256 of the bytes of each of the M shares
	Commitment []byte   // HKDF-SHA256(secret, no salt, info), 32 bytes
	Data       []byte   // N = 1: the secret; otherwise y for each of its bytes, then x
}

// Split splits a secret into m parts of which any n give it back. Digests and
// commitment are public to each holder, so the secret must be random and of at
// least 128 bits. info is the commitment's, and names the use.
func Split(secretBytes []byte, n, m int, info string) ([]*Part, error) {
	if n < 1 || n > m || m > MaxTrustees {
		return nil, fmt.Errorf("escrow: split %d of %d: 1 to %d are possible", n, m, MaxTrustees)
	}
	if len(secretBytes) == 0 || len(secretBytes) >= maxShareData {
		return nil, fmt.Errorf("escrow: split a secret of %d bytes", len(secretBytes))
	}
	data, err := splitBytes(secretBytes, n, m)
	if err != nil {
		return nil, fmt.Errorf("escrow: split: %w", err)
	}
	promise, err := commitment(secretBytes, info)
	if err != nil {
		return nil, err
	}
	id, digests := secret.Random(setIDSize), make([][]byte, m)
	for i := range data {
		sum := sha256.Sum256(data[i])
		digests[i] = sum[:]
	}
	parts := make([]*Part, m)
	for i := range data {
		parts[i] = &Part{id, i + 1, n, digests, promise, data[i]}
	}
	return parts, nil
}

func splitBytes(secretBytes []byte, n, m int) ([][]byte, error) {
	if n > 1 {
		return shamir.Split(secretBytes, m, n)
	}
	data := make([][]byte, m)
	for i := range data {
		data[i] = bytes.Clone(secretBytes)
	}
	return data, nil
}

func commitment(secretBytes []byte, info string) ([]byte, error) {
	out, err := hkdf.Key(sha256.New, secretBytes, nil, info, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("escrow: commitment: %w", err)
	}
	return out, nil
}

// Combine gives back a secret from at least Threshold parts of one set. Every
// part is judged before any is combined, and the first bad one is named in a
// ShareError; the caller may leave it out and try again. What comes out is
// checked against the commitment.
func Combine(parts []*Part, info string) ([]byte, error) {
	if len(parts) == 0 {
		return nil, fmt.Errorf("%w: none is there", ErrTooFew)
	}
	set := commonSet(parts)
	for i, p := range parts {
		if err := p.check(set, parts[:i]); err != nil {
			return nil, &ShareError{Index: p.Index, Err: err}
		}
	}
	n := parts[0].Threshold
	if len(parts) < n {
		return nil, fmt.Errorf("%w: %d of the %d that are needed", ErrTooFew, len(parts), n)
	}
	combined, err := combineBytes(parts[:n])
	if err != nil {
		return nil, err
	}
	promise, err := commitment(combined, info)
	if err != nil || !hmac.Equal(promise, parts[0].Commitment) {
		clear(combined)
		return nil, errors.Join(ErrCommitment, err)
	}
	return combined, nil
}

// combineBytes is given exactly the threshold's number of parts.
func combineBytes(parts []*Part) ([]byte, error) {
	if len(parts) == 1 {
		return bytes.Clone(parts[0].Data), nil
	}
	data := make([][]byte, len(parts))
	for i, p := range parts {
		data[i] = p.Data
	}
	combined, err := shamir.Combine(data)
	if err != nil {
		return nil, fmt.Errorf("escrow: combine: %w", err)
	}
	return combined, nil
}

// commonSet is the set that most parts name, so that a single liar is the one
// who is blamed.
func commonSet(parts []*Part) [32]byte {
	votes := map[[32]byte]int{}
	best := parts[0].SetDigest()
	for _, p := range parts {
		votes[p.SetDigest()]++
	}
	for _, p := range parts {
		if d := p.SetDigest(); votes[d] > votes[best] {
			best = d
		}
	}
	return best
}

func (p *Part) check(set [32]byte, before []*Part) error {
	if p.SetDigest() != set {
		return fmt.Errorf("%w: not of the set that the others are of", ErrForeignShare)
	}
	if err := p.checkAlone(); err != nil {
		return err
	}
	for _, b := range before {
		if b.Index == p.Index || p.Threshold > 1 && b.x() == p.x() {
			return ErrDuplicateShare
		}
		if len(b.Data) != len(p.Data) {
			return fmt.Errorf("%w: %d bytes, another has %d", ErrCorruptShare, len(p.Data), len(b.Data))
		}
	}
	return nil
}

// checkAlone judges a part by what it says itself.
func (p *Part) checkAlone() error {
	m := len(p.Digests)
	switch {
	case m == 0 || m > MaxTrustees || p.Threshold < 1 || p.Threshold > m:
		return fmt.Errorf("%w: threshold %d of %d", ErrCorruptShare, p.Threshold, m)
	case p.Index < 1 || p.Index > m:
		return fmt.Errorf("%w: index %d of %d", ErrCorruptShare, p.Index, m)
	case len(p.Data) < min(p.Threshold, 2):
		return fmt.Errorf("%w: %d bytes", ErrCorruptShare, len(p.Data))
	}
	if sum := sha256.Sum256(p.Data); !bytes.Equal(sum[:], p.Digests[p.Index-1]) {
		return fmt.Errorf("%w: does not match its digest", ErrCorruptShare)
	}
	if p.Threshold > 1 && p.x() == 0 {
		return fmt.Errorf("%w: x = 0", ErrCorruptShare)
	}
	return nil
}

func (p *Part) x() byte { return p.Data[len(p.Data)-1] }

// SetDigest is the SHA-256 of what all shares of a set say alike: their lines
// set-id, threshold, digest and commitment, as Write writes them.
func (p *Part) SetDigest() [32]byte {
	var w record.Writer
	w.Hex("set-id", p.SetID)
	p.writeSet(&w)
	lines, err := w.Bytes()
	if err != nil { // an empty field, which no set of ours has
		return [32]byte{}
	}
	return sha256.Sum256(lines)
}

func (p *Part) writeSet(w *record.Writer) {
	w.Uint("threshold", uint64(p.Threshold))
	for _, d := range p.Digests {
		w.Hex("digest", d)
	}
	w.Hex("commitment", p.Commitment)
}

// Write adds a part's lines to a record: set-id, index, threshold, digest (M
// times), commitment, share.
func (p *Part) Write(w *record.Writer) {
	w.Hex("set-id", p.SetID).Uint("index", uint64(p.Index))
	p.writeSet(w)
	w.Hex("share", p.Data)
}

// ReadPart reads what Write wrote; a fault stays in r. Whether the share fits
// its digest, Combine judges.
func ReadPart(r *record.Reader) *Part {
	p := &Part{SetID: r.Hex("set-id", setIDSize)}
	p.Index = int(min(r.Uint("index"), MaxTrustees+1))
	p.Threshold = int(min(r.Uint("threshold"), MaxTrustees+1))
	for r.Next("digest") && len(p.Digests) <= MaxTrustees {
		p.Digests = append(p.Digests, r.Hex("digest", sha256.Size))
	}
	p.Commitment = r.Hex("commitment", sha256.Size)
	p.Data = r.Hex("share", -1)
	return p
}

// Wipe clears the share's bytes.
func (p *Part) Wipe() { secret.Wipe(p.Data) }
