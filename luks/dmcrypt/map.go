// Package dmcrypt opens a LUKS volume with a passphrase and maps it under /dev/mapper. It is the only importer of luks.go, and
// apart from package luks so that a program that only reads headers does not link it. It serves an initramfs without
// cryptsetup; elsewhere cryptsetup does this better. It imports package luks, luks.go and x/sys/unix.
package dmcrypt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"

	luksgo "github.com/anatol/luks.go"
	"golang.org/x/sys/unix"

	"mandos-escrow/luks"
)

// ErrPassphrase: the passphrase opens no keyslot.
var ErrPassphrase = errors.New("dmcrypt: passphrase opens no keyslot")

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,126}$`)

// Map opens the volume at path and maps its data to /dev/mapper/NAME. It tries active keyslots that hold the volume key, those
// of priority prefer first, those of priority ignore never. Errors are those of luks.ReadFile, ErrPassphrase, and what luks.go
// or the kernel says: luks.go knows no CBC and no serpent.
func Map(path string, passphrase []byte, name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("dmcrypt: %q cannot be the name of a mapping", name)
	}
	return open(path, func(d luksgo.Device, slot int) error { return d.Unlock(slot, passphrase, name) })
}

// open calls unlock for one keyslot after the other until one opens.
func open(path string, unlock func(luksgo.Device, int) error) error {
	h, err := luks.ReadFile(path)
	if err != nil {
		return err
	}
	image, err := snapshot(path, h)
	if err != nil {
		return fmt.Errorf("dmcrypt: copy header of %s: %w", path, err)
	}
	defer image.Close()
	dev, err := luksgo.OpenWithHeader(path, fmt.Sprintf("/proc/self/fd/%d", image.Fd()))
	if err != nil {
		return fmt.Errorf("dmcrypt: open %s: %w", path, err)
	}
	defer dev.Close()
	var failed error
	for _, slot := range order(h) {
		err := unlock(dev, slot)
		if err == nil {
			return nil
		}
		if !errors.Is(err, luksgo.ErrPassphraseDoesNotMatch) && failed == nil {
			failed = fmt.Errorf("dmcrypt: %s: keyslot %d: %w", path, slot, err)
		}
	}
	if failed != nil {
		return failed
	}
	return fmt.Errorf("%w of %s", ErrPassphrase, path)
}

// order returns the keyslots to try, in turn.
func order(h *luks.Header) []int {
	var prefer, normal []int
	for _, s := range h.Slots {
		switch {
		case !s.Bound || s.Priority == luks.Ignore:
		case s.Priority == luks.Prefer:
			prefer = append(prefer, s.Number)
		default:
			normal = append(normal, s.Number)
		}
	}
	return slices.Concat(prefer, normal)
}

// snapshot copies the header that was checked, and its keyslot areas, into memory: luks.go reads it again, and must not see
// another one than was checked.
func snapshot(path string, h *luks.Header) (*os.File, error) {
	fd, err := unix.MemfdCreate("luks-header", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	image := os.NewFile(uintptr(fd), "luks-header")
	if err := fill(image, path, h); err != nil {
		image.Close()
		return nil, err
	}
	return image, nil
}

func fill(image *os.File, path string, h *luks.Header) error {
	dev, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dev.Close()
	header := h.Image()
	if _, err := image.WriteAt(header, 0); err != nil {
		return err
	}
	for _, s := range h.Slots {
		area := io.NewSectionReader(dev, s.Offset, s.Size)
		if _, err := io.Copy(io.NewOffsetWriter(image, s.Offset), area); err != nil {
			return fmt.Errorf("keyslot %d: %w", s.Number, err)
		}
	}
	return nil
}
