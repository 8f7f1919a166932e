package volumekey

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/certkey"
)

// fixtureKey is the private key of the certificate in testdata.
func fixtureKey() *rsa.PrivateKey {
	return must(certkey.ParsePrivate(must(os.ReadFile("testdata/key.pem")), nil)).(*rsa.PrivateKey)
}

// volumeKeyProgram runs Debian's volume_key on a LUKS1 volume, which is the only
// kind that it can open.
type volumeKeyProgram struct {
	t   *testing.T
	dir string
}

func newProgram(t *testing.T) *volumeKeyProgram {
	dir, err := os.MkdirTemp("", "vk") // a short path: gpg-agent's socket stands in it
	if err != nil {
		t.Fatal(err)
	}
	v := &volumeKeyProgram{t, dir}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", dir, "--kill", "all").Run()
		os.RemoveAll(dir)
	})
	v.run("", "truncate", "-s", "4M", "disk")
	v.run("disk passphrase", "cryptsetup", "luksFormat", "-q", "--type", "luks1", "--uuid", testUUID, "--pbkdf-force-iterations", "1000", "-s", "512", "--key-file", "-", "disk")
	if err := os.WriteFile(filepath.Join(dir, "cert.pem"), must(os.ReadFile("testdata/cert.pem")), 0o600); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *volumeKeyProgram) run(stdin, name string, args ...string) string {
	v.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Stdin = v.dir, strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "GNUPGHOME="+v.dir, "HOME="+v.dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		v.t.Fatalf("%s %v: %v: %s", name, args, err, stderr.Bytes())
	}
	return string(out)
}

// save makes a packet; secrets end with a NUL each.
func (v *volumeKeyProgram) save(secrets string, args ...string) []byte {
	v.t.Helper()
	file := filepath.Join(v.dir, "packet")
	v.run(secrets, "volume_key", append([]string{"-b", "--save", "disk"}, args...)...)
	defer os.Remove(file)
	return must(os.ReadFile(file))
}

// TestDebian opens what Debian's volume_key wrote, in every format that it can,
// and finds in it what volume_key itself says.
func TestDebian(t *testing.T) {
	v := newProgram(t)
	const disk, both = "disk passphrase\x00", "disk passphrase\x00packet passphrase\x00packet passphrase\x00"
	volumeKey := v.run("disk passphrase", "cryptsetup", "luksDump", "-q", "--dump-volume-key", "--key-file", "-", "disk")
	_, hexKey, _ := strings.Cut(volumeKey, "MK dump:")
	hexKey = strings.Join(strings.Fields(hexKey), "")
	keys := Keys{Private: fixtureKey(), Passphrase: []byte("packet passphrase")}
	for name, c := range map[string]struct {
		format  Format
		secrets string
		args    []string
	}{
		"certificate":      {Certificate, disk, []string{"-c", "cert.pem", "--output-format", "asymmetric"}},
		"certificate wrap": {CertificateWrap, disk, []string{"-c", "cert.pem"}},
		"passphrase":       {Passphrase, both, nil},
		"clear":            {Clear, disk, []string{"--unencrypted-yes-really"}},
	} {
		outputs := []string{"--output-data-encryption-key", "--output-passphrase"}
		if c.format == CertificateWrap { // as Anaconda does it; a new slot takes volume_key seconds
			outputs = append(outputs, "--create-random-passphrase")
		}
		for _, output := range outputs {
			data := v.save(c.secrets, append([]string{output, "packet"}, c.args...)...)
			p, err := Parse(data)
			if err != nil || p.Format != c.format {
				t.Fatalf("%s %s: %v, %v", name, output, p, err)
			}
			if r := p.Recipient; r != nil && (r.Issuer != "CN=Escrow,O=Firm" || r.Serial != "66051") {
				t.Errorf("%s: recipient %+v", name, r)
			}
			o, err := p.Open(keys, now)
			if err != nil {
				t.Fatalf("%s %s: %v", name, output, err)
			}
			checkDebian(t, v, o, output, hexKey)
			if f := p.Facts; (f != nil) != (c.format == Clear || c.format == CertificateWrap) || f != nil && f.UUID != testUUID {
				t.Errorf("%s: in clear: %+v", name, f)
			}
		}
	}
}

