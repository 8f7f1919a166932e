package recovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/tyler-smith/go-bip39/wordlists"
)

// The list's own digest: words are for ever, also when a library changes.
func TestWordList(t *testing.T) {
	if len(wordlists.English) != 2048 || !slices.IsSorted(wordlists.English) {
		t.Fatal("not 2048 sorted words")
	}
	const frozen = "2f5eed53a4727b4bf8880d8f3f199efc90e58503646d9ff8eff3a2ed3b24dbda" // of english.txt in BIP-39
	if sum := sha256.Sum256([]byte(strings.Join(wordlists.English, "\n") + "\n")); hexOf(sum) != frozen {
		t.Errorf("another list: %x", sum)
	}
	for _, word := range wordlists.English {
		if strings.Trim(word, "abcdefghijklmnopqrstuvwxyz") != "" {
			t.Errorf("%q cannot be typed", word)
		}
	}
}

func TestWordsKnownAnswers(t *testing.T) {
	for words, digest := range map[string][32]byte{
		"abandon abandon abandon abandon abandon abandon": {},
		"zoo zoo zoo zoo zoo zoo":                         [32]byte(bytes.Repeat([]byte{255}, 32)),
		// 11-bit groups 1, 2, 4, 8, 16, 32
		"ability able above absurd acoustic advice": {0, 0x20, 0x08, 0x02, 0, 0x80, 0x20, 0x08},
		// of BIP-39's test vector 7f7f...: its first six words
		"legal winner thank year wave sausage":    [32]byte(bytes.Repeat([]byte{0x7f}, 32)),
		"letter advice cage absurd amount doctor": [32]byte(bytes.Repeat([]byte{0x80}, 32)),
	} {
		if got := Words(digest); got != words {
			t.Errorf("%x: %s, want %s", digest[:9], got, words)
		}
	}
}

// All of the first 66 bits count, and no other.
func TestWordsTake66Bits(t *testing.T) {
	base := sha256.Sum256([]byte("a request"))
	for bit := range 256 {
		changed := base
		changed[bit/8] ^= 0x80 >> (bit % 8)
		if same := Words(changed) == Words(base); same != (bit >= 66) {
			t.Errorf("bit %d: same words is %t", bit, same)
		}
	}
}

// Each word comes equally often at each place: chi-square over 2048 words with
// 2047 degrees of freedom stays below 2350 with probability 1 - 3e-6.
func TestWordsDistribution(t *testing.T) {
	const tries = 60_000
	index := map[string]int{}
	for i, word := range wordlists.English {
		index[word] = i
	}
	var counts [wordCount][2048]int
	for n := range tries {
		var seed [8]byte
		binary.BigEndian.PutUint64(seed[:], uint64(n))
		for place, word := range strings.Split(Words(sha256.Sum256(seed[:])), " ") {
			counts[place][index[word]]++
		}
	}
	for place := range counts {
		expected, chi := float64(tries)/2048, 0.0
		for _, c := range counts[place] {
			chi += (float64(c) - expected) * (float64(c) - expected) / expected
		}
		if chi > 2350 || chi < 1750 {
			t.Errorf("word %d: chi-square %.0f", place+1, chi)
		}
	}
}

func TestTypedForms(t *testing.T) {
	digest := sha256.Sum256([]byte("a request"))
	words := Words(digest)
	split := strings.Split(words, " ")
	for name, typed := range map[string]string{
		"as printed": words, "upper case": strings.ToUpper(words), "title": strings.ToUpper(words[:1]) + words[1:],
		"dashes": strings.Join(split, "-"), "commas": strings.Join(split, ", "), "a line each": strings.Join(split, "\n") + "\n",
		"tabs and spaces": "\t " + strings.Join(split, " \t ") + " ", "numbered": "1. " + strings.Join(split, " 2) "),
	} {
		if err := CheckWords(typed, digest); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	swapped := slices.Clone(split)
	swapped[0], swapped[1] = swapped[1], swapped[0]
	for name, typed := range map[string]string{
		"empty": "", "five words": strings.Join(split[:5], " "), "seven words": words + " zoo", "joined": strings.Join(split, ""),
		"another order": strings.Join(swapped, " "), "the first four letters": first(split, 3), "one more letter": words + "s",
		"of another request": Words([32]byte{1}), "spaces alone": "     ",
	} {
		if err := CheckWords(typed, digest); !errors.Is(err, ErrWords) {
			t.Errorf("%s (%q): %v", name, typed, err)
		}
	}
	for i := range split { // each word counts
		other := slices.Clone(split)
		other[i] = "zebra"
		if err := CheckWords(strings.Join(other, " "), digest); !errors.Is(err, ErrWords) {
			t.Errorf("word %d: %v", i+1, err)
		}
	}
}

func first(words []string, letters int) string {
	var out []string
	for _, w := range words {
		out = append(out, w[:min(letters, len(w))])
	}
	return strings.Join(out, " ")
}
