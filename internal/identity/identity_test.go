package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// rfc8032 is the key of test 1 in RFC 8032, section 7.1.
func rfc8032() *Key {
	seed := []byte{
		0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4,
		0x44, 0x49, 0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
	}
	return must(newKey(ed25519.NewKeyFromSeed(seed)))
}

// sha256sum of the 44 bytes 302a300506032b6570032100 and the public key of RFC 8032.
func TestKeyIDKnownAnswer(t *testing.T) {
	const want = KeyID("06e3fd8fda29bb60ab59557de61edb0aecdb231134be30e75b455f8e1b792fa9")
	key := rfc8032()
	if len(key.Public()) != 44 || key.KeyID() != want {
		t.Errorf("%x has %s", []byte(key.Public()), key.KeyID())
	}
	if key.KeyID().Short() != string(want[:16]) || KeyID("short").Short() != "short" {
		t.Error("Short")
	}
}

func TestParseKeyID(t *testing.T) {
	good := string(rfc8032().KeyID())
	if id, err := ParseKeyID(good); err != nil || string(id) != good {
		t.Error(err)
	}
	for _, text := range []string{"", good[1:], good + "0", strings.ToUpper(good), "g" + good[1:], " " + good} {
		if id, err := ParseKeyID(text); !errors.Is(err, ErrKey) || id != "" {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// One key has one key ID: other encodings of it are refused.
func TestPublicKeyHasOneEncoding(t *testing.T) {
	good := rfc8032().Public()
	if p, err := ParsePublic(good); err != nil || !bytes.Equal(p, good) {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{
		"empty": nil, "cut": good[:43], "longer": append(bytes.Clone(good), 0),
		"P-256":            must(x509.MarshalPKIXPublicKey(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public())),
		"padded bits":      paddedBits(),
		"null parameters":  nullParameters(good[12:]),
		"long form length": append([]byte{0x30, 0x81, 0x2a}, good[2:]...),
	} {
		if p, err := ParsePublic(der); !errors.Is(err, ErrKey) || p != nil {
			t.Errorf("%s: %x, %v", name, []byte(p), err)
		}
	}
}

// paddedBits encodes a key whose first bit is 0 as a string of 255 bits.
func paddedBits() []byte {
	for {
		key := must(Generate()).Public()
		if raw := key[12:]; raw[0] < 0x80 {
			shifted := make([]byte, 32)
			for i := range shifted {
				shifted[i] = raw[i] << 1
				if i+1 < len(raw) {
					shifted[i] |= raw[i+1] >> 7
				}
			}
			der := bytes.Clone(key[:12])
			der[11] = 1 // unused bits
			return append(der, shifted...)
		}
	}
}

func nullParameters(raw []byte) []byte {
	type algorithm struct {
		OID        asn1.ObjectIdentifier
		Parameters asn1.RawValue
	}
	return must(asn1.Marshal(struct {
		Algorithm algorithm
		Key       asn1.BitString
	}{algorithm{asn1.ObjectIdentifier{1, 3, 101, 112}, asn1.NullRawValue}, asn1.BitString{Bytes: raw, BitLength: 256}}))
}

func TestSignatures(t *testing.T) {
	key, other := must(Generate()), must(Generate())
	message := []byte("what is signed")
	signature := key.Sign("request", message)
	if err := key.Public().Verify("request", message, signature); err != nil {
		t.Fatal(err)
	}
	if !ed25519.Verify(ed25519.PublicKey(key.Public()[12:]), []byte("mandos-escrow/1/request\x00what is signed"), signature) {
		t.Error("not as documented")
	}
	for name, err := range map[string]error{
		"another context":                 key.Public().Verify("approval", message, signature),
		"another key":                     other.Public().Verify("request", message, signature),
		"another message":                 key.Public().Verify("request", []byte("what is signeD"), signature),
		"cut":                             key.Public().Verify("request", message, signature[:63]),
		"none":                            key.Public().Verify("request", message, nil),
		"context and message, moved over": key.Public().Verify("request\x00what", []byte(" is signed"), signature),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range signature {
		signature[i] ^= 1
		if err := key.Public().Verify("request", message, signature); !errors.Is(err, ErrSignature) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		signature[i] ^= 1
	}
	if err := Public("x").Verify("request", message, signature); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
}

func TestPEM(t *testing.T) {
	key := must(Generate())
	text := must(key.PrivatePEM())
	again, err := ParsePrivatePEM(text)
	if err != nil || again.KeyID() != key.KeyID() || !bytes.Equal(again.Sign("c", nil), key.Sign("c", nil)) {
		t.Fatal(err)
	}
	p256 := must(x509.MarshalPKCS8PrivateKey(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	for name, bad := range map[string][]byte{
		"empty": nil, "public half": key.PublicPEM(), "two": append(bytes.Clone(text), text...), "cut": text[:len(text)/2],
		"P-256":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p256}),
		"no key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}),
	} {
		if _, err := ParsePrivatePEM(bad); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Stock openssl reads both halves, and gives the same key ID.
func TestStockOpenSSL(t *testing.T) {
	key := must(Generate())
	run := func(stdin []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.Command("openssl", args...)
		cmd.Stdin = bytes.NewReader(stdin)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("openssl %v: %v (install the package openssl)", args, err)
		}
		return out
	}
	if der := run(must(key.PrivatePEM()), "pkey", "-pubout", "-outform", "DER"); !bytes.Equal(der, key.Public()) {
		t.Errorf("private half: %x", der)
	}
	if der := run(key.PublicPEM(), "pkey", "-pubin", "-pubout", "-outform", "DER"); Public(der).KeyID() != key.KeyID() {
		t.Errorf("public half: %x", der)
	}
}

func FuzzParsePublic(f *testing.F) {
	f.Add([]byte(rfc8032().Public()))
	f.Add(paddedBits())
	f.Fuzz(func(t *testing.T, der []byte) {
		p, err := ParsePublic(der)
		if err != nil && !errors.Is(err, ErrKey) {
			t.Fatal(err)
		}
		if err == nil && len(p) != 44 {
			t.Fatalf("%d bytes", len(p))
		}
	})
}
