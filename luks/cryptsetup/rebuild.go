package cryptsetup

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"mandos-escrow/luks"
)

// Rebuild writes a header around data that are not touched: that of the backup, if there is one, otherwise one that luksFormat
// makes with the parameters and that has a new digest. It has no keyslot; AddKey adds one with the volume key. What can be
// refused is refused before anything is written, and the header is read back and proved. Killed at any moment it can be done
// again, except between luksFormat and the removal of the keyslot that luksFormat must make: then the header is there, and has
// a keyslot whose passphrase nobody knows.
//
// That the data are under this key is not looked at here: package content does. Errors: luks.ErrIntact, luks.ErrVolumeKey,
// luks.ErrDamaged and luks.ErrUnsupported for what no header can say, luks.ErrMismatch for a device that the data cannot be on.
func (t Tool) Rebuild(ctx context.Context, dev string, r luks.Rebuild, volumeKey []byte) error {
	if err := r.Check(volumeKey); err != nil {
		return err
	}
	if err := luks.GoneFile(dev, r.UUID); err != nil {
		return err
	}
	if err := takes(dev, r); err != nil {
		return err
	}
	write := t.format
	if len(r.Backup) != 0 {
		write = t.restore
	}
	if err := write(ctx, dev, r, volumeKey); err != nil {
		return err
	}
	return rebuilt(dev, r, volumeKey)
}

// takes refuses a device that cannot be written, is in use, or is too short for any data. Of a regular file O_EXCL says nothing.
func takes(dev string, r luks.Rebuild) error {
	f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_EXCL, 0)
	if errors.Is(err, syscall.EBUSY) {
		return fmt.Errorf("%w: %s is in use: mounted, mapped, or part of something", luks.ErrMismatch, dev)
	}
	if err != nil {
		return fmt.Errorf("cryptsetup: write a header: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("cryptsetup: size of %s: %w", dev, err)
	}
	if r.Offset > size-int64(r.SectorSize) {
		return fmt.Errorf("%w: the data begin at %d, %s ends at %d", luks.ErrMismatch, r.Offset, dev, size)
	}
	return nil
}

// restore writes the header of the backup. The file that cryptsetup reads it from has no name.
func (t Tool) restore(ctx context.Context, dev string, r luks.Rebuild, _ []byte) error {
	image, err := r.Image(rand.Reader, os.Getpagesize())
	if err != nil {
		return err
	}
	f, err := os.CreateTemp("", "mandos-escrow-header-")
	if err != nil {
		return fmt.Errorf("cryptsetup: a file for the header: %w", err)
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return fmt.Errorf("cryptsetup: a file for the header: %w", err)
	}
	if _, err := f.Write(image); err != nil {
		return fmt.Errorf("cryptsetup: a file for the header: %w", err)
	}
	_, err = t.runWith(ctx, operation(dev, "luksHeaderRestore"), []*os.File{f},
		"luksHeaderRestore", "--batch-mode", "--header-backup-file", fd(0), "--", dev)
	return err
}

// format makes a header from parameters. The keyslot that luksFormat adds goes at once.
func (t Tool) format(ctx context.Context, dev string, r luks.Rebuild, volumeKey []byte) error {
	args := []string{
		"luksFormat", "--batch-mode", "--type", r.Type, "--uuid", r.UUID, "--cipher", r.Cipher, "--key-size", strconv.Itoa(r.KeyBits),
		"--offset", strconv.FormatInt(r.Offset/512, 10), "--volume-key-file", fd(0), "--key-file", fd(1), "--key-slot", "0",
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
	}
	if r.Type == luks.Type2 {
		args = append(args, "--sector-size", strconv.Itoa(r.SectorSize))
	}
	if r.Digest.Hash != "" {
		args = append(args, "--hash", r.Digest.Hash)
	}
	thrownAway := make([]byte, 32)
	defer clear(thrownAway)
	rand.Read(thrownAway)
	op := operation(dev, "luksFormat")
	if _, err := t.run(ctx, op, [][]byte{volumeKey, thrownAway}, append(args, "--", dev)...); err != nil {
		return err
	}
	return t.killSlot(ctx, dev, operation(dev, "luksKillSlot 0"), 0, nil, "luksKillSlot", "--batch-mode")
}

// rebuilt proves the header that was written.
func rebuilt(dev string, r luks.Rebuild, volumeKey []byte) error {
	h, err := luks.ReadFileWithin(dev, luks.AnyMemory)
	if err != nil {
		return fmt.Errorf("cryptsetup: read the new header: %w", err)
	}
	want := luks.Enrolled{
		UUID: r.UUID, Type: r.Type, Cipher: r.Cipher, KeyBits: r.KeyBits, Offset: r.Offset, SectorSize: r.SectorSize,
		Digest: h.Enrolled().Digest, // the key is proved by it
	}
	if err := luks.Match(h, want); err != nil {
		return fmt.Errorf("cryptsetup: the new header: %w", err)
	}
	return h.VerifyVolumeKey(volumeKey)
}
