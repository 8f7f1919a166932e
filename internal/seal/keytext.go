package seal

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

const (
	// maxKeySize bounds an armored key; ours have 1 KB, RSA 4096 pairs 7 KB.
	maxKeySize = 64 << 10
	// maxLocked bounds the derivations of one key, as every subkey has its own.
	maxLocked = 8
	// usageSHA1 says that a secret key is encrypted with a SHA-1 checksum (RFC
	// 4880, 5.5.3), as GnuPG and this package write it.
	usageSHA1 = 254
)

func parseEntity(text []byte) (*openpgp.Entity, error) {
	binary, err := dearmor(text)
	if err != nil {
		return nil, err
	}
	defer clear(binary)
	if err := checkKeyPackets(binary); err != nil {
		return nil, err
	}
	list, err := openpgp.ReadKeyRing(bytes.NewReader(binary))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("%w: %d keys in one text, one is needed", ErrKey, len(list))
	}
	return list[0], checkLocks(list[0])
}

// dearmor demands that the text ends with its one block.
func dearmor(text []byte) ([]byte, error) {
	if len(text) > maxKeySize {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrKey, maxKeySize)
	}
	block, err := armor.Decode(bytes.NewReader(text))
	if err != nil || block.Type != openpgp.PublicKeyType && block.Type != openpgp.PrivateKeyType {
		return nil, fmt.Errorf("%w: no armored key", ErrKey)
	}
	_, rest, ended := bytes.Cut(text, []byte("-----END "+block.Type+"-----"))
	if !ended || len(bytes.TrimSpace(rest)) > 0 || bytes.Count(text, []byte("-----BEGIN ")) != 1 {
		return nil, fmt.Errorf("%w: not one armored block, or something follows it", ErrKey)
	}
	binary, err := io.ReadAll(block.Body)
	if err != nil {
		clear(binary)
		return nil, fmt.Errorf("%w: armor: %w", ErrKey, err)
	}
	return binary, nil
}

// checkKeyPackets demands whole packets of the kinds that a key has (RFC 4880,
// 11.1 and 11.2), and nothing else: go-crypto looks into others.
func checkKeyPackets(binary []byte) error {
	r := bytes.NewReader(binary)
	for {
		tag, size, err := readHeader(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrKey, err)
		}
		switch tag {
		case tagSignature, tagSecretKey, tagPublicKey, tagSecretSubkey, tagUserID, tagPublicSubkey, tagUserAttribute:
		default:
			return fmt.Errorf("%w: packet %d does not belong into a key", ErrKey, tag)
		}
		if size < 0 || size > int64(r.Len()) {
			return fmt.Errorf("%w: packet %d is cut, or comes in parts", ErrKey, tag)
		}
		if _, err := r.Seek(size, io.SeekCurrent); err != nil {
			return fmt.Errorf("%w: %w", ErrKey, err)
		}
	}
}

// checkLocks demands of every private key that it is not protected, or in the
// way of GnuPG. It judges the keys that will be unlocked, not their text, so
// that no text can be read in two ways.
func checkLocks(entity *openpgp.Entity) error {
	keys := []*packet.PrivateKey{entity.PrivateKey}
	for _, sub := range entity.Subkeys {
		keys = append(keys, sub.PrivateKey)
	}
	locked := 0
	for _, key := range keys {
		if key == nil {
			continue
		}
		if key.Dummy() {
			return fmt.Errorf("%w: private half of %X is kept elsewhere", ErrKey, key.Fingerprint)
		}
		if !key.Encrypted {
			continue
		}
		if locked++; locked > maxLocked {
			return fmt.Errorf("%w: more than %d private keys under a passphrase", ErrKey, maxLocked)
		}
		if err := checkProtection(key); err != nil {
			return err
		}
	}
	return nil
}

// checkProtection looks at what follows the public half in a secret key packet
// (RFC 4880, 5.5.3): usage, cipher, S2K.
func checkProtection(key *packet.PrivateKey) error {
	if key.Version != 4 {
		return fmt.Errorf("%w: private key of version %d under a passphrase", ErrKey, key.Version)
	}
	whole, err := packetBody(key.Serialize)
	if err != nil {
		return err
	}
	public, err := packetBody(key.PublicKey.Serialize)
	if err != nil {
		return err
	}
	if len(whole) < len(public)+3 || !bytes.HasPrefix(whole, public) {
		return fmt.Errorf("%w: secret key packet without protection", ErrKey)
	}
	usage, cipher, s2k := whole[len(public)], packet.CipherFunction(whole[len(public)+1]), whole[len(public)+2]
	if usage != usageSHA1 || s2k != iteratedSalted || cipher != packet.CipherAES128 && cipher != packet.CipherAES256 {
		return fmt.Errorf("%w: protected by usage %d, cipher %d, S2K %d, not by usage %d, AES-128 or AES-256, and an iterated and salted S2K", ErrKey, usage, cipher, s2k, usageSHA1)
	}
	return nil
}

func packetBody(serialize func(io.Writer) error) ([]byte, error) {
	var out bytes.Buffer
	if err := serialize(&out); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	if _, _, err := readHeader(&out); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return out.Bytes(), nil
}
