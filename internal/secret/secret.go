// Package secret makes secrets, judges chosen ones, and keeps a process that
// holds them from leaking its memory. It knows nothing of where secrets go.
// It imports no other package of this program.
package secret

import (
	"bytes"
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
)

// ErrWeak is wrapped by Strong.
var ErrWeak = errors.New("passphrase is too weak")

// Wipe clears b where it lies. The runtime may have copied it before; what
// Harden does is for those copies.
func Wipe(b []byte) {
	clear(b)
	runtime.KeepAlive(b)
}

// Random returns n random bytes.
func Random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// ID returns a random 128-bit identifier, 32 hex digits.
func ID() string { return hex.EncodeToString(Random(16)) }

// BootPassphrase returns 256 random bits as 43 printable characters.
func BootPassphrase() []byte {
	raw := Random(32)
	defer Wipe(raw)
	return base64.RawURLEncoding.AppendEncode(nil, raw)
}

// oneTimeAlphabet leaves out l, o, 0 and 1, which are taken for each other.
const oneTimeAlphabet = "abcdefghijkmnpqrstuvwxyz23456789"

var oneTime = base32.NewEncoding(oneTimeAlphabet).WithPadding(base32.NoPadding)

// OneTimePassword returns 80 random bits as 16 characters in groups of four,
// `abcd-efgh-ijkm-npqr`.
func OneTimePassword() []byte {
	raw := Random(10)
	defer Wipe(raw)
	text := oneTime.AppendEncode(nil, raw)
	defer Wipe(text)
	return inGroups(text)
}

func inGroups(text []byte) []byte {
	grouped := make([]byte, 0, 19)
	for i := 0; i < len(text); i += 4 {
		if i > 0 {
			grouped = append(grouped, '-')
		}
		grouped = append(grouped, text[i:i+4]...)
	}
	return grouped
}

// NormalizeOneTime returns a one-time password as OneTimePassword writes it,
// from one that was typed in capitals or without its dashes; nil if it is none.
func NormalizeOneTime(typed []byte) []byte {
	letters := make([]byte, 0, 16)
	for _, c := range bytes.ToLower(typed) {
		switch {
		case c == '-' || c == ' ':
		case len(letters) == 16 || bytes.IndexByte([]byte(oneTimeAlphabet), c) < 0:
			return nil
		default:
			letters = append(letters, c)
		}
	}
	if len(letters) != 16 {
		return nil
	}
	return inGroups(letters)
}

// Limits of a chosen passphrase.
const (
	minLength   = 12
	minDistinct = 6
	minDigits   = 20 // a passphrase of digits alone
	maxLength   = 512
)

// Strong refuses a chosen passphrase that a dictionary or a short search finds:
// shorter than 12 bytes (20 if all are digits), fewer than 6 different bytes,
// or mostly one run such as 1234 or aaaa. Longer than 512 bytes is refused too,
// which is cryptsetup's limit.
func Strong(passphrase []byte) error {
	distinct := map[byte]bool{}
	digits, steps := 0, 0
	for i, c := range passphrase {
		distinct[c] = true
		if c >= '0' && c <= '9' {
			digits++
		}
		if i > 0 && (c == passphrase[i-1] || c == passphrase[i-1]+1 || c+1 == passphrase[i-1]) {
			steps++
		}
	}
	n := len(passphrase)
	switch {
	case n > maxLength:
		return fmt.Errorf("%w: longer than %d bytes", ErrWeak, maxLength)
	case n < minLength:
		return fmt.Errorf("%w: %d characters, at least %d are needed", ErrWeak, n, minLength)
	case digits == n && n < minDigits:
		return fmt.Errorf("%w: digits alone, at least %d are needed", ErrWeak, minDigits)
	case len(distinct) < minDistinct:
		return fmt.Errorf("%w: only %d different characters", ErrWeak, len(distinct))
	case 2*steps > n:
		return fmt.Errorf("%w: mostly repeated or consecutive characters", ErrWeak)
	}
	return nil
}
