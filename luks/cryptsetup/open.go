package cryptsetup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"

	"mandos-escrow/luks"
)

// Errors of Open.
var (
	// ErrMapping: no mapping can have that name, or one has it already.
	ErrMapping = errors.New("cryptsetup: the mapping cannot have that name")
	// ErrNoMapper: the kernel has no device-mapper, so that no volume can be opened on this machine.
	ErrNoMapper = errors.New("cryptsetup: the kernel has no device-mapper: load its modules dm_mod and dm_crypt, or use a machine that has them")
)

var mappingName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,126}$`)

// Places that tests replace.
var (
	mapperFolder = "/dev/mapper"
	miscDevices  = "/proc/misc"
)

// CheckMapping refuses a name that a mapping under /dev/mapper cannot get. Errors: ErrMapping.
func CheckMapping(name string) error {
	if !mappingName.MatchString(name) || name == "control" {
		return fmt.Errorf("%w: %q", ErrMapping, name)
	}
	if _, err := os.Lstat(mapperFolder + "/" + name); err == nil {
		return fmt.Errorf("%w: %s/%s exists", ErrMapping, mapperFolder, name)
	}
	return nil
}

// Open maps a volume's data to /dev/mapper/NAME, which takes root and a kernel with device-mapper. Errors: ErrMapping,
// ErrNoMapper, ErrPassphrase, luks.ErrVolumeKey.
func (t Tool) Open(ctx context.Context, dev string, key Key, name string) error {
	if err := CheckMapping(name); err != nil {
		return err
	}
	h, err := luks.ReadFile(dev)
	if err != nil {
		return err
	}
	unlock, options, err := key.unlocking(h)
	if err != nil {
		return err
	}
	args := append([]string{"open", "--batch-mode", "--disable-external-tokens", "--token-type", noToken, "--type", h.Type}, options...)
	_, err = t.run(ctx, operation(dev, "open"), [][]byte{unlock}, append(args, "--", dev, name)...)
	if err != nil && !errors.Is(err, ErrPassphrase) && !hasMapper() {
		return fmt.Errorf("%w: %w", ErrNoMapper, err)
	}
	return err
}

// hasMapper tells after a failure: before it the module may not be loaded yet.
func hasMapper() bool {
	text, err := os.ReadFile(miscDevices)
	return err != nil || bytes.Contains(text, []byte(" device-mapper\n"))
}
