// Package luks reads LUKS1 and LUKS2 headers strictly, and compares a volume with what was enrolled.
//
// A header is hostile input: whoever holds the disk wrote it. Everything is checked before it is believed: sizes, areas,
// checksums, ciphers, digests and the cost of every key derivation. What this package refuses, no other part may open.
//
// It is not a way to change or to open a volume: package luks/cryptsetup writes, package luks/dmcrypt (apart, so that this
// package does not link luks.go) maps at boot. Nothing here runs a program, speaks on a network, or sees a passphrase.
// It may import the standard library, hash functions and the leaf internal/record.
//
// Formats: LUKS1 On-Disk Format Specification 1.2.3; LUKS2 On-Disk Format Specification 1.1.x; where they are silent, what
// cryptsetup 2.6.1 checks.
package luks

import (
	"errors"
	"slices"
)

// Errors that callers decide on. Each is wrapped in a message that names the field that is wrong.
var (
	ErrNotLUKS      = errors.New("luks: not a LUKS volume")
	ErrDamaged      = errors.New("luks: damaged header")
	ErrTooExpensive = errors.New("luks: key derivation too expensive")
	ErrUnsupported  = errors.New("luks: unsupported volume")
	ErrRequirement  = errors.New("luks: header has a requirement that is not met")
	ErrMismatch     = errors.New("luks: not the volume that was enrolled")
	ErrVolumeKey    = errors.New("luks: volume key does not match the volume's digest")
)

// Values of Header.Type.
const (
	Type1 = "luks1"
	Type2 = "luks2"
)

// Values of Slot.Priority.
const (
	Ignore = "ignore"
	Normal = "normal"
	Prefer = "prefer"
)

// Header is a header that was read whole and found sound. Offsets and sizes are in bytes.
type Header struct {
	Type       string `json:"type"`
	UUID       string `json:"uuid"`
	Label      string `json:"label,omitempty"`     // LUKS2
	Subsystem  string `json:"subsystem,omitempty"` // LUKS2
	Cipher     string `json:"cipher"`              // as in aes-xts-plain64
	KeyBits    int    `json:"key_bits"`            // of the volume key; 0: LUKS2 with no keyslot left, so nothing tells
	Offset     int64  `json:"offset"`              // where data begins
	SectorSize int    `json:"sector_size"`
	Digest     Digest `json:"digest"`

	Slots    []Slot  `json:"slots"` // active ones, by number
	MaxSlots int     `json:"max_slots"`
	Tokens   []Token `json:"tokens,omitempty"` // LUKS2, by number

	// Warnings tell what is damaged but does not matter for reading, such as one of the two LUKS2 header copies.
	Warnings []string `json:"warnings,omitempty"`

	// Alone: a file with header and keyslots, and none of the data (ReadHeaderFile).
	Alone bool `json:"alone,omitempty"`

	backup      []byte
	areas, room span // LUKS2: where keyslot areas may lie; and, for both types, all of the header
}

// Digest proves a volume key: PBKDF2 of the key with Hash, Iterations and Salt gives Value.
type Digest struct {
	Hash       string `json:"hash"`
	Iterations int    `json:"iterations"`
	Salt       []byte `json:"salt"`
	Value      []byte `json:"value"`
}

// Slot is one active keyslot.
type Slot struct {
	Number   int    `json:"number"`
	Priority string `json:"priority,omitempty"` // LUKS2: ignore, normal or prefer
	Bound    bool   `json:"bound"`              // holds the key of the data; otherwise some other key
	KeyBits  int    `json:"key_bits"`           // of the key it holds
	KDF      KDF    `json:"kdf"`
	AFHash   string `json:"af_hash"`

	Cipher     string `json:"cipher"` // of the area
	CipherBits int    `json:"cipher_bits"`
	Offset     int64  `json:"offset"` // of the area
	Size       int64  `json:"size"`
}

// KDF is a keyslot's key derivation: pbkdf2 (Hash, Iterations), argon2i or argon2id (Time, Memory in KiB, CPUs).
type KDF struct {
	Type       string `json:"type"`
	Hash       string `json:"hash,omitempty"`
	Iterations int    `json:"iterations,omitempty"`
	Time       int    `json:"time,omitempty"`
	Memory     int64  `json:"memory,omitempty"`
	CPUs       int    `json:"cpus,omitempty"`
	Salt       []byte `json:"salt"`
}

// Token is a LUKS2 token: JSON is exactly as it stands in the header, and not checked beyond type and keyslots.
type Token struct {
	ID       int    `json:"id"`
	Type     string `json:"type"`
	Keyslots []int  `json:"keyslots"`
	JSON     Raw    `json:"json"`
}

// Raw is JSON that stands in other JSON as it is.
type Raw []byte

// MarshalJSON returns the text (encoding/json.Marshaler).
func (r Raw) MarshalJSON() ([]byte, error) { return r, nil }

// Slot returns the active keyslot with that number.
func (h *Header) Slot(number int) (Slot, bool) {
	for _, s := range h.Slots {
		if s.Number == number {
			return s, true
		}
	}
	return Slot{}, false
}

// Backup returns what rebuilds the header, and holds no keyslot material: for LUKS1 the 592 bytes of the header; for LUKS2 the
// 512 meaningful bytes of the binary header, as a primary copy, and the JSON without its trailing NULs. See Image.
func (h *Header) Backup() []byte { return slices.Clone(h.backup) }

// Image returns Backup as it stands on a volume: for LUKS2 padded with NULs, the binary header to 4096 bytes and the whole to
// the header size (big-endian at byte 8), which makes a primary copy with a valid checksum.
func (h *Header) Image() []byte {
	if h.Type == Type1 {
		return h.Backup()
	}
	image := make([]byte, h.areas.start/2)
	copy(image, h.backup[:binUsed])
	copy(image[binSize:], h.backup[binUsed:])
	return image
}

// Free returns the numbers of keyslots that can still be added, lowest first. LUKS2 numbers are as many as there is room for in
// the keyslots area, for a key of this volume's size, by the rule of cryptsetup's LUKS2_find_area_gap.
func (h *Header) Free() []int {
	var free []int
	for n := range h.MaxSlots {
		if _, used := h.Slot(n); !used {
			free = append(free, n)
		}
	}
	if h.Type == Type1 {
		return free
	}
	return free[:min(len(free), h.gaps())]
}

// gaps counts the areas for one more keyslot each that the LUKS2 keyslots area still has.
func (h *Header) gaps() int {
	need := roundUp(int64(h.maxKeyBytes())*stripes, areaAlign)
	used := make([]span, 0, len(h.Slots)+1)
	for _, s := range h.Slots {
		used = append(used, span{s.Offset, s.Offset + s.Size})
	}
	slices.SortFunc(used, func(a, b span) int { return int(a.start - b.start) })
	used = append(used, span{h.areas.end, h.areas.end})
	n, at := int64(0), h.areas.start
	for _, u := range used {
		n += max(0, (u.start-at)/need)
		at = u.end
	}
	return int(n)
}

// maxKeyBytes is the volume key's length, or the longest that the cipher takes when no keyslot tells.
func (h *Header) maxKeyBytes() int {
	if h.KeyBits != 0 {
		return h.KeyBits / 8
	}
	return slices.Max(keyLengths(h.Cipher))
}
