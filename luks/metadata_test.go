package luks

import (
	"encoding/base64"
	"errors"
	"maps"
	"strings"
	"testing"
)

type hostile struct {
	name    string
	changes map[string]any
	want    error
	says    string
}

func (c hostile) run(t *testing.T) {
	t.Helper()
	h, err := readImage(edited(t, c.changes))
	if h != nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
		t.Errorf("got header: %t, %v; want %v that says %q", h != nil, err, c.want, c.says)
	}
}

func one(path string, value any) map[string]any { return map[string]any{path: value} }

func b64(n int) string { return base64.StdEncoding.EncodeToString(make([]byte, n)) }

// TestHostileSegment: one failure a row, as in all tables here.
func TestHostileSegment(t *testing.T) {
	second := member(t, "segments.0")
	integrity := map[string]any{"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}
	for _, c := range []hostile{
		{"null cipher", one("segments.0.encryption", "cipher_null-ecb"), ErrUnsupported, "null cipher"},
		{"Null cipher", one("segments.0.encryption", "Null-xts-plain64"), ErrUnsupported, "null cipher"},
		{"capi null", one("segments.0.encryption", "capi:ecb(cipher_null)-plain"), ErrUnsupported, "null cipher"},
		{"capi", one("segments.0.encryption", "capi:xts(aes)-plain64"), ErrUnsupported, "not one of those allowed"},
		{"ecb", one("segments.0.encryption", "aes-ecb"), ErrUnsupported, "aes-ecb"},
		{"upper case", one("segments.0.encryption", "AES-xts-plain64"), ErrUnsupported, "AES"},
		{"no mode", one("segments.0.encryption", "aes"), ErrUnsupported, `"aes"`},
		{"empty cipher", one("segments.0.encryption", ""), ErrUnsupported, `""`},
		{"adiantum with a key of 64 bytes", one("segments.0.encryption", "xchacha20,aes-adiantum-plain64"), ErrDamaged, "64 bytes"},
		{"no cipher", one("segments.0.encryption", nil), ErrDamaged, "segments.0.encryption"},
		{"offset inside the header", one("segments.0.offset", "16773120"), ErrDamaged, "inside the header"},
		{"detached", one("segments.0.offset", "0"), ErrUnsupported, "detached"},
		{"offset unaligned", one("segments.0.offset", "16777217"), ErrDamaged, "multiple of 512"},
		{"offset at the end", one("segments.0.offset", dec(seedSize)), ErrDamaged, "beyond the volume's end"},
		{"offset 2^63-1", one("segments.0.offset", "9223372036854775807"), ErrDamaged, "data offset"},
		{"offset 2^63", one("segments.0.offset", "9223372036854775808"), ErrDamaged, "segments.0.offset"},
		{"offset negative", one("segments.0.offset", "-4096"), ErrDamaged, "segments.0.offset"},
		{"offset with zero", one("segments.0.offset", "016777216"), ErrDamaged, "segments.0.offset"},
		{"offset hexadecimal", one("segments.0.offset", "0x1000000"), ErrDamaged, "segments.0.offset"},
		{"offset a number", one("segments.0.offset", 16777216), ErrDamaged, "segments.0.offset"},
		{"fixed size", one("segments.0.size", "4096"), ErrUnsupported, "fixed size"},
		{"iv_tweak", one("segments.0.iv_tweak", "8"), ErrUnsupported, "iv_tweak 8"},
		{"sector 0", one("segments.0.sector_size", 0), ErrDamaged, "sector_size 0"},
		{"sector 3", one("segments.0.sector_size", 513), ErrDamaged, "sector_size 513"},
		{"sector 8192", one("segments.0.sector_size", 8192), ErrDamaged, "sector_size 8192"},
		{"integrity", one("segments.0.integrity", integrity), ErrUnsupported, "dm-integrity"},
		{"flags", one("segments.0.flags", []string{"backup-final"}), ErrUnsupported, "flags"},
		{"unknown member", one("segments.0.opal", 1), ErrDamaged, `segments.0."opal"`},
		{"linear", one("segments.0.type", "linear"), ErrUnsupported, "linear"},
		{"two segments", one("segments.1", second), ErrUnsupported, "2 data segments"},
		{"no segment", one("segments.0", nil), ErrUnsupported, "0 data segments"},
		{"no segments", one("segments", nil), ErrDamaged, "segments: not an object"},
		{"segments null", one("segments", []int{}), ErrDamaged, "segments: not an object"},
	} {
		t.Run(c.name, c.run)
	}
}

func TestHostileKeyslot(t *testing.T) {
	for _, c := range []hostile{
		{"null cipher", one("keyslots.0.area.encryption", "cipher_null-ecb"), ErrUnsupported, "keyslots.0: null"},
		{"cbc with a key of 64 bytes", one("keyslots.0.area.encryption", "aes-cbc-plain64"), ErrDamaged, "64 bytes"},
		{"capi", one("keyslots.0.area.encryption", "capi:xts(aes)-plain64"), ErrUnsupported, "keyslots.0"},
		{"area key 0", one("keyslots.0.area.key_size", 0), ErrDamaged, "area.key_size 0"},
		{"area key 2^32-1", one("keyslots.0.area.key_size", 1<<32-1), ErrDamaged, "keyslots.0"},
		{"key 0", one("keyslots.0.key_size", 0), ErrDamaged, "key_size 0"},
		{"key 2^40", one("keyslots.0.key_size", 1<<40), ErrDamaged, "keyslots.0.key_size"},
		{"key 513", one("keyslots.0.key_size", 513), ErrDamaged, "key_size 513"},
		{"key not the others'", one("keyslots.0.key_size", 32), ErrDamaged, "keyslot 1: key of 512 bits, others have 256"},
		{"area in the binary header", one("keyslots.0.area.offset", "0"), ErrDamaged, "keyslots.0: area 0 to"},
		{"area in the secondary header", one("keyslots.0.area.offset", "28672"), ErrDamaged, "not inside"},
		{"area in the data", one("keyslots.0.area.offset", "16777216"), ErrDamaged, "not inside"},
		{"area across the end", one("keyslots.0.area.offset", "16519680"), ErrDamaged, "not inside"},
		{"area unaligned", one("keyslots.0.area.offset", "32769"), ErrDamaged, "area.offset 32769"},
		{"area overflow", one("keyslots.0.area.offset", "9223372036854775296"), ErrDamaged, "area.offset"},
		{"areas overlap", one("keyslots.1.area.offset", "290304"), ErrDamaged, "keyslots.0 and keyslots.1: areas overlap"},
		{"area too small", one("keyslots.0.area.size", "255999"), ErrDamaged, "area.size 255999"},
		{"area too big", one("keyslots.0.area.size", "4194304"), ErrDamaged, "area.size 4194304"},
		{"area type", one("keyslots.0.area.type", "journal"), ErrUnsupported, "journal"},
		{"af type", one("keyslots.0.af.type", "luks9"), ErrUnsupported, "luks9"},
		{"af hash", one("keyslots.0.af.hash", "md5"), ErrUnsupported, "keyslots.0.af"},
		{"af stripes 2^31", one("keyslots.0.af.stripes", 1<<31), ErrUnsupported, "stripes"},
		{"type", one("keyslots.0.type", "reencrypt"), ErrUnsupported, "reencrypt"},
		{"priority 3", one("keyslots.1.priority", 3), ErrDamaged, "priority"},
		{"unknown member", one("keyslots.0.mode", "x"), ErrDamaged, `keyslots.0."mode"`},
		{"no kdf", one("keyslots.0.kdf", nil), ErrDamaged, "keyslots.0.kdf"},
		{"no area", one("keyslots.0.area", nil), ErrDamaged, "keyslots.0.area"},
		{"a string", one("keyslots.0", "x"), ErrDamaged, "keyslots.0"},
	} {
		t.Run(c.name, c.run)
	}
}

func TestHostileCost(t *testing.T) {
	for _, c := range []hostile{
		{"memory 4 TiB", one("keyslots.0.kdf.memory", 1<<32-1), ErrTooExpensive, "memory 4294967295 KiB"},
		{"memory above the cap", one("keyslots.0.kdf.memory", MaxArgon2Memory+1), ErrTooExpensive, "at most"},
		{"memory that is not free", one("keyslots.0.kdf.memory", 1<<20), ErrTooExpensive, "only 1048576 are free"},
		{"memory 0", one("keyslots.0.kdf.memory", 0), ErrDamaged, "memory 0"},
		{"memory below 8 a thread", one("keyslots.0.kdf.memory", 15), ErrDamaged, "memory 15"},
		{"cpus 0", one("keyslots.0.kdf.cpus", 0), ErrDamaged, "cpus 0"},
		{"cpus 5", one("keyslots.0.kdf.cpus", 5), ErrTooExpensive, "cpus 5"},
		{"cpus 2^32-1", one("keyslots.0.kdf.cpus", 1<<32-1), ErrDamaged, "cpus"},
		{"time 0", one("keyslots.0.kdf.time", 0), ErrDamaged, "time 0"},
		{"time 2^32-1", one("keyslots.0.kdf.time", 1<<32-1), ErrTooExpensive, "time 4294967295"},
		{"time and memory", map[string]any{"keyslots.0.kdf.time": 1000, "keyslots.0.kdf.memory": 1 << 19}, ErrTooExpensive, "time 1000"},
		{"iterations 0", one("keyslots.1.kdf.iterations", 0), ErrDamaged, "0 iterations"},
		{"iterations 2^31", one("keyslots.1.kdf.iterations", 1<<31), ErrTooExpensive, "keyslots.1.kdf"},
		{"iterations above the cap", one("keyslots.1.kdf.iterations", MaxIterations+1), ErrTooExpensive, "at most"},
		{"kdf hash", one("keyslots.1.kdf.hash", "crc32"), ErrUnsupported, "crc32"},
		{"kdf type", one("keyslots.1.kdf.type", "scrypt"), ErrUnsupported, "scrypt"},
		{"kdf unknown member", one("keyslots.1.kdf.time", 1), ErrDamaged, `"time"`},
		{"kdf short salt", one("keyslots.1.kdf.salt", b64(31)), ErrDamaged, "salt of 31"},
		{"kdf no salt", one("keyslots.1.kdf.salt", nil), ErrDamaged, "salt"},
		{"kdf long salt", one("keyslots.1.kdf.salt", b64(3000)), ErrDamaged, "salt of 3000"},
		{"digest iterations", one("digests.0.iterations", MaxDigestIterations+1), ErrTooExpensive, "digests.0"},
		{"digest 2^31 iterations", one("digests.0.iterations", 1<<31), ErrTooExpensive, "digests.0"},
	} {
		t.Run(c.name, c.run)
	}
}

// TestAnyMemory: no keyslot within the fixed bound is refused, and none beyond it is let through.
func TestAnyMemory(t *testing.T) {
	most := edited(t, map[string]any{"keyslots.0.kdf.memory": MaxArgon2Memory})
	if _, err := ReadWithin(volume{most}, seedSize, AnyMemory); err != nil {
		t.Error(err)
	}
	more := edited(t, map[string]any{"keyslots.0.kdf.memory": MaxArgon2Memory + 1})
	if _, err := ReadWithin(volume{more}, seedSize, AnyMemory); !errors.Is(err, ErrTooExpensive) {
		t.Errorf("got %v", err)
	}
}

// TestAnyCost: what a keyslot costs is let through, and nothing else.
func TestAnyCost(t *testing.T) {
	for name, c := range map[string]struct {
		change map[string]any
		want   error
	}{
		"memory":           {map[string]any{"keyslots.0.kdf.memory": 1<<32 - 1}, nil},
		"passes":           {map[string]any{"keyslots.0.kdf.time": 1<<32 - 1}, nil},
		"no pass":          {map[string]any{"keyslots.0.kdf.time": 0}, ErrDamaged},
		"the digest's":     {map[string]any{"digests.0.iterations": MaxDigestIterations + 1}, ErrTooExpensive},
		"an unknown KDF":   {map[string]any{"keyslots.0.kdf.type": "argon3"}, ErrUnsupported},
		"a null cipher":    {map[string]any{"segments.0.encryption": "cipher_null-ecb"}, ErrUnsupported},
		"nothing that was": {nil, nil},
	} {
		if _, err := ReadWithin(volume{edited(t, c.change)}, seedSize, AnyCost); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestHostileDigest(t *testing.T) {
	unbound := member(t, "digests.0")
	unbound["segments"] = []string{}
	other := maps.Clone(unbound)
	other["keyslots"] = []string{}
	other["segments"] = []string{"0"}
	for _, c := range []hostile{
		{"empty", one("digests.0.digest", ""), ErrDamaged, "digest of 0 bytes"},
		{"short", one("digests.0.digest", b64(31)), ErrDamaged, "digest of 31 bytes"},
		{"one byte", one("digests.0.digest", b64(1)), ErrDamaged, "digest of 1 bytes"},
		{"longer than the hash", one("digests.0.digest", b64(64)), ErrDamaged, "digest of 64 bytes"},
		{"hash", one("digests.0.hash", "md5"), ErrUnsupported, "md5"},
		{"iterations 0", one("digests.0.iterations", 0), ErrDamaged, "0 iterations"},
		{"salt", one("digests.0.salt", b64(8)), ErrDamaged, "salt of 8"},
		{"type", one("digests.0.type", "argon2id"), ErrUnsupported, "argon2id"},
		{"no segment", one("digests.0.segments", []string{}), ErrDamaged, "0 digests for the data segment"},
		{"unknown segment", one("digests.0.segments", []string{"1"}), ErrDamaged, "digests.0.segments"},
		{"unknown keyslot", one("digests.0.keyslots", []string{"0", "7"}), ErrDamaged, "digests.0.keyslots"},
		{"keyslot twice", one("digests.0.keyslots", []string{"0", "1", "1"}), ErrDamaged, "stands twice"},
		{"keyslot of none", one("digests.0.keyslots", []string{"0"}), ErrDamaged, "keyslot 1 belongs to no digest"},
		{"keyslot of two", one("digests.1", unbound), ErrDamaged, "belongs to two digests"},
		{"two for the segment", one("digests.1", other), ErrDamaged, "2 digests"},
		{"none", one("digests.0", nil), ErrDamaged, "0 digests"},
	} {
		t.Run(c.name, c.run)
	}
}

func TestHostileConfig(t *testing.T) {
	requires := func(names ...string) map[string]any {
		return one("config.requirements", map[string]any{"mandatory": names})
	}
	for _, c := range []hostile{
		{"json_size", one("config.json_size", "12287"), ErrDamaged, "json_size 12287"},
		{"no json_size", one("config.json_size", nil), ErrDamaged, "json_size"},
		{"keyslots_size unaligned", one("config.keyslots_size", "16744447"), ErrDamaged, "keyslots_size"},
		{"keyslots_size beyond the data", one("config.keyslots_size", "16748544"), ErrDamaged, "inside the header"},
		{"keyslots_size 1 GiB", one("config.keyslots_size", dec(1<<30)), ErrDamaged, "keyslots_size"},
		{"keyslots_size 0", one("config.keyslots_size", "0"), ErrDamaged, "not inside"},
		{"online-reencrypt", requires("online-reencrypt"), ErrRequirement, "online-reencrypt"},
		{"online-reencrypt-v2", requires("online-reencrypt-v2"), ErrRequirement, "online-reencrypt-v2"},
		{"online-reencrypt-v9", requires("online-reencrypt-v9"), ErrRequirement, "online-reencrypt-v9"},
		{"unknown requirement", requires("levitation"), ErrRequirement, "levitation"},
		{"requirements array", one("config.requirements", []string{"opal"}), ErrRequirement, "opal"},
		{"requirements string", one("config.requirements", "opal"), ErrDamaged, "requirements"},
		{"requirements number", one("config.requirements", map[string]any{"mandatory": []int{1}}), ErrDamaged, "mandatory"},
		{"other requirements", one("config.requirements", map[string]any{"optional": []string{"x"}}), ErrDamaged, "optional"},
		{"flags", one("config.flags", "allow-discards"), ErrDamaged, "flags"},
		{"unknown member", one("config.volume", "x"), ErrDamaged, `"volume"`},
		{"no config", one("config", nil), ErrDamaged, "config"},
		{"unknown section", one("extensions", map[string]any{}), ErrDamaged, `"extensions"`},
		{"token type", one("tokens.0.type", nil), ErrDamaged, "tokens.0.type"},
		{"token type with escape", one("tokens.0.type", "a\x1b[2J"), ErrDamaged, "tokens.0"},
		{"token of no keyslot", one("tokens.0.keyslots", []string{"9"}), ErrDamaged, "tokens.0.keyslots"},
		{"token without keyslots", one("tokens.0.keyslots", nil), ErrDamaged, "tokens.0.keyslots"},
	} {
		t.Run(c.name, c.run)
	}
}

// TestHarmless has rows that must not be refused.
func TestHarmless(t *testing.T) {
	for _, c := range []struct {
		name    string
		changes map[string]any
	}{
		{"nothing", nil},
		{"discards", one("config.flags", []string{"allow-discards", "some-future-flag"})},
		{"empty requirements", one("config.requirements", map[string]any{"mandatory": []string{}})},
		{"digest of a converted LUKS1 volume", one("digests.0.digest", b64(20))},
		{"priority 0", one("keyslots.1.priority", 0)},
		{"serpent", one("segments.0.encryption", "serpent-xts-plain64")},
		{"camellia in a keyslot", one("keyslots.0.area.encryption", "camellia-xts-plain")},
		{"sha3", map[string]any{"digests.0.hash": "sha3-512", "digests.0.digest": b64(64)}},
		{"the most expensive", map[string]any{
			"keyslots.0.kdf.time": MaxArgon2Work / (1 << 19), "keyslots.0.kdf.memory": 1 << 19, "keyslots.0.kdf.cpus": 4,
			"keyslots.1.kdf.iterations": MaxIterations, "digests.0.iterations": MaxDigestIterations,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := readImage(edited(t, c.changes)); err != nil {
				t.Error(err)
			}
		})
	}
}
