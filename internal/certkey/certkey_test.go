package certkey

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

// openssl runs it with input, and returns what it prints.
func openssl(t testing.TB, stdin []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("openssl %v: %v: %s", args, err, stderr.String())
	}
	return out
}

// made has the files of openssl in all forms; locked ones are under "secret".
func made(t testing.TB) map[string][]byte {
	rsaKey := openssl(t, nil, "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
	ecKey := openssl(t, nil, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
	return map[string][]byte{
		"PKCS8 RSA": rsaKey, "PKCS8 EC": ecKey,
		"PKCS8 X25519":  openssl(t, nil, "genpkey", "-algorithm", "X25519"),
		"PKCS1":         openssl(t, rsaKey, "rsa", "-traditional"),
		"SEC1":          append(openssl(t, nil, "ecparam", "-name", "prime256v1"), openssl(t, ecKey, "ec")...),
		"locked AES":    openssl(t, rsaKey, "pkcs8", "-topk8", "-v2", "aes-256-cbc", "-passout", "pass:secret"),
		"locked scrypt": openssl(t, ecKey, "pkcs8", "-topk8", "-scrypt", "-passout", "pass:secret"),
		"locked, old":   openssl(t, rsaKey, "rsa", "-traditional", "-aes128", "-passout", "pass:secret"),
	}
}

func TestParsePrivate(t *testing.T) {
	type equaler interface{ Equal(crypto.PrivateKey) bool }
	files := made(t)
	for name, same := range map[string]string{
		"PKCS8 RSA": "PKCS8 RSA", "PKCS8 EC": "PKCS8 EC", "PKCS8 X25519": "PKCS8 X25519", "PKCS1": "PKCS8 RSA", "SEC1": "PKCS8 EC",
		"locked AES": "PKCS8 RSA", "locked scrypt": "PKCS8 EC",
	} {
		isLocked := strings.HasPrefix(name, "locked")
		if private, locked := IsPrivate(files[name]); !private || locked != isLocked {
			t.Errorf("%s: %v, %v", name, private, locked)
		}
		var passphrase []byte
		if isLocked {
			passphrase = []byte("secret")
			for _, wrong := range [][]byte{nil, {}, []byte("other")} {
				if key, err := ParsePrivate(files[name], wrong); key != nil || !errors.Is(err, ErrPassphrase) {
					t.Errorf("%s under %q: %v", name, wrong, err)
				}
			}
		} else if _, err := ParsePrivate(files[name], []byte("secret")); !errors.Is(err, ErrPassphrase) {
			t.Errorf("%s: a passphrase for nothing: %v", name, err)
		}
		key, err := ParsePrivate(files[name], passphrase)
		want, wantErr := ParsePrivate(files[same], nil)
		if err != nil || wantErr != nil || !key.(equaler).Equal(want) {
			t.Errorf("%s: %T, %v, %v", name, key, err, wantErr)
		}
	}
	if _, err := ParsePrivate(files["locked, old"], []byte("secret")); !errors.Is(err, ErrFile) || !strings.Contains(err.Error(), "openssl pkcs8 -topk8") {
		t.Errorf("old protection: %v", err)
	}
}

// A protected key says itself what opening it costs: what asks for hours, or for
// all memory, is refused before anything is derived.
func TestExpensiveKeys(t *testing.T) {
	der := func(value any) []byte {
		data, err := asn1.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	locked := func(kind asn1.ObjectIdentifier, cost any) []byte {
		schemes := twoSchemes{
			pkix.AlgorithmIdentifier{Algorithm: kind, Parameters: asn1.RawValue{FullBytes: der(cost)}},
			pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, Parameters: asn1.RawValue{FullBytes: der(make([]byte, 16))}},
		}
		body := lockedKey{pkix.AlgorithmIdentifier{
			Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}, Parameters: asn1.RawValue{FullBytes: der(schemes)},
		}, make([]byte, 64)}
		return pem.EncodeToMemory(&pem.Block{Type: lockedType, Bytes: der(body)})
	}
	salt := make([]byte, 16)
	rounds := func(n int) []byte {
		hash := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}, Parameters: asn1.NullRawValue}
		return locked(oidPBKDF2, roundsCost{salt, n, hash})
	}
	scrypt := func(n, r, p int) []byte { return locked(oidScrypt, scryptCost{salt, n, r, p}) }
	for name, c := range map[string]struct {
		file []byte
		want error
	}{
		"PBKDF2, cheap":            {rounds(2048), ErrPassphrase}, // it is derived, and opens nothing
		"PBKDF2, no round":         {rounds(0), ErrFile},
		"PBKDF2, a day":            {rounds(1 << 40), ErrFile},
		"scrypt, cheap":            {scrypt(1024, 8, 1), ErrPassphrase},
		"scrypt, 1 TiB":            {scrypt(1<<30, 8, 1), ErrFile},
		"scrypt, by r":             {scrypt(1024, 1<<25, 1), ErrFile},
		"scrypt, a week":           {scrypt(1<<18, 8, 1<<20), ErrFile},
		"scrypt, negative":         {scrypt(-1024, 8, 1), ErrFile},
		"scrypt, with an overflow": {scrypt(1<<20, 1<<60, 1), ErrFile},
		"of another kind":          {locked(asn1.ObjectIdentifier{1, 2, 3}, salt), ErrFile},
	} {
		if key, err := ParsePrivate(c.file, []byte("secret")); key != nil || !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseCertificate(t *testing.T) {
	key := made(t)["PKCS8 EC"]
	both := append(bytes.Clone(key), openssl(t, key, "req", "-x509", "-new", "-key", "/dev/stdin", "-subj", "/CN=Example", "-days", "2")...)
	c, err := ParseCertificate(both)
	if err != nil || c.Subject.CommonName != "Example" {
		t.Fatal(err)
	}
	if _, ok := c.PublicKey.(*ecdsa.PublicKey); !ok {
		t.Errorf("%T", c.PublicKey)
	}
	if again, err := ParseCertificate(c.Raw); err != nil || !again.Equal(c) {
		t.Errorf("in DER: %v", err)
	}
	for name, data := range map[string][]byte{"none": nil, "a key": key, "garbage": bytes.Repeat([]byte("garbage "), 1<<17), "cut": both[:len(both)-40]} {
		if c, err := ParseCertificate(data); c != nil || !errors.Is(err, ErrFile) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{"none": nil, "certificate": c.Raw, "garbage": bytes.Repeat([]byte("garbage "), 1<<17)} {
		if key, err := ParsePrivate(data, nil); key != nil || !errors.Is(err, ErrFile) {
			t.Errorf("key, %s: %v", name, err)
		}
	}
}

// FuzzFiles: what is refused has a name, and nothing panics. Protected keys are
// left out: their own text says how much time they cost, a few seconds at most.
func FuzzFiles(f *testing.F) {
	for name, file := range made(f) {
		if !strings.HasPrefix(name, "locked") {
			f.Add(file)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := ParseCertificate(data); err != nil && !errors.Is(err, ErrFile) {
			t.Error(err)
		}
		if _, locked := IsPrivate(data); locked {
			return
		}
		key, err := ParsePrivate(data, nil)
		if err != nil && !errors.Is(err, ErrFile) && !errors.Is(err, ErrPassphrase) {
			t.Error(err)
		}
		if rsaKey, ok := key.(*rsa.PrivateKey); ok && rsaKey.Validate() != nil {
			t.Error("a key that does not fit itself")
		}
	})
}
