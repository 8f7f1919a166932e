package luks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// A LUKS2 header copy is a binary header of 4096 bytes (512 of them used) and a JSON area, together hdr_size bytes. The
// primary copy is at 0, the secondary follows it.
const (
	binSize  = 4096
	binUsed  = 512
	csumAt   = 448
	csumSize = 64
)

var (
	primaryMagic   = []byte("LUKS\xba\xbe")
	secondaryMagic = []byte("SKUL\xba\xbe")
	headerSizes    = []int64{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20}
)

// binary2 is struct luks2_hdr_disk, big-endian.
type binary2 struct {
	Magic     [6]byte
	Version   uint16
	Size      uint64
	SeqID     uint64
	Label     [48]byte
	CsumAlg   [32]byte
	Salt      [64]byte
	UUID      [40]byte
	Subsystem [48]byte
	Offset    uint64
	_         [184]byte
	Csum      [csumSize]byte
}

// copy2 is one header copy whose checksum is right. Whether its content makes sense is decided later, for the copy that
// counts: a copy with a right checksum that asks for something we refuse is never passed over in favour of the other.
type copy2 struct {
	bin  binary2
	size int64
	json []byte // without its trailing NULs
}

func read2(b *budget, memory int64) (*Header, error) {
	c, warnings, err := newest(b)
	if err != nil {
		return nil, err
	}
	h := &Header{Type: Type2, MaxSlots: 32, Warnings: warnings, areas: span{start: 2 * c.size}}
	var f fields
	h.UUID = f.text("uuid", c.bin.UUID[:])
	h.Label = f.text("label", c.bin.Label[:])
	h.Subsystem = f.text("subsystem", c.bin.Subsystem[:])
	if f.err != nil {
		return nil, f.err
	}
	if err := checkUUID(h.UUID); err != nil {
		return nil, err
	}
	if err := h.parse(c, memory); err != nil {
		return nil, err
	}
	if err := h.checkData(b); err != nil {
		return nil, err
	}
	h.backup, err = c.primary()
	return h, err
}

// newest returns the copy that counts: the sound one with the higher sequence number. The other may be damaged or older.
func newest(b *budget) (*copy2, []string, error) {
	first, err1 := readCopy(b, 0, primaryMagic)
	if err1 != nil {
		second, err := onlySecondary(b, err1)
		if err != nil {
			return nil, nil, err
		}
		return second, []string{"primary header copy: " + err1.Error()}, nil
	}
	second, err2 := readCopy(b, first.size, secondaryMagic)
	switch {
	case err2 != nil:
		return first, []string{"secondary header copy: " + err2.Error()}, nil
	case first.bin.SeqID < second.bin.SeqID:
		return second, []string{"primary header copy is older than the secondary"}, nil
	case first.bin.SeqID > second.bin.SeqID:
		return first, []string{"secondary header copy is older than the primary"}, nil
	case !first.same(second):
		return nil, nil, fmt.Errorf("%w: both header copies have sequence number %d, and differ", ErrDamaged, first.bin.SeqID)
	}
	return first, nil, nil
}

// onlySecondary looks for a secondary copy at all places where one may be, as the primary cannot tell. It counts only where
// the primary was damaged or wiped: a volume that begins with something else is something else now.
func onlySecondary(b *budget, cause error) (*copy2, error) {
	head, err := b.bytes(0, min(binSize, b.size))
	if err != nil {
		return nil, cause
	}
	ours := bytes.HasPrefix(head, primaryMagic)
	wiped := !slices.ContainsFunc(head, func(c byte) bool { return c != 0 })
	if !ours && !wiped {
		return nil, fmt.Errorf("%w: it begins with something else", ErrNotLUKS)
	}
	for _, off := range headerSizes {
		second, err := readCopy(b, off, secondaryMagic)
		if err == nil {
			return second, nil
		}
		if !errors.Is(err, ErrDamaged) { // a device that cannot be read tells nothing
			return nil, err
		}
	}
	if wiped {
		return nil, fmt.Errorf("%w: no magic, and no secondary header copy", ErrNotLUKS)
	}
	return nil, fmt.Errorf("%w; no sound secondary header copy", cause)
}

