package escrow

import (
	"bytes"
	"errors"
	"slices"
	"testing"
)

func TestRecoveryPassphrase(t *testing.T) {
	seen := map[string]bool{}
	for range 500 {
		p := NewRecoveryPassphrase()
		if len(p) != 55 || seen[string(p)] {
			t.Fatalf("%d characters, or seen before", len(p))
		}
		seen[string(p)] = true
		if err := CheckRecoveryPassphrase(p); err != nil {
			t.Fatal(err)
		}
	}
}

// Every single wrong digit, neighbours swapped, groups swapped and repeated.
func TestMistypedGroupIsNamed(t *testing.T) {
	right := NewRecoveryPassphrase()
	for at, c := range right {
		if c == '-' {
			continue
		}
		for d := byte('0'); d <= '9'; d++ {
			wrong := bytes.Clone(right)
			wrong[at] = d
			wantGroup(t, wrong, at/7+1, d == c)
		}
		if at+1 < len(right) && right[at+1] != '-' {
			wrong := bytes.Clone(right)
			wrong[at], wrong[at+1] = wrong[at+1], wrong[at]
			wantGroup(t, wrong, at/7+1, right[at] == right[at+1])
		}
	}
	for a := range groups {
		for b := a + 1; b < groups; b++ {
			swapped, repeated := bytes.Clone(right), bytes.Clone(right)
			copy(swapped[7*a:7*a+6], right[7*b:])
			copy(swapped[7*b:7*b+6], right[7*a:])
			copy(repeated[7*b:7*b+6], right[7*a:])
			wantGroup(t, swapped, a+1, false)
			wantGroup(t, repeated, b+1, false)
		}
	}
}

func wantGroup(t *testing.T, text []byte, group int, right bool) {
	t.Helper()
	err := CheckRecoveryPassphrase(text)
	if right {
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		return
	}
	var named *GroupError
	if !errors.As(err, &named) || named.Group != group || !errors.Is(err, ErrGroup) {
		t.Errorf("%s: %v, want group %d", text, err, group)
	}
}

func TestCheckGroup(t *testing.T) {
	for _, c := range []struct {
		group  int
		digits string
		ok     bool
	}{
		{0, "000000", true},
		{7, "720892", true}, // 11*65535 + 7
		{7, "720903", false},
		{7, "000007", true},
		{0, "00000", false},
		{0, "0000000", false},
		{0, "00000a", false},
		{0, "", false},
		{8, "000008", false},
		{-1, "000000", false},
		{0, "99999999999999999999999999", false},
	} {
		if err := CheckGroup(c.group, []byte(c.digits)); (err == nil) != c.ok {
			t.Errorf("group %d %q: %v", c.group, c.digits, err)
		}
	}
}

func TestRecoveryPassphraseForm(t *testing.T) {
	right := NewRecoveryPassphrase()
	for name, text := range map[string][]byte{
		"no dashes": bytes.ReplaceAll(right, []byte("-"), nil),
		"spaces":    bytes.ReplaceAll(right, []byte("-"), []byte(" ")),
		"newline":   append(slices.Clone(right), '\n'),
		"empty":     nil,
	} {
		if err := CheckRecoveryPassphrase(text); !errors.Is(err, ErrGroup) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
