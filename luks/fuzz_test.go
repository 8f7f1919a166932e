package luks

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// sound fails unless all that callers rely on holds of a header that was not refused.
func sound(t *testing.T, h *Header) {
	t.Helper()
	if h.Offset <= 0 || h.Offset > seedSize-int64(h.SectorSize) || len(keyLengths(h.Cipher)) == 0 || checkUUID(h.UUID) != nil {
		t.Fatalf("accepted offset %d, sector size %d, cipher %q, uuid %q", h.Offset, h.SectorSize, h.Cipher, h.UUID)
	}
	if checkDigest("digest", h.Digest) != nil || hashes(h.Digest.Hash) == nil || len(h.Slots)+len(h.Free()) > h.MaxSlots {
		t.Fatalf("accepted digest %+v, %d keyslots and %d free", h.Digest, len(h.Slots), len(h.Free()))
	}
	for i, s := range h.Slots {
		if s.Number < 0 || s.Number >= h.MaxSlots || i > 0 && h.Slots[i-1].Number >= s.Number {
			t.Fatalf("accepted keyslot %d at %d", s.Number, i)
		}
		if s.Offset < header1Size || s.Size <= 0 || s.Offset > h.Offset-s.Size || s.Size > maxKeyBytes*stripes {
			t.Fatalf("accepted area %d of %d bytes", s.Offset, s.Size)
		}
		if err := checkKDF("kdf", s.KDF, 1<<30); err != nil {
			t.Fatal(err)
		}
	}
	again, err := readImage(h.Image())
	if err != nil || !bytes.Equal(again.Backup(), h.Backup()) || Match(again, h.Enrolled()) != nil {
		t.Fatalf("image of the header: %v", err)
	}
}

func FuzzLUKS1(f *testing.F) {
	f.Add(seed(f, "luks1.hdr"))
	f.Add(seed1(f, func(p *phdr) { p.PayloadOffset = 0 }))
	f.Add(seed1(f, func(p *phdr) { p.Slots[0].Offset = 1<<32 - 1 }))
	f.Fuzz(func(t *testing.T, image []byte) {
		if h, err := readImage(image); err == nil {
			sound(t, h)
		}
	})
}

// FuzzLUKS2 mutates the two parts of a header, and makes their checksums right again.
func FuzzLUKS2(f *testing.F) {
	b := seed(f, "luks2.hdr")
	f.Add(b[:binUsed], b[binUsed:])
	image := edited(f, map[string]any{"keyslots.0.priority": 0, "config.flags": []string{"allow-discards"}})
	f.Add(image[:binUsed], bytes.TrimRight(image[binSize:16<<10], "\x00"))
	f.Fuzz(func(t *testing.T, head, text []byte) {
		var bin binary2
		if _, err := binary.Decode(head, binary.BigEndian, &bin); err != nil || len(text) > seedJSON {
			return
		}
		if h, err := readImage(image2(bin, text)); err == nil {
			sound(t, h)
		}
	})
}
