package escrow

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

// subsets calls try with every set of indexes from 1 to m.
func subsets(m int, try func(indexes []int)) {
	for bits := range 1 << m {
		var indexes []int
		for i := range m {
			if bits>>i&1 == 1 {
				indexes = append(indexes, i+1)
			}
		}
		try(indexes)
	}
}

func TestEverySubset(t *testing.T) {
	for _, size := range [][2]int{{1, 3}, {2, 3}, {3, 5}} {
		n, m := size[0], size[1]
		f := newFixture(n, m)
		p := f.packet(passphrasePayload())
		subsets(m, func(indexes []int) {
			o, err := p.Open(ForPassphrase, f.shares(t, p, ForPassphrase, indexes...))
			if len(indexes) < n {
				if o != nil || !errors.Is(err, ErrTooFew) {
					t.Errorf("%d of %d with %v: %v", n, m, indexes, err)
				}
				return
			}
			if err != nil || string(o.Passphrase.Passphrase) != testPassphrase {
				t.Errorf("%d of %d with %v: %v", n, m, indexes, err)
			}
		})
	}
}

func TestEveryCorruptByteIsNamed(t *testing.T) {
	for _, n := range []int{1, 2} {
		f := newFixture(n, 3)
		p := f.packet(passphrasePayload())
		for bad := range n {
			for at := range len(f.shares(t, p, ForPassphrase, 1)[0].Data) {
				shares := f.shares(t, p, ForPassphrase, 3, 1)[:n]
				shares[bad].Data[at] ^= 1 << (at % 8)
				wantNamed(t, p, shares, shares[bad].Index, ErrCorruptShare)
			}
		}
	}
}

func wantNamed(t *testing.T, p *Packet, shares []*Share, index int, want error) {
	t.Helper()
	o, err := p.Open(ForPassphrase, shares)
	var bad *ShareError
	if o != nil || !errors.Is(err, want) || !errors.As(err, &bad) || bad.Index != index {
		t.Errorf("%v, want share %d: %v", err, index, want)
		return
	}
	if index >= 1 && index <= len(p.Trustees) && bad.Trustee != p.Trustees[index-1] {
		t.Errorf("%v names %s", err, bad.Trustee)
	}
}

// rewrite makes the share's digest list fit what it holds, as a corrupt trustee
// would, and as shares of a forged set have it.
func rewrite(s *Share) {
	sum := sha256.Sum256(s.Data)
	s.Digests = append([][]byte{}, s.Digests...)
	s.Digests[s.Index-1] = sum[:]
}

func TestBadShareIsNamed(t *testing.T) {
	f := newFixture(2, 3)
	p, other := f.packet(passphrasePayload(), volumeKeyPayload()), f.packet(passphrasePayload())
	for name, c := range map[string]struct {
		spoil func(shares []*Share)
		index int
		want  error
	}{
		"other packet":    {func(s []*Share) { s[1] = f.shares(t, other, ForPassphrase, 2)[0] }, 2, ErrForeignShare},
		"other payload":   {func(s []*Share) { s[0] = f.shares(t, p, ForVolumeKey, 1)[0] }, 1, ErrForeignShare},
		"payload renamed": {func(s []*Share) { s[0] = f.shares(t, p, ForVolumeKey, 1)[0]; s[0].Payload = ForPassphrase }, 1, ErrForeignShare},
		"header":          {func(s []*Share) { s[1].HeaderDigest[7] ^= 1 }, 2, ErrForeignShare},
		"payload digest":  {func(s []*Share) { s[1].PayloadDigest[7] ^= 1 }, 2, ErrForeignShare},
		"set id":          {func(s []*Share) { s[1].SetID = secret.Random(16) }, 2, ErrForeignShare},
		"commitment":      {func(s []*Share) { s[0].Commitment = secret.Random(32) }, 1, ErrForeignShare},
		"threshold":       {func(s []*Share) { s[0].Threshold = 1 }, 1, ErrForeignShare},
		"digest list":     {func(s []*Share) { s[0].Data[3] ^= 1; rewrite(s[0]) }, 1, ErrForeignShare},
		"fewer digests":   {func(s []*Share) { s[0].Digests = s[0].Digests[:2] }, 1, ErrForeignShare},
		"x = 0":           {func(s []*Share) { s[1].Data[32] = 0; rewrite(s[1]) }, 2, ErrForeignShare},
		"index 0":         {func(s []*Share) { s[0].Index = 0 }, 0, ErrCorruptShare},
		"index 4":         {func(s []*Share) { s[0].Index = 4 }, 4, ErrCorruptShare},
		"other index":     {func(s []*Share) { s[0].Index = 3 }, 3, ErrCorruptShare},
		"twice":           {func(s []*Share) { s[1] = s[0] }, 1, ErrDuplicateShare},
		"empty":           {func(s []*Share) { s[1].Data = nil }, 2, ErrCorruptShare},
		"shorter":         {func(s []*Share) { s[1].Data = s[1].Data[1:] }, 2, ErrCorruptShare},
	} {
		shares := f.shares(t, p, ForPassphrase, 1, 2)
		c.spoil(shares)
		t.Run(name, func(t *testing.T) { wantNamed(t, p, shares, c.index, c.want) })
	}
}

