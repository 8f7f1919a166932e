package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

func runRestore(ctx context.Context, g *globals, o recoverOptions) error {
	if o.device == "" {
		return usage("recover --restore needs --device")
	}
	return restoreFile(ctx, g, o.openOptions(), o.restore, o.device, o.newPassphraseFile, o.how)
}

// restoreFile restores from a packet in a file. What can be found out without a
// secret is found out first, and the new passphrase is asked for last.
func restoreFile(ctx context.Context, g *globals, o openOptions, path, device, newPassphraseFile string, how restoreOptions) error {
	if err := how.ready(device); err != nil {
		return err
	}
	opened, err := openFile(g, o, path)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	if _, err := how.plan(ctx, opened.Opened, device); err != nil {
		return opened.doubt(err)
	}
	passphrase, err := g.newSecret(newPassphraseFile, "--new-passphrase-file", "New passphrase of the volume: ")
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	return restore(ctx, g, opened.Opened, device, passphrase, how)
}

// ready refuses a volume that cannot be restored, whatever a packet holds.
func (how restoreOptions) ready(device string) error {
	if err := how.check(); err != nil {
		return err
	}
	header, err := luks.ReadFile(device)
	if err != nil {
		return how.gone(device, err)
	}
	return hasRoom(header, device)
}

func hasRoom(header *luks.Header, device string) error {
	if len(header.Free()) == 0 {
		return fmt.Errorf("%w on %s: remove one that is not used with cryptsetup luksKillSlot", cryptsetup.ErrFull, device)
	}
	return nil
}

// plan finds what of a packet opens the volume, or brings its header back; nothing
// was changed yet.
func (how restoreOptions) plan(ctx context.Context, opened *escrow.Opened, device string) (*restoring, error) {
	header, err := luks.ReadFile(device)
	if err != nil {
		if err := how.gone(device, err); err != nil {
			return nil, err
		}
		rebuild, err := how.rebuilding(opened, device)
		if err != nil {
			return nil, err
		}
		return &restoring{rebuild: rebuild, key: cryptsetup.Key{VolumeKey: opened.VolumeKey.Key}}, nil
	}
	if err := sameVolume(opened, header, device); err != nil {
		return nil, err
	}
	key, err := keyFor(ctx, opened, header, device)
	return &restoring{header: header, key: key}, err
}

// restoring is what a volume is restored with: a header that is there, or will be
// written anew.
type restoring struct {
	header  *luks.Header
	rebuild *luks.Rebuild
	key     cryptsetup.Key
}

func sameVolume(opened *escrow.Opened, header *luks.Header, device string) error {
	if want := opened.Header.Volume.UUID; !strings.EqualFold(header.UUID, want) {
		return fmt.Errorf("%w: the packet is of volume %s, %s is volume %s", errOtherVolume, want, device, header.UUID)
	}
	return nil
}

// keyFor proves what a packet holds on the volume: the volume key, or else the
// passphrase, which outlives a re-encryption.
func keyFor(ctx context.Context, opened *escrow.Opened, header *luks.Header, device string) (cryptsetup.Key, error) {
	var stale error
	if p := opened.VolumeKey; p != nil {
		stale = proveKey(p, header, device)
		if !errors.Is(stale, errStaleKey) {
			return cryptsetup.Key{VolumeKey: p.Key}, stale
		}
	}
	p := opened.Passphrase
	if p == nil {
		return cryptsetup.Key{}, stale
	}
	_, err := provePassphrase(ctx, p, header, device)
	return cryptsetup.Key{Passphrase: p.Passphrase}, err
}

// proveKey is errStaleKey for a key that the volume's digest is not of.
func proveKey(p *escrow.VolumeKeyPayload, header *luks.Header, device string) error {
	err := header.VerifyVolumeKey(p.Key)
	if errors.Is(err, luks.ErrVolumeKey) {
		return fmt.Errorf("%w: %s", errStaleKey, device)
	}
	if err != nil {
		return err
	}
	return sameGeometry(p, header, device)
}

