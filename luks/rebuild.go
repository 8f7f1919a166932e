package luks

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"
)

// maxImage bounds the memory for a header that is written anew: the longest that LUKS2 allows.
const maxImage = 2*(4<<20) + 128<<20

// Rebuild is what a header is written anew from, around data that are not touched: what a packet remembers of a volume. Offset
// and SectorSize are in bytes.
type Rebuild struct {
	Type, UUID, Cipher string
	KeyBits            int
	Offset             int64
	SectorSize         int
	Digest             Digest // may be missing
	Backup             []byte // Header.Backup; may be missing, and then label, tokens and sizes are lost
}

// Check refuses what no volume has, a backup that says something else than the rest (both ErrDamaged, or ErrUnsupported), and
// a volume key that the digest does not know (ErrVolumeKey). It takes up to about a second.
func (r Rebuild) Check(volumeKey []byte) error {
	if err := r.checkFields(); err != nil {
		return err
	}
	digest := r.Digest
	if len(r.Backup) != 0 {
		h, _, err := r.parse()
		if err != nil {
			return err
		}
		digest = h.Digest
	}
	if len(volumeKey)*8 != r.KeyBits {
		return fmt.Errorf("%w: it has %d bits, the volume's has %d", ErrVolumeKey, len(volumeKey)*8, r.KeyBits)
	}
	if digest.Hash == "" {
		return nil
	}
	return (&Header{Digest: digest}).VerifyVolumeKey(volumeKey)
}

func (r Rebuild) checkFields() error {
	if err := checkUUID(r.UUID); err != nil {
		return err
	}
	sizes := []int{512, 1024, 2048, 4096}
	switch {
	case r.Type == Type1:
		sizes = []int{sector}
	case r.Type != Type2:
		return fmt.Errorf("%w: type %q", ErrUnsupported, r.Type)
	}
	switch {
	case !slices.Contains(sizes, r.SectorSize):
		return fmt.Errorf("%w: sectors of %d bytes in %s", ErrDamaged, r.SectorSize, r.Type)
	case r.Offset <= 0 || r.Offset%sector != 0:
		return fmt.Errorf("%w: data offset %d", ErrDamaged, r.Offset)
	case r.KeyBits < 8:
		return fmt.Errorf("%w: key of %d bits", ErrDamaged, r.KeyBits)
	}
	if r.Digest.Hash != "" {
		if err := checkDigest("digest", r.Digest); err != nil {
			return err
		}
	}
	return checkCipher("data", r.Cipher, r.KeyBits/8)
}

// parse reads the backup as if it stood on a volume that is long enough; the copy is LUKS2's. The backup must say what the rest
// says.
func (r Rebuild) parse() (*Header, *copy2, error) {
	volume := r.volume()
	h, err := ReadWithin(volume, math.MaxInt64, AnyCost)
	if err != nil {
		return nil, nil, fmt.Errorf("luks: header backup: %w", err)
	}
	want := Enrolled{
		UUID: r.UUID, Type: r.Type, Cipher: r.Cipher, KeyBits: r.KeyBits, Offset: r.Offset, SectorSize: r.SectorSize,
		Digest: h.Enrolled().Digest,
	}
	if r.Digest.Hash != "" {
		want.Digest = (&Header{Digest: r.Digest}).Enrolled().Digest
	}
	if err := Match(h, want); err != nil {
		return nil, nil, fmt.Errorf("%w: the header backup is not of the volume that the rest is of: %v", ErrDamaged, err) //nolint:errorlint // not a volume that mismatches
	}
	if h.Type == Type1 {
		return h, nil, nil
	}
	c, _, err := newest(&budget{r: volume, size: math.MaxInt64, left: MaxRead, until: time.Now().Add(readTime)})
	return h, c, err
}

// volume is the backup where it stands on one.
func (r Rebuild) volume() padded {
	if r.Type == Type1 || len(r.Backup) < binUsed {
		return r.Backup
	}
	return slices.Concat(r.Backup[:binUsed], make([]byte, binSize-binUsed), r.Backup[binUsed:])
}

