package seal

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestRecipients: keys that people made with gpg, which expire.
func TestRecipients(t *testing.T) {
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	gpg := func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command("gpg", append([]string{"--homedir", home, "--batch", "--quiet", "--passphrase", ""}, args...)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %v: %v: %s", args, err, stderr.String())
		}
		return out
	}
	gpg("--quick-gen-key", "expires", "default", "default", "2y")
	gpg("--quick-gen-key", "weak", "rsa1024", "sign,encrypt", "never")
	gpg("--quick-gen-key", "signs", "ed25519", "sign", "never")
	gpg("--quick-gen-key", "encrypts", "rsa2048", "encrypt", "never")
	key := gpg("--armor", "--export", "expires")
	today := time.Now()
	to, err := ParseRecipient(key, today)
	if err != nil {
		t.Fatal(err)
	}
	message, err := EncryptText([]byte("plain"), to, today)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ParsePrivate(gpg("--armor", "--export-secret-keys", "expires"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := DecryptText(message, private); err != nil || string(plain) != "plain" {
		t.Errorf("%q, %v", plain, err)
	}
	if _, err := ParseRecipient(key, today.AddDate(3, 0, 0)); !errors.Is(err, ErrKey) {
		t.Errorf("expired: %v", err)
	}
	if err := private.checkAt(today.AddDate(3, 0, 0)); err != nil {
		t.Errorf("the private half of an expired key does not open any more: %v", err)
	}
	to, err = ParseRecipient(gpg("--armor", "--export", "encrypts"), today)
	if err != nil {
		t.Fatal(err)
	}
	if message, err = EncryptText([]byte("plain"), to, today); err != nil {
		t.Fatal(err)
	}
	if private, err = ParsePrivate(gpg("--armor", "--export-secret-keys", "encrypts"), nil); err != nil {
		t.Fatal(err)
	}
	if plain, err := DecryptText(message, private); err != nil || string(plain) != "plain" {
		t.Errorf("a key for encryption alone: %q, %v", plain, err)
	}
	for _, name := range []string{"weak", "signs"} {
		if _, err := ParseRecipient(gpg("--armor", "--export", name), today); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
