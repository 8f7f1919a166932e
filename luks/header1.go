package luks

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// header1Size is the length of the LUKS1 header proper (struct luks_phdr).
const header1Size = 592

const (
	slot1Active   = 0x00ac71f3
	slot1Inactive = 0x0000dead
)

// phdr is the LUKS1 header as it stands on disk, big-endian.
type phdr struct {
	Magic         [6]byte
	Version       uint16
	CipherName    [32]byte
	CipherMode    [32]byte
	HashSpec      [32]byte
	PayloadOffset uint32 // sectors
	KeyBytes      uint32
	Digest        [20]byte
	DigestSalt    [32]byte
	DigestIter    uint32
	UUID          [40]byte
	Slots         [8]phdrSlot
}

type phdrSlot struct {
	Active     uint32
	Iterations uint32
	Salt       [32]byte
	Offset     uint32 // sectors
	Stripes    uint32
}

func read1(b *budget, memory int64) (*Header, error) {
	raw, err := b.bytes(0, header1Size)
	if err != nil {
		return nil, err
	}
	var p phdr
	if _, err := binary.Decode(raw, binary.BigEndian, &p); err != nil {
		return nil, fmt.Errorf("luks: decode LUKS1 header: %w", err)
	}
	h := &Header{
		Type: Type1, KeyBits: 8 * int(min(p.KeyBytes, 1<<20)), SectorSize: sector, MaxSlots: len(p.Slots),
		Offset: int64(p.PayloadOffset) * sector, backup: raw,
	}
	if err := h.text1(&p); err != nil {
		return nil, err
	}
	if err := checkDigest("digest", h.Digest); err != nil {
		return nil, err
	}
	if err := h.areas1(&p); err != nil {
		return nil, err
	}
	if err := h.slots1(&p, memory); err != nil {
		return nil, err
	}
	if err := h.checkData(b); err != nil {
		return nil, err
	}
	return h, nil
}

// text1 reads the text fields, and all that depends on nothing else.
func (h *Header) text1(p *phdr) error {
	var f fields
	h.UUID = f.text("uuid", p.UUID[:])
	name, mode := f.text("cipher name", p.CipherName[:]), f.text("cipher mode", p.CipherMode[:])
	hash := f.text("hash", p.HashSpec[:])
	if f.err != nil {
		return f.err
	}
	// The name has no dash of its own: else other readers would split the same text at another place.
	if strings.Contains(name, "-") && !strings.Contains(strings.ToLower(name), "null") {
		return fmt.Errorf("%w: cipher name %q", ErrUnsupported, name)
	}
	h.Cipher = name + "-" + mode
	h.Digest = Digest{Hash: hash, Iterations: int(p.DigestIter), Salt: slices.Clone(p.DigestSalt[:]), Value: slices.Clone(p.Digest[:])}
	if err := checkUUID(h.UUID); err != nil {
		return err
	}
	if h.KeyBits == 0 {
		return fmt.Errorf("%w: key of 0 bytes", ErrDamaged)
	}
	return checkCipher("data", h.Cipher, h.KeyBits/8)
}

// areas1 checks the areas of all eight keyslots, active or not: cryptsetup writes into the others.
func (h *Header) areas1(p *phdr) error {
	size := roundUp(int64(p.KeyBytes)*stripes, sector)
	h.room = span{0, header1Size}
	end := h.Offset
	if end == 0 { // detached: refused later, with a message of its own
		end = 1 << 40
	}
	var names []string
	var areas []span
	for i, s := range p.Slots {
		if s.Stripes != stripes {
			return fmt.Errorf("%w: keyslot %d: %d stripes, must be %d", ErrDamaged, i, s.Stripes, stripes)
		}
		start := int64(s.Offset) * sector
		names = append(names, fmt.Sprintf("keyslot %d", i))
		areas = append(areas, span{start, start + size})
		h.room.end = max(h.room.end, start+size)
	}
	return checkAreas(span{roundUp(header1Size, sector), end}, names, areas)
}

func (h *Header) slots1(p *phdr, memory int64) error {
	for i, s := range p.Slots {
		where := fmt.Sprintf("keyslot %d", i)
		switch s.Active {
		case slot1Inactive:
			continue
		case slot1Active:
		default:
			return fmt.Errorf("%w: %s: neither active nor inactive (%#08x)", ErrDamaged, where, s.Active)
		}
		slot := Slot{
			Number: i, Bound: true, KeyBits: h.KeyBits, AFHash: h.Digest.Hash,
			KDF:    KDF{Type: "pbkdf2", Hash: h.Digest.Hash, Iterations: int(s.Iterations), Salt: slices.Clone(s.Salt[:])},
			Cipher: h.Cipher, CipherBits: h.KeyBits,
			Offset: int64(s.Offset) * sector, Size: roundUp(int64(p.KeyBytes)*stripes, sector),
		}
		if err := checkKDF(where, slot.KDF, memory); err != nil {
			return err
		}
		h.Slots = append(h.Slots, slot)
	}
	return nil
}

// fields reads NUL-terminated texts of a binary header, and keeps the first error.
type fields struct{ err error }

func (f *fields) text(name string, b []byte) string {
	text, _, ok := bytes.Cut(b, []byte{0})
	if f.err == nil {
		if !ok {
			f.err = fmt.Errorf("%w: %s is not NUL-terminated", ErrDamaged, name)
		} else if !plain(string(text)) {
			f.err = fmt.Errorf("%w: %s %q is not plain text", ErrDamaged, name, text)
		}
	}
	return string(text)
}
