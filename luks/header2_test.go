package luks

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestLUKS2(t *testing.T) {
	bin, text := parts(t)
	h, err := readImage(image2(bin, text))
	if err != nil {
		t.Fatal(err)
	}
	if h.Type != Type2 || h.UUID != "6b0a5ad5-3c2f-4f6b-9d3c-0d1d5c1f7c11" || h.Label != "system" || h.Subsystem != "test" ||
		h.Cipher != "aes-xts-plain64" || h.KeyBits != 512 || h.Offset != 16<<20 || h.SectorSize != 4096 || h.MaxSlots != 32 {
		t.Errorf("read %+v", h)
	}
	if len(h.Slots) != 2 || h.Slots[0].KDF.Memory != 64 || h.Slots[1].Priority != Prefer || !h.Slots[1].Bound {
		t.Errorf("slots %+v", h.Slots)
	}
	if len(h.Tokens) != 1 || string(h.Tokens[0].JSON) != `{"type":"seed","keyslots":["1"],"note":"kept as it is"}` {
		t.Errorf("tokens %+v", h.Tokens)
	}
	if free := h.Free(); len(free) != 30 || free[0] != 2 || free[29] != 31 {
		t.Errorf("free %v", free)
	}
	key, _ := hex.DecodeString(seedKey2)
	if err := h.VerifyVolumeKey(key); err != nil {
		t.Error(err)
	}
	if len(h.Warnings) != 0 {
		t.Errorf("warnings %q", h.Warnings)
	}
}

// TestBackup rebuilds a header from its backup alone, whichever copy it came from.
func TestBackup(t *testing.T) {
	bin, text := parts(t)
	image := image2(bin, text)
	for name, lost := range map[string]int{"none": -1, "primary": 0, "secondary": len(image) / 2} {
		damaged := slices.Clone(image)
		if lost >= 0 {
			clear(damaged[lost : lost+binSize])
		}
		h, err := readImage(damaged)
		if err != nil {
			t.Fatalf("%s lost: %v", name, err)
		}
		if (lost >= 0) != (len(h.Warnings) == 1) {
			t.Errorf("%s lost: warnings %q", name, h.Warnings)
		}
		again, err := readImage(h.Image())
		if err != nil {
			t.Fatalf("%s lost: read backup: %v", name, err)
		}
		if !bytes.Equal(again.Backup(), h.Backup()) || again.Enrolled() != h.Enrolled() {
			t.Errorf("%s lost: backup of the backup differs", name)
		}
	}
}

func TestHeaderCopies(t *testing.T) {
	bin, text := parts(t)
	area := append(slices.Clone(text), make([]byte, seedJSON-len(text))...)
	newer := bin
	newer.SeqID++
	copy(newer.Label[:], "newer!")
	relabelled := bin
	copy(relabelled.Label[:], "other!")
	null := bytes.Replace(area, []byte(`"iv_tweak":"0","encryption":"aes-xts-plain64"`), []byte(`"iv_tweak":"0","encryption":"cipher_null-ecb"`), 1)
	unsized, elsewhere := bin, bin
	unsized.Size, elsewhere.Offset = 20000, 4096
	for _, c := range []struct {
		name              string
		primary, second   []byte
		label, warns, err string
	}{
		{"both", copyImage(bin, area, false), copyImage(bin, area, true), "system", "", ""},
		{"primary newer", copyImage(newer, area, false), copyImage(bin, area, true), "newer!", "secondary header copy is older", ""},
		{"secondary newer", copyImage(bin, area, false), copyImage(newer, area, true), "newer!", "primary header copy is older", ""},
		{"same number, not the same", copyImage(bin, area, false), copyImage(relabelled, area, true), "", "", "both header copies"},
		{"secondary checksum", copyImage(bin, area, false), flip(copyImage(bin, area, true), 5000), "system", "wrong checksum", ""},
		{"primary checksum", flip(copyImage(bin, area, false), 5000), copyImage(bin, area, true), "system", "wrong checksum", ""},
		{"primary size", copyImage(unsized, area, false), copyImage(bin, area, true), "system", "hdr_size 20000", ""},
		{"primary offset", copyImage(elsewhere, area, false), copyImage(bin, area, true), "system", "hdr_offset 4096 at 0", ""},
		{"both checksums", flip(copyImage(bin, area, false), 5000), flip(copyImage(bin, area, true), 5000), "", "", "wrong checksum; no sound secondary"},
		{"refused newer copy is not passed over", copyImage(bin, area, false), copyImage(newer, null, true), "", "", "null cipher"},
		{"refused only copy", flip(copyImage(bin, area, false), 9), copyImage(bin, null, true), "", "", "null cipher"},
		{"wiped", make([]byte, len(area)+binSize), copyImage(bin, area, true), "system", "magic", ""},
		{"overwritten", append([]byte("XFSB"), make([]byte, len(area)+binSize-4)...), copyImage(bin, area, true), "", "", "begins with something else"},
		{"all NULs", make([]byte, 16<<10), make([]byte, 16<<10), "", "", "no secondary"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, err := readImage(append(c.primary, c.second...))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got header: %t, %v; want %q", h != nil, err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Label != c.label || !strings.Contains(strings.Join(h.Warnings, "\n"), c.warns) || (c.warns == "") != (len(h.Warnings) == 0) {
				t.Errorf("label %q, warnings %q; want %q, %q", h.Label, h.Warnings, c.label, c.warns)
			}
		})
	}
}

func flip(b []byte, at int) []byte { b[at] ^= 1; return b }

