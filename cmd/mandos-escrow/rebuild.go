package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/luks"
	"mandos-escrow/luks/content"
	"mandos-escrow/luks/cryptsetup"
)

// errNoKey: the recovery passphrase opens a keyslot, and there is none.
var errNoKey = errors.New("what is to be used has no volume key, without which there is no new one: it is asked for with `recover --request --for volume-key`")

// restoreOptions say what may be done to a volume whose header is gone.
type restoreOptions struct{ rebuild, unchecked bool }

func withRebuild(cmd *cobra.Command, how *restoreOptions) {
	cmd.Flags().BoolVar(&how.rebuild, "rebuild", false, "write a header that is gone or damaged anew, from the packet; one that can be read or repaired is never written over")
	cmd.Flags().BoolVar(&how.unchecked, "unchecked", false, "with --rebuild: also when the data on the volume are not known to be those of the packet")
}

func (how restoreOptions) check() error {
	if how.unchecked && !how.rebuild {
		return usage("--unchecked is about --rebuild")
	}
	return nil
}

// gone is nil for a header that may be written anew: one that is not there, or is
// damaged. One that is only too expensive, say, is there.
func (how restoreOptions) gone(device string, err error) error {
	if !errors.Is(err, luks.ErrNotLUKS) && !errors.Is(err, luks.ErrDamaged) {
		return err
	}
	if how.rebuild {
		return overwritable(device, "")
	}
	return fmt.Errorf("%s: %w: %w", device, enroll.ErrHeaderGone, err)
}

// rebuilding is the header that a packet's volume had, once the packet's key was
// seen to be that of the data on the device.
func (how restoreOptions) rebuilding(opened *escrow.Opened, device string) (*luks.Rebuild, error) {
	p := opened.VolumeKey
	if p == nil {
		return nil, fmt.Errorf("%s: %w, and %w", device, enroll.ErrHeaderGone, errNoKey)
	}
	if p.DataOffset == escrow.NoOffset || p.Cipher == "" || p.LUKSType == "" {
		return nil, fmt.Errorf("%s: %w, and this packet does not say where the data begin and how they are encrypted", device, enroll.ErrHeaderGone)
	}
	r := &luks.Rebuild{
		Type: p.LUKSType, UUID: opened.Header.Volume.UUID, Cipher: p.Cipher, KeyBits: p.KeyBits, Offset: p.DataOffset, SectorSize: p.SectorSize,
		Digest: luks.Digest{Hash: p.DigestHash, Iterations: p.DigestIterations, Salt: p.DigestSalt, Value: p.Digest},
		Backup: p.HeaderBackup,
	}
	if err := r.Check(p.Key); err != nil {
		return nil, fmt.Errorf("the packet: %w", err)
	}
	if err := overwritable(device, r.UUID); err != nil || how.unchecked {
		return r, err
	}
	if r.Offset > usualOffset {
		return nil, fmt.Errorf("%w: the packet's data begin at %d bytes, further in than cryptsetup puts them by itself: if they do, say so with --unchecked", content.ErrGeometry, r.Offset)
	}
	return r, sameData(p, device)
}

// usualOffset is twice what cryptsetup makes: before the data all is written over.
const usualOffset = 32 << 20

// overwritable refuses a device on which something stands that a new header would
// damage: another header, also of uuid if that is known, or something that is not
// encrypted, under which an older volume's data may still be seen.
func overwritable(device, uuid string) error {
	if err := luks.GoneFile(device, uuid); err != nil {
		return fmt.Errorf("%w; `cryptsetup repair %s` may mend it; if it may be lost, say so with `wipefs --all %s`", err, device, device)
	}
	f, err := os.OpenFile(device, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of %s: %w", device, err)
	}
	what, err := content.Unencrypted(f, size)
	if err == nil && what != "" {
		err = fmt.Errorf("%w: %s holds %s, which is not encrypted, and would be damaged; if it may be, say so with `wipefs --all %s`", content.ErrGeometry, device, what, device)
	}
	return err
}

// enough refuses, before it is collected, what does not bring back a header that is
// gone.
func (how restoreOptions) enough(payload, device string) error {
	_, err := luks.ReadFile(device)
	if err == nil || payload == escrow.ForVolumeKey {
		return nil
	}
	return fmt.Errorf("%s: %w, and %w; what was approved stays for --out", device, enroll.ErrHeaderGone, errNoKey)
}

// sameData refuses a device whose data the packet's key, cipher, offset and sector
// size make no sense of.
func sameData(p *escrow.VolumeKeyPayload, device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of %s: %w", device, err)
	}
	_, err = content.Check(f, size, enroll.Geometry(p), p.Key, p.Fingerprint)
	if !errors.Is(err, content.ErrGeometry) && !errors.Is(err, content.ErrCipher) {
		return err
	}
	if len(p.Fingerprint) == 0 {
		err = fmt.Errorf("%w: the packet has no fingerprint of them, and no file system is found in them", err)
	}
	return fmt.Errorf("%s: %w; nothing was changed. If you know that it is the volume, work on a copy of it, with --unchecked", device, err)
}

// rebuildHeader writes the header, and returns it. What stands there is not kept:
// whoever may need it has the copy that the documents ask for.
func rebuildHeader(ctx context.Context, g *globals, r *luks.Rebuild, device string, volumeKey []byte) (*luks.Header, error) {
	if err := (cryptsetup.Tool{}).Rebuild(ctx, device, *r, volumeKey); err != nil {
		return nil, err
	}
	fmt.Fprintf(g.out, "%s: header written anew, without a keyslot\n", device)
	return luks.ReadFileWithin(device, luks.AnyMemory)
}
