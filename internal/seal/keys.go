// Package seal is OpenPGP for this program: key pairs, messages to a key,
// messages under a passphrase. It is the only importer of go-crypto, and keeps
// to what GnuPG 2.2 reads (RFC 4880 with Curve25519, no AEAD, no compression),
// so that what is sealed today opens with stock tools in twenty years.
//
// It is not a format of ours: what is inside a message is the caller's. It
// imports no other package of this program.
package seal

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

// Errors that callers decide on.
var (
	ErrKey        = errors.New("not a usable OpenPGP key")
	ErrPassphrase = errors.New("wrong passphrase")
	ErrMismatch   = errors.New("private key does not belong to the public key")
)

// PublicKey is a key that messages can be sealed to.
type PublicKey struct{ entity *openpgp.Entity }

// PrivateKey opens what was sealed to its public half.
type PrivateKey struct{ entity *openpgp.Entity }

// strongS2K is the highest count that RFC 4880 can name, about 0.3 s. It is
// made anew for each use, because go-crypto writes to it.
func strongS2K() *s2k.Config {
	return &s2k.Config{S2KMode: s2k.IteratedSaltedS2K, Hash: crypto.SHA256, S2KCount: 65011712}
}

func config(now time.Time) *packet.Config {
	return &packet.Config{
		DefaultHash:            crypto.SHA256,
		DefaultCipher:          packet.CipherAES256,
		DefaultCompressionAlgo: packet.CompressionNone,
		Algorithm:              packet.PubKeyAlgoEdDSA,
		Curve:                  packet.Curve25519,
		Time:                   func() time.Time { return now },
		S2KConfig:              strongS2K(),
	}
}

// timeless judges keys and signatures at a date after all of them: keys are
// pinned by fingerprint and never expire, and a clock at 1970 must not lock a
// machine out.
func timeless() *packet.Config { return config(time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)) }

// Generate makes a version 4 pair, EdDSA to sign and Curve25519 to decrypt,
// with name as its user ID.
func Generate(name string, now time.Time) (*PrivateKey, error) {
	entity, err := openpgp.NewEntity(name, "", "", config(now))
	if err != nil {
		return nil, fmt.Errorf("seal: generate: %w", err)
	}
	return &PrivateKey{entity}, nil
}

// Public returns the public half.
func (k *PrivateKey) Public() *PublicKey { return &PublicKey{k.entity} }

// Fingerprint is the key's fingerprint as gpg prints it: 40 upper-case hex
// digits for a version 4 key.
func (p *PublicKey) Fingerprint() string {
	return strings.ToUpper(hex.EncodeToString(p.entity.PrimaryKey.Fingerprint))
}

// Armor returns the public key in ASCII armor.
func (p *PublicKey) Armor() ([]byte, error) {
	return armored(openpgp.PublicKeyType, p.entity.Serialize)
}

// Armor returns the private key in ASCII armor, not protected: for a file that
// only its owner reads, as mandos-keygen(8) writes seckey.txt.
func (k *PrivateKey) Armor() ([]byte, error) {
	return armored(openpgp.PrivateKeyType, func(w io.Writer) error {
		return k.entity.SerializePrivateWithoutSigning(w, timeless())
	})
}

// ArmorProtected returns the private key under a passphrase (iterated and
// salted SHA-256, count 65,011,712; AES-256). k itself stays as it is.
func (k *PrivateKey) ArmorProtected(passphrase []byte) ([]byte, error) {
	plain, err := k.Armor()
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	locked, err := parseEntity(plain)
	if err != nil {
		return nil, err
	}
	if err := locked.EncryptPrivateKeys(passphrase, timeless()); err != nil {
		return nil, fmt.Errorf("seal: protect private key: %w", err)
	}
	return armored(openpgp.PrivateKeyType, func(w io.Writer) error {
		return locked.SerializePrivateWithoutSigning(w, timeless())
	})
}

