package escrow

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"mandos-escrow/internal/record"
)

// Limits of a policy.
const (
	MaxTrustees   = 32
	MaxPolicySize = 16 << 10

	policyKind    = "mandos-escrow-policy"
	policyVersion = 1
	maxName       = 255 // bytes of a name, a label or a path
)

// ErrPolicy: not a policy that anything may be sealed to.
var ErrPolicy = errors.New("not a valid policy")

// Trustee is the holder of a key that shares are sealed to.
type Trustee struct {
	Fingerprint string // 40 upper-case hex digits, as gpg prints them
	Name        string
}

// Policy says to whom secrets are sealed, and how many of them give one back.
// NewPolicy and ParsePolicy make it; it is only read after that.
type Policy struct {
	Epoch     uint64
	Threshold int
	Previous  []byte    // SHA-256 of the policy that this one succeeds; nil for epoch 1
	Trustees  []Trustee // by fingerprint

	raw []byte
}

// NewPolicy makes a policy; it sorts the trustees.
func NewPolicy(epoch uint64, threshold int, previous []byte, trustees []Trustee) (Policy, error) {
	p := Policy{Epoch: epoch, Threshold: threshold, Previous: bytes.Clone(previous), Trustees: slices.Clone(trustees)}
	slices.SortFunc(p.Trustees, func(a, b Trustee) int { return strings.Compare(a.Fingerprint, b.Fingerprint) })
	if err := p.check(); err != nil {
		return Policy{}, err
	}
	w := record.New(policyKind, policyVersion).Uint("epoch", epoch).Uint("threshold", uint64(threshold))
	if previous != nil {
		w.Hex("previous", previous)
	}
	for _, t := range p.Trustees {
		w.Text("trustee", t.Fingerprint+" "+t.Name)
	}
	raw, err := w.Bytes()
	if err != nil {
		return Policy{}, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	p.raw = raw
	return p, nil
}

// ParsePolicy reads the one canonical form of a policy.
func ParsePolicy(data []byte) (Policy, error) {
	r := record.Parse(data, policyKind, policyVersion, MaxPolicySize)
	epoch, threshold := r.Uint("epoch"), r.Uint("threshold")
	var previous []byte
	if r.Next("previous") {
		previous = r.Hex("previous", sha256.Size)
	}
	var trustees []Trustee
	for _, text := range r.Repeated("trustee", MaxTrustees) {
		fingerprint, name, _ := strings.Cut(text, " ")
		trustees = append(trustees, Trustee{fingerprint, name})
	}
	if err := r.End(); err != nil {
		return Policy{}, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	if threshold > MaxTrustees {
		return Policy{}, fmt.Errorf("%w: threshold %d of %d trustees", ErrPolicy, threshold, len(trustees))
	}
	p, err := NewPolicy(epoch, int(threshold), previous, trustees)
	if err != nil {
		return Policy{}, err
	}
	if !bytes.Equal(p.raw, data) {
		return Policy{}, fmt.Errorf("%w: trustees are not in the order of their fingerprints", ErrPolicy)
	}
	return p, nil
}

func (p Policy) check() error {
	switch {
	case p.Epoch == 0:
		return fmt.Errorf("%w: epoch 0", ErrPolicy)
	case (p.Epoch == 1) != (p.Previous == nil):
		return fmt.Errorf("%w: epoch 1, and no other, has no previous policy", ErrPolicy)
	case p.Previous != nil && len(p.Previous) != sha256.Size:
		return fmt.Errorf("%w: the previous policy's digest has %d bytes", ErrPolicy, len(p.Previous))
	}
	fingerprints := make([]string, len(p.Trustees))
	for i, t := range p.Trustees {
		fingerprints[i] = t.Fingerprint
		if t.Name != strings.TrimSpace(t.Name) || len(t.Name) > maxName || record.Printable(t.Name) != nil {
			return fmt.Errorf("%w: name %q of trustee %s", ErrPolicy, t.Name, t.Fingerprint)
		}
	}
	if err := checkTrustees(fingerprints, p.Threshold); err != nil {
		return fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	return nil
}

// checkTrustees is what a policy and a packet's header both demand.
func checkTrustees(fingerprints []string, threshold int) error {
	if len(fingerprints) == 0 || len(fingerprints) > MaxTrustees {
		return fmt.Errorf("%d trustees; 1 to %d are possible", len(fingerprints), MaxTrustees)
	}
	if threshold < 1 || threshold > len(fingerprints) {
		return fmt.Errorf("threshold %d of %d trustees", threshold, len(fingerprints))
	}
	for i, f := range fingerprints {
		if len(f) != 40 || strings.Trim(f, "0123456789ABCDEF") != "" {
			return fmt.Errorf("%q is not the fingerprint of a version 4 key (40 upper-case hex digits)", f)
		}
		if i > 0 && f == fingerprints[i-1] {
			return fmt.Errorf("trustee %s stands twice", f)
		}
		if i > 0 && f < fingerprints[i-1] {
			return errors.New("trustees are not in the order of their fingerprints")
		}
	}
	return nil
}

// Bytes returns the policy as it is pinned, carried and digested.
func (p Policy) Bytes() []byte { return bytes.Clone(p.raw) }

// Digest is the SHA-256 of Bytes: what tokens, invites and packets name.
func (p Policy) Digest() [32]byte { return sha256.Sum256(p.raw) }

// Accept refuses a clear header that is sealed neither to this policy nor to one
// that holds all its trustees and whose threshold is not lower: a first policy
// into which this one was merged. Whoever pinned this one then has a say in the
// other that nobody took away. Nothing is pinned anew by it.
func (p Policy) Accept(h *Header) error {
	if h.PolicyDigest == p.Digest() {
		return h.checkPolicy(p)
	}
	merged := p.Epoch == 1 && h.PolicyEpoch == 1 && h.Threshold >= p.Threshold && !slices.ContainsFunc(p.Trustees, func(t Trustee) bool {
		return !slices.Contains(h.Trustees, t.Fingerprint)
	})
	if !merged {
		return fmt.Errorf("escrow: packet %s: %w: epoch %d, %d of %d trustees, and not all of the %d of %d that are pinned", h.ID,
			ErrOtherPolicy, h.PolicyEpoch, h.Threshold, len(h.Trustees), p.Threshold, len(p.Trustees))
	}
	return nil
}

// Trustee finds the trustee with this fingerprint.
func (p Policy) Trustee(fingerprint string) (Trustee, bool) {
	i := slices.IndexFunc(p.Trustees, func(t Trustee) bool { return t.Fingerprint == fingerprint })
	if i < 0 {
		return Trustee{}, false
	}
	return p.Trustees[i], true
}
