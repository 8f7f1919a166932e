// Package content reads a few blocks of a volume's data with its volume key, to see whether cipher, data offset and sector
// size are those that the data were written with: a header made anew with wrong ones would turn every file into noise.
//
// It is not a way to read a volume, and writes nothing. It runs no program and needs no device-mapper. It imports the standard
// library, ciphers and the shape of package luks; it is the only importer of the ciphers that neither the standard library nor
// x/crypto has. The boot program does not link it.
//
// IVs are those of dm-crypt as LUKS uses it: they count from the data offset, in units of 512 bytes whatever the sector size
// (Documentation/admin-guide/device-mapper/dm-crypt.rst; LUKS2 On-Disk Format Specification 1.1.x, section 3.3).
package content

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Errors that callers decide on.
var (
	// ErrGeometry: the data do not look like data under this key, cipher, offset and sector size.
	ErrGeometry = errors.New("content: the data do not agree with the key, cipher, data offset and sector size")
	// ErrNothing: no file system, swap, volume group or partition table that is known here.
	ErrNothing = errors.New("content: nothing known is there")
	// ErrCipher: the data cannot be read in this process.
	ErrCipher = errors.New("content: cipher is not known here")
)

// Geometry is how data lie on a volume. Offset and SectorSize are in bytes; Cipher is as in aes-xts-plain64.
type Geometry struct {
	Cipher     string
	Offset     int64
	SectorSize int
}

const (
	// block is what is read at a time: the largest sector, and what most file systems write at once.
	block = 4096
	// Fingerprinted are blocks at 64 KiB of the data and at each power of two from there to 2 GiB, where the volume is long
	// enough: they do not depend on its size, which may change.
	firstPlace, places = 64 << 10, 16
	fingerprintBytes   = 8
)

// KnownData is what Check calls data that agree with a fingerprint.
const KnownData = "the data that were there when the key was saved"

// Fingerprint tells the plaintext at several places, so that Check can see later whether it is still there. It is keyed by the
// volume key, and tells nothing without it. Places that were never written, and those beyond the end, are left out: there may
// be none. Errors: ErrCipher, or those of r.
func Fingerprint(r io.ReaderAt, size int64, g Geometry, key []byte) ([][]byte, error) {
	d, err := open(r, size, g, key)
	if err != nil {
		return nil, err
	}
	secret, err := hkdf.Key(sha256.New, key, nil, "mandos-escrow data-fingerprint 1", sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("content: derive the fingerprint's key: %w", err)
	}
	defer clear(secret)
	var prints [][]byte
	for i := range places {
		at := int64(firstPlace) << i
		if !d.has(at) {
			break
		}
		raw, err := d.raw(at)
		if err != nil {
			return nil, err
		}
		// Never written, or discarded: the same bytes stand at any offset.
		if uniform(raw) {
			continue
		}
		d.decrypt(raw, at, g.SectorSize, 0)
		mac := hmac.New(sha256.New, secret)
		mac.Write(binary.BigEndian.AppendUint64(nil, uint64(at)))
		mac.Write(raw)
		clear(raw)
		prints = append(prints, mac.Sum(nil)[:fingerprintBytes])
	}
	return prints, nil
}

// Check tells what is on a volume, when Find finds something, or places of a fingerprint agree: two, of a fingerprint that has
// more than two, because a single one may be a remnant under what is there now. Errors: ErrGeometry when neither holds,
// ErrCipher, or those of r.
func Check(r io.ReaderAt, size int64, g Geometry, key []byte, fingerprint [][]byte) (what string, err error) {
	what, err = Find(r, size, g, key)
	if err == nil || !errors.Is(err, ErrNothing) {
		return what, err
	}
	now, err := Fingerprint(r, size, g, key)
	if err != nil {
		return "", err
	}
	agree := 0
	for _, n := range now {
		if slices.ContainsFunc(fingerprint, func(was []byte) bool { return len(was) == fingerprintBytes && hmac.Equal(n, was) }) {
			agree++
		}
	}
	if agree >= 2 || agree == 1 && len(fingerprint) <= 2 {
		return KnownData, nil
	}
	return "", fmt.Errorf("%w (%s, offset %d, sectors of %d bytes)", ErrGeometry, g.Cipher, g.Offset, g.SectorSize)
}

// data is a volume's data, decrypted on the way.
type data struct {
	r    io.ReaderAt
	size int64 // of the data
	g    Geometry
	c    sectorCipher
}

func open(r io.ReaderAt, size int64, g Geometry, key []byte) (*data, error) {
	switch {
	case g.SectorSize != 512 && g.SectorSize != 1024 && g.SectorSize != 2048 && g.SectorSize != 4096:
		return nil, fmt.Errorf("%w: sectors of %d bytes", ErrGeometry, g.SectorSize)
	case g.Offset < 0 || g.Offset%512 != 0 || g.Offset > size-block:
		return nil, fmt.Errorf("%w: data offset %d on a volume of %d bytes", ErrGeometry, g.Offset, size)
	}
	c, err := newCipher(g.Cipher, key)
	if err != nil {
		return nil, err
	}
	return &data{r: r, size: size - g.Offset, g: g, c: c}, nil
}

// has tells whether a whole block is at that place.
func (d *data) has(at int64) bool { return at <= d.size-block }

// raw reads one block as it stands. At counts from the data offset and is a multiple of block.
func (d *data) raw(at int64) ([]byte, error) {
	buf := make([]byte, block)
	if n, err := d.r.ReadAt(buf, d.g.Offset+at); n < len(buf) {
		return nil, fmt.Errorf("content: read %d bytes at %d: %w", block, d.g.Offset+at, err)
	}
	return buf, nil
}

// plain reads one block and decrypts it.
func (d *data) plain(at int64) ([]byte, error) {
	buf, err := d.raw(at)
	if err == nil {
		d.decrypt(buf, at, d.g.SectorSize, 0)
	}
	return buf, err
}

// decrypt decrypts a block in place, as if sectors had that size and the first IV that number.
func (d *data) decrypt(buf []byte, at int64, sectorSize int, shift uint64) {
	for i := 0; i < len(buf); i += sectorSize {
		d.c(buf[i:i+sectorSize], uint64(at+int64(i))/512+shift)
	}
}

// uniform tells whether all bytes are the same.
func uniform(b []byte) bool { return bytes.Count(b, b[:1]) == len(b) }