func TestHostileBinary(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*binary2)
		want error
		says string
	}{
		{"version", func(b *binary2) { b.Version = 7 }, ErrUnsupported, "version 7"},
		{"hdr_size 0", func(b *binary2) { b.Size = 0 }, ErrDamaged, "hdr_size 0"},
		{"hdr_size 2^64-1", func(b *binary2) { b.Size = 1<<64 - 1 }, ErrDamaged, "hdr_size"},
		{"hdr_size 8 MiB", func(b *binary2) { b.Size = 8 << 20 }, ErrDamaged, "hdr_size"},
		{"hdr_size not the area's", func(b *binary2) { b.Size = 32 << 10 }, ErrDamaged, "checksum"},
		{"checksum algorithm", func(b *binary2) { copy(b.CsumAlg[:], "md5\x00\x00\x00") }, ErrDamaged, "checksum algorithm"},
		{"uuid", func(b *binary2) { copy(b.UUID[:], "../") }, ErrDamaged, "uuid"},
		{"label with escape", func(b *binary2) { copy(b.Label[:], "a\x1b[31m") }, ErrDamaged, "label"},
		{"label unterminated", func(b *binary2) { copy(b.Label[:], strings.Repeat("x", 48)) }, ErrDamaged, "label"},
		{"label not UTF-8", func(b *binary2) { copy(b.Label[:], "\xff") }, ErrDamaged, "label"},
		{"subsystem unterminated", func(b *binary2) { copy(b.Subsystem[:], strings.Repeat("x", 48)) }, ErrDamaged, "subsystem"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bin, text := parts(t)
			c.edit(&bin)
			h, err := readImage(image2(bin, text))
			if h != nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got header: %t, %v; want %v that says %q", h != nil, err, c.want, c.says)
			}
		})
	}
}

// TestHostileText has JSON that a lenient reader could take for something else.
func TestHostileText(t *testing.T) {
	_, good := parts(t)
	text := string(good)
	for _, c := range []struct{ name, text, says string }{
		{"no NUL", text + strings.Repeat(" ", seedJSON-len(text)), "NUL-terminated"},
		{"after the NUL", text + "\x00{}", "follows the JSON"},
		{"empty", "", "no value"},
		{"array", "[]", "not an object"},
		{"null", "null", "not an object"},
		{"leading blank", " " + text, "not an object"},
		{"trailing value", text + "{}", "something follows"},
		{"cut", text[:len(text)-1], "no comma"},
		{"not UTF-8", strings.Replace(text, "kept", "k\xff", 1), "UTF-8"},
		{"twice at the top", strings.Replace(text, `{"keyslots"`, `{"segments":{},"keyslots"`, 1), `"segments" stands twice`},
		{"twice inside", strings.Replace(text, `"time":4`, `"time":4,"time":4`, 1), `"time" stands twice`},
		{"twice, once escaped", strings.Replace(text, `"time":4`, `"time":4,"t\u0069me":9`, 1), `"time" stands twice`},
		{"twice in a token", strings.Replace(text, `"note":`, `"note":1,"note":`, 1), `"note" stands twice`},
		{"other case", strings.Replace(text, `"offset":"16777216"`, `"offset":"16777216","Offset":"1"`, 1), `"Offset"`},
		{"deep", strings.Replace(text, `"note":`, `"deep":`+strings.Repeat("[", 40)+strings.Repeat("]", 40)+`,"note":`, 1), "nested too deeply"},
		{"number with exponent", strings.Replace(text, `"time":4`, `"time":4e0`, 1), "kdf.time"},
		{"number with fraction", strings.Replace(text, `"time":4`, `"time":4.0`, 1), "kdf.time"},
		{"negative number", strings.Replace(text, `"time":4`, `"time":-4`, 1), "kdf.time"},
		{"slot 00", strings.Replace(text, `{"keyslots":{"0"`, `{"keyslots":{"00"`, 1), `keyslots."00"`},
		{"slot 32", strings.Replace(text, `{"keyslots":{"0"`, `{"keyslots":{"32"`, 1), `keyslots."32"`},
		{"slot -1", strings.Replace(text, `{"keyslots":{"0"`, `{"keyslots":{"-1"`, 1), `keyslots."-1"`},
		{"base64 with newline", strings.Replace(text, `"salt":"`, `"salt":"\n`, 1), "not base64"},
		{"base64 not canonical", strings.Replace(text, `i7U=`, `i7V=`, 1), "not base64"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.text == text {
				t.Fatal("the row changes nothing")
			}
			bin, _ := parts(t)
			h, err := readImage(image2(bin, []byte(c.text)))
			if h != nil || !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got header: %t, %v; want ErrDamaged that says %q", h != nil, err, c.says)
			}
		})
	}
}

// TestFreeByRoom: a small keyslots area has room for fewer than 32.
func TestFreeByRoom(t *testing.T) {
	const area = 258048
	for _, c := range []struct{ room, slot1, want int }{
		{2, 32768 + area, 0},
		{3, 32768 + area, 1},
		{3, 32768 + 2*area, 1}, // a gap of exactly one
		{4, 32768 + area + 4096, 1},
		{5, 32768 + area + 4096, 2},
		{40, 32768 + area, 30},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			h, err := readImage(edited(t, map[string]any{
				"config.keyslots_size": dec(c.room * area), "keyslots.1.area.offset": dec(c.slot1),
			}))
			if err != nil {
				t.Fatal(err)
			}
			if got := len(h.Free()); got != c.want {
				t.Errorf("%d free, want %d", got, c.want)
			}
		})
	}
}

func TestJSON(t *testing.T) {
	bin, text := parts(t)
	h, err := readImage(image2(bin, text))
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"type":"luks2"`, `"uuid":"6b0a5ad5-`, `"cipher":"aes-xts-plain64"`, `"key_bits":512`, `"offset":16777216`,
		`"sector_size":4096`, `"slots":[{"number":0,"priority":"normal","bound":true`,
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %s in %s", want, out)
		}
	}
}
