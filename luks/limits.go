package luks

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Bounds on what a header may ask for. Those on cost are far above what cryptsetup writes with its default of 2 seconds, and
// far below what hangs a boot: the worst admitted keyslot takes about a minute on a slow core.
const (
	MaxRead             = 16 << 20 // bytes read for one header
	MaxArgon2Memory     = 4 << 20  // KiB, that is 4 GiB; and below the memory that is free
	MaxArgon2Time       = 1000     // passes
	MaxArgon2Work       = 1 << 27  // KiB written in all passes together: 128 GiB
	MaxArgon2CPUs       = 4        // cryptsetup writes no more
	MaxIterations       = 50_000_000
	MaxDigestIterations = 4_000_000 // cryptsetup benchmarks it for 1/8 second

	// AnyMemory is what callers of ReadWithin pass that derive no key: only the fixed bound counts then.
	AnyMemory = MaxArgon2Memory<<10 + 1024

	// AnyCost is what callers of ReadWithin pass after whom nobody derives a key: what a keyslot costs is the same to them.
	AnyCost = math.MaxInt64

	stripes     = 4000 // of the anti-forensic splitter: the only number that cryptsetup takes
	saltSize    = 32
	digest1Size = 20 // of a LUKS1 digest, cut from any hash; LUKS2 volumes converted from LUKS1 keep it
	areaAlign   = 4096
	sector      = 512
	maxKeyBytes = 512 // of an unbound keyslot's key
)

// hashSizes are the hashes that a header may name, with their digest lengths in bytes: all that cryptsetup 2.6.1 with OpenSSL
// takes, but for MD4 and MD5, which are broken, and which it refuses itself in LUKS1.
var hashSizes = map[string]int{
	"sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "sha512-224": 28, "sha512-256": 32, "ripemd160": 20, "whirlpool": 64,
	"sha3-224": 28, "sha3-256": 32, "sha3-384": 48, "sha3-512": 64, "blake2b-512": 64, "blake2s-256": 32, "sm3": 32,
}

// otherNames are what OpenSSL calls them as well. It takes all names in any case, and cryptsetup writes what was typed.
var otherNames = map[string]string{
	"sha-1": "sha1", "sha-224": "sha224", "sha-256": "sha256", "sha-384": "sha384", "sha-512": "sha512",
	"sha2-224": "sha224", "sha2-256": "sha256", "sha2-384": "sha384", "sha2-512": "sha512",
	"ripemd-160": "ripemd160", "rmd160": "ripemd160", "blake2b512": "blake2b-512", "blake2s256": "blake2s-256",
}

// hashName is the name that hashSizes has, if it has the hash.
func hashName(written string) string {
	name := strings.ToLower(written)
	if usual, ok := otherNames[name]; ok {
		return usual
	}
	return name
}

// modes are the cipher modes that a header may name, with the key lengths in bytes that go with them. LRW's has a block more
// than the cipher's. Not among them are those under which equal sectors show (ecb, and null for an IV), a rewritten sector
// gives the plaintext away (ctr), the sector's number is not in the IV (random), and the IVs of other systems' volumes.
var modes = map[string][]int{
	"xts-plain64": {32, 48, 64}, "xts-plain": {32, 48, 64}, "xts-essiv:sha256": {32, 48, 64},
	"cbc-essiv:sha256": {16, 24, 32}, "cbc-plain": {16, 24, 32}, "cbc-plain64": {16, 24, 32}, "cbc-benbi": {16, 24, 32},
	"lrw-benbi": {32, 40, 48},
}

// keyLengths returns the key lengths in bytes of an allowed cipher, nothing for any other.
func keyLengths(cipher string) []int {
	switch cipher {
	case "xchacha12,aes-adiantum-plain64", "xchacha20,aes-adiantum-plain64":
		return []int{32}
	}
	name, mode, _ := strings.Cut(cipher, "-")
	switch name {
	case "aes", "serpent", "twofish", "camellia":
		return modes[mode]
	}
	return nil
}

