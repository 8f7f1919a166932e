package initrd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

// mapping is a device that the device-mapper made of a LUKS volume.
type mapping struct {
	name   string
	volume string // UUID without dashes, lower case
	device uint64 // as in stat(2) st_rdev
}

// mappings lists what cryptsetup has opened, by the UUIDs that it gives to
// mappings: CRYPT-LUKS2-VOLUME-NAME.
func mappings(r root) ([]mapping, error) {
	devices, err := os.ReadDir(r.path("sys/class/block"))
	if err != nil {
		return nil, fmt.Errorf("list mappings: %w", err)
	}
	var found []mapping
	for _, device := range devices {
		dir := r.path("sys/class/block", device.Name())
		uuid, err := os.ReadFile(filepath.Join(dir, "dm/uuid"))
		if err != nil {
			continue // it is none, or gone
		}
		parts := strings.SplitN(strings.TrimSpace(string(uuid)), "-", 4)
		if len(parts) < 3 || parts[0] != "CRYPT" || parts[1] != "LUKS1" && parts[1] != "LUKS2" {
			continue
		}
		m := mapping{volume: strings.ToLower(parts[2])}
		name, err := os.ReadFile(filepath.Join(dir, "dm/name"))
		if err != nil {
			continue
		}
		m.name = printable(string(name), 128)
		number, err := os.ReadFile(filepath.Join(dir, "dev"))
		if err != nil {
			continue
		}
		if m.device, err = parseDevice(strings.TrimSpace(string(number))); err != nil {
			return nil, fmt.Errorf("device number of mapping %s: %w", m.name, err)
		}
		found = append(found, m)
	}
	return found, nil
}

func (m mapping) of(uuid string) bool {
	return m.volume == strings.ToLower(strings.ReplaceAll(uuid, "-", ""))
}

var (
	errNumber = errors.New("not MAJOR:MINOR")
	errNoNode = errors.New("the device beneath has no name")
)

// parseDevice reads MAJOR:MINOR.
func parseDevice(text string) (uint64, error) {
	major, minor, _ := strings.Cut(text, ":")
	a, err1 := strconv.ParseUint(major, 10, 12)
	b, err2 := strconv.ParseUint(minor, 10, 20)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%w: %q", errNumber, printable(text, 40))
	}
	return unix.Mkdev(uint32(a), uint32(b)), nil
}

// checker compares what is mapped with what was enrolled.
type checker struct {
	root   root
	mapper mapper
	say    func(format string, a ...any)
}

// mapper is the kernel's device-mapper.
type mapper interface {
	table(device uint64) ([]target, error)
	remove(device uint64) error
}

// target is one line of a mapping's table. Its parameters may hold the volume
// key: whoever has it wipes it.
type target struct {
	start  uint64
	kind   string
	params []byte
}

// CheckMapped compares every mapping of an enrolled volume with what was
// enrolled, and removes those that differ before anything mounts them; then it
// returns ErrMismatch. Another error says that it could not find out. With
// mandos-escrow=off on the kernel command line it does nothing.
func CheckMapped(o Options) error {
	if cmdline := o.cmdline(); cmdline.Off {
		return nil
	}
	config, err := LoadConfig(o.Config)
	if err != nil {
		return err
	}
	return checker{o.where(), controlDevice{}, o.Say}.check(config.Volumes)
}

func (c checker) check(volumes []unlock.Volume) error {
	mapped, err := mappings(c.root)
	if err != nil {
		return err
	}
	var wrong, unknown []error
	for _, m := range mapped {
		i := slices.IndexFunc(volumes, func(v unlock.Volume) bool { return m.of(v.UUID) })
		if i < 0 {
			continue
		}
		switch err := c.compare(m, volumes[i]); {
		case errors.Is(err, ErrMismatch):
			c.remove(m, err)
			wrong = append(wrong, fmt.Errorf("%w: mapping %s", ErrMismatch, m.name))
		case err != nil:
			unknown = append(unknown, fmt.Errorf("mapping %s could not be compared with what was enrolled: %w", m.name, err))
		}
	}
	if len(wrong) != 0 {
		return wrong[0]
	}
	return errors.Join(unknown...)
}

// remove takes a mapping away, and says what differs and what to do about it.
func (c checker) remove(m mapping, why error) {
	c.say("mapping %s: %s", m.name, printable(why.Error(), 600))
	c.say("this machine does not boot from it. If you changed the volume yourself: boot once with mandos-escrow=off on the kernel command line, and run mandos-escrow enroll again")
	if err := c.removeInTime(m.device); err != nil {
		c.say("mapping %s could not be removed: %v", m.name, err)
	}
}

// removeInTime tries again while somebody, such as udev, looks at the mapping.
func (c checker) removeInTime(device uint64) error {
	const tries, pause = 50, 100 * time.Millisecond
	for n := 1; ; n++ {
		err := c.mapper.remove(device)
		if !errors.Is(err, unix.EBUSY) || n == tries {
			return err
		}
		time.Sleep(pause)
	}
}

