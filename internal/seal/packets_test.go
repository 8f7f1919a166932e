package seal

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

// soon fails the test if f derives something costly.
func soon(t *testing.T, f func() error) error {
	t.Helper()
	start := time.Now()
	err := f()
	if took := time.Since(start); took > 100*time.Millisecond {
		t.Errorf("took %v", took)
	}
	return err
}

func framed(tag byte, body []byte) []byte {
	return append([]byte{0xC0 | tag, 255, 0, 0, byte(len(body) >> 8), byte(len(body))}, body...)
}

// argon2Session is a session key under a passphrase that costs 2 GiB to try.
func argon2Session() []byte {
	body := append([]byte{4, byte(packet.CipherAES256), byte(s2k.Argon2S2K)}, make([]byte, 16)...)
	return framed(tagPassphraseSession, append(body, 1, 1, 21))
}

func TestMessageOfAnotherForm(t *testing.T) {
	key, content, plain := generate(t, "m"), make([]byte, 32), []byte("plain")
	underKey, err := EncryptKey(plain, content, now)
	if err != nil {
		t.Fatal(err)
	}
	toKey, err := Encrypt(plain, key.Public(), nil, now)
	if err != nil {
		t.Fatal(err)
	}
	session, sealed := underKey[:2+underKey[1]], underKey[2+underKey[1]:]
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	old := join([]byte{0x80 | tagPassphraseSession<<2, session[1]}, session[2:], sealed)
	if got, err := DecryptKey(old, content); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("header of the old format: %q, %v", got, err)
	}
	marker, literal := framed(10, []byte("PGP")), framed(11, []byte("b\x00\x00\x00\x00\x00plain"))
	keySession := toKey[:2+toKey[1]]
	for name, message := range map[string][]byte{
		"two session keys":     join(session, session, sealed),
		"Argon2 second":        join(session, argon2Session(), sealed),
		"Argon2 first":         join(argon2Session(), session, sealed),
		"Argon2 alone":         join(argon2Session(), sealed),
		"marker first":         join(marker, session, sealed),
		"marker between":       join(session, marker, sealed),
		"to a key too":         join(session, toKey),
		"no session key":       sealed,
		"no data":              session,
		"literal":              literal,
		"literal after":        join(session, literal),
		"version 2 data":       join(session, framed(tagSealed, []byte{2})),
		"empty data":           join(session, []byte{0xC0 | tagSealed, 0}),
		"session key in parts": join([]byte{0xC0 | tagPassphraseSession, 0xE3}, session[2:10], []byte{session[1] - 8}, session[10:], sealed),
		"session key, no end":  join([]byte{0x80 | tagPassphraseSession<<2 | 3}, session[2:], sealed),
		"many recipients":      join(bytes.Repeat(keySession, maxRecipients), toKey),
		"passphrase second":    join(keySession, session, toKey[2+toKey[1]:]),
		"passphrase first":     join(session, keySession, toKey[2+toKey[1]:]),
	} {
		t.Run(name, func(t *testing.T) {
			for opener, open := range map[string]func() error{
				"key":        func() error { _, err := Decrypt(message, key, nil); return err },
				"content":    func() error { _, err := DecryptKey(message, content); return err },
				"passphrase": func() error { _, err := PassphraseReader(bytes.NewReader(message), []byte("p")); return err },
			} {
				if err := soon(t, open); !errors.Is(err, ErrIntegrity) {
					t.Errorf("%s: %v", opener, err)
				}
			}
		})
	}
}

// endless counts what was read of it.
type endless struct {
	start *bytes.Reader
	read  int
}

func (e *endless) Read(p []byte) (int, error) {
	e.read += len(p)
	if e.start.Len() > 0 {
		return e.start.Read(p)
	}
	return len(p), nil
}

func TestPassphraseReaderRefusesWithoutReadingOn(t *testing.T) {
	r := &endless{start: bytes.NewReader(argon2Session())}
	if _, err := PassphraseReader(r, []byte("p")); !errors.Is(err, ErrIntegrity) || r.read > 100 {
		t.Errorf("%v after %d bytes", err, r.read)
	}
	message, err := EncryptKey([]byte("plain"), make([]byte, 32), now)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 + int(message[1]) + 3 {
		if _, err := PassphraseReader(bytes.NewReader(message[:i]), []byte("p")); !errors.Is(err, ErrIntegrity) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
}

// FuzzPackets: what is accepted as a start of a message, go-crypto reads as the
// same two packets; no input is refused without a name, or panics.
func FuzzPackets(f *testing.F) {
	message, err := EncryptKey([]byte("plain"), make([]byte, 32), now)
	if err != nil {
		f.Fatal(err)
	}
	key, err := Generate("m", now)
	if err != nil {
		f.Fatal(err)
	}
	toKey, err := Encrypt([]byte("plain"), key.Public(), nil, now)
	if err != nil {
		f.Fatal(err)
	}
	text, err := key.Armor()
	if err != nil {
		f.Fatal(err)
	}
	binary, err := dearmor(text)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{message, toKey, binary, argon2Session(), {0xC3, 0xFF}, {0x8F}, {}} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := checkKeyPackets(data); err != nil && !errors.Is(err, ErrKey) {
			t.Errorf("key: %v", err)
		}
		if err := checkKeyMessage(bytes.NewReader(data)); err != nil && !errors.Is(err, ErrIntegrity) {
			t.Errorf("message to a key: %v", err)
		}
		if err := checkPassphraseMessage(bytes.NewReader(data)); err != nil {
			if !errors.Is(err, ErrIntegrity) {
				t.Errorf("message under a passphrase: %v", err)
			}
			return
		}
		r := bytes.NewReader(data)
		first, _ := packet.Read(r) // it may know no such hash
		second, err := packet.Read(r)
		_, session := first.(*packet.SymmetricKeyEncrypted)
		if _, sealed := second.(*packet.SymmetricallyEncrypted); !session || !sealed || err != nil {
			t.Errorf("go-crypto reads %T and %T, %v", first, second, err)
		}
	})
}
