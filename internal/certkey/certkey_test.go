package certkey

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
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
// left out: their own text says how much time they cost.
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
