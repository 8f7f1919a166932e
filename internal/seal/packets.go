package seal

import (
	"errors"
	"fmt"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// Whoever writes a message or a key chooses what opening it costs: Argon2 may
// ask for terabytes. So what a text consists of is checked here before go-crypto
// derives anything from it.

// Packet tags of RFC 4880, section 4.3.
const (
	tagKeySession        = 1 // session key, encrypted to a public key
	tagSignature         = 2
	tagPassphraseSession = 3 // session key, under a passphrase
	tagSecretKey         = 5
	tagPublicKey         = 6
	tagSecretSubkey      = 7
	tagUserID            = 13
	tagPublicSubkey      = 14
	tagUserAttribute     = 17
	tagSealed            = 18 // data with modification detection code
)

const (
	// iteratedSalted is the one S2K whose cost has a ceiling worth having (RFC
	// 4880, 3.7.1.3): 65,011,712 bytes of hash.
	iteratedSalted = 3
	// maxRecipients bounds the private key operations of one message.
	maxRecipients = 16
	// maxKeySession has room for RSA of 16384 bits.
	maxKeySession = 2100
	// A session key under a passphrase: 4, cipher, S2K of 11 bytes; then, if the
	// passphrase does not give it directly, a cipher and a key of 32 bytes.
	minPassphraseSession, maxPassphraseSession = 13, 13 + 33
)

// unknownSize is the size of a packet that comes in parts, or has no end.
const unknownSize = -1

// readHeader reads a packet header (RFC 4880, section 4.2). The error is io.EOF
// only if there is nothing at all.
func readHeader(r io.Reader) (tag byte, size int64, err error) {
	first, err := readSize(r, 1)
	if err != nil {
		return 0, 0, err
	}
	switch {
	case first&0x80 == 0:
		return 0, 0, errors.New("no packet header")
	case first&0x40 != 0:
		tag = byte(first & 0x3f)
		size, err = readNewSize(r)
	case first&3 == 3:
		return byte(first >> 2 & 0xf), unknownSize, nil
	default:
		tag = byte(first >> 2 & 0xf)
		size, err = readSize(r, 1<<(first&3))
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return tag, size, err
}

func readNewSize(r io.Reader) (int64, error) {
	first, err := readSize(r, 1)
	switch {
	case err != nil || first < 192:
		return first, err
	case first < 224:
		second, err := readSize(r, 1)
		return (first-192)<<8 + second + 192, err
	case first < 255:
		return unknownSize, nil
	}
	return readSize(r, 4)
}

// readSize reads a big-endian number of n bytes, at most 4.
func readSize(r io.Reader, n int) (int64, error) {
	var buf [4]byte
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return 0, err
	}
	var size int64
	for _, b := range buf[:n] {
		size = size<<8 | int64(b)
	}
	return size, nil
}

// readBody reads a packet that must have between least and most bytes.
func readBody(r io.Reader, size, least, most int64) ([]byte, error) {
	if size < least || size > most {
		return nil, fmt.Errorf("a packet of %d bytes, where %d to %d belong", size, least, most)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	return body, nil
}

// checkPassphraseMessage reads the start of a message, up to its ciphertext: it
// must be one version 4 session key packet for AES-256 with an iterated and
// salted S2K (RFC 4880, 5.3), and then the sealed data (5.13).
func checkPassphraseMessage(r io.Reader) error {
	tag, size, err := readHeader(r)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	if tag != tagPassphraseSession {
		return fmt.Errorf("%w: packet %d, where a session key under a passphrase belongs", ErrIntegrity, tag)
	}
	body, err := readBody(r, size, minPassphraseSession, maxPassphraseSession)
	if err != nil {
		return fmt.Errorf("%w: session key: %w", ErrIntegrity, err)
	}
	if body[0] != 4 || packet.CipherFunction(body[1]) != packet.CipherAES256 || body[2] != iteratedSalted {
		return fmt.Errorf("%w: session key of version %d, cipher %d, S2K %d, not AES-256 by an iterated and salted S2K", ErrIntegrity, body[0], body[1], body[2])
	}
	tag, size, err = readHeader(r)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	return checkSealed(r, tag, size)
}

// checkKeyMessage reads the start of a message, up to its ciphertext: version 3
// session keys to public keys (RFC 4880, 5.1), and then the sealed data.
func checkKeyMessage(r io.Reader) error {
	for n := 0; ; n++ {
		tag, size, err := readHeader(r)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrIntegrity, err)
		}
		if n > 0 && tag != tagKeySession {
			return checkSealed(r, tag, size)
		}
		if tag != tagKeySession || n == maxRecipients {
			return fmt.Errorf("%w: not 1 to %d session keys to public keys", ErrIntegrity, maxRecipients)
		}
		body, err := readBody(r, size, 1, maxKeySession)
		if err != nil {
			return fmt.Errorf("%w: session key: %w", ErrIntegrity, err)
		}
		if body[0] != 3 {
			return fmt.Errorf("%w: session key of version %d", ErrIntegrity, body[0])
		}
	}
}

func checkSealed(r io.Reader, tag byte, size int64) error {
	if tag != tagSealed || size == 0 {
		return fmt.Errorf("%w: packet %d, where sealed data belong", ErrIntegrity, tag)
	}
	if version, err := readSize(r, 1); err != nil || version != 1 {
		return fmt.Errorf("%w: sealed data of another version than 1", ErrIntegrity)
	}
	return nil
}
