package seal

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestOtherImplementation: Sequoia, which shares no code with what is used
// here or with GnuPG, opens a sealed message and finds its signature.
func TestOtherImplementation(t *testing.T) {
	recipientFlag, signerFlag := sqFlags(t)
	machine, stranger := generate(t, "machine"), generate(t, "stranger")
	plain := []byte("exactly these bytes\x00\n")
	message, err := Encrypt(plain, machine.Public(), machine, now)
	if err != nil {
		t.Fatal(err)
	}
	files := t.TempDir()
	file := func(name string, content []byte, err error) string {
		path := filepath.Join(files, name)
		if err == nil {
			err = os.WriteFile(path, content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := machine.Armor()
	keyFile := file("key", key, err)
	certificate, err := machine.Public().Armor()
	certificateFile := file("certificate", certificate, err)
	other, err := stranger.Public().Armor()
	otherFile := file("other", other, err)

	open := func(signer string) ([]byte, error) {
		cmd := exec.Command("sq", "decrypt", recipientFlag, keyFile, signerFlag, signer)
		cmd.Env = append(os.Environ(), "HOME="+files)
		cmd.Stdin = bytes.NewReader(message)
		return cmd.Output()
	}
	if opened, err := open(certificateFile); err != nil || !bytes.Equal(opened, plain) {
		t.Errorf("%q, %v", opened, err)
	}
	if opened, err := open(otherFile); err == nil {
		t.Errorf("%q, as signed by somebody else", opened)
	}
}

// sqFlags are named one way up to 0.3x, and another since.
func sqFlags(t *testing.T) (recipient, signer string) {
	t.Helper()
	help, err := exec.Command("sq", "decrypt", "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("sq is missing: apt-get install sq: %v %s", err, help)
	}
	for _, flags := range [][2]string{{"--recipient-key", "--signer-cert"}, {"--recipient-file", "--signer-file"}} {
		if strings.Contains(string(help), flags[0]) && strings.Contains(string(help), flags[1]) {
			return flags[0], flags[1]
		}
	}
	t.Fatalf("sq decrypt has other flags: %s", help)
	return "", ""
}