func (c checker) compare(m mapping, v unlock.Volume) error {
	targets, err := c.mapper.table(m.device)
	if err != nil {
		return err
	}
	defer func() {
		for _, t := range targets {
			secret.Wipe(t.params)
		}
	}()
	if len(targets) != 1 || targets[0].kind != "crypt" || targets[0].start != 0 {
		return fmt.Errorf("%w: it is not one crypt target", ErrMismatch)
	}
	device, err := compareTable(targets[0].params, v)
	if err != nil {
		return err
	}
	path, err := c.node(device)
	if err != nil {
		return err
	}
	// It is open: what the keyslots cost, one that somebody added too, does not matter any more.
	_, err = compareWithin(path, v, luks.AnyCost)
	return err
}

// node is the device file of a device, by the name that the kernel gave it.
func (c checker) node(device uint64) (string, error) {
	path := c.root.path("sys/dev/block", fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device)), "uevent")
	text, err := readLimited(path, maxStat)
	if err != nil {
		return "", fmt.Errorf("find the device beneath: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return c.root.path("dev", name), nil
		}
	}
	return "", fmt.Errorf("%w in %s", errNoNode, path)
}

// harmless are options of a crypt target that do not change what is decrypted.
var harmless = []string{
	"allow_discards", "same_cpu_crypt", "submit_from_crypt_cpus", "no_read_workqueue", "no_write_workqueue", "high_priority",
}

// compareTable compares the parameters of a crypt target with what was
// enrolled, and returns the device beneath. They are (dm-crypt in the kernel's
// documentation): cipher, key, IV offset, device, offset, and perhaps options
// after their number. No key gets into an error.
func compareTable(params []byte, v unlock.Volume) (device uint64, err error) {
	fields := bytes.Fields(params)
	if len(fields) < 5 {
		return 0, fmt.Errorf("%w: its table has %d fields", ErrMismatch, len(fields))
	}
	options := [][]byte{}
	if len(fields) > 5 {
		options = fields[6:]
		if string(fields[5]) != strconv.Itoa(len(options)) {
			return 0, fmt.Errorf("%w: its table has another number of options than it says", ErrMismatch)
		}
	}
	sectorSize, err := readOptions(options)
	if err != nil {
		return 0, err
	}
	var wrong []string
	for _, f := range []struct {
		name     string
		now, was string
	}{
		{"cipher", string(fields[0]), v.Cipher},
		{"key bits", strconv.Itoa(keyBits(fields[1])), strconv.Itoa(v.KeyBits)},
		{"IV offset", string(fields[2]), "0"},
		{"data offset in sectors", string(fields[4]), strconv.FormatInt(v.Offset/512, 10)},
		{"sector size", sectorSize, strconv.Itoa(v.SectorSize)},
	} {
		if f.now != f.was {
			wrong = append(wrong, fmt.Sprintf("%s is %s, enrolled was %s", f.name, printable(f.now, 100), f.was))
		}
	}
	if len(wrong) != 0 {
		return 0, fmt.Errorf("%w: %s", ErrMismatch, strings.Join(wrong, "; "))
	}
	if device, err = parseDevice(string(fields[3])); err != nil {
		return 0, fmt.Errorf("%w: device beneath: %w", ErrMismatch, err)
	}
	return device, nil
}

// readOptions returns the sector size, and refuses what is not harmless, such
// as iv_large_sectors, which LUKS never sets, and integrity.
func readOptions(options [][]byte) (sectorSize string, err error) {
	sectorSize = "512"
	for _, o := range options {
		size, ok := strings.CutPrefix(string(o), "sector_size:")
		switch {
		case ok:
			sectorSize = size
		case !slices.Contains(harmless, string(o)):
			return "", fmt.Errorf("%w: option %s", ErrMismatch, printable(string(o), 60))
		}
	}
	return sectorSize, nil
}

// keyBits is the length of a key in a table: hex, or :BYTES:TYPE:DESCRIPTION of
// one in a keyring; 0 for anything else.
func keyBits(key []byte) int {
	rest, ok := bytes.CutPrefix(key, []byte(":"))
	if !ok {
		if len(bytes.Trim(key, "0123456789abcdefABCDEF")) != 0 || len(key)%2 != 0 {
			return 0
		}
		return len(key) * 4
	}
	size, _, _ := bytes.Cut(rest, []byte(":"))
	n, err := strconv.ParseUint(string(size), 10, 16)
	if err != nil {
		return 0
	}
	return int(n) * 8
}

// parseTargets reads the part of a DM_TABLE_STATUS reply that follows its head:
// count times a struct dm_target_spec and a text that ends with NUL. next is
// where the following one begins, counted from the first.
func parseTargets(data []byte, count uint32) ([]target, error) {
	const specSize, maxTargets = 40, 64
	if count > maxTargets {
		return nil, fmt.Errorf("a table of %d targets, at most %d are read", count, maxTargets)
	}
	var targets []target
	at := 0
	for range count {
		if len(data)-at < specSize {
			return nil, errors.New("the kernel's table is cut off")
		}
		spec := data[at : at+specSize]
		next := binary.NativeEndian.Uint32(spec[20:24])
		kind, _, _ := bytes.Cut(spec[24:40], []byte{0})
		params, _, ended := bytes.Cut(data[at+specSize:], []byte{0})
		if !ended || uint64(next) < uint64(at+specSize+len(params)) || uint64(next) > uint64(len(data)) {
			return nil, errors.New("the kernel's table is cut off")
		}
		targets = append(targets, target{start: binary.NativeEndian.Uint64(spec[:8]), kind: string(kind), params: bytes.Clone(params)})
		at = int(next)
	}
	return targets, nil
}
