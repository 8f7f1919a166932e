package luks

import (
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestLUKS1(t *testing.T) {
	image := seed(t, "luks1.hdr")
	h, err := readImage(image)
	if err != nil {
		t.Fatal(err)
	}
	if h.Type != Type1 || h.UUID != "0f6a58b6-6a53-4d5b-8a4c-5d0a7f0d2b11" || h.Cipher != "aes-xts-plain64" ||
		h.KeyBits != 512 || h.Offset != 2<<20 || h.SectorSize != 512 || h.MaxSlots != 8 {
		t.Errorf("read %+v", h)
	}
	if len(h.Slots) != 2 || h.Slots[1].Number != 5 || h.Slots[1].Offset != 1294336 || h.Slots[1].Size != 256000 {
		t.Errorf("slots %+v", h.Slots)
	}
	if want := []int{1, 2, 3, 4, 6, 7}; !reflect.DeepEqual(h.Free(), want) {
		t.Errorf("free %v, want %v", h.Free(), want)
	}
	if string(h.Backup()) != string(image) || string(h.Image()) != string(image) {
		t.Error("backup is not the header")
	}
	key, _ := hex.DecodeString(seedKey1)
	if err := h.VerifyVolumeKey(key); err != nil {
		t.Error(err)
	}
}

// TestHostile1 changes one field of a good header in each row.
func TestHostile1(t *testing.T) {
	text := func(field []byte, s string) { clear(field); copy(field, s) }
	for _, c := range []struct {
		name string
		edit func(*phdr)
		want error
		says string
	}{
		{"version 3", func(p *phdr) { p.Version = 3 }, ErrUnsupported, "version 3"},
		{"re-encryption", func(p *phdr) { copy(p.Magic[:], "LUKS\xde\xad") }, ErrRequirement, "re-encryption"},
		{"no magic", func(p *phdr) { p.Magic[0] = 'X' }, ErrNotLUKS, "something else"},
		{"null cipher", func(p *phdr) { text(p.CipherName[:], "cipher_null") }, ErrUnsupported, "null cipher"},
		{"NULL cipher", func(p *phdr) { text(p.CipherName[:], "NULL") }, ErrUnsupported, "null cipher"},
		{"null in mode", func(p *phdr) { text(p.CipherMode[:], "cipher_null-ecb") }, ErrUnsupported, "null cipher"},
		{"capi cipher", func(p *phdr) { text(p.CipherName[:], "capi:xts(aes)") }, ErrUnsupported, "capi"},
		{"ecb", func(p *phdr) { text(p.CipherMode[:], "ecb") }, ErrUnsupported, "aes-ecb"},
		{"dash in cipher name", func(p *phdr) {
			text(p.CipherName[:], "aes-xts")
			text(p.CipherMode[:], "plain64")
		}, ErrUnsupported, "cipher name"},
		{"unterminated cipher", func(p *phdr) { text(p.CipherName[:], strings.Repeat("a", 32)) }, ErrDamaged, "cipher name"},
		{"control character", func(p *phdr) { text(p.CipherMode[:], "xts\x1b[2J") }, ErrDamaged, "cipher mode"},
		{"unknown hash", func(p *phdr) { text(p.HashSpec[:], "md5") }, ErrUnsupported, `hash "md5"`},
		{"hash with a blank", func(p *phdr) { text(p.HashSpec[:], "sha256 ") }, ErrUnsupported, `hash "sha256 "`},
		{"bad uuid", func(p *phdr) { text(p.UUID[:], "../../../etc/passwd") }, ErrDamaged, "uuid"},
		{"no uuid", func(p *phdr) { text(p.UUID[:], "") }, ErrDamaged, "uuid"},
		{"unterminated uuid", func(p *phdr) { text(p.UUID[:], strings.Repeat("a", 40)) }, ErrDamaged, "uuid"},
		{"key of 0 bytes", func(p *phdr) { p.KeyBytes = 0 }, ErrDamaged, "key of 0"},
		{"key of 2^32-1 bytes", func(p *phdr) { p.KeyBytes = 1<<32 - 1 }, ErrDamaged, "with a key of"},
		{"key of 40 bytes", func(p *phdr) { p.KeyBytes = 40 }, ErrDamaged, "40 bytes"},
		{"key of 16 bytes for xts", func(p *phdr) { p.KeyBytes = 16 }, ErrDamaged, "16 bytes"},
		{"digest without iterations", func(p *phdr) { p.DigestIter = 0 }, ErrDamaged, "digest: 0 iterations"},
		{"digest of 2^32-1 iterations", func(p *phdr) { p.DigestIter = 1<<32 - 1 }, ErrTooExpensive, "digest: 4294967295"},
		{"digest above the cap", func(p *phdr) { p.DigestIter = MaxDigestIterations + 1 }, ErrTooExpensive, "digest"},
		{"detached", func(p *phdr) { p.PayloadOffset = 0 }, ErrUnsupported, "detached"},
		{"data inside the header", func(p *phdr) { p.PayloadOffset = 4000 }, ErrDamaged, "keyslot 7"},
		{"data beyond the device", func(p *phdr) { p.PayloadOffset = seedSize / 512 }, ErrDamaged, "beyond the volume's end"},
		{"data at 2^32-1 sectors", func(p *phdr) { p.PayloadOffset = 1<<32 - 1 }, ErrDamaged, "beyond the volume's end"},
		{"slot neither active nor not", func(p *phdr) { p.Slots[3].Active = 1 }, ErrDamaged, "keyslot 3"},
		{"no iterations", func(p *phdr) { p.Slots[0].Iterations = 0 }, ErrDamaged, "keyslot 0: 0 iterations"},
		{"too many iterations", func(p *phdr) { p.Slots[5].Iterations = MaxIterations + 1 }, ErrTooExpensive, "keyslot 5"},
		{"2^32-1 iterations", func(p *phdr) { p.Slots[5].Iterations = 1<<32 - 1 }, ErrTooExpensive, "keyslot 5"},
		{"stripes", func(p *phdr) { p.Slots[1].Stripes = 4001 }, ErrDamaged, "keyslot 1: 4001 stripes"},
		{"no stripes", func(p *phdr) { p.Slots[0].Stripes = 0 }, ErrDamaged, "keyslot 0: 0 stripes"},
		{"overlap", func(p *phdr) { p.Slots[1].Offset = p.Slots[0].Offset + 499 }, ErrDamaged, "keyslot 0 and keyslot 1"},
		{"same area", func(p *phdr) { p.Slots[7].Offset = p.Slots[2].Offset }, ErrDamaged, "overlap"},
		{"slot in the header", func(p *phdr) { p.Slots[0].Offset = 1 }, ErrDamaged, "keyslot 0"},
		{"slot in the data", func(p *phdr) { p.Slots[6].Offset = p.PayloadOffset - 499 }, ErrDamaged, "keyslot 6"},
		{"slot at 2^32-1 sectors", func(p *phdr) { p.Slots[6].Offset = 1<<32 - 1 }, ErrDamaged, "keyslot 6"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, err := readImage(seed1(t, c.edit))
			if h != nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got header: %t, %v; want %v that says %q", h != nil, err, c.want, c.says)
			}
		})
	}
}
