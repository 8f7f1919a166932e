package seal

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func generate(t *testing.T, name string) *PrivateKey {
	t.Helper()
	key, err := Generate(name, now)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestMessageToKey(t *testing.T) {
	alice, mallory := generate(t, "alice"), generate(t, "mallory")
	plain := []byte("a passphrase")
	sealed, err := Encrypt(plain, alice.Public(), alice, now)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Decrypt(sealed, alice, alice.Public())
	if err != nil || !bytes.Equal(opened, plain) {
		t.Fatalf("got %q, %v", opened, err)
	}
	if _, err := Decrypt(sealed, mallory, nil); !errors.Is(err, ErrRecipient) {
		t.Errorf("another key: %v", err)
	}
	forged, err := Encrypt(plain, alice.Public(), mallory, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decrypt(forged, alice, alice.Public()); !errors.Is(err, ErrSigner) {
		t.Errorf("signed by another: %v", err)
	}
	unsigned, err := Encrypt(plain, alice.Public(), nil, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decrypt(unsigned, alice, alice.Public()); !errors.Is(err, ErrSigner) {
		t.Errorf("not signed: %v", err)
	}
}

func TestEveryFlipAndEveryTruncationIsRefusedOrHarmless(t *testing.T) {
	key, plain := generate(t, "m"), []byte("exactly these bytes")
	content := bytes.Repeat([]byte{7}, 32)
	toKey, err := Encrypt(plain, key.Public(), key, now)
	if err != nil {
		t.Fatal(err)
	}
	underKey, err := EncryptKey(plain, content, now)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		message []byte
		open    func([]byte) ([]byte, error)
	}{
		"to a key":    {toKey, func(m []byte) ([]byte, error) { return Decrypt(m, key, key.Public()) }},
		"under a key": {underKey, func(m []byte) ([]byte, error) { return DecryptKey(m, content) }},
	} {
		t.Run(name, func(t *testing.T) {
			for i := range c.message {
				changed := bytes.Clone(c.message)
				changed[i] ^= 1
				if got, err := c.open(changed); err == nil && !bytes.Equal(got, plain) {
					t.Fatalf("byte %d flipped: other plaintext without error", i)
				}
				if got, err := c.open(c.message[:i]); err == nil {
					t.Fatalf("cut to %d bytes: opened to %q", i, got)
				}
			}
		})
	}
}

func TestProtectedKey(t *testing.T) {
	key, passphrase := generate(t, "master"), []byte("correct horse battery staple")
	text, err := key.ArmorProtected(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	if locked, err := Protected(text); err != nil || !locked {
		t.Fatalf("Protected: %v, %v", locked, err)
	}
	opened, err := ParsePrivate(text, passphrase)
	if err != nil || opened.Public().Fingerprint() != key.Public().Fingerprint() {
		t.Fatalf("open: %v", err)
	}
	if _, err := ParsePrivate(text, []byte("wrong")); !errors.Is(err, ErrPassphrase) {
		t.Errorf("wrong passphrase: %v", err)
	}
	if _, err := ParsePrivate(text, nil); !errors.Is(err, ErrPassphrase) {
		t.Errorf("no passphrase: %v", err)
	}
}

// TestStockGPG: what this package writes, stock gpg reads, and the reverse.
func TestStockGPG(t *testing.T) {
	gpg := func(stdin []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.Command("gpg", append([]string{"--batch", "--quiet", "--pinentry-mode", "loopback"}, args...)...)
		cmd.Stdin = bytes.NewReader(stdin)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %v: %v: %s", args, err, stderr.String())
		}
		return out
	}
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GNUPGHOME", home)
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	key, passphrase, plain := generate(t, "master"), []byte("correct horse battery staple"), []byte("secret\nbytes\n")

	protected, err := key.ArmorProtected(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	gpg(protected, "--import")
	sealed, err := Encrypt(plain, key.Public(), key, now)
	if err != nil {
		t.Fatal(err)
	}
	if got := gpg(sealed, "--passphrase", string(passphrase), "-d"); !bytes.Equal(got, plain) {
		t.Errorf("gpg opened a sealed message to %q", got)
	}
	theirs := gpg(plain, "--trust-model", "always", "-r", key.Public().Fingerprint(), "--compress-algo", "none", "-e")
	if got, err := Decrypt(theirs, key, nil); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("message made by gpg: %q, %v", got, err)
	}
	file := filepath.Join(home, "p")
	if err := os.WriteFile(file, []byte("one-time"), 0o600); err != nil {
		t.Fatal(err)
	}
	carried, err := EncryptPassphrase(plain, []byte("one-time"), now)
	if err != nil {
		t.Fatal(err)
	}
	if got := gpg(carried, "--passphrase-file", file, "-d"); !bytes.Equal(got, plain) {
		t.Errorf("gpg opened a message under a passphrase to %q", got)
	}
	if got, err := DecryptPassphrase(carried, []byte("one-time")); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("own message under a passphrase: %q, %v", got, err)
	}
	if _, err := DecryptPassphrase(carried, []byte("other")); !errors.Is(err, ErrIntegrity) {
		t.Errorf("wrong one-time password: %v", err)
	}
}

func TestClockAt1970(t *testing.T) {
	key := generate(t, "m")
	sealed, err := Encrypt([]byte("x"), key.Public(), key, time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decrypt(sealed, key, key.Public()); err != nil {
		t.Fatal(err)
	}
}

// Two commands of one process may seal at the same time; go-crypto writes to
// the settings that it is given.
func TestSealingAtTheSameTime(t *testing.T) {
	key, content := generate(t, "m"), bytes.Repeat([]byte{7}, 32)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if _, err := EncryptKey([]byte("x"), content, now); err != nil {
				t.Error(err)
			}
			if _, err := Encrypt([]byte("x"), key.Public(), key, now); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}
