package seal

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

const (
	compactSalt = 8
	// CompactRandom is how many random bytes EncryptCompact takes: the salt, and
	// what sealed data begin with.
	CompactRandom = compactSalt + 16
	// Octets of RFC 4880, sections 9.4 and 3.7.1.3.
	hashSHA256  = 8
	countStrong = 0xff // strongS2K's
)

// EncryptCompact seals plain under a passphrase as a binary message that is as
// short as can be: the stretched passphrase is itself the session key. random
// has CompactRandom bytes, which must never be used for another plain: the same
// input gives the same message.
func EncryptCompact(plain, passphrase, random []byte, created time.Time) ([]byte, error) {
	if len(random) != CompactRandom {
		return nil, fmt.Errorf("seal: encrypt: %d random bytes, not %d", len(random), CompactRandom)
	}
	salt := random[:compactSalt]
	key := make([]byte, packet.CipherAES256.KeySize())
	defer clear(key)
	s2k.Iterated(key, sha256.New(), passphrase, salt, strongS2K().S2KCount)
	var out bytes.Buffer
	out.Write([]byte{0xC0 | tagPassphraseSession, minPassphraseSession, 4, byte(packet.CipherAES256), iteratedSalted, hashSHA256})
	out.Write(salt)
	out.WriteByte(countStrong)
	cfg := config(created)
	cfg.Rand = bytes.NewReader(random[compactSalt:])
	sealed, err := packet.SerializeSymmetricallyEncrypted(&out, packet.CipherAES256, false, packet.CipherSuite{}, key, cfg)
	if err != nil {
		return nil, fmt.Errorf("seal: encrypt: %w", err)
	}
	w, err := packet.SerializeLiteral(sealed, true, "", uint32(created.Unix()))
	if err := finish(w, err, plain); err != nil {
		return nil, fmt.Errorf("seal: encrypt: %w", err)
	}
	return out.Bytes(), nil
}

// DecryptCompact opens what EncryptCompact sealed.
func DecryptCompact(message, passphrase []byte) ([]byte, error) {
	return decryptSymmetric(message, passphrase)
}
