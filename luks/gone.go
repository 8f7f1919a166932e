package luks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// ErrIntact: a header is there that somebody can still use, if not this program.
var ErrIntact = errors.New("luks: the volume has its header")

const uuidAt, uuidSize = 168, 40 // in LUKS1 and in both copies of LUKS2

// Gone is nil for a volume on which a header may be written anew: none stands there that cryptsetup can read or repair, and
// none that names another volume than uuid (which is not looked at if it is ""). A copy whose checksum is right is there,
// whatever it says: it may be of a later version. Errors: ErrIntact, with what Read says of it; ErrMismatch; or those of r.
func Gone(r io.ReaderAt, size int64, uuid string) error {
	_, cause := ReadWithin(r, size, AnyCost)
	switch {
	case cause == nil:
		return ErrIntact
	case !errors.Is(cause, ErrNotLUKS) && !errors.Is(cause, ErrDamaged):
		return cause
	}
	b := &budget{r: r, size: size, left: math.MaxInt64, until: time.Now().Add(readTime)}
	for _, off := range append([]int64{0}, headerSizes...) {
		if off > size-binSize {
			continue
		}
		magic := secondaryMagic
		if off == 0 {
			magic = primaryMagic
		}
		if err := b.gone(off, magic, uuid, cause); err != nil {
			return err
		}
	}
	return nil
}

// gone is Gone for one copy.
func (b *budget) gone(off int64, magic []byte, uuid string, cause error) error {
	head, err := b.bytes(off, binSize)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(head, magic) {
		return nil
	}
	text, _, _ := bytes.Cut(head[uuidAt:uuidAt+uuidSize], []byte{0})
	if uuid != "" && checkUUID(string(text)) == nil && !strings.EqualFold(string(text), uuid) {
		return fmt.Errorf("%w: the damaged header at %d is of volume %s, not of %s", ErrMismatch, off, text, uuid)
	}
	if bytes.HasPrefix(head[len(magic):], []byte{0, 1}) {
		return repairable1(head, cause)
	}
	switch _, err := readCopy(b, off, magic); {
	case err == nil:
		return fmt.Errorf("%w: its copy at %d is whole: %w", ErrIntact, off, cause)
	case !errors.Is(err, ErrDamaged):
		return err
	}
	return nil
}

// repairable1 is ErrIntact for a LUKS1 header, which has no checksum, that is damaged in some of its keyslots only.
func repairable1(head []byte, cause error) error {
	var p phdr
	if _, err := binary.Decode(head[:header1Size], binary.BigEndian, &p); err != nil {
		return fmt.Errorf("luks: decode LUKS1 header: %w", err)
	}
	h := &Header{KeyBits: 8 * int(min(p.KeyBytes, 1<<20))}
	whole := slices.ContainsFunc(p.Slots[:], func(s phdrSlot) bool { return s.Active == slot1Active && s.Stripes == stripes })
	if !whole || h.text1(&p) != nil || checkDigest("digest", h.Digest) != nil {
		return nil
	}
	return fmt.Errorf("%w: only some of its keyslots are damaged: %w", ErrIntact, cause)
}

// GoneFile is Gone for a regular file or block device.
func GoneFile(path, uuid string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("luks: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("luks: size of %s: %w", path, err)
	}
	if err := Gone(f, size, uuid); err != nil {
		return fmt.Errorf("%w (%s)", err, path)
	}
	return nil
}
