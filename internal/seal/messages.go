package seal

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

// Errors that callers decide on.
var (
	// ErrIntegrity: not the bytes that were sealed. A wrong passphrase of a
	// message cannot be told from a changed message, so it is this error too.
	ErrIntegrity = errors.New("message is damaged, or was not sealed with this key or passphrase")
	// ErrRecipient: the message is sealed to somebody else.
	ErrRecipient = errors.New("message is sealed to another key")
	// ErrSigner: not signed by the one who must have signed it.
	ErrSigner = errors.New("message is not signed by the expected key")
)

// errNotOpened ends go-crypto's asking for further passphrases.
var errNotOpened = errors.New("the passphrase opens nothing")

// maxMessage bounds what is opened; the largest packet payload has about 30 KB.
const maxMessage = 1 << 20

// cheapS2K is for random keys of 256 bits, which stretching cannot improve.
func cheapS2K() *s2k.Config {
	return &s2k.Config{S2KMode: s2k.IteratedSaltedS2K, Hash: crypto.SHA256, S2KCount: 65536}
}

// Encrypt seals plain to one key and, with a signer, signs it inside. The
// result is a binary message (RFC 4880, section 11.3).
func Encrypt(plain []byte, to *PublicKey, signer *PrivateKey, now time.Time) ([]byte, error) {
	var signing *openpgp.Entity
	cfg := config(now)
	if signer != nil {
		signing = signer.entity
	}
	// go-crypto refuses a key made in the future; with a clock that was set
	// back since, the key's own date is the better guess.
	if made := to.entity.PrimaryKey.CreationTime; now.Before(made) {
		cfg = config(made)
	}
	var out bytes.Buffer
	w, err := openpgp.Encrypt(&out, []*openpgp.Entity{to.entity}, signing, &openpgp.FileHints{IsBinary: true}, cfg)
	if err := finish(w, err, plain); err != nil {
		return nil, fmt.Errorf("seal: encrypt to %s: %w", to.Fingerprint(), err)
	}
	return out.Bytes(), nil
}

func finish(w io.WriteCloser, err error, plain []byte) error {
	if err != nil {
		return err
	}
	if _, err := w.Write(plain); err != nil {
		return err
	}
	return w.Close()
}

// Decrypt opens a message sealed to key. With signedBy, a message that this
// key did not sign is refused. Nothing is returned before all of it was
// authenticated.
func Decrypt(message []byte, key *PrivateKey, signedBy *PublicKey) ([]byte, error) {
	return decrypt(message, key, signedBy, readConfig())
}

func decrypt(message []byte, key *PrivateKey, signedBy *PublicKey, cfg *packet.Config) ([]byte, error) {
	if err := checkKeyMessage(bytes.NewReader(message)); err != nil {
		return nil, err
	}
	ring := openpgp.EntityList{key.entity}
	if signedBy != nil && signedBy.entity != key.entity {
		ring = append(ring, signedBy.entity)
	}
	md, err := openpgp.ReadMessage(bytes.NewReader(message), ring, nil, cfg)
	if err != nil {
		if md == nil && errors.Is(err, pgperrors.ErrKeyIncorrect) {
			return nil, ErrRecipient
		}
		return nil, fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	plain, err := readAll(md)
	if err != nil {
		return nil, err
	}
	if signedBy == nil {
		return plain, nil
	}
	if !md.IsSigned || md.SignedBy == nil || md.SignatureError != nil || md.SignedBy.Entity != signedBy.entity {
		clear(plain)
		return nil, fmt.Errorf("%w %s", ErrSigner, signedBy.Fingerprint())
	}
	return plain, nil
}

// EncryptPassphrase seals plain under a passphrase that a person carries: a
// slow key derivation, in ASCII armor, as `gpg -d` reads it.
func EncryptPassphrase(plain, passphrase []byte, now time.Time) ([]byte, error) {
	binary, err := encryptSymmetric(plain, passphrase, strongS2K(), now)
	if err != nil {
		return nil, err
	}
	return armoredMessage(binary)
}

const messageType = "PGP MESSAGE"

func armoredMessage(binary []byte) ([]byte, error) {
	return armored(messageType, func(w io.Writer) error {
		_, err := w.Write(binary)
		return err
	})
}

// EncryptText is Encrypt without a signer, in ASCII armor, for a file that `gpg
// -d` reads.
func EncryptText(plain []byte, to *PublicKey, now time.Time) ([]byte, error) {
	binary, err := Encrypt(plain, to, nil, now)
	if err != nil {
		return nil, err
	}
	return armoredMessage(binary)
}

// DecryptText opens what EncryptText sealed, or gpg to that key.
func DecryptText(text []byte, key *PrivateKey) ([]byte, error) {
	binary, err := dearmorMessage(text)
	if err != nil {
		return nil, err
	}
	return Decrypt(binary, key, nil)
}

// Kind is what opens a message.
type Kind int

// Kinds of MessageKind.
const (
	NoMessage Kind = iota
	ToKey
	UnderPassphrase       // in armor
	UnderPassphraseBinary // the same without armor
)

// MessageKind says what opens a message, by its first packet; NoMessage when it
// is none.
func MessageKind(text []byte) Kind {
	if tag, _, err := readHeader(bytes.NewReader(text)); err == nil && tag == tagPassphraseSession {
		return UnderPassphraseBinary
	}
	if len(text) > 2*maxMessage || !bytes.HasPrefix(text, []byte("-----BEGIN "+messageType)) {
		return NoMessage
	}
	block, err := armor.Decode(bytes.NewReader(text))
	if err != nil {
		return NoMessage
	}
	switch tag, _, err := readHeader(block.Body); {
	case err == nil && tag == tagKeySession:
		return ToKey
	case err == nil && tag == tagPassphraseSession:
		return UnderPassphrase
	}
	return NoMessage
}

// EncryptKey seals plain under a random 256-bit key, whose lower-case hex is
// the message's passphrase. The result is a binary message.
func EncryptKey(plain, key []byte, now time.Time) ([]byte, error) {
	passphrase := hex.AppendEncode(nil, key)
	defer clear(passphrase)
	return encryptSymmetric(plain, passphrase, cheapS2K(), now)
}

func encryptSymmetric(plain, passphrase []byte, stretch *s2k.Config, now time.Time) ([]byte, error) {
	cfg := config(now)
	cfg.S2KConfig = stretch
	var out bytes.Buffer
	w, err := openpgp.SymmetricallyEncrypt(&out, passphrase, &openpgp.FileHints{IsBinary: true}, cfg)
	if err := finish(w, err, plain); err != nil {
		return nil, fmt.Errorf("seal: encrypt under a passphrase: %w", err)
	}
	return out.Bytes(), nil
}

// DecryptKey opens what EncryptKey sealed.
func DecryptKey(message, key []byte) ([]byte, error) {
	passphrase := hex.AppendEncode(nil, key)
	defer clear(passphrase)
	return decryptSymmetric(message, passphrase)
}

// DecryptPassphrase opens what EncryptPassphrase sealed.
func DecryptPassphrase(text, passphrase []byte) ([]byte, error) {
	binary, err := dearmorMessage(text)
	if err != nil {
		return nil, err
	}
	return decryptSymmetric(binary, passphrase)
}

func dearmorMessage(text []byte) ([]byte, error) {
	if len(text) > 2*maxMessage {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrIntegrity, 2*maxMessage)
	}
	block, err := armor.Decode(bytes.NewReader(text))
	if err != nil || block.Type != messageType {
		return nil, fmt.Errorf("%w: no armored message", ErrIntegrity)
	}
	binary, err := io.ReadAll(block.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: armor: %w", ErrIntegrity, err)
	}
	return binary, nil
}