// checkCipher refuses a cipher that is not on the list, or that does not take keys of that many bytes (0: not known).
func checkCipher(where, cipher string, keyBytes int) error {
	if strings.Contains(strings.ToLower(strings.TrimSuffix(cipher, "-null")), "null") { // at the end it is an IV
		return fmt.Errorf("%w: %s: null cipher %q encrypts nothing", ErrUnsupported, where, cipher)
	}
	lengths := keyLengths(cipher)
	if lengths == nil {
		return fmt.Errorf("%w: %s: cipher %q is not one of those allowed", ErrUnsupported, where, cipher)
	}
	if keyBytes != 0 && !slices.Contains(lengths, keyBytes) {
		return fmt.Errorf("%w: %s: cipher %s with a key of %d bytes", ErrDamaged, where, cipher, keyBytes)
	}
	return nil
}

func checkHash(where, hash string) error {
	if _, ok := hashSizes[hashName(hash)]; !ok {
		return fmt.Errorf("%w: %s: hash %q is not one of those allowed", ErrUnsupported, where, hash)
	}
	return nil
}

func checkDigest(where string, d Digest) error {
	if err := checkHash(where, d.Hash); err != nil {
		return err
	}
	if len(d.Salt) != saltSize {
		return fmt.Errorf("%w: %s: salt of %d bytes, must be %d", ErrDamaged, where, len(d.Salt), saltSize)
	}
	if n, size := len(d.Value), hashSizes[hashName(d.Hash)]; n != size && n != digest1Size {
		return fmt.Errorf("%w: %s: digest of %d bytes, %s gives %d", ErrDamaged, where, n, d.Hash, size)
	}
	return checkIterations(where, d.Iterations, MaxDigestIterations)
}

// checkKDF bounds the work of a keyslot. Memory is how much is free, in bytes.
func checkKDF(where string, k KDF, memory int64) error {
	err := checkKDFWithin(where, k, memory)
	if memory == AnyCost && errors.Is(err, ErrTooExpensive) {
		return nil
	}
	return err
}

func checkKDFWithin(where string, k KDF, memory int64) error {
	if len(k.Salt) != saltSize {
		return fmt.Errorf("%w: %s: salt of %d bytes, must be %d", ErrDamaged, where, len(k.Salt), saltSize)
	}
	switch k.Type {
	case "pbkdf2":
		if err := checkHash(where, k.Hash); err != nil {
			return err
		}
		return checkIterations(where, k.Iterations, MaxIterations)
	case "argon2i", "argon2id":
		return checkArgon2(where, k, memory)
	}
	return fmt.Errorf("%w: %s: type %q", ErrUnsupported, where, k.Type)
}

func checkIterations(where string, n, most int) error {
	if n < 1 {
		return fmt.Errorf("%w: %s: %d iterations", ErrDamaged, where, n)
	}
	if n > most {
		return fmt.Errorf("%w: %s: %d iterations, at most %d are allowed", ErrTooExpensive, where, n, most)
	}
	return nil
}

func checkArgon2(where string, k KDF, memory int64) error {
	switch {
	case k.CPUs < 1 || k.Time < 1 || k.Memory < 8*int64(k.CPUs):
		return fmt.Errorf("%w: %s: %s with time %d, memory %d KiB, cpus %d", ErrDamaged, where, k.Type, k.Time, k.Memory, k.CPUs)
	case k.CPUs > MaxArgon2CPUs:
		return fmt.Errorf("%w: %s: cpus %d, at most %d are allowed", ErrTooExpensive, where, k.CPUs, MaxArgon2CPUs)
	case k.Memory > MaxArgon2Memory:
		return fmt.Errorf("%w: %s: memory %d KiB, at most %d are allowed", ErrTooExpensive, where, k.Memory, MaxArgon2Memory)
	case k.Memory >= memory>>10:
		return fmt.Errorf("%w: %s: memory %d KiB, only %d are free", ErrTooExpensive, where, k.Memory, memory>>10)
	case k.Time > MaxArgon2Time || int64(k.Time)*k.Memory > MaxArgon2Work:
		return fmt.Errorf("%w: %s: time %d over %d KiB of memory, at most %d and %d KiB in all are allowed",
			ErrTooExpensive, where, k.Time, k.Memory, MaxArgon2Time, MaxArgon2Work)
	}
	return nil
}
