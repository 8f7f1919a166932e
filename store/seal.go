package store

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"strconv"

	"golang.org/x/crypto/chacha20poly1305"
)

// KeySize is the length of a store key in bytes.
const KeySize = chacha20poly1305.KeySize

// sealer seals the values of one schema under one store key.
//
// A sealed value is a random 24-byte nonce and the XChaCha20-Poly1305 text
// (draft-irtf-cfrg-xchacha-03). The additional data is
// "mandos-escrow store " schema NUL bucket NUL key, so a value opens only
// where it was put.
type sealer struct {
	aead   cipher.AEAD
	index  []byte
	prefix string
}

func newSealer(key []byte, schema int) (*sealer, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("store: a store key is %d bytes, not %d", KeySize, len(key))
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	index, err := hkdf.Key(sha256.New, key, nil, "mandos-escrow store index", sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("store: derive index key: %w", err)
	}
	return &sealer{aead: aead, index: index, prefix: "mandos-escrow store " + strconv.Itoa(schema) + "\x00"}, nil
}

func (s *sealer) place(bucket string, key []byte) []byte {
	place := make([]byte, 0, len(s.prefix)+len(bucket)+1+len(key))
	place = append(append(place, s.prefix...), bucket...)
	return append(append(place, 0), key...)
}

func (s *sealer) seal(bucket string, key, value []byte) []byte {
	nonce := make([]byte, s.aead.NonceSize(), s.aead.NonceSize()+len(value)+s.aead.Overhead())
	_, _ = rand.Read(nonce) // never fails: crypto/rand ends the program instead
	return s.aead.Seal(nonce, nonce, value, s.place(bucket, key))
}

func (s *sealer) open(bucket string, key, sealed []byte) ([]byte, error) {
	size := s.aead.NonceSize()
	if len(sealed) < size {
		return nil, ErrKey
	}
	value, err := s.aead.Open(nil, sealed[:size], sealed[size:], s.place(bucket, key))
	if err != nil {
		return nil, ErrKey
	}
	return value, nil
}

// blind is the 32-byte key by which a record is found in a bucket by something
// that is not to stand in the file in clear, or is not ours to trust as a key:
// a name, a volume's UUID, the hash of a secret.
func (s *sealer) blind(bucket, text string) []byte {
	mac := hmac.New(sha256.New, s.index)
	mac.Write([]byte(bucket + "\x00" + text))
	return mac.Sum(nil)
}