func readCopy(b *budget, off int64, magic []byte) (*copy2, error) {
	head, err := b.bytes(off, binSize)
	if err != nil {
		return nil, err
	}
	c := &copy2{}
	if _, err := binary.Decode(head[:binUsed], binary.BigEndian, &c.bin); err != nil {
		return nil, fmt.Errorf("luks: decode LUKS2 header: %w", err)
	}
	if err := c.check(off, magic, head); err != nil {
		return nil, err
	}
	area, err := b.bytes(off+binSize, c.size-binSize)
	if err != nil {
		return nil, err
	}
	if sum := checksum(head, area); !bytes.Equal(sum[:], c.bin.Csum[:sha256.Size]) {
		return nil, fmt.Errorf("%w: wrong checksum", ErrDamaged)
	}
	c.json, err = trimJSON(area)
	return c, err
}

// check checks what must be right before the JSON area can be read.
func (c *copy2) check(off int64, magic, head []byte) error {
	if !bytes.Equal(c.bin.Magic[:], magic) {
		return fmt.Errorf("%w: magic %q", ErrDamaged, c.bin.Magic)
	}
	if c.bin.Version != 2 {
		return fmt.Errorf("%w: version %d", ErrDamaged, c.bin.Version)
	}
	c.size = int64(min(c.bin.Size, 1<<62))
	if !slices.Contains(headerSizes, c.size) || off != 0 && off != c.size {
		return fmt.Errorf("%w: hdr_size %d", ErrDamaged, c.bin.Size)
	}
	if c.bin.Offset != uint64(off) {
		return fmt.Errorf("%w: hdr_offset %d at %d", ErrDamaged, c.bin.Offset, off)
	}
	if alg := string(bytes.TrimRight(c.bin.CsumAlg[:], "\x00")); alg != "sha256" {
		return fmt.Errorf("%w: checksum algorithm %q", ErrDamaged, alg)
	}
	if slices.ContainsFunc(head[binUsed:], func(c byte) bool { return c != 0 }) {
		return fmt.Errorf("%w: bytes %d to %d of the binary header are not all NUL", ErrDamaged, binUsed, binSize)
	}
	return nil
}

// checksum is SHA-256 over a whole copy, with its checksum field set to NULs.
func checksum(head, area []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write(head[:csumAt])
	h.Write(make([]byte, csumSize))
	h.Write(head[csumAt+csumSize:])
	h.Write(area)
	return [sha256.Size]byte(h.Sum(nil))
}

// trimJSON cuts the NULs that must fill the JSON area up, at least one of them.
func trimJSON(area []byte) ([]byte, error) {
	text, rest, ok := bytes.Cut(area, []byte{0})
	if !ok {
		return nil, fmt.Errorf("%w: JSON is not NUL-terminated", ErrDamaged)
	}
	if slices.ContainsFunc(rest, func(c byte) bool { return c != 0 }) {
		return nil, fmt.Errorf("%w: something follows the JSON", ErrDamaged)
	}
	return text, nil
}

// same tells whether two copies say the same.
func (c *copy2) same(o *copy2) bool {
	return c.bin.Label == o.bin.Label && c.bin.UUID == o.bin.UUID && c.bin.Subsystem == o.bin.Subsystem &&
		bytes.Equal(c.json, o.json)
}

// primary returns the used part of the binary header, as a primary copy has it, followed by the JSON.
func (c *copy2) primary() ([]byte, error) {
	whole, err := c.encode(primaryMagic, 0)
	if err != nil {
		return nil, err
	}
	return append(whole[:binUsed:binUsed], c.json...), nil
}

// encode returns a whole copy for that place, with its checksum.
func (c *copy2) encode(magic []byte, offset int64) ([]byte, error) {
	bin := c.bin
	copy(bin.Magic[:], magic)
	bin.Offset, bin.Csum = uint64(offset), [csumSize]byte{}
	whole := make([]byte, c.size)
	if n, err := binary.Encode(whole, binary.BigEndian, &bin); err != nil || n != binUsed {
		return nil, errors.Join(errors.New("luks: encode LUKS2 header"), err)
	}
	copy(whole[binSize:], c.json)
	sum := checksum(whole[:binSize], whole[binSize:])
	copy(whole[csumAt:], sum[:])
	return whole, nil
}
