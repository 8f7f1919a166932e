package luks

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// readTime is how long reading a header may take.
const readTime = 2 * time.Second

// Read reads the header at the start of r, a volume of size bytes. It reads at most MaxRead bytes, and refuses a keyslot
// whose key derivation needs more memory than is free now. Errors are ErrNotLUKS, ErrDamaged, ErrTooExpensive,
// ErrUnsupported, ErrRequirement, or those of r.
func Read(r io.ReaderAt, size int64) (*Header, error) {
	return ReadWithin(r, size, freeMemory())
}

// ReadWithin is Read for a machine with that many bytes of free memory. A caller that derives no key passes AnyMemory, and is
// not disturbed by a machine that is short of memory for a moment; AnyCost where nobody will derive one because of what is read.
func ReadWithin(r io.ReaderAt, size, memory int64) (*Header, error) {
	return readWithin(r, size, memory, false)
}

func readWithin(r io.ReaderAt, size, memory int64, alone bool) (*Header, error) {
	b := &budget{r: r, size: size, left: MaxRead, until: time.Now().Add(readTime), alone: alone}
	if size < header1Size {
		return nil, fmt.Errorf("%w: %d bytes are no volume", ErrNotLUKS, size)
	}
	head, err := b.bytes(0, 8)
	if err != nil {
		return nil, err
	}
	switch {
	case bytes.Equal(head, []byte("LUKS\xba\xbe\x00\x01")):
		return read1(b, memory)
	case bytes.HasPrefix(head, []byte("LUKS\xde\xad")):
		return nil, fmt.Errorf("%w: offline re-encryption (cryptsetup-reencrypt) was not finished", ErrRequirement)
	case bytes.HasPrefix(head, primaryMagic) && !bytes.Equal(head[6:], []byte{0, 2}):
		return nil, fmt.Errorf("%w: LUKS version %d", ErrUnsupported, int(head[6])<<8|int(head[7]))
	}
	return read2(b, memory)
}

// ReadFile reads the header of a regular file or block device, which it opens read-only.
func ReadFile(path string) (*Header, error) { return ReadFileWithin(path, freeMemory()) }

// ReadFileWithin is to ReadFile what ReadWithin is to Read.
func ReadFileWithin(path string, memory int64) (*Header, error) { return readFile(path, memory, false) }

func readFile(path string, memory int64, alone bool) (*Header, error) {
	// O_NONBLOCK: opening a FIFO must not wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("luks: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("luks: %w", err)
	}
	if t := st.Mode().Type(); t != 0 && t != os.ModeDevice {
		f.Close()
		return nil, fmt.Errorf("%w: %s is neither a regular file nor a block device", ErrNotLUKS, path)
	}
	return readInTime(f, path, memory, alone)
}

// ReadHeaderFile is ReadFile, and also reads a file that has the header and keyslots of a volume and none of its data, as
// `cryptsetup luksHeaderBackup` writes it: Header.Alone tells.
func ReadHeaderFile(path string) (*Header, error) { return readFile(path, freeMemory(), true) }

// readInTime gives up on a device that does not answer; the reading goroutine then ends when the device does.
func readInTime(f *os.File, path string, memory int64, alone bool) (*Header, error) {
	type result struct {
		h   *Header
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			done <- result{nil, fmt.Errorf("luks: size of %s: %w", path, err)}
			return
		}
		h, err := readWithin(f, size, memory, alone)
		if err != nil {
			err = fmt.Errorf("%w (%s)", err, path)
		}
		done <- result{h, err}
	}()
	select {
	case r := <-done:
		return r.h, r.err
	case <-time.After(readTime):
		return nil, fmt.Errorf("luks: read header of %s: %w", path, os.ErrDeadlineExceeded)
	}
}

// budget reads no more than left bytes of a volume, and not after until.
type budget struct {
	r          io.ReaderAt
	size, left int64
	until      time.Time
	alone      bool // no data need follow the header
}

func (b *budget) bytes(off, n int64) ([]byte, error) {
	if off < 0 || n < 0 || off > b.size-n {
		return nil, fmt.Errorf("%w: needs %d bytes at %d, the volume has %d", ErrDamaged, n, off, b.size)
	}
	if b.left -= n; b.left < 0 {
		return nil, fmt.Errorf("%w: header longer than %d bytes", ErrDamaged, int64(MaxRead))
	}
	if time.Now().After(b.until) {
		return nil, fmt.Errorf("luks: read header: %w", os.ErrDeadlineExceeded)
	}
	buf := make([]byte, n)
	if got, err := b.r.ReadAt(buf, off); got < len(buf) {
		return nil, fmt.Errorf("luks: read %d bytes at %d: %w", n, off, err)
	}
	return buf, nil
}

// freeMemory returns MemAvailable of /proc/meminfo in bytes; without /proc, what the kernel calls free.
func freeMemory() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err == nil {
		for line := range bytes.Lines(text) {
			var kib int64
			if _, err := fmt.Sscanf(string(line), "MemAvailable: %d kB", &kib); err == nil {
				return kib << 10
			}
		}
	}
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) != nil {
		return 0
	}
	return int64(info.Freeram) * int64(info.Unit)
}

// span is the bytes from start up to, but not including, end.
type span struct{ start, end int64 }

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// checkAreas refuses areas that leave their room or overlap. Names say which, for the message.
func checkAreas(room span, names []string, areas []span) error {
	for i, a := range areas {
		if a.start < room.start || a.end > room.end || a.start >= a.end {
			return fmt.Errorf("%w: %s: area %d to %d is not inside %d to %d", ErrDamaged, names[i], a.start, a.end, room.start, room.end)
		}
		for j, b := range areas[:i] {
			if a.start < b.end && b.start < a.end {
				return fmt.Errorf("%w: %s and %s: areas overlap", ErrDamaged, names[j], names[i])
			}
		}
	}
	return nil
}

// checkData refuses a data segment that is not behind the header and inside the volume. A header may be alone where that is
// wanted: nothing of the data is there then, and all of the keyslots is.
func (h *Header) checkData(b *budget) error {
	size := b.size
	h.Alone = b.alone && size <= h.Offset && size >= h.room.end
	switch {
	case h.Offset == 0:
		return fmt.Errorf("%w: data offset 0: a detached header, whose data is on another device", ErrUnsupported)
	case h.Offset < h.room.end:
		return fmt.Errorf("%w: data offset %d is inside the header, which ends at %d", ErrDamaged, h.Offset, h.room.end)
	case h.Offset%sector != 0:
		return fmt.Errorf("%w: data offset %d is not a multiple of %d", ErrDamaged, h.Offset, sector)
	case !h.Alone && h.Offset > size-int64(h.SectorSize):
		return fmt.Errorf("%w: data offset %d is at or beyond the volume's end, %d", ErrDamaged, h.Offset, size)
	}
	return nil
}