func decryptSymmetric(message, passphrase []byte) ([]byte, error) {
	if err := checkPassphraseMessage(bytes.NewReader(message)); err != nil {
		return nil, err
	}
	asked := false
	md, err := openpgp.ReadMessage(bytes.NewReader(message), nil, func([]openpgp.Key, bool) ([]byte, error) {
		if asked {
			return nil, errNotOpened
		}
		asked = true
		return passphrase, nil
	}, readConfig())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	return readAll(md)
}

func readConfig() *packet.Config { return limited(timeless()) }

func limited(cfg *packet.Config) *packet.Config {
	limit := int64(maxMessage)
	cfg.MaxDecompressedMessageSize = &limit
	return cfg
}

// readAll reads to the end, where the modification detection code is checked.
func readAll(md *openpgp.MessageDetails) ([]byte, error) {
	plain := make([]byte, 0, 16<<10)
	for {
		if len(plain) > maxMessage {
			clear(plain)
			return nil, fmt.Errorf("%w: longer than %d bytes", ErrIntegrity, maxMessage)
		}
		if len(plain) == cap(plain) {
			grown := make([]byte, len(plain), 2*cap(plain))
			copy(grown, plain)
			clear(plain)
			plain = grown
		}
		n, err := md.UnverifiedBody.Read(plain[len(plain):cap(plain)])
		plain = plain[:len(plain)+n]
		if err == io.EOF {
			return plain, nil
		}
		if err != nil {
			clear(plain[:cap(plain)])
			return nil, fmt.Errorf("%w: %w", ErrIntegrity, err)
		}
	}
}

// PassphraseWriter seals what is written to it under a passphrase, as a binary
// message of any length to w. Close ends the message; it does not close w.
func PassphraseWriter(w io.Writer, passphrase []byte, now time.Time) (io.WriteCloser, error) {
	sealed, err := openpgp.SymmetricallyEncrypt(w, passphrase, &openpgp.FileHints{IsBinary: true}, config(now))
	if err != nil {
		return nil, fmt.Errorf("seal: encrypt under a passphrase: %w", err)
	}
	return sealed, nil
}

// PassphraseReader opens what PassphraseWriter sealed. What it gives is not
// authenticated before it has returned io.EOF: use nothing of it until then.
func PassphraseReader(r io.Reader, passphrase []byte) (io.Reader, error) {
	var start bytes.Buffer
	if err := checkPassphraseMessage(io.TeeReader(r, &start)); err != nil {
		return nil, err
	}
	asked := false
	md, err := openpgp.ReadMessage(io.MultiReader(&start, r), nil, func([]openpgp.Key, bool) ([]byte, error) {
		if asked {
			return nil, errNotOpened
		}
		asked = true
		return passphrase, nil
	}, timeless())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	return md.UnverifiedBody, nil
}