// Without a packet the parts are all there is: what the others say names the
// liar, and x = 0, which makes vault/shamir return that part as the secret.
func TestCombineAlone(t *testing.T) {
	const info = "test"
	secretBytes := secret.Random(43)
	for name, c := range map[string]struct {
		spoil func(parts []*Part) []*Part
		index int
		want  error
	}{
		"good":           {func(p []*Part) []*Part { return p }, 0, nil},
		"exactly enough": {func(p []*Part) []*Part { return p[1:] }, 0, nil},
		"too few":        {func(p []*Part) []*Part { return p[:1] }, 0, ErrTooFew},
		"none":           {func([]*Part) []*Part { return nil }, 0, ErrTooFew},
		"foreign, first": {func(p []*Part) []*Part { p[0] = must(Split(secretBytes, 2, 3, info))[0]; return p }, 1, ErrForeignShare},
		"foreign, last":  {func(p []*Part) []*Part { p[2] = must(Split(secretBytes, 2, 3, info))[2]; return p }, 3, ErrForeignShare},
		"damaged":        {func(p []*Part) []*Part { p[1].Data[0] ^= 1; return p }, 2, ErrCorruptShare},
		"x = 0":          {func(p []*Part) []*Part { setX(p, 1, 0); return p }, 2, ErrCorruptShare},
		"x twice":        {func(p []*Part) []*Part { setX(p, 2, p[0].x()); return p }, 3, ErrDuplicateShare},
		"length":         {func(p []*Part) []*Part { p[1].Data = append([]byte{0}, p[1].Data...); redigest(p); return p }, 2, ErrCorruptShare},
		"twice":          {func(p []*Part) []*Part { return []*Part{p[0], p[0]} }, 1, ErrDuplicateShare},
		"dishonest dealer": {func(p []*Part) []*Part {
			p[0].Data[0] ^= 1
			redigest(p)
			return p[:2]
		}, 0, ErrCommitment},
		"threshold too low": {func(p []*Part) []*Part {
			for _, part := range p {
				part.Threshold = 1
			}
			return p
		}, 0, ErrCommitment},
	} {
		parts := c.spoil(must(Split(secretBytes, 2, 3, info)))
		got, err := Combine(parts, info)
		var bad *ShareError
		switch {
		case c.want == nil && (err != nil || !bytes.Equal(got, secretBytes)):
			t.Errorf("%s: %v", name, err)
		case c.want != nil && (got != nil || !errors.Is(err, c.want)):
			t.Errorf("%s: %v, want %v", name, err, c.want)
		case c.index != 0 && (!errors.As(err, &bad) || bad.Index != c.index):
			t.Errorf("%s: %v, want share %d", name, err, c.index)
		}
	}
	if _, err := Combine(must(Split(secretBytes, 2, 3, info)), "other use"); !errors.Is(err, ErrCommitment) {
		t.Errorf("another use: %v", err)
	}
}

