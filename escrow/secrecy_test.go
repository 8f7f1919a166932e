package escrow

import (
	"bytes"
	"testing"
)

// TestEveryFlippedBitOfEveryShare: whichever bit of whichever share of 3 of 5 is
// another, that share is named, and nothing is combined.
func TestEveryFlippedBitOfEveryShare(t *testing.T) {
	f := newFixture(3, 5)
	p := f.packet(passphrasePayload())
	for index := 1; index <= 5; index++ {
		others := []int{index%5 + 1, (index+1)%5 + 1}
		shares := f.shares(t, p, ForPassphrase, index, others[0], others[1])
		bad := shares[0]
		for bit := range 8 * len(bad.Data) {
			bad.Data[bit/8] ^= 1 << (bit % 8)
			wantNamed(t, p, shares, index, ErrCorruptShare)
			bad.Data[bit/8] ^= 1 << (bit % 8)
		}
		if _, err := p.Open(ForPassphrase, shares); err != nil {
			t.Errorf("share %d as it was: %v", index, err)
		}
	}
}

// TestTwoOfThreeSharesTellNothing: what anybody can compute of two shares of 3 of 5
// is spread as evenly over all bytes as noise is, whatever the secret: each share,
// their sum, and what they would give if two were enough. The bound of chi-squared
// with 255 degrees of freedom is eight standard deviations above what is expected.
func TestTwoOfThreeSharesTellNothing(t *testing.T) {
	const splits, bound = 4000, 255 + 8*22.6
	for _, secret := range [][]byte{make([]byte, 32), bytes.Repeat([]byte{0xff}, 32), []byte("thirty-two bytes, of them printa")} {
		var counts [4][256]int
		for range splits {
			pieces, err := splitBytes(secret, 3, 5)
			if err != nil {
				t.Fatal(err)
			}
			a, b := pieces[1], pieces[4]
			xa, xb := a[len(a)-1], b[len(b)-1]
			for i := range secret {
				line := gfMul(a[i], gfDiv(xb, xa^xb)) ^ gfMul(b[i], gfDiv(xa, xa^xb)) // at 0, through both
				for k, v := range [4]byte{a[i], b[i], a[i] ^ b[i], line ^ secret[i]} {
					counts[k][v]++
				}
			}
		}
		expected := float64(splits*len(secret)) / 256
		for k, name := range []string{"one share", "another", "their sum", "the line through both, against the secret"} {
			chi := 0.0
			for _, n := range counts[k] {
				chi += (float64(n) - expected) * (float64(n) - expected) / expected
			}
			if chi > bound {
				t.Errorf("secret %x: %s: chi-squared %.0f", secret[:4], name, chi)
			}
		}
	}
}

// TestTwoOfTwoSharesTellAll: the measure of the test above finds what is there to
// be found: of a secret that is split 2 of 5, two shares tell all.
func TestTwoOfTwoSharesTellAll(t *testing.T) {
	secret := []byte("thirty-two bytes, of them printa")
	pieces, err := splitBytes(secret, 2, 5)
	if err != nil {
		t.Fatal(err)
	}
	a, b := pieces[1], pieces[4]
	xa, xb := a[len(a)-1], b[len(b)-1]
	for i := range secret {
		if line := gfMul(a[i], gfDiv(xb, xa^xb)) ^ gfMul(b[i], gfDiv(xa, xa^xb)); line != secret[i] {
			t.Fatalf("byte %d: %#x", i, line)
		}
	}
}

// gfMul multiplies in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1, from the definition.
func gfMul(a, b byte) (product byte) {
	for ; b != 0; b >>= 1 {
		if b&1 == 1 {
			product ^= a
		}
		carry := a & 0x80
		if a <<= 1; carry != 0 {
			a ^= 0x1b
		}
	}
	return product
}

func gfDiv(a, b byte) byte {
	for q := range 256 {
		if gfMul(byte(q), b) == a {
			return byte(q)
		}
	}
	panic("division by 0")
}
