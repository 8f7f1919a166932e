package content

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/aead/serpent"
	"github.com/dgryski/go-camellia"
	"golang.org/x/crypto/twofish" //nolint:staticcheck // volumes use it
	"golang.org/x/crypto/xts"
	"lukechampine.com/adiantum"
)

// sectorCipher decrypts one sector in place; number is its IV's.
type sectorCipher func(sector []byte, number uint64)

type blockCipher func(key []byte) (cipher.Block, error)

var blockCiphers = map[string]blockCipher{
	"aes": aes.NewCipher, "camellia": camellia.New, "serpent": serpent.NewCipher,
	"twofish": func(key []byte) (cipher.Block, error) { return twofish.NewCipher(key) },
}

// newCipher knows the ciphers that package luks admits, but for LRW, which no library has, and XTS under IVs of more than 64
// bits (ESSIV), which none takes. Errors: ErrCipher, or that the key has no length that the cipher takes.
func newCipher(name string, key []byte) (c sectorCipher, err error) {
	algorithm, mode, _ := strings.Cut(name, "-")
	block := blockCiphers[algorithm]
	switch {
	case algorithm == "xchacha12,aes" && mode == "adiantum-plain64" && len(key) == adiantumKey:
		return wide(adiantum.New(key)), nil
	case algorithm == "xchacha20,aes" && mode == "adiantum-plain64" && len(key) == adiantumKey:
		return wide(adiantum.New20(key)), nil
	case block == nil:
		return nil, fmt.Errorf("%w: %q with a key of %d bytes", ErrCipher, name, len(key))
	}
	switch mode {
	case "xts-plain64":
		c, err = newXTS(block, key, 1<<64-1)
	case "xts-plain":
		c, err = newXTS(block, key, 1<<32-1)
	case "cbc-plain64":
		c, err = newCBC(block, key, func(iv []byte, n uint64) { binary.LittleEndian.PutUint64(iv, n) })
	case "cbc-plain":
		c, err = newCBC(block, key, func(iv []byte, n uint64) { binary.LittleEndian.PutUint32(iv, uint32(n)) })
	case "cbc-benbi":
		c, err = newCBC(block, key, func(iv []byte, n uint64) { binary.BigEndian.PutUint64(iv[8:], n<<5+1) }) // the cipher block's number, from 1
	case "cbc-essiv:sha256":
		c, err = newESSIV(block, key)
	default:
		return nil, fmt.Errorf("%w: %q", ErrCipher, name)
	}
	if err != nil {
		return nil, fmt.Errorf("content: %s with a key of %d bytes: %w", name, len(key), err)
	}
	return c, nil
}

func newXTS(block blockCipher, key []byte, mask uint64) (sectorCipher, error) {
	c, err := xts.NewCipher(block, key)
	if err != nil {
		return nil, err
	}
	return func(sector []byte, n uint64) { c.Decrypt(sector, sector, n&mask) }, nil
}

func newCBC(block blockCipher, key []byte, setIV func(iv []byte, number uint64)) (sectorCipher, error) {
	b, err := block(key)
	if err != nil {
		return nil, err
	}
	return func(sector []byte, n uint64) {
		iv := make([]byte, b.BlockSize())
		setIV(iv, n)
		cipher.NewCBCDecrypter(b, iv).CryptBlocks(sector, sector)
	}, nil
}

// newESSIV encrypts the sector's number with the key's hash.
func newESSIV(block blockCipher, key []byte) (sectorCipher, error) {
	salt := sha256.Sum256(key)
	defer clear(salt[:])
	b, err := block(salt[:])
	if err != nil {
		return nil, err
	}
	return newCBC(block, key, func(iv []byte, n uint64) {
		binary.LittleEndian.PutUint64(iv, n)
		b.Encrypt(iv, iv)
	})
}

const adiantumKey, adiantumTweak = 32, 32

// decrypter is what hbsh.HBSH is here.
type decrypter interface {
	Decrypt(block, tweak []byte) []byte
}

func wide(c decrypter) sectorCipher {
	return func(sector []byte, n uint64) {
		tweak := make([]byte, adiantumTweak)
		binary.LittleEndian.PutUint64(tweak, n)
		copy(sector, c.Decrypt(sector, tweak))
	}
}
