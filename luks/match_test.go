package luks

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

func header2(t *testing.T, changes map[string]any) *Header {
	t.Helper()
	h, err := readImage(edited(t, changes))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestMatch(t *testing.T) {
	h := header2(t, nil)
	e := h.Enrolled()
	// Other programs compare this digest: its encoding must not change.
	if e.Digest != "653f39726498e23de1d61cbafd73c072eebc79697a785c94fa71136881ab5edf" {
		t.Errorf("digest %s", e.Digest)
	}
	if err := Match(h, e); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		name string
		edit func(*Enrolled)
		says string
	}{
		{"uuid", func(e *Enrolled) { e.UUID = "x" }, "UUID is 6b0a5ad5-3c2f-4f6b-9d3c-0d1d5c1f7c11, enrolled was x"},
		{"type", func(e *Enrolled) { e.Type = Type1 }, "type is luks2, enrolled was luks1"},
		{"cipher", func(e *Enrolled) { e.Cipher = "aes-cbc-plain" }, "cipher is aes-xts-plain64, enrolled was aes-cbc-plain"},
		{"key bits", func(e *Enrolled) { e.KeyBits = 256 }, "key bits is 512, enrolled was 256"},
		{"offset", func(e *Enrolled) { e.Offset++ }, "data offset is 16777216, enrolled was 16777217"},
		{"sector size", func(e *Enrolled) { e.SectorSize = 512 }, "sector size is 4096, enrolled was 512"},
		{"digest", func(e *Enrolled) { e.Digest = "00" }, "volume key digest is 653f"},
		{"two", func(e *Enrolled) { e.Type, e.KeyBits = Type1, 256 }, "enrolled was luks1; key bits is 512"},
		{"never enrolled", func(e *Enrolled) { *e = Enrolled{} }, "UUID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			changed := e
			c.edit(&changed)
			if err := Match(h, changed); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want ErrMismatch that says %q", err, c.says)
			}
		})
	}
}

// TestMatchErased: a header whose keyslots are all gone can still be told to be the enrolled one.
func TestMatchErased(t *testing.T) {
	e := header2(t, nil).Enrolled()
	h := header2(t, map[string]any{"keyslots": map[string]any{}, "tokens": map[string]any{}, "digests.0.keyslots": []string{}})
	if h.KeyBits != 0 || len(h.Free()) != 32 {
		t.Errorf("key bits %d, %d free", h.KeyBits, len(h.Free()))
	}
	if err := Match(h, e); err != nil {
		t.Error(err)
	}
	key, _ := hex.DecodeString(seedKey2)
	if err := h.VerifyVolumeKey(key); err != nil {
		t.Error(err)
	}
}

// TestMatchDigest: each part of a digest counts.
func TestMatchDigest(t *testing.T) {
	e := header2(t, nil).Enrolled()
	for name, changes := range map[string]map[string]any{
		"hash":       one("digests.0.hash", "blake2s-256"),
		"iterations": one("digests.0.iterations", 1001),
		"salt":       one("digests.0.salt", b64(32)),
		"value":      one("digests.0.digest", b64(32)),
		"length":     one("digests.0.digest", "K0LnNuHt5Jqz9FLhl+armq/vsBw="),
	} {
		if err := Match(header2(t, changes), e); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "digest") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyVolumeKey(t *testing.T) {
	h := header2(t, nil)
	key, _ := hex.DecodeString(seedKey2)
	flipped := append([]byte{}, key...)
	flipped[63] ^= 1
	for name, bad := range map[string][]byte{"flipped": flipped, "short": key[:63], "long": append(key[:64:64], 0), "empty": nil} {
		if err := h.VerifyVolumeKey(bad); !errors.Is(err, ErrVolumeKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for hash, size := range hashSizes {
		h := header2(t, map[string]any{"digests.0.hash": hash, "digests.0.digest": b64(size)})
		if err := h.VerifyVolumeKey(key); !errors.Is(err, ErrVolumeKey) {
			t.Errorf("%s: %v", hash, err)
		}
		if n := hashes(hash)().Size(); n != size {
			t.Errorf("%s has %d bytes, table says %d", hash, n, size)
		}
	}
}

func TestSlotMaterial(t *testing.T) {
	bin, text := parts(t)
	image := append(image2(bin, text), make([]byte, 600000)...)
	material := func(h *Header, slot int) [32]byte {
		t.Helper()
		m, err := SlotMaterial(volume{image}, h, slot)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	h := header2(t, nil)
	first := material(h, 0)
	if first == material(h, 1) {
		t.Error("two keyslots have the same material")
	}
	if first != material(header2(t, one("keyslots.0.priority", 2)), 0) {
		t.Error("priority counts")
	}
	for name, changes := range map[string]map[string]any{
		"time": one("keyslots.0.kdf.time", 5), "memory": one("keyslots.0.kdf.memory", 65), "salt": one("keyslots.0.kdf.salt", b64(32)),
		"type": one("keyslots.0.kdf.type", "argon2i"), "cipher": one("keyslots.0.area.encryption", "twofish-xts-plain64"),
		"af hash": one("keyslots.0.af.hash", "sha512"), "area": one("keyslots.0.area.size", "256000"),
	} {
		if first == material(header2(t, changes), 0) {
			t.Errorf("%s does not count", name)
		}
	}
	for _, at := range []int{32768, 32768 + 258047} {
		image[at] ^= 1
		if first == material(h, 0) {
			t.Errorf("byte %d does not count", at)
		}
		image[at] ^= 1
	}
	image[32768+258048] ^= 1
	if first != material(h, 0) {
		t.Error("a byte behind the area counts")
	}
	if _, err := SlotMaterial(volume{image}, h, 7); err == nil {
		t.Error("material of a keyslot that is not there")
	}
}
