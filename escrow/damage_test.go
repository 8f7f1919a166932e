package escrow

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/internal/seal"
)

// form is a sealed form, and what opens it.
type form struct {
	sealed []byte
	plain  []byte
	open   func([]byte) (*Opened, error)
}

// forms are all forms of a stand-alone packet and of a sheet. What a passphrase
// opens is stretched cheaply here, which the message itself says.
func forms() map[string]form {
	o := standAlone(passphrasePayload(), oldVolumeKeyPayload())
	key := bytes.Repeat([]byte{7}, contentKeySize)
	passphrase := fmt.Appendf(nil, "%x", key)
	armored := "-----BEGIN PGP MESSAGE-----\n\n"
	for part := range slices.Chunk(must(seal.EncryptKey(o.Plain, key, now)), 48) {
		armored += base64.StdEncoding.EncodeToString(part) + "\n"
	}
	armored += "-----END PGP MESSAGE-----\n"
	recipient := testKeys().trustees[0]
	sheet := must(OpenSheet(must(SealSheet(o, ForPassphrase, packetPassphrase)).Message, packetPassphrase)).Plain
	out := map[string]form{
		"passphrase": {[]byte(armored), o.Plain, func(b []byte) (*Opened, error) { return OpenOffline(b, passphrase) }},
		"recipient": {must(SealRecipient(o, recipient.Public(), now)), o.Plain, func(b []byte) (*Opened, error) {
			return OpenRecipient(b, recipient)
		}},
		"sheet": {must(seal.EncryptKey(sheet, key, now)), sheet, func(b []byte) (*Opened, error) { return OpenSheet(b, passphrase) }},
	}
	for _, name := range []string{"RSA", "P-256", "X25519"} {
		h := certificateHolders()[name]
		out["certificate, "+name] = form{must(SealCertificate(o, h.certificate, now)), o.Plain, func(b []byte) (*Opened, error) {
			return OpenCertificate(b, h.key)
		}}
	}
	return out
}

// refused: an error with a name, and nothing else; or, of armor, which has some
// signs to spare, exactly what was sealed.
func (f form) refused(changed []byte) error {
	o, err := f.open(changed)
	armor := bytes.HasPrefix(f.sealed, []byte("-----BEGIN"))
	switch {
	case err == nil && armor && bytes.Equal(o.Plain, f.plain):
		return nil
	case err == nil:
		return fmt.Errorf("opened to %q", o.Plain)
	case o != nil:
		return fmt.Errorf("bytes with error %w", err)
	case !errors.Is(err, ErrIntegrity) && !errors.Is(err, seal.ErrRecipient) && !errors.Is(err, ErrOtherKey):
		return fmt.Errorf("no name: %w", err)
	}
	return nil
}

func TestEveryFlippedBitOfAllForms(t *testing.T) {
	for name, f := range forms() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if o, err := f.open(f.sealed); err != nil || !bytes.Equal(o.Plain, f.plain) {
				t.Fatal(err)
			}
			for at := range f.sealed {
				for bit := range 8 {
					if strings.HasSuffix(name, "RSA") && bit != at%8 { // 2 ms each
						continue
					}
					changed := bytes.Clone(f.sealed)
					changed[at] ^= 1 << bit
					if err := f.refused(changed); err != nil {
						t.Fatalf("byte %d, bit %d: %v", at, bit, err)
					}
				}
			}
		})
	}
}

func TestEveryTruncationOfAllForms(t *testing.T) {
	for name, f := range forms() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := range f.sealed {
				if err := f.refused(f.sealed[:n]); err != nil {
					t.Fatalf("first %d bytes: %v", n, err)
				}
			}
			if err := f.refused(append(bytes.Clone(f.sealed), f.sealed...)); err != nil {
				t.Errorf("twice: %v", err)
			}
		})
	}
}

// Flips and cuts of typed lines: an error that names a line, or, of a letter's
// case or a space, the same message.
func TestEveryFlippedBitOfTypedLines(t *testing.T) {
	want := message(319)
	text := []byte(strings.Join(Lines(want), "\n") + "\n")
	check := func(changed []byte) error {
		got, err := ParseLines(changed)
		var bad *LineError
		if err == nil && bytes.Equal(got, want) || got == nil && errors.As(err, &bad) {
			return nil
		}
		return fmt.Errorf("%x, %w", got, err)
	}
	for at := range text {
		for bit := range 8 {
			changed := bytes.Clone(text)
			changed[at] ^= 1 << bit
			if err := check(changed); err != nil {
				t.Fatalf("byte %d, bit %d: %v", at, bit, err)
			}
		}
		if got, err := ParseLines(text[:at]); at < len(text)-1 && (got != nil || !errors.Is(err, ErrLine)) {
			t.Fatalf("first %d bytes: %x, %v", at, got, err)
		}
	}
}

func TestMegabyteOfGarbage(t *testing.T) {
	random, all := message(1<<20), forms()
	begin := func(text string) []byte { return append([]byte(text), random...) }
	for name, garbage := range map[string][]byte{
		"random": random, "zeros": make([]byte, 1<<20), "letters": bytes.Repeat([]byte("ABCDEFG "), 1<<17), "one word": bytes.Repeat([]byte("A"), 1<<20),
		"lines": bytes.Repeat([]byte("01 ABCD AA\n"), 1<<17-1<<15), "newlines": bytes.Repeat([]byte("\n"), 1<<20),
		"armor": begin("-----BEGIN PGP MESSAGE-----\n\n"), "certificate": begin("mandos-escrow-certificate-packet: 1\n"),
		"armor without end": []byte("-----BEGIN PGP MESSAGE-----\n\n" + base64.StdEncoding.EncodeToString(random)), "session key": begin("\xc3\x0d\x04\x09\x03\x08"),
	} {
		for form, f := range all {
			if o, err := f.open(garbage); o != nil || !errors.Is(err, ErrIntegrity) {
				t.Errorf("%s as %s: %v", name, form, err)
			}
		}
		if got, err := ParseLines(garbage); err == nil && len(got) < len(garbage)/2 || err != nil && !errors.Is(err, ErrIntegrity) {
			t.Errorf("%s as lines: %d bytes, %v", name, len(got), err)
		}
		if s := SealingOf(garbage); s == ByTrustees || s == ByVolumeKey {
			t.Errorf("%s seems to be %q", name, s)
		}
	}
}
