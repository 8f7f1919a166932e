package luks

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// seedRebuild is what remembers a seed.
func seedRebuild(t testing.TB, head []byte, key string) (r Rebuild, volumeKey []byte) {
	t.Helper()
	h, err := readImage(head)
	if err != nil {
		t.Fatal(err)
	}
	if volumeKey, err = hex.DecodeString(key); err != nil {
		t.Fatal(err)
	}
	return Rebuild{
		Type: h.Type, UUID: h.UUID, Cipher: h.Cipher, KeyBits: h.KeyBits, Offset: h.Offset, SectorSize: h.SectorSize,
		Digest: h.Digest, Backup: h.Backup(),
	}, volumeKey
}

// filler is where the random bytes of keyslot areas come from.
type filler byte

func (f filler) Read(p []byte) (int, error) {
	copy(p, bytes.Repeat([]byte{byte(f)}, len(p)))
	return len(p), nil
}

// TestRebuildImage: the image reads as the volume that was, without keyslots, and each keyslot area is what the source of
// random bytes gave.
func TestRebuildImage(t *testing.T) {
	for name, c := range map[string]struct {
		head []byte
		key  string
		page int
	}{
		"luks1":             {seed1(t, func(*phdr) {}), seedKey1, 4096},
		"luks1, long pages": {seed1(t, func(*phdr) {}), seedKey1, 64 << 10},
		"luks2":             {edited(t, nil), seedKey2, 4096},
		"luks2 serpent":     {edited(t, map[string]any{"segments.0.encryption": "serpent-xts-plain64", "segments.0.sector_size": 4096}), seedKey2, 4096},
		"luks2, a token":    {edited(t, map[string]any{"tokens.7": map[string]any{"type": "]}\\\"{", "keyslots": []string{"1"}, "x": []int{1}}}), seedKey2, 4096},
		"luks2, no keyslot": {edited(t, map[string]any{"keyslots": map[string]any{}, "digests.0.keyslots": []string{}, "tokens": map[string]any{}}), seedKey2, 4096},
	} {
		t.Run(name, func(t *testing.T) {
			r, key := seedRebuild(t, c.head, c.key)
			r.KeyBits = len(key) * 8 // a header without keyslots does not tell
			if err := r.Check(key); err != nil {
				t.Fatal(err)
			}
			image, err := r.Image(filler(0xa5), c.page)
			if err != nil {
				t.Fatal(err)
			}
			was, err := readImage(c.head)
			if err != nil {
				t.Fatal(err)
			}
			h, err := readImage(image)
			if err != nil {
				t.Fatal(err)
			}
			was.KeyBits = h.KeyBits
			if err := Match(h, was.Enrolled()); err != nil || len(h.Slots) != 0 || len(h.Warnings) != 0 || len(h.Tokens) != len(was.Tokens) {
				t.Errorf("%v; keyslots %v, tokens %v, warnings %q", err, h.Slots, h.Tokens, h.Warnings)
			}
			start := max(h.areas.start, roundUp(header1Size, sector))
			if int64(len(image))%4096 != 0 || int64(len(image)) < was.room.end || len(bytes.Trim(image[start:], "\xa5")) != 0 {
				t.Errorf("%d bytes of image, %d of header", len(image), was.room.end)
			}
		})
	}
}

// TestRebuildUnbound: the digest of a key that is not the volume's goes with its keyslot.
func TestRebuildUnbound(t *testing.T) {
	digest := member(t, "digests.0")
	digest["keyslots"], digest["segments"] = []string{"1"}, []string{}
	r, key := seedRebuild(t, edited(t, map[string]any{"digests.5": digest, "digests.0.keyslots": []string{"0"}}), seedKey2)
	if err := r.Check(key); err != nil {
		t.Fatal(err)
	}
	image, err := r.Image(filler(1), 4096)
	if err != nil {
		t.Fatal(err)
	}
	h, err := readImage(image)
	if err != nil {
		t.Fatal(err)
	}
	if text := string(h.Backup()[binUsed:]); strings.Count(text, `"pbkdf2"`) != 1 || h.VerifyVolumeKey(key) != nil {
		t.Errorf("JSON %s", text)
	}
}

// TestRebuildRoom: what does not fit before the data is not written, however long a header claims to be.
func TestRebuildRoom(t *testing.T) {
	at := func(first, offset uint32) []byte {
		return seed1(t, func(p *phdr) {
			for i := range p.Slots {
				p.Slots[i].Offset = first + uint32(i)*512
			}
			p.PayloadOffset = offset
		})
	}
	for name, c := range map[string]struct {
		head []byte
		page int
	}{
		"one sector too long": {at(8, 8+7*512+500+3), 4096},
		"a page too long":     {at(8, 4096), 1 << 22},
		"as long as the data": {at(1<<31, 1<<31+1<<20), 4096},
	} {
		h, err := ReadWithin(volume{c.head}, 1<<42, AnyCost)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r := Rebuild{Type: h.Type, UUID: h.UUID, Cipher: h.Cipher, KeyBits: h.KeyBits, Offset: h.Offset, SectorSize: h.SectorSize, Backup: h.Backup()}
		if _, err := r.Image(filler(1), c.page); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzRebuild: whatever a backup says, an image is no longer than what is before the data, and reads as the backup does.
func FuzzRebuild(f *testing.F) {
	f.Add(seed(f, "luks1.hdr"))
	f.Add(seed(f, "luks2.hdr"))
	f.Fuzz(func(t *testing.T, backup []byte) {
		of := Type2
		if bytes.HasPrefix(backup, []byte("LUKS\xba\xbe\x00\x01")) {
			of = Type1
		}
		volume := Rebuild{Type: of, Backup: backup}.volume()
		was, err := ReadWithin(volume, 1<<42, AnyCost)
		if err != nil {
			return
		}
		r := Rebuild{
			Type: was.Type, UUID: was.UUID, Cipher: was.Cipher, KeyBits: was.KeyBits, Offset: was.Offset, SectorSize: was.SectorSize,
			Digest: was.Digest, Backup: was.Backup(),
		}
		image, err := r.Image(filler(1), 4096)
		if err != nil {
			if !errors.Is(err, ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		h, err := ReadWithin(padded(image), 1<<42, AnyCost)
		if err != nil || int64(len(image)) > was.Offset || len(h.Slots) != 0 {
			t.Fatalf("%d bytes, %v", len(image), err)
		}
		was.KeyBits = h.KeyBits
		if err := Match(h, was.Enrolled()); err != nil {
			t.Fatal(err)
		}
	})
}
