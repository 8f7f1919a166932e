package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

var (
	errMismatch = errors.New("not the volume that was enrolled")
	errNotFound = errors.New("volume not found")
)

// devices says where block devices are named.
type devices struct{ byUUID, block, dev string }

var systemDevices = devices{byUUID: "/dev/disk/by-uuid", block: "/sys/class/block", dev: "/dev"}

// check compares the volume's header with what was enrolled. It is looked for
// at its enrolled path, then under its UUID as udev names it, then on all
// block devices. Something else at the path is errMismatch only if the volume
// is nowhere else either: device names change.
func (d devices) check(v unlock.Volume) error {
	atPath := errNotFound
	if v.Path != "" {
		var same bool
		if same, atPath = compare(v.Path, v); same {
			return atPath
		}
	}
	_, err := compare(filepath.Join(d.byUUID, strings.ToLower(v.UUID)), v)
	if errors.Is(err, errNotFound) {
		err = d.scan(v)
	}
	if errors.Is(err, errNotFound) && !errors.Is(atPath, errNotFound) {
		return atPath
	}
	return err
}

// scan reads the headers of all block devices. Each that has the UUID must
// match: which of them will be opened is not decided here.
func (d devices) scan(v unlock.Volume) error {
	entries, err := os.ReadDir(d.block)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look for volume %s: %w", v.UUID, err)
	}
	result := fmt.Errorf("%w: %s", errNotFound, v.UUID)
	for _, entry := range entries {
		name := strings.ReplaceAll(entry.Name(), "!", "/") // sysfs writes / as !
		same, err := compare(filepath.Join(d.dev, name), v)
		if same && err != nil {
			return err
		}
		if same {
			result = nil
		}
	}
	return result
}

// anyMemory: no key is derived from the header, so its memory cost is judged by
// the fixed bound alone.
const anyMemory = luks.MaxArgon2Memory<<10 + 1

// compare reads one header; same says that it has the volume's UUID.
func compare(path string, v unlock.Volume) (same bool, err error) {
	h, err := luks.ReadFileWithin(path, anyMemory)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("%w: %s", errNotFound, v.UUID)
	case err != nil && !isVerdict(err):
		return false, fmt.Errorf("compare volume %s: %w", v.UUID, err)
	case err != nil:
		return false, fmt.Errorf("%w: %s: %w", errMismatch, path, err)
	}
	err = luks.Match(h, luks.Enrolled{
		UUID: v.UUID, Type: v.Type, Cipher: v.Cipher, KeyBits: v.KeyBits,
		Offset: v.Offset, SectorSize: v.SectorSize, Digest: v.Digest,
	})
	if err != nil {
		err = fmt.Errorf("%w: %s: %w", errMismatch, path, err)
	}
	return strings.EqualFold(h.UUID, v.UUID), err
}

// isVerdict tells a header that was read and refused from one that could not
// be read.
func isVerdict(err error) bool {
	for _, verdict := range []error{luks.ErrNotLUKS, luks.ErrDamaged, luks.ErrTooExpensive, luks.ErrUnsupported, luks.ErrRequirement} {
		if errors.Is(err, verdict) {
			return true
		}
	}
	return false
}