// padded is a volume of which only the beginning was written.
type padded []byte

func (p padded) ReadAt(b []byte, off int64) (int, error) {
	clear(b)
	if off < int64(len(p)) {
		copy(b, p[off:])
	}
	return len(b), nil
}

// Image returns the backup as `cryptsetup luksHeaderRestore` takes it: UUID, label, subsystem, tokens, digest and all sizes are
// what they were. Keyslots are not: what was in them is lost, so there are none, and their areas are random. The length is all
// that is written to the volume; of LUKS1 cryptsetup writes whole pages of that many bytes. Errors: those of Check, and
// ErrUnsupported for a header whose last page is also the first of the data.
func (r Rebuild) Image(random io.Reader, page int) ([]byte, error) {
	h, c, err := r.parse()
	if err != nil {
		return nil, err
	}
	size := h.room.end
	if h.Type == Type1 {
		size = roundUp(size, int64(page))
	}
	if size > h.Offset || size > maxImage {
		return nil, fmt.Errorf("%w: header of %d bytes before data at %d", ErrUnsupported, size, h.Offset)
	}
	image := make([]byte, size)
	if _, err := io.ReadFull(random, image); err != nil {
		return nil, fmt.Errorf("luks: fill keyslot areas: %w", err)
	}
	if h.Type == Type1 {
		head, err := without1(h.backup)
		copy(image, append(head, make([]byte, roundUp(header1Size, sector)-header1Size)...))
		return image, err
	}
	if c.json, err = without2(c.json); err != nil {
		return nil, err
	}
	for i, magic := range [][]byte{primaryMagic, secondaryMagic} {
		whole, err := c.encode(magic, int64(i)*c.size)
		if err != nil {
			return nil, err
		}
		copy(image[int64(i)*c.size:], whole)
	}
	return image, nil
}

// without1 returns a LUKS1 header whose keyslots are as cryptsetup leaves those that it removed.
func without1(header []byte) ([]byte, error) {
	var p phdr
	if _, err := binary.Decode(header, binary.BigEndian, &p); err != nil {
		return nil, fmt.Errorf("luks: decode LUKS1 header: %w", err)
	}
	for i := range p.Slots {
		s := &p.Slots[i]
		s.Active, s.Iterations, s.Salt = slot1Inactive, 0, [32]byte{}
	}
	return binary.Append(nil, binary.BigEndian, &p)
}

// without2 returns the JSON of a LUKS2 header without keyslots, and without the digests of keys that are not the volume's.
// Tokens stay, and name no keyslot.
func without2(text []byte) ([]byte, error) {
	top, err := parseJSON(text)
	if err != nil {
		return nil, fmt.Errorf("luks: JSON of the header: %w", err)
	}
	changes := map[int]change{}
	set := func(v value, to string) { changes[v.at] = change{len(v.raw), to} }
	set(top.members["keyslots"], "{}")
	for _, token := range top.members["tokens"].members {
		set(token.members["keyslots"], "[]")
	}
	for number, digest := range top.members["digests"].members {
		if len(digest.members["segments"].list) != 0 {
			keyslots := digest.members["keyslots"]
			at := keyslots.at - digest.at
			set(top.members["digests"], fmt.Sprintf("{%s:%s[]%s}", strconv.Quote(number), digest.raw[:at], digest.raw[at+len(keyslots.raw):]))
		}
	}
	return replaced(text, changes), nil
}

// change is what replaces that many bytes.
type change struct {
	length int
	to     string
}

// replaced makes changes, by where they begin, which do not overlap.
func replaced(text []byte, changes map[int]change) []byte {
	var out bytes.Buffer
	end := 0
	for _, at := range slices.Sorted(maps.Keys(changes)) {
		out.Write(text[end:at])
		out.WriteString(changes[at].to)
		end = at + changes[at].length
	}
	out.Write(text[end:])
	return out.Bytes()
}
