package testvm

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"testing"
)

// secrets are bytes that may not be shown, by what they are called.
type secrets map[string][]byte

// in names those that stand in text: as they are, in base64, or in hex.
func (s secrets) in(text []byte) []string {
	var found []string
	lower := bytes.ToLower(text)
	for name, secret := range s {
		// The last character of base64 depends on what follows.
		encoded := base64.RawStdEncoding.EncodeToString(secret)
		if bytes.Contains(text, secret) || bytes.Contains(text, []byte(encoded[:len(encoded)-1])) ||
			bytes.Contains(lower, []byte(hex.EncodeToString(secret))) {
			found = append(found, name)
		}
	}
	slices.Sort(found)
	return found
}

// addLines adds the lines of an armored private key.
func (s secrets) addLines(name string, armored []byte) {
	for line := range bytes.Lines(armored) {
		line = bytes.TrimSpace(line)
		if len(line) >= 40 && !bytes.HasPrefix(line, []byte("-----")) {
			s[name+" "+string(line[:4])] = line
		}
	}
}

func TestSecretsIn(t *testing.T) {
	s := secrets{"key": {0xfb, 0xff, 0x00, 0x01, 0x80}, "passphrase": []byte("correct horse")}
	for text, want := range map[string][]string{
		"nothing of that kind":           nil,
		"it is \xfb\xff\x00\x01\x80.":    {"key"},
		"FBFF000180":                     {"key"},
		"mount: +/8AAYA=: no such file":  {"key"},
		"+/8AAYAx":                       {"key"},
		"correct horse, and fbff000180":  {"key", "passphrase"},
		"Y29ycmVjdCBob3JzZQ":             {"passphrase"},
		"636f727265637420686f727365 now": {"passphrase"},
		"correct hors":                   nil,
	} {
		if got := s.in([]byte(text)); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestSecretsAddLines(t *testing.T) {
	s := secrets{}
	const line = "MC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	s.addLines("tls", []byte("-----BEGIN PRIVATE KEY BLOCK AND MORE-----\n\n"+line+"\n=short\n-----END PRIVATE KEY BLOCK AND MORE-----\n"))
	if len(s) != 1 || s.in([]byte("a "+line+" z")) == nil {
		t.Errorf("got %q", s)
	}
}
