package luks

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestNotLUKS(t *testing.T) {
	for name, b := range map[string][]byte{
		"empty": nil, "short": []byte("LUKS\xba\xbe\x00\x01"), "text": []byte(strings.Repeat("no volume ", 1000)), "NULs": make([]byte, 1<<20),
	} {
		path := filepath.Join(t.TempDir(), "v")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadFile(path); !errors.Is(err, ErrNotLUKS) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadFileRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadFile(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/zero"} {
		if _, err := ReadFile(path); !errors.Is(err, ErrNotLUKS) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestCut cuts a volume at places where something is still to be read.
func TestCut(t *testing.T) {
	bin, text := parts(t)
	image := image2(bin, text)
	for _, size := range []int64{592, 4095, 4096, 16383, 20000, 32768, 16 << 20} {
		h, err := ReadWithin(volume{image}, size, 1<<30)
		if h != nil || !errors.Is(err, ErrDamaged) {
			t.Errorf("%d bytes: got header: %t, %v", size, h != nil, err)
		}
	}
}

type counting struct {
	volume
	read int64
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	c.read += int64(len(p))
	return c.volume.ReadAt(p, off)
}

// TestBudget: the biggest header fits, and no header makes us read more than the limit.
func TestBudget(t *testing.T) {
	bin, text := parts(t)
	bin.Size = 4 << 20
	area := make([]byte, 4<<20-binSize)
	copy(area, strings.NewReplacer(
		`"12288"`, dec(4<<20-binSize), `"32768"`, `"8388608"`, `"290816"`, `"8650752"`,
		`"16744448"`, `"8388608"`,
	).Replace(strings.Replace(string(text), `"json_size":"12288"`, `"json_size":"`+dec(4<<20-binSize)+`"`, 1)))
	good := append(copyImage(bin, area, false), copyImage(bin, area, true)...)
	c := &counting{volume: volume{good}}
	if _, err := ReadWithin(c, seedSize, 1<<30); err != nil {
		t.Fatal(err)
	}
	if c.read > MaxRead {
		t.Errorf("read %d bytes", c.read)
	}
	// A secondary copy with a wrong checksum at each place where one may be.
	hostile := make([]byte, 8<<20)
	copy(hostile, primaryMagic)
	hostile[7] = 2
	for _, size := range headerSizes {
		b := bin
		b.Size = uint64(size)
		copy(hostile[size:], copyImage(b, nil, true)[:binUsed])
	}
	c = &counting{volume: volume{hostile}}
	if _, err := ReadWithin(c, seedSize, 1<<30); !errors.Is(err, ErrDamaged) {
		t.Errorf("hostile: %v", err)
	}
	if c.read > MaxRead {
		t.Errorf("read %d bytes", c.read)
	}
}

type failing struct{}

var errDisk = errors.New("disk on fire")

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errDisk }

func TestReadErrors(t *testing.T) {
	if _, err := Read(failing{}, seedSize); !errors.Is(err, errDisk) {
		t.Errorf("got %v", err)
	}
	late := &budget{r: failing{}, size: 10, left: 10, until: time.Now().Add(-time.Second)}
	if _, err := late.bytes(0, 1); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("late: %v", err)
	}
}

func TestFreeMemory(t *testing.T) {
	if n := freeMemory(); n < 1<<20 || n > 1<<50 {
		t.Errorf("%d bytes free", n)
	}
}
