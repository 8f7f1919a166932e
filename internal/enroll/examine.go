package enroll

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

// volume is one device on its way through the transaction.
type volume struct {
	device  string // as typed
	path    string // absolute
	header  *luks.Header
	journal *journal     // of an earlier run
	earlier *passphrases // that an interrupted run had made
	added   []int        // keyslots that it had added
	opener  []byte       // a passphrase that opens a slot; proved
	users   bool         // opener is the passphrase that a person gave
	apart   bool         // opener opens a keyslot that no interrupted run added
}

func newVolume(device string) (*volume, error) {
	header, err := luks.ReadFile(device)
	if err != nil {
		return nil, err
	}
	path, err := filepath.Abs(device)
	return &volume{device: device, path: path, header: header}, err
}

func (v *volume) wipe() {
	secret.Wipe(v.opener)
	if v.earlier != nil {
		v.earlier.wipe()
	}
}

func (v *volume) reread() (err error) {
	v.header, err = luks.ReadFile(v.device)
	return err
}

// examine finds out, without changing anything, where a volume stands, and
// that what will be needed is there. The header is read again: it may have
// changed while the lock was waited for.
func (e *enrolment) examine(ctx context.Context, v *volume) (err error) {
	if err := v.reread(); err != nil {
		return err
	}
	if v.journal, err = e.readJournal(v.header.UUID); err != nil {
		return err
	}
	if v.journal != nil && !v.journal.committed {
		if err := e.examineInterrupted(ctx, v); err != nil {
			return fmt.Errorf("take up an interrupted enrolment: %w", err)
		}
	}
	if err := e.findOpener(ctx, v); err != nil {
		return err
	}
	needed := 2
	if e.NoBoot {
		needed = 1
	}
	if free := len(v.header.Free()) + len(v.added); !e.settled(v) && free < needed {
		return fmt.Errorf("%w: %d of %d are free, %d are needed; remove one that is not used with cryptsetup luksKillSlot", ErrFull, free, v.header.MaxSlots, needed)
	}
	return nil
}

// examineInterrupted finds the keyslots that an interrupted run added: those
// that its passphrases open.
func (e *enrolment) examineInterrupted(ctx context.Context, v *volume) error {
	running, err := config.LoadIdentity(e.path(RunningFolder))
	if err != nil {
		return err
	}
	if v.earlier, err = v.journal.open(running.Seal); err != nil {
		return fmt.Errorf("%s: %w", e.journalPath(v.header.UUID), err)
	}
	for _, s := range []struct {
		number     int
		passphrase []byte
	}{{v.journal.boot.number, v.earlier.boot}, {v.journal.recovery.number, v.earlier.recovery}} {
		if _, active := v.header.Slot(s.number); !active {
			continue
		}
		switch _, err := e.Tool.Test(ctx, v.device, s.passphrase, s.number); {
		case err == nil:
			v.added = append(v.added, s.number)
		case !errors.Is(err, cryptsetup.ErrPassphrase): // that one is somebody else's now
			return err
		}
	}
	return nil
}

// complete reports whether an interrupted run had added all its keyslots.
func (v *volume) complete() bool {
	return v.earlier != nil && len(v.added) == len(v.journal.planned())
}

// spellings are a passphrase exactly as it was read, and without its last
// newline.
func spellings(passphrase []byte) [][]byte {
	all := [][]byte{passphrase}
	if trimmed := config.TrimNewline(passphrase); len(trimmed) < len(passphrase) {
		all = append(all, trimmed)
	}
	return all
}

// findOpener proves a passphrase: the given one, exactly as it was read, then
// without its last newline; or that of an interrupted run, which may have
// removed the given one already.
func (e *enrolment) findOpener(ctx context.Context, v *volume) error {
	candidates := spellings(e.Passphrase)
	given := len(candidates)
	if v.earlier != nil {
		candidates = append(candidates, v.earlier.recovery)
	}
	var last error
	for i, candidate := range candidates {
		if len(candidate) == 0 {
			continue
		}
		number, err := e.Tool.Test(ctx, v.device, candidate, cryptsetup.AnySlot)
		if err == nil {
			v.opener, v.users, v.apart = slices.Clone(candidate), i < given && !e.fetched, !slices.Contains(v.added, number)
			return nil
		}
		if last = err; !errors.Is(err, cryptsetup.ErrPassphrase) {
			return err
		}
	}
	if e.intact(v) && !e.renew {
		return nil // enrolled already, and the given passphrase was removed then
	}
	if last == nil {
		return errors.New("needs a passphrase that opens it: give --passphrase-file")
	}
	return last
}

// intact reports whether a finished enrolment of the kind that is wanted still
// stands on the volume: our keyslots have the material that was proved then.
func (e *enrolment) intact(v *volume) bool {
	j := v.journal
	if j == nil || !j.committed || j.boots() == e.NoBoot {
		return false
	}
	return v.unchanged(j.recovery) && (!j.boots() || v.unchanged(j.boot))
}

// settled reports whether there is nothing to do on the volume: a finished
// enrolment stands, and the given passphrase is not to be removed. Where it
// is, new keyslots are made, because only those can be proved.
func (e *enrolment) settled(v *volume) bool {
	return e.intact(v) && !(e.RemovePassphrase && v.users) && !e.renew
}

func (v *volume) unchanged(s slot) bool {
	material, err := v.material(s.number)
	return err == nil && material == s.material
}

func (v *volume) material(number int) ([32]byte, error) {
	f, err := os.Open(v.device)
	if err != nil {
		return [32]byte{}, err
	}
	defer f.Close()
	return luks.SlotMaterial(f, v.header, number)
}