// provePassphrase returns the keyslot that a passphrase opens, or errStale. That of
// somebody else may have moved to another keyslot than the packet names.
func provePassphrase(ctx context.Context, p *escrow.PassphrasePayload, header *luks.Header, device string) (int, error) {
	slot := p.Slot
	if _, active := header.Slot(slot); p.Foreign {
		slot = cryptsetup.AnySlot
	} else if !active {
		return 0, fmt.Errorf("%w: %s: keyslot %d, which it names, is not there", errStale, device, slot)
	}
	opens, err := cryptsetup.Tool{}.Test(ctx, device, p.Passphrase, slot)
	if errors.Is(err, cryptsetup.ErrPassphrase) {
		err = fmt.Errorf("%w: %s", errStale, device)
	}
	return opens, err
}

// sameGeometry refuses a header that has the volume key, and says something else
// about the data than the one that was saved. What the packet does not know is not
// compared.
func sameGeometry(p *escrow.VolumeKeyPayload, header *luks.Header, device string) error {
	saved := *header
	saved.KeyBits = p.KeyBits
	if p.Cipher != "" {
		saved.Cipher = p.Cipher
	}
	if p.LUKSType != "" {
		saved.Type = p.LUKSType
	}
	if p.DataOffset != escrow.NoOffset {
		saved.Offset, saved.SectorSize = p.DataOffset, p.SectorSize
	}
	if err := luks.Match(header, saved.Enrolled()); err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	return nil
}

// cheapSlots spares tests the seconds that guessing what a person chose must take.
var cheapSlots = false

// restore adds a passphrase to a volume with what a packet holds, and proves it. A
// header that is gone is written anew before, if that is wanted. No keyslot is
// removed.
func restore(ctx context.Context, g *globals, opened *escrow.Opened, device string, passphrase []byte, how restoreOptions) error {
	if err := how.ready(device); err != nil {
		return err
	}
	r, err := how.plan(ctx, opened, device)
	if err != nil {
		return err
	}
	switch {
	case how.rebuild && r.rebuild == nil:
		g.say("%s has its header: --rebuild was not needed", device)
	case r.rebuild != nil:
		if r.header, err = rebuildHeader(ctx, g, r.rebuild, device, r.key.VolumeKey); err != nil {
			return err
		}
	}
	free := r.header.Free()
	var tool cryptsetup.Tool
	if err := tool.AddKey(ctx, device, r.key, passphrase, free[0], cheapSlots); err != nil {
		return err
	}
	if _, err := tool.Test(ctx, device, passphrase, free[0]); err != nil {
		return fmt.Errorf("prove the new passphrase: %w", err)
	}
	fmt.Fprintf(g.out, "%s: new passphrase in keyslot %d, proved\n", device, free[0])
	if r.rebuild != nil {
		g.say("every other keyslot is gone with the old header, those for unattended boot and recovery too: look at the data first; then %s, or make a new packet", rotateWith)
		return nil
	}
	g.say("%s", whatNow(opened))
	return nil
}

// rotateWith is what gives an enrolled volume its keyslots back. The passphrase that
// was just added is named, because that of the boot may open nothing any more.
const rotateWith = "run `mandos-escrow rotate --passphrase-file F` on the machine, with the new passphrase in F"

// whatNow says what became of the packet that was used.
func whatNow(opened *escrow.Opened) string {
	switch {
	case opened.Header.KeyID == "":
		return "no keyslot was removed, and the packet goes on being good for this volume"
	case opened.Passphrase == nil:
		return "the escrow of this volume is unchanged; its volume key has been revealed: re-encrypt the volume; if the passphrases were only lost, " + rotateWith
	}
	return "the escrow of this volume is unchanged; its recovery passphrase has been revealed: to replace it, " + rotateWith
}

// runOpen writes what is in a packet. To the terminal, or a new file.
func runOpen(_ context.Context, g *globals, o recoverOptions) error {
	if o.phone {
		return phoneFile(g, o)
	}
	if o.out == "" {
		if _, err := terminal(g); err != nil {
			return usage("secrets are shown on a terminal only: give --out FILE")
		}
		o.out = "-"
	} else if o.out == "-" {
		return usage("--out - could be read by others: name a file, or leave it out on a terminal")
	}
	opened, err := openFile(g, o.openOptions(), o.openFile)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	return g.write(o.out, opened.Plain)
}

func checkPrintable(flag, text string) error {
	if err := record.Printable(text); err != nil {
		return usage("%s: %v", flag, err)
	}
	return nil
}

// quoted shows a text that somebody else wrote.
func quoted(text string) string { return strconv.Quote(text) }
