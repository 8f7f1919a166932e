package escrow

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/internal/seal"
)

// gpgHome is a gpg of its own that has the private keys, protected by nothing.
func gpgHome(t *testing.T, keys ...*seal.PrivateKey) {
	t.Helper()
	if _, err := exec.LookPath("gpg"); err != nil {
		t.Fatal("gpg is missing: install the package gnupg")
	}
	home, err := os.MkdirTemp("", "gpg") // a short path: the agent's socket lies in it
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GNUPGHOME", home)
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		_ = os.RemoveAll(home) // the agent removes its sockets at the same time
	})
	for _, k := range keys {
		run(t, must(k.Armor()), "gpg", "-q", "--batch", "--import")
	}
}

func run(t *testing.T, stdin []byte, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, stderr.String())
	}
	return out
}

func writeFile(t *testing.T, name string, data []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// In twenty years: gpg, sed, base64, sha256sum, and the recipe of the document.
func TestOpenWithGPG(t *testing.T) {
	f := newFixture(1, 2)
	data := f.make(passphrasePayload(), volumeKeyPayload())
	p := must(Parse(data))
	gpgHome(t, f.keys[p.Trustees[1]])
	file := writeFile(t, "packet", data)
	for _, name := range payloadNames {
		want := must(p.Open(name, f.shares(t, p, name, 1))).Plain
		got := run(t, nil, "sh", "testdata/open-with-gpg.sh", file, name, "2")
		if !bytes.Equal(got, want) {
			t.Errorf("%s: %q", name, got)
		}
	}
	wrong := writeFile(t, "wrong", edit(data, `^machine-name: a`, "machine-name: b"))
	if out, err := exec.Command("sh", "testdata/open-with-gpg.sh", wrong, ForPassphrase, "2").Output(); err == nil || len(out) > 0 {
		t.Errorf("a changed header: %q, %v", out, err)
	}
}

func TestCombineWithShell(t *testing.T) {
	f := newFixture(3, 5)
	data := f.make(passphrasePayload())
	p := must(Parse(data))
	keys := []*seal.PrivateKey{f.keys[p.Trustees[0]], f.keys[p.Trustees[2]], f.keys[p.Trustees[4]]}
	gpgHome(t, keys...)
	args := []string{"testdata/combine-shares.sh"}
	for _, k := range keys {
		_, message, err := p.Share(ForPassphrase, k.Public().Fingerprint())
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, writeFile(t, "envelope", run(t, message, "gpg", "-q", "-d")))
	}
	contentKey := run(t, nil, "bash", args...)
	message := writeFile(t, "message", p.Payloads[0].Message)
	got := run(t, contentKey, "gpg", "-q", "--batch", "--pinentry-mode", "loopback", "--passphrase-fd", "0", "-d", message)
	want := must(p.Open(ForPassphrase, f.shares(t, p, ForPassphrase, 2, 3, 4))).Plain
	if !bytes.Equal(got, want) {
		t.Errorf("%q", got)
	}
	for name, bad := range map[string][]string{"too few": args[:3], "one twice": {args[0], args[1], args[1], args[2]}} {
		if out, err := exec.Command("bash", bad...).Output(); err == nil || len(out) > 0 {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
}

// Stand-alone packets, by gpg alone.
func TestStandAloneWithGPG(t *testing.T) {
	want := standAlone(passphrasePayload(), fingerprinted())
	gpgHome(t, testKeys().trustees[2])
	text := must(SealRecipient(want, testKeys().trustees[2].Public(), now))
	if got := run(t, text, "gpg", "-q", "--batch", "-d"); !bytes.Equal(got, want.Plain) {
		t.Errorf("to a recipient: %q", got)
	}
	file := writeFile(t, "packet", must(SealOffline(want, packetPassphrase, now)))
	if got := run(t, packetPassphrase, "gpg", "-q", "--batch", "--pinentry-mode", "loopback", "--passphrase-fd", "0", "-d", file); !bytes.Equal(got, want.Plain) {
		t.Errorf("under a passphrase: %q", got)
	}
	theirs := run(t, want.Plain, "gpg", "-q", "--batch", "--trust-model", "always", "-r", testKeys().trustees[2].Public().Fingerprint(), "-e", "-a")
	if got, err := OpenRecipient(theirs, testKeys().trustees[2]); err != nil || !bytes.Equal(got.Plain, want.Plain) {
		t.Errorf("what gpg sealed: %v", err)
	}
}

// A packet to a certificate with openssl and gpg, by the recipe of the document.
func TestCertificateWithOpenSSL(t *testing.T) {
	gpgHome(t)
	want := standAlone(passphrasePayload(), fingerprinted())
	for name, h := range certificateHolders() {
		der := must(x509.MarshalPKCS8PrivateKey(h.key))
		key := writeFile(t, "key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		text := must(SealCertificate(want, h.certificate, now))
		if got := run(t, nil, "sh", "testdata/open-certificate-packet.sh", writeFile(t, "packet", text), key); !bytes.Equal(got, want.Plain) {
			t.Errorf("%s: %q", name, got)
		}
		wrong := writeFile(t, "wrong", edit(text, `^machine-name: a`, "machine-name: b"))
		if out, err := exec.Command("sh", "testdata/open-certificate-packet.sh", wrong, key).Output(); err == nil || len(out) > 0 {
			t.Errorf("%s, changed in clear: %q, %v", name, out, err)
		}
	}
}

// A sheet from its typed lines, and from the code, with base32 and gpg.
func TestSheetWithGPG(t *testing.T) {
	gpgHome(t)
	passphrase := writeFile(t, "passphrase", packetPassphrase)
	options := []string{"--batch", "--pinentry-mode", "loopback", "--passphrase-file", passphrase}
	for name, payload := range map[string]Payload{ForPassphrase: passphrasePayload(), ForVolumeKey: volumeKeyPayload()} {
		s := must(SealSheet(standAlone(payload), name, packetPassphrase))
		want := must(OpenSheet(s.Message, packetPassphrase)).Plain
		lines := Lines(s.Message)
		slices.Reverse(lines)
		script := append([]string{"testdata/open-sheet.sh", writeFile(t, "lines", []byte(strings.Join(lines, "\n")+"\n"))}, options...)
		if got := run(t, nil, "sh", script...); !bytes.Equal(got, want) {
			t.Errorf("%s: %q", name, got)
		}
		lines[1] = lines[1][:4] + "7" + lines[1][5:]
		script[1] = writeFile(t, "lines", []byte(strings.Join(lines, "\n")+"\n"))
		cmd := exec.Command("sh", script...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if out, err := cmd.Output(); err == nil || len(out) > 0 || !strings.Contains(stderr.String(), fmt.Sprintf("line %d is", len(lines)-1)) {
			t.Errorf("%s, mistyped: %q, %s", name, out, stderr.String())
		}
		scanned := QRText(s.Message)
		scanned += strings.Repeat("=", (8-len(scanned)%8)%8)
		message := run(t, []byte(scanned), "base32", "-d")
		if got := run(t, message, "gpg", append(append([]string{"-q"}, options...), "-d")...); !bytes.Equal(got, want) {
			t.Errorf("%s, the code: %q", name, got)
		}
	}
}

// The document shows the very scripts that the tests run, and its example of
// the field's arithmetic is right.
func TestDocument(t *testing.T) {
	doc := string(must(os.ReadFile("../docs/packet-format.md")))
	for _, name := range []string{"open-with-gpg.sh", "combine-shares.sh", "open-certificate-packet.sh", "open-sheet.sh"} {
		if script := string(must(os.ReadFile("testdata/" + name))); !strings.Contains(doc, "\n```sh\n"+script+"```\n") {
			t.Errorf("docs/packet-format.md does not show testdata/%s as it is", name)
		}
	}
	for _, line := range []string{
		"share: 3e01\n", "share: 8602\n", "secret: 56\n",
	} {
		if !strings.Contains(doc, line) {
			t.Errorf("docs/packet-format.md lacks %q", line)
		}
	}
	if got, err := combineBytes([]*Part{{Data: []byte{0x3e, 1}}, {Data: []byte{0x86, 2}}}); err != nil || !bytes.Equal(got, []byte{0x56}) {
		t.Errorf("the example gives %x, %v", got, err)
	}
}
