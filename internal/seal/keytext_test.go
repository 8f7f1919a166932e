package seal

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

// argon2Key has another S2K in a locked secret key packet, which go-crypto
// would only make by deriving from it: 2 GiB for 16 bytes of salt.
func argon2Key(t testing.TB, key *packet.PrivateKey) []byte {
	t.Helper()
	public, err := packetBody(key.PublicKey.Serialize)
	if err != nil {
		t.Fatal(err)
	}
	const usageAEAD, ocb = 253, 2
	body := append(bytes.Clone(public), usageAEAD, byte(packet.CipherAES256), ocb, byte(s2k.Argon2S2K))
	body = append(body, make([]byte, 16)...) // salt
	body = append(body, 1, 1, 21)            // passes, lanes, memory
	body = append(body, make([]byte, 15)...) // nonce
	body = append(body, make([]byte, 48)...) // key
	tag := byte(tagSecretKey)
	if key.IsSubkey {
		tag = tagSecretSubkey
	}
	return framed(tag, body)
}

// rekeyed is an armored private key whose secret packets of a kind were made anew.
func rekeyed(t testing.TB, entity *openpgp.Entity, primary, sub func(*packet.PrivateKey) []byte) []byte {
	t.Helper()
	text, err := armored(openpgp.PrivateKeyType, func(w io.Writer) error {
		out := bytes.NewBuffer(primary(entity.PrivateKey))
		for _, identity := range entity.Identities {
			if err := errors.Join(identity.UserId.Serialize(out), identity.SelfSignature.Serialize(out)); err != nil {
				return err
			}
		}
		for _, subkey := range entity.Subkeys {
			out.Write(sub(subkey.PrivateKey))
			if err := subkey.Sig.Serialize(out); err != nil {
				return err
			}
		}
		_, err := out.WriteTo(w)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestKeyUnderArgon2IsRefusedBeforeItCosts(t *testing.T) {
	key := generate(t, "m")
	text, err := key.ArmorProtected([]byte("p"))
	if err != nil {
		t.Fatal(err)
	}
	locked, err := parseEntity(text)
	if err != nil {
		t.Fatal(err)
	}
	same := func(key *packet.PrivateKey) []byte {
		var out bytes.Buffer
		if err := key.Serialize(&out); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	argon2 := func(key *packet.PrivateKey) []byte { return argon2Key(t, key) }
	// go-crypto reads what a public subkey packet has too much as further packets
	hidden := func(key *packet.PrivateKey) []byte {
		body, err := packetBody(key.PublicKey.Serialize)
		if err != nil {
			t.Fatal(err)
		}
		out := bytes.NewBuffer(bytes.Clone(body))
		if err := locked.Subkeys[0].Sig.Serialize(out); err != nil {
			t.Fatal(err)
		}
		out.Write(argon2Key(t, key))
		return framed(tagPublicSubkey, out.Bytes())
	}
	change := func(offset int, value byte) func(*packet.PrivateKey) []byte {
		return func(key *packet.PrivateKey) []byte {
			public, err := packetBody(key.PublicKey.Serialize)
			if err != nil {
				t.Fatal(err)
			}
			whole, err := packetBody(key.Serialize)
			if err != nil {
				t.Fatal(err)
			}
			whole = bytes.Clone(whole)
			whole[len(public)+offset] = value
			return framed(tagSecretKey, whole)
		}
	}
	if _, err := ParsePrivate(rekeyed(t, locked, same, same), []byte("p")); err != nil {
		t.Fatalf("unchanged: %v", err)
	}
	for name, text := range map[string][]byte{
		"primary key":        rekeyed(t, locked, argon2, same),
		"subkey":             rekeyed(t, locked, same, argon2),
		"hidden subkey":      rekeyed(t, locked, same, hidden),
		"checksum usage 255": rekeyed(t, locked, change(0, 255), same),
		"3DES":               rekeyed(t, locked, change(1, 2), same),
		"salted S2K":         rekeyed(t, locked, change(2, 1), same),
	} {
		t.Run(name, func(t *testing.T) {
			err := soon(t, func() error { _, err := ParsePrivate(text, []byte("p")); return err })
			if !errors.Is(err, ErrKey) || !strings.Contains(err.Error(), "protected by usage") {
				t.Errorf("ParsePrivate: %v", err)
			}
			if _, err := Protected(text); !errors.Is(err, ErrKey) {
				t.Errorf("Protected: %v", err)
			}
		})
	}
}

func TestKeyOfManyDerivations(t *testing.T) {
	key := generate(t, "m")
	for len(key.entity.Subkeys) < maxLocked {
		if err := key.entity.AddEncryptionSubkey(config(now)); err != nil {
			t.Fatal(err)
		}
	}
	cfg := config(now)
	cfg.S2KConfig = cheapS2K()
	if err := key.entity.EncryptPrivateKeys([]byte("p"), cfg); err != nil {
		t.Fatal(err)
	}
	text, err := key.Armor()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParsePrivate(text, []byte("p")); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
}

func TestTextWithMoreThanOneKey(t *testing.T) {
	text, err := generate(t, "m").Armor()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := dearmor(text)
	if err != nil {
		t.Fatal(err)
	}
	block := func(binary []byte) []byte {
		text, err := armored(openpgp.PrivateKeyType, func(w io.Writer) error { _, err := w.Write(binary); return err })
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	bare, _, _ := strings.Cut(string(text), "-----END ")
	for name, text := range map[string][]byte{
		"two blocks":          append(bytes.Clone(text), text...),
		"two blocks, one end": append([]byte(bare), text...),
		"text after it":       append(bytes.Clone(text), "x"...),
		"no end":              []byte(bare),
		"two keys":            block(append(bytes.Clone(binary), binary...)),
		"compressed data":     block(append(bytes.Clone(binary), framed(8, append([]byte{0}, binary...))...)),
		"passphrase session":  block(append(framed(3, []byte{4, 9, 3, 8, 0, 0, 0, 0, 0, 0, 0, 0, 96}), binary...)),
		"packet in parts":     block(append(bytes.Clone(binary), 0xC0|tagUserID, 0xE0, 'x', 0)),
		"packet without end":  block(append(bytes.Clone(binary), 0x80|tagUserID<<2|3, 'x')),
		"nothing":             block(nil),
	} {
		if _, err := ParsePrivate(text, nil); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range binary {
		if _, err := ParsePrivate(block(binary[:i]), nil); !errors.Is(err, ErrKey) && !errors.Is(err, ErrMismatch) {
			t.Errorf("%v, when cut to %d of %d bytes", err, i, len(binary))
		}
	}
	if _, err := ParsePrivate(append(text, " \r\n\n"...), nil); err != nil {
		t.Errorf("blank lines after it: %v", err)
	}
}

// TestKeyMadeByGPG: as `gpg --export-secret-keys` writes it.
func TestKeyMadeByGPG(t *testing.T) {
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	gpg := func(stdin string, args ...string) []byte {
		t.Helper()
		cmd := exec.Command("gpg", append([]string{"--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "horse"}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %v: %v", args, err)
		}
		return out
	}
	for name, kind := range map[string]string{
		"rsa":   "Key-Type: RSA\nKey-Length: 2048\nSubkey-Type: RSA\nSubkey-Length: 2048\n",
		"25519": "Key-Type: EDDSA\nKey-Curve: ed25519\nSubkey-Type: ECDH\nSubkey-Curve: cv25519\n",
	} {
		gpg(kind+"Name-Real: "+name+"\nPassphrase: horse\n%commit\n", "--generate-key")
		key, err := ParsePrivate(gpg("", "--armor", "--export-secret-keys", name), []byte("horse"))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		sealed := gpg("plain", "--trust-model", "always", "-r", name, "-e")
		if got, err := Decrypt(sealed, key, nil); err != nil || string(got) != "plain" {
			t.Errorf("%s: message: %q, %v", name, got, err)
		}
	}
	carried := gpg("plain", "--armor", "--cipher-algo", "AES256", "-c")
	if got, err := DecryptPassphrase(carried, []byte("horse")); err != nil || string(got) != "plain" {
		t.Errorf("under a passphrase: %q, %v", got, err)
	}
}