func armored(kind string, write func(io.Writer) error) ([]byte, error) {
	var out bytes.Buffer
	out.Grow(16 << 10) // so that no copy of a private key stays in an outgrown array
	enc, err := armor.Encode(&out, kind, nil)
	if err == nil {
		err = write(enc)
	}
	if err == nil {
		err = enc.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("seal: encode key: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// Binary returns the key without armor, for records.
func (p *PublicKey) Binary() ([]byte, error) {
	text, err := p.Armor()
	if err != nil {
		return nil, err
	}
	return dearmor(text)
}

// ParsePublicBinary is ParsePublic for what Binary returned.
func ParsePublicBinary(data []byte) (*PublicKey, error) {
	text, err := armored(openpgp.PublicKeyType, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return nil, err
	}
	return ParsePublic(text)
}

// ParsePublic reads one armored key; a private one is cut to its public half.
// Errors: ErrKey.
func ParsePublic(text []byte) (*PublicKey, error) {
	entity, err := parseEntity(text)
	if err != nil {
		return nil, err
	}
	key := &PublicKey{entity}
	if _, ok := entity.EncryptionKey(timeless().Now()); !ok {
		return nil, fmt.Errorf("%w: %s has no valid subkey for encryption", ErrKey, key.Fingerprint())
	}
	return key, nil
}

// ParseRecipient is ParsePublic for somebody's own key, which may expire later,
// but has not: it can be sealed to now. Errors: ErrKey.
func ParseRecipient(text []byte, now time.Time) (*PublicKey, error) {
	entity, err := parseEntity(text)
	if err != nil {
		return nil, err
	}
	key := &PublicKey{entity}
	sub, ok := entity.EncryptionKey(now)
	if !ok {
		return nil, fmt.Errorf("%w: %s has no subkey for encryption that is valid now: it expired, was revoked, or is only for signing", ErrKey, key.Fingerprint())
	}
	if bits, err := sub.PublicKey.BitLength(); isRSA(sub.PublicKey) && (err != nil || bits < minRSABits) {
		return nil, fmt.Errorf("%w: %s has an RSA subkey of %d bits; at least %d are needed", ErrKey, key.Fingerprint(), bits, minRSABits)
	}
	return key, nil
}

const minRSABits = 2048

func isRSA(key *packet.PublicKey) bool {
	return key.PubKeyAlgo == packet.PubKeyAlgoRSA || key.PubKeyAlgo == packet.PubKeyAlgoRSAEncryptOnly
}

// ParsePrivate reads one armored private key and unlocks it. A nil passphrase
// is for a key that is not protected. The halves are proved to belong together
// before the key is used, so that a public half that somebody overwrote cannot
// make the private one leak (Klima and Rosa, 2001; "Victory by KO", 2022). Its
// protection must be GnuPG's (iterated and salted S2K, AES): that of another, like
// Argon2, is refused before it costs anything. Errors: ErrKey, ErrPassphrase,
// ErrMismatch.
func ParsePrivate(text, passphrase []byte) (*PrivateKey, error) {
	entity, err := parseEntity(text)
	if err != nil {
		return nil, err
	}
	if entity.PrivateKey == nil {
		return nil, fmt.Errorf("%w: no private half", ErrKey)
	}
	if err := checkLock(entity, passphrase != nil); err != nil {
		return nil, err
	}
	if passphrase != nil {
		if err := entity.DecryptPrivateKeys(passphrase); err != nil {
			return nil, fmt.Errorf("%w of key %s", ErrPassphrase, (&PublicKey{entity}).Fingerprint())
		}
	}
	key := &PrivateKey{entity}
	return key, key.check()
}

func checkLock(entity *openpgp.Entity, hasPassphrase bool) error {
	switch locked := entity.PrivateKey.Encrypted; {
	case locked && !hasPassphrase:
		return fmt.Errorf("%w: it is protected, and no passphrase was given", ErrPassphrase)
	case !locked && hasPassphrase:
		return fmt.Errorf("%w: it is not protected by a passphrase", ErrKey)
	}
	return nil
}

// Protected reports whether text is a private key under a passphrase.
func Protected(text []byte) (bool, error) {
	entity, err := parseEntity(text)
	if err != nil {
		return false, err
	}
	if entity.PrivateKey == nil {
		return false, fmt.Errorf("%w: no private half", ErrKey)
	}
	for _, sub := range entity.Subkeys {
		if sub.PrivateKey == nil || !sub.PrivateKey.Encrypted {
			return false, nil
		}
	}
	return entity.PrivateKey.Encrypted, nil
}

func (k *PrivateKey) check() error { return k.checkAt(time.Now()) }

// checkAt proves the halves at a time when the key was valid: one that expired
// still opens what was sealed before.
func (k *PrivateKey) checkAt(now time.Time) error {
	if _, valid := k.entity.EncryptionKey(now); !valid {
		now = k.entity.PrimaryKey.CreationTime
		for _, sub := range k.entity.Subkeys {
			if made := sub.PublicKey.CreationTime; made.After(now) {
				now = made
			}
		}
	}
	probe := make([]byte, 32)
	rand.Read(probe)
	signer, sender := k, k.Public()
	if _, signs := k.entity.SigningKey(now); !signs { // somebody's own key may be for encryption alone
		signer, sender = nil, nil
	}
	sealed, err := Encrypt(probe, k.Public(), signer, now)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMismatch, err)
	}
	opened, err := decrypt(sealed, k, sender, limited(config(now)))
	if err != nil || !bytes.Equal(opened, probe) {
		return fmt.Errorf("%w: %s", ErrMismatch, k.Public().Fingerprint())
	}
	return nil
}
