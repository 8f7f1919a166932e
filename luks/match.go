package luks

import (
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"github.com/jzelinskie/whirlpool"
	"golang.org/x/crypto/blake2b"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/ripemd160" //nolint:staticcheck // LUKS1 volumes use it
)

// Enrolled is what is remembered of a volume when it is enrolled, and must still hold at boot, verify and restore. Digest is
// the SHA-256, in hex, of the lines "luks-digest", hash, iterations, salt in hex and value in hex, each ended by a newline.
type Enrolled struct {
	UUID       string `json:"uuid"`
	Type       string `json:"type"`
	Cipher     string `json:"cipher"`
	KeyBits    int    `json:"key_bits"`
	Offset     int64  `json:"offset"`
	SectorSize int    `json:"sector_size"`
	Digest     string `json:"digest"`
}

// Enrolled returns what to remember of a volume.
func (h *Header) Enrolled() Enrolled {
	d := h.Digest
	sum := sha256.Sum256(fmt.Appendf(nil, "luks-digest\n%s\n%d\n%x\n%x\n", d.Hash, d.Iterations, d.Salt, d.Value))
	return Enrolled{
		UUID: h.UUID, Type: h.Type, Cipher: h.Cipher, KeyBits: h.KeyBits,
		Offset: h.Offset, SectorSize: h.SectorSize, Digest: hex.EncodeToString(sum[:]),
	}
}

// Match compares a volume with what was enrolled. ErrMismatch names every field that differs, with both values. A LUKS2 header
// without any keyslot does not tell its key size, which then is not compared: the digest stands for it.
func Match(h *Header, e Enrolled) error {
	now := h.Enrolled()
	if now.KeyBits == 0 {
		now.KeyBits = e.KeyBits
	}
	var wrong []string
	for _, f := range []struct {
		name     string
		now, was any
	}{
		{"UUID", now.UUID, e.UUID},
		{"type", now.Type, e.Type},
		{"cipher", now.Cipher, e.Cipher},
		{"key bits", now.KeyBits, e.KeyBits},
		{"data offset", now.Offset, e.Offset},
		{"sector size", now.SectorSize, e.SectorSize},
		{"volume key digest", now.Digest, e.Digest},
	} {
		if f.now != f.was {
			wrong = append(wrong, fmt.Sprintf("%s is %v, enrolled was %v", f.name, f.now, f.was))
		}
	}
	if len(wrong) != 0 {
		return fmt.Errorf("%w: %s", ErrMismatch, strings.Join(wrong, "; "))
	}
	return nil
}

// SlotMaterial returns the SHA-256 over what decides whether a passphrase opens a keyslot: its description and its area. With
// it one can see, without any secret, that a keyslot is still the one that was proved. Priority does not count.
func SlotMaterial(r io.ReaderAt, h *Header, slot int) ([32]byte, error) {
	s, ok := h.Slot(slot)
	if !ok {
		return [32]byte{}, fmt.Errorf("luks: keyslot %d is not active", slot)
	}
	area := make([]byte, s.Size)
	if n, err := r.ReadAt(area, s.Offset); n < len(area) {
		return [32]byte{}, fmt.Errorf("luks: read keyslot %d: %w", slot, err)
	}
	k := s.KDF
	sum := sha256.New()
	sum.Write(fmt.Appendf(nil, "luks-slot\n%s\n%d\n%t\n%d\n%s\n%s\n%d\n%d\n%d\n%d\n%x\n%s\n%s\n%d\n%d\n%d\n", h.Type, s.Number, s.Bound, s.KeyBits,
		k.Type, k.Hash, k.Iterations, k.Time, k.Memory, k.CPUs, k.Salt, s.AFHash, s.Cipher, s.CipherBits, s.Offset, s.Size))
	sum.Write(area)
	return [32]byte(sum.Sum(nil)), nil
}

// VerifyVolumeKey proves a volume key by the header's digest, or returns ErrVolumeKey. It takes up to about a second.
func (h *Header) VerifyVolumeKey(key []byte) error {
	if len(key) == 0 || h.KeyBits != 0 && len(key)*8 != h.KeyBits {
		return fmt.Errorf("%w: it has %d bits, the volume's has %d", ErrVolumeKey, len(key)*8, h.KeyBits)
	}
	newHash := hashes(h.Digest.Hash)
	if newHash == nil {
		return fmt.Errorf("%w: digest hash %q", ErrUnsupported, h.Digest.Hash)
	}
	sum, err := pbkdf2.Key(newHash, string(key), h.Digest.Salt, h.Digest.Iterations, len(h.Digest.Value))
	if err != nil {
		return fmt.Errorf("luks: digest: %w", err)
	}
	if subtle.ConstantTimeCompare(sum, h.Digest.Value) != 1 {
		return ErrVolumeKey
	}
	return nil
}

// hashes returns the hash of that name, one of hashSizes or otherNames.
func hashes(name string) func() hash.Hash {
	switch hashName(name) {
	case "sha1":
		return sha1.New
	case "sha224":
		return sha256.New224
	case "sha256":
		return sha256.New
	case "sha384":
		return sha512.New384
	case "sha512":
		return sha512.New
	case "sha512-224":
		return sha512.New512_224
	case "sha512-256":
		return sha512.New512_256
	case "sha3-224":
		return func() hash.Hash { return sha3.New224() }
	case "sha3-256":
		return func() hash.Hash { return sha3.New256() }
	case "sha3-384":
		return func() hash.Hash { return sha3.New384() }
	case "sha3-512":
		return func() hash.Hash { return sha3.New512() }
	case "ripemd160":
		return ripemd160.New
	case "whirlpool":
		return whirlpool.New
	case "sm3":
		return sm3.New
	case "blake2b-512":
		return func() hash.Hash { return must(blake2b.New512(nil)) }
	case "blake2s-256":
		return func() hash.Hash { return must(blake2s.New256(nil)) }
	}
	return nil
}

// must: unkeyed BLAKE2 cannot fail.
func must(h hash.Hash, err error) hash.Hash {
	if err != nil {
		panic(err)
	}
	return h
}
