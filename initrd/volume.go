package initrd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

var (
	// ErrMismatch: what lies there is another volume than the one that was enrolled.
	ErrMismatch = errors.New("not the volume that was enrolled")
	// ErrNotFound: the volume lies nowhere.
	ErrNotFound = errors.New("volume not found")
)

// devices says where block devices are named.
type devices struct{ disk, block, dev string }

var systemDevices = root("/").devices()

// CheckVolume compares the volume's header with what was enrolled, wherever it
// lies, for a caller who does not know which device will be opened. Errors are
// ErrMismatch, ErrNotFound, and what reading a device gives.
func CheckVolume(v unlock.Volume) error { return systemDevices.check(v) }

// check looks for the volume at its enrolled path, then under its UUID as udev
// names it, then on all block devices. Something else at the path is
// ErrMismatch only if the volume is nowhere else either: device names change.
func (d devices) check(v unlock.Volume) error {
	atPath := ErrNotFound
	if v.Path != "" {
		var same bool
		if same, atPath = compare(v.Path, v); same {
			return atPath
		}
	}
	_, err := compare(d.resolve("UUID="+v.UUID), v)
	if errors.Is(err, ErrNotFound) {
		err = d.scan(v)
	}
	if errors.Is(err, ErrNotFound) && !errors.Is(atPath, ErrNotFound) {
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
	result := fmt.Errorf("%w: %s", ErrNotFound, v.UUID)
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

// resolve returns the path of a device as crypttab names it: a path, or a tag
// that udev has a link for.
func (d devices) resolve(name string) string {
	for tag, folder := range map[string]string{
		"UUID=": "by-uuid", "LABEL=": "by-label", "PARTUUID=": "by-partuuid", "PARTLABEL=": "by-partlabel",
	} {
		value, ok := strings.CutPrefix(name, tag)
		if !ok || strings.Contains(value, "/") {
			continue
		}
		if strings.HasSuffix(tag, "UUID=") {
			value = strings.ToLower(value)
		}
		return filepath.Join(d.disk, folder, value)
	}
	return name
}

// identify finds the enrolled volume that a device is, by the header on that
// very device; nil: it is none. Something that pretends to be one, by its UUID
// or by the device's name, is ErrMismatch, and is returned with it. Other
// errors say that the device cannot be read now.
func (d devices) identify(device string, enrolled []unlock.Volume) (*unlock.Volume, error) {
	path := d.resolve(device)
	var uuid string
	h, err := luks.ReadFileWithin(path, luks.AnyMemory)
	switch {
	case err == nil:
		uuid = h.UUID
	case isVerdict(err):
		uuid = claimedUUID(path)
	default:
		return nil, err
	}
	// What the header says counts before any name: two disks may have got each other's names since.
	i := slices.IndexFunc(enrolled, func(v unlock.Volume) bool { return strings.EqualFold(uuid, v.UUID) })
	if i < 0 {
		i = slices.IndexFunc(enrolled, func(v unlock.Volume) bool { return d.named(device, v) })
	}
	if i < 0 {
		return nil, nil
	}
	_, err = compare(path, enrolled[i])
	return &enrolled[i], err
}

// named tells whether a device is named after the volume. Where it lay when it
// was enrolled means nothing any more if udev knows it elsewhere: names of
// devices change.
func (d devices) named(device string, v unlock.Volume) bool {
	byUUID := d.resolve("UUID=" + v.UUID)
	if d.resolve(device) == byUUID {
		return true
	}
	_, err := os.Stat(byUUID)
	return device == v.Path && errors.Is(err, fs.ErrNotExist)
}

// claimedUUID is the UUID where LUKS1 and LUKS2 headers have it, of a header
// that the strict reader refused; empty if there is none.
func claimedUUID(path string) string {
	const at, length = 168, 40
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, at+length)
	if _, err := f.ReadAt(head, 0); err != nil || !bytes.HasPrefix(head, []byte("LUKS")) {
		return ""
	}
	uuid, _, _ := bytes.Cut(head[at:], []byte{0})
	return string(uuid)
}

// compare reads one header; same says that it has the volume's UUID.
func compare(path string, v unlock.Volume) (same bool, err error) {
	return compareWithin(path, v, luks.AnyMemory)
}

func compareWithin(path string, v unlock.Volume, memory int64) (same bool, err error) {
	h, err := luks.ReadFileWithin(path, memory)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("%w: %s", ErrNotFound, v.UUID)
	case err != nil && !isVerdict(err):
		return false, fmt.Errorf("compare volume %s: %w", v.UUID, err)
	case err != nil:
		return false, fmt.Errorf("%w: %s: %w", ErrMismatch, path, err)
	}
	err = luks.Match(h, luks.Enrolled{
		UUID: v.UUID, Type: v.Type, Cipher: v.Cipher, KeyBits: v.KeyBits,
		Offset: v.Offset, SectorSize: v.SectorSize, Digest: v.Digest,
	})
	if err != nil {
		err = fmt.Errorf("%w: %s: %w", ErrMismatch, path, err)
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
