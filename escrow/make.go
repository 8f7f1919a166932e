package escrow

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

const (
	contentKeySize = 32
	hkdfLabel      = "mandos-escrow packet 1 "
)

// Make makes a packet. The caller fills the header's machine, volume and
// supersedes; Make sets Created, RunningKeyID and what the policy says, and ID
// if it is empty. keys are the policy's trustees' keys, in any order, no more
// and no fewer. The payloads stay the caller's to wipe.
func Make(h Header, policy Policy, keys []*seal.PublicKey, payloads []Payload, signer *identity.Key, now time.Time) ([]byte, error) {
	if policy.raw == nil {
		return nil, fmt.Errorf("escrow: make packet: %w: it is empty", ErrPolicy)
	}
	h.setPolicy(policy)
	h.Created, h.RunningKeyID = now.UTC().Truncate(time.Second), signer.KeyID()
	if h.ID == "" {
		h.ID = secret.ID()
	}
	p, err := sealAll(h, keys, payloads, now)
	if err != nil {
		return nil, fmt.Errorf("escrow: make packet: %w", err)
	}
	p.Signer = signer.Public()
	signed, err := p.encode(nil)
	if err != nil {
		return nil, fmt.Errorf("escrow: make packet: %w", err)
	}
	data, err := p.encode(signer.Sign(signContext, signed))
	if err != nil {
		return nil, fmt.Errorf("escrow: make packet: %w", err)
	}
	if _, err := Parse(data); err != nil { // what cannot be read back is worth nothing
		return nil, fmt.Errorf("escrow: make packet: %w", err)
	}
	return data, nil
}

func sealAll(h Header, keys []*seal.PublicKey, payloads []Payload, now time.Time) (*Packet, error) {
	header, err := h.encode()
	if err != nil {
		return nil, err
	}
	ordered, err := orderKeys(h.Trustees, keys)
	if err != nil {
		return nil, err
	}
	p := &Packet{Header: h, HeaderBytes: header, HeaderDigest: sha256.Sum256(header)}
	for _, name := range payloadNames {
		for _, payload := range payloads {
			if payload.Name() != name {
				continue
			}
			sealed, err := p.seal(payload, ordered, now)
			if err != nil {
				return nil, fmt.Errorf("payload %s: %w", name, err)
			}
			p.Payloads = append(p.Payloads, sealed)
		}
	}
	if len(p.Payloads) == 0 {
		return nil, errors.New("it would have no payload")
	}
	return p, nil
}

// orderKeys puts the keys in the order of the policy, which names each of them.
func orderKeys(trustees []string, keys []*seal.PublicKey) ([]*seal.PublicKey, error) {
	ordered := make([]*seal.PublicKey, len(trustees))
	for _, k := range keys {
		i := slices.Index(trustees, k.Fingerprint())
		if i < 0 || ordered[i] != nil {
			return nil, fmt.Errorf("%w: key %s is not in it, or was given twice", ErrOtherPolicy, k.Fingerprint())
		}
		ordered[i] = k
	}
	if i := slices.Index(ordered, nil); i >= 0 {
		return nil, fmt.Errorf("%w: the key of trustee %s is missing", ErrOtherPolicy, trustees[i])
	}
	return ordered, nil
}

func (p *Packet) seal(payload Payload, keys []*seal.PublicKey, now time.Time) (SealedPayload, error) {
	if p.ofMachine() {
		if err := payload.whole(); err != nil {
			return SealedPayload{}, err
		}
	}
	plain, err := plaintext(p.HeaderBytes, payload)
	if err != nil {
		return SealedPayload{}, err
	}
	defer secret.Wipe(plain)
	contentKey := secret.Random(contentKeySize)
	defer secret.Wipe(contentKey)
	s := SealedPayload{Name: payload.Name()}
	if s.Message, err = seal.EncryptKey(plain, contentKey, now); err != nil {
		return SealedPayload{}, err
	}
	if s.MAC, err = p.mac(&s, contentKey); err != nil {
		return SealedPayload{}, err
	}
	return s, p.sealShares(&s, contentKey, keys, now)
}

func (p *Packet) sealShares(s *SealedPayload, contentKey []byte, keys []*seal.PublicKey, now time.Time) error {
	parts, err := Split(contentKey, p.Threshold, len(keys), commitmentInfo(s.Name))
	if err != nil {
		return err
	}
	set := parts[0].SetDigest()
	s.Set = set[:]
	for i, part := range parts {
		message, err := p.sealShare(s, part, keys[i], now)
		part.Wipe()
		if err != nil {
			return err
		}
		s.Shares = append(s.Shares, message)
	}
	return nil
}

func (p *Packet) sealShare(s *SealedPayload, part *Part, key *seal.PublicKey, now time.Time) ([]byte, error) {
	share := Share{HeaderDigest: p.HeaderDigest, Payload: s.Name, PayloadDigest: sha256.Sum256(s.Message), Part: *part}
	plain, err := share.Bytes()
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(plain)
	return seal.Encrypt(plain, key, nil, now)
}

func commitmentInfo(name string) string { return hkdfLabel + "commitment " + name }

// mac binds payload and header to the content key: a holder of all else cannot
// put another payload under the same shares.
func (p *Packet) mac(s *SealedPayload, contentKey []byte) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, contentKey, nil, hkdfLabel+"mac "+s.Name, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("derive the MAC's key: %w", err)
	}
	defer secret.Wipe(key)
	message := sha256.Sum256(s.Message)
	h := hmac.New(sha256.New, key)
	h.Write(p.HeaderDigest[:])
	h.Write(message[:])
	h.Write([]byte(s.Name))
	return h.Sum(nil), nil
}

// plaintext is what a payload's message holds, or a stand-alone packet's.
func plaintext(header []byte, payloads ...Payload) ([]byte, error) {
	var w record.Writer
	w.Raw(header)
	for _, payload := range payloads {
		if err := payload.check(); err != nil {
			w.Wipe()
			return nil, err
		}
		payload.write(&w)
	}
	plain, err := w.Bytes()
	if err != nil {
		w.Wipe()
	}
	return plain, err
}
