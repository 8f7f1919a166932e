package recovery

import (
	"crypto/subtle"
	"errors"
	"strings"

	"github.com/tyler-smith/go-bip39/wordlists"
)

// ErrWords: the words are not those of the request that was served. Either
// they were heard wrong, or somebody changed the request on its way.
var ErrWords = errors.New("the six words are not those of this request")

const wordCount = 6

// Words returns the first 66 bits of a request's digest as six words of
// BIP-39's English list, 11 bits each, separated by single spaces. To make a
// second request with the same words takes 2^66 tries.
func Words(digest [32]byte) string {
	words := make([]string, wordCount)
	for i := range words {
		n := 0
		for bit := 11 * i; bit < 11*(i+1); bit++ {
			n = n<<1 | int(digest[bit/8]>>(7-bit%8)&1)
		}
		words[i] = wordlists.English[n]
	}
	return strings.Join(words, " ")
}

// CheckWords compares words as somebody typed them (any case, spaces, dashes
// or commas between them) with those of a request.
func CheckWords(typed string, digest [32]byte) error {
	split := strings.FieldsFunc(strings.ToLower(typed), func(r rune) bool { return r < 'a' || r > 'z' })
	if subtle.ConstantTimeCompare([]byte(strings.Join(split, " ")), []byte(Words(digest))) != 1 {
		return ErrWords
	}
	return nil
}