func setX(parts []*Part, i int, x byte) {
	parts[i].Data[len(parts[i].Data)-1] = x
	redigest(parts)
}

func redigest(parts []*Part) {
	for i, p := range parts {
		sum := sha256.Sum256(p.Data)
		parts[0].Digests[i] = sum[:] // the list is one for all
	}
}

func TestSplitRefuses(t *testing.T) {
	for _, c := range []struct{ size, n, m int }{
		{32, 0, 1}, {32, 2, 1}, {32, 1, 33}, {0, 1, 1}, {1024, 1, 1}, {32, -1, 3},
	} {
		if _, err := Split(make([]byte, c.size), c.n, c.m, "test"); err == nil {
			t.Errorf("%d bytes, %d of %d", c.size, c.n, c.m)
		}
	}
}

func TestOpenShareRefuses(t *testing.T) {
	f := newFixture(2, 3)
	p := f.packet(passphrasePayload())
	first, second := p.Trustees[0], p.Trustees[1]
	_, message, err := p.Share(ForPassphrase, first)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenShare(message, f.keys[second], p, ForPassphrase); !errors.Is(err, seal.ErrRecipient) {
		t.Errorf("another trustee: %v", err)
	}
	if _, err := OpenShare(message, testKeys().trustees[4], p, ForPassphrase); !errors.Is(err, ErrNoTrustee) {
		t.Errorf("no trustee: %v", err)
	}
	if _, err := OpenShare(message, f.keys[first], p, ForVolumeKey); !errors.Is(err, ErrNoPayload) {
		t.Errorf("no such payload: %v", err)
	}
	text := must(f.shares(t, p, ForPassphrase, 1)[0].Bytes())
	moved := must(seal.Encrypt(text, f.keys[second].Public(), nil, now))
	if _, err := OpenShare(moved, f.keys[second], p, ForPassphrase); !errors.Is(err, ErrForeignShare) {
		t.Errorf("another trustee's share: %v", err)
	}
	for at := 0; at < len(message); at += 3 {
		wrong := bytes.Clone(message)
		wrong[at] ^= 1 << (at % 8)
		if s, err := OpenShare(wrong, f.keys[first], p, ForPassphrase); err == nil && s.Index != 1 {
			t.Errorf("byte %d: another share came out", at)
		}
	}
}

func TestShareFlips(t *testing.T) {
	f := newFixture(2, 3)
	p := f.packet(passphrasePayload())
	data := must(f.shares(t, p, ForPassphrase, 2)[0].Bytes())
	if s, err := ParseShare(data); err != nil || !bytes.Equal(must(s.Bytes()), data) {
		t.Fatal(err)
	}
	for at := range data {
		for bit := range 8 {
			wrong := bytes.Clone(data)
			wrong[at] ^= 1 << bit
			s, err := ParseShare(wrong)
			if err == nil {
				err = p.CheckShare(ForPassphrase, s)
			}
			if !errors.Is(err, record.ErrFormat) && !errors.Is(err, ErrForeignShare) && !errors.Is(err, ErrCorruptShare) {
				t.Fatalf("byte %d bit %d: %v", at, bit, err)
			}
		}
		if _, err := ParseShare(data[:at]); !errors.Is(err, ErrIntegrity) {
			t.Fatalf("first %d bytes: %v", at, err)
		}
	}
}

// A share never stands in an error text.
func TestErrorsKeepSecrets(t *testing.T) {
	f := newFixture(2, 3)
	p := f.packet(passphrasePayload())
	shares := f.shares(t, p, ForPassphrase, 1, 2)
	hexShare := fmt.Sprintf("%x", shares[0].Data)
	shares[0].SetID = secret.Random(16)
	_, err := p.Open(ForPassphrase, shares)
	if err == nil || bytes.Contains([]byte(err.Error()), []byte(hexShare[:16])) {
		t.Errorf("%v", err)
	}
}