func checkDebian(t *testing.T, v *volumeKeyProgram, o *escrow.Opened, output, hexKey string) {
	t.Helper()
	if o.Header.Volume.UUID != testUUID || o.Header.Machine == "" {
		t.Errorf("%+v", o.Header)
	}
	switch output {
	case "--output-data-encryption-key":
		if !bytes.Contains(o.Plain, []byte("\nvolume-key: "+hexKey+"\n")) || o.VolumeKey.Cipher != "aes-xts-plain64" || len(hexKey) != 128 {
			t.Errorf("%s, and not %s", o.Plain, hexKey)
		}
	case "--output-passphrase":
		if string(o.Passphrase.Passphrase) != "disk passphrase" || o.Passphrase.Slot != 0 {
			t.Errorf("%s", o.Plain)
		}
	case "--create-random-passphrase":
		slot := v.run(string(o.Passphrase.Passphrase), "cryptsetup", "open", "-v", "--test-passphrase", "--key-file", "-", "disk")
		if o.Passphrase.Slot < 1 || !strings.Contains(slot, "Key slot "+string(rune('0'+o.Passphrase.Slot))+" unlocked") {
			t.Errorf("slot %d: %s", o.Passphrase.Slot, slot)
		}
	}
}

// TestDebianDamaged: under a passphrase every changed byte and every wrong
// passphrase is found, also right after the right one. To a certificate a changed
// byte may give another key, and Unauthenticated says so.
func TestDebianDamaged(t *testing.T) {
	v := newProgram(t)
	data := v.save("disk passphrase\x00p\x00p\x00", "-o", "packet")
	p := must(Parse(data))
	must(p.Open(Keys{Passphrase: []byte("p")}, now)).Wipe()
	for _, wrong := range []string{"q", "p\n"} {
		if _, err := p.Open(Keys{Passphrase: []byte(wrong)}, now); !errors.Is(err, escrow.ErrIntegrity) {
			t.Errorf("passphrase %q: %v", wrong, err)
		}
	}
	if _, err := p.Open(Keys{}, now); !errors.Is(err, ErrKey) {
		t.Errorf("no passphrase: %v", err)
	}
	for i := len(magic) + 1 + 20; i < len(data); i += 149 { // each costs a whole key derivation
		changed := bytes.Clone(data)
		changed[i] ^= 1
		if o, err := must(Parse(changed)).Open(Keys{Passphrase: []byte("p")}, now); !errors.Is(err, escrow.ErrIntegrity) {
			t.Errorf("byte %d: %v, %v", i, o, err)
		}
	}
}

// TestCertificateWithoutIntegrity: as the format is, a changed byte of ciphertext
// is another key, so nothing that is opened of it is proved.
func TestCertificateWithoutIntegrity(t *testing.T) {
	data := must(os.ReadFile("testdata/certificate.pkt"))
	right := must(must(Parse(data)).Open(Keys{Private: fixtureKey()}, now))
	changed, refused := 0, 0
	for i := range data {
		flipped := bytes.Clone(data)
		flipped[i] ^= 1
		p, err := Parse(flipped)
		if err != nil {
			refused++
			continue
		}
		o, err := p.Open(Keys{Private: fixtureKey()}, now)
		if err != nil {
			refused++
		} else if !bytes.Equal(o.VolumeKey.Key, right.VolumeKey.Key) {
			if changed++; len(p.Unauthenticated()) == 0 {
				t.Errorf("byte %d: another key, and nothing says that it is not authenticated", i)
			}
		}
	}
	if changed == 0 || refused == 0 {
		t.Errorf("%d changed the key, %d were refused", changed, refused)
	}
}
