package content

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Find names what the data are, by what stands at its fixed places. That alone would also be found with a wrong sector size,
// whose first 512 bytes of each 4096 are right, and, under CBC, with a wrong first IV; so the data must also hold bytes that
// only this geometry makes plain. Errors: ErrNothing, ErrGeometry for a geometry that no volume has, ErrCipher, or those of r.
func Find(r io.ReaderAt, size int64, g Geometry, key []byte) (string, error) {
	d, err := open(r, size, g, key)
	if err != nil {
		return "", err
	}
	what, err := d.name()
	if err != nil {
		return "", err
	}
	if what == "" {
		return "", ErrNothing
	}
	sure, err := d.sure()
	if err != nil {
		return "", err
	}
	if !sure {
		return "", fmt.Errorf("%w: it looks like %s, but nothing proves the sector size and the offset", ErrNothing, what)
	}
	return what, nil
}

// Unencrypted names what stands on a device as it is, before any encryption; "" for nothing that is known. LUKS is nothing.
func Unencrypted(r io.ReaderAt, size int64) (string, error) {
	d := &data{r: r, size: size, g: Geometry{SectorSize: 512}, c: func([]byte, uint64) {}}
	what, err := d.name()
	if what == "LUKS" {
		what = ""
	}
	return what, err
}

// signature is a text at a fixed place, and what else must hold; data are those of the first blocks, up to beyond the text.
type signature struct {
	what string
	at   int64
	text string
	also func(d []byte, size int64) bool
}

// Where a device is whole of one kind, that kind comes first: an old file system's remains may stand behind it.
var signatures = []signature{
	{what: "LVM2", at: 512, text: "LABELONE", also: func(d []byte, _ int64) bool { return string(d[536:544]) == "LVM2 001" }},
	{what: "LUKS", at: 0, text: "LUKS\xba\xbe\x00"},
	{what: "Linux software RAID", at: 4096, text: "\xfc\x4e\x2b\xa9\x01\x00\x00\x00"},
	{what: "XFS", at: 0, text: "XFSB", also: xfs},
	{what: "Btrfs", at: 65600, text: "_BHRfS_M", also: func(d []byte, _ int64) bool { return le64(d[65584:]) == 65536 }}, // its own place
	{what: "F2FS", at: 1024, text: "\x10\x20\xf5\xf2", also: func(d []byte, _ int64) bool { return le32(d[1036:]) == 12 }},
	{what: "ext4", at: 1080, text: "\x53\xef", also: ext4},
	{what: "swap", at: 4086, text: "SWAPSPACE2", also: func(d []byte, _ int64) bool { return le32(d[1024:]) == 1 }},
	{what: "NTFS", at: 3, text: "NTFS    ", also: bootSector},
	{what: "exFAT", at: 3, text: "EXFAT   ", also: bootSector},
	{what: "FAT", at: 82, text: "FAT32   ", also: bootSector},
	{what: "FAT", at: 54, text: "FAT1", also: bootSector},
	{what: "MBR partitions", at: 510, text: "\x55\xaa", also: mbr},
	{what: "GPT partitions", at: 512, text: "EFI PART"},
	{what: "ISO 9660", at: 32769, text: "CD001"},
	{what: "SquashFS", at: 0, text: "hsqs", also: func(d []byte, _ int64) bool { return le32(d[28:]) == 4 }},
}

// head is how much of the data the signatures need.
const head = 68 << 10

func (d *data) name() (string, error) {
	first := make([]byte, 0, head)
	for at := int64(0); at < head && d.has(at); at += block {
		b, err := d.plain(at)
		if err != nil {
			return "", err
		}
		first = append(first, b...)
		clear(b)
	}
	defer clear(first)
	for _, s := range signatures {
		end := s.at + int64(len(s.text))
		if int64(len(first)) >= end && string(first[s.at:end]) == s.text && (s.also == nil || s.also(first, d.size)) {
			return s.what, nil
		}
	}
	return "", nil
}

func le16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

// ext4 checks the first superblock of ext2, ext3 or ext4: copies of it say of which group they are.
func ext4(d []byte, size int64) bool {
	s := d[1024:2048]
	logBlock, blocks := le32(s[24:]), int64(le32(s[4:]))
	return logBlock <= 6 && le16(s[90:]) == 0 && le32(s[76:]) <= 1 && blocks > 0 && blocks <= size>>(10+logBlock) && le32(s[40:]) > 0
}

// xfs checks the first superblock; the header of the group's free space says that it is of group 0.
func xfs(d []byte, size int64) bool {
	be := binary.BigEndian
	blockSize, blocks, sector := be.Uint32(d[4:]), be.Uint64(d[8:]), int(be.Uint16(d[102:]))
	if !slices.Contains([]int{512, 1024, 2048, 4096, 8192, 16384, 32768}, sector) || blockSize < 512 || blockSize > 64<<10 ||
		blocks > uint64(size)/uint64(blockSize) {
		return false
	}
	agf := d[sector:]
	return bytes.HasPrefix(agf, []byte("XAGF")) && be.Uint32(agf[8:]) == 0
}

// mbr checks the four entries of a partition table.
func mbr(d []byte, _ int64) bool {
	used := false
	for i := 446; i < 510; i += 16 {
		if d[i] != 0 && d[i] != 0x80 {
			return false
		}
		used = used || d[i+4] != 0 && le32(d[i+12:]) > 0
	}
	return used
}

func bootSector(d []byte, _ int64) bool { return d[510] == 0x55 && d[511] == 0xaa }

// sure tells whether cipher blocks are in the data that only this geometry makes plain: 16 equal bytes, most often NULs, of
// which each file system writes many; by chance they come out once in 2^120 blocks. For each other sector size, and for
// another first IV, there must be such a block that comes out otherwise.
func (d *data) sure() (bool, error) {
	type other struct {
		sectorSize int
		shift      uint64
	}
	open := []other{{d.g.SectorSize, 1}}
	for _, n := range []int{512, 1024, 2048, 4096} {
		if n != d.g.SectorSize {
			open = append(open, other{n, 0})
		}
	}
	for at := range sampled(d.size) {
		raw, err := d.raw(at)
		if err != nil {
			return false, err
		}
		plain := bytes.Clone(raw)
		d.decrypt(plain, at, d.g.SectorSize, 0)
		open = slices.DeleteFunc(open, func(o other) bool {
			otherwise := bytes.Clone(raw)
			d.decrypt(otherwise, at, o.sectorSize, o.shift)
			return tells(plain, otherwise)
		})
		clear(plain)
		if len(open) == 0 {
			return true, nil
		}
	}
	return false, nil
}

// tells tells whether a cipher block is plain in one and different in the other.
func tells(plain, other []byte) bool {
	const cipherBlock = 16
	for i := 0; i < len(plain); i += cipherBlock {
		if b := plain[i : i+cipherBlock]; uniform(b) && !bytes.Equal(b, other[i:i+cipherBlock]) {
			return true
		}
	}
	return false
}

// sampled are the places that sure reads: the first 256 KiB, then a block of each 128 KiB up to 128 MiB.
func sampled(size int64) func(yield func(int64) bool) {
	return func(yield func(int64) bool) {
		const dense, step, last = 256 << 10, 128 << 10, 128 << 20
		for at := int64(0); at <= min(size-block, last); {
			if !yield(at) {
				return
			}
			if at += block; at > dense {
				at += step - block
			}
		}
	}
}
