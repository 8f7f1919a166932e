package escrow

import (
	"errors"
	"fmt"

	"mandos-escrow/internal/secret"
)

// The recovery passphrase: 8 groups of 6 digits, 55 characters with dashes,
// which are part of it.
const (
	groups         = 8
	groupDigits    = 6
	passphraseSize = groups*groupDigits + groups - 1
)

// ErrGroup is wrapped by a GroupError.
var ErrGroup = errors.New("digits are mistyped")

// GroupError names the group of digits that cannot be right.
type GroupError struct{ Group int } // 1 to 8

func (e *GroupError) Error() string { return fmt.Sprintf("group %d: %v", e.Group, ErrGroup) }

// Unwrap returns ErrGroup.
func (e *GroupError) Unwrap() error { return ErrGroup }

// NewRecoveryPassphrase returns 128 random bits as a person can read them over
// a telephone: group i (0 to 7) is 11*v + i for 16 random bits v, in six
// digits. A wrong digit, two swapped ones, and groups that are swapped or
// repeated all break the remainder (mod 11) of some group.
func NewRecoveryPassphrase() []byte {
	raw := secret.Random(2 * groups)
	defer secret.Wipe(raw)
	text := make([]byte, passphraseSize)
	for i := range groups {
		n := 11*(int(raw[2*i])<<8|int(raw[2*i+1])) + i
		group := text[i*(groupDigits+1):]
		for d := groupDigits - 1; d >= 0; d-- {
			group[d] = byte('0' + n%10)
			n /= 10
		}
		if i < groups-1 {
			group[groupDigits] = '-'
		}
	}
	return text
}

// CheckRecoveryPassphrase tells a mistyped recovery passphrase, and which group
// of it is wrong, without knowing the right one.
func CheckRecoveryPassphrase(text []byte) error {
	if len(text) != passphraseSize {
		return fmt.Errorf("%w: a recovery passphrase has %d groups of %d digits with dashes between, %d characters; this has %d",
			ErrGroup, groups, groupDigits, passphraseSize, len(text))
	}
	for i := range groups {
		start := i * (groupDigits + 1)
		if err := CheckGroup(i, text[start:start+groupDigits]); err != nil {
			return err
		}
		if i < groups-1 && text[start+groupDigits] != '-' {
			return fmt.Errorf("%w: no dash after group %d", ErrGroup, i+1)
		}
	}
	return nil
}

// CheckGroup checks group i, counted from 0, as it is typed.
func CheckGroup(i int, digits []byte) error {
	n := 0
	for _, c := range digits {
		if c < '0' || c > '9' || n > 1e6 {
			return &GroupError{i + 1}
		}
		n = 10*n + int(c-'0')
	}
	if len(digits) != groupDigits || i < 0 || i >= groups || n%11 != i || n/11 > 0xffff {
		return &GroupError{i + 1}
	}
	return nil
}
