package cryptsetup

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"mandos-escrow/luks"
)

// AnySlot lets Test find the keyslot.
const AnySlot = -1

// noToken keeps cryptsetup open from trying LUKS2 tokens before the passphrase: it would report success for whatever a TPM or a
// keyring opens. No token has this type, so it goes on to the key file.
const noToken = "mandos-escrow-no-token"

// VolumeKey returns the volume key, proved by the header's digest. The caller wipes it. dev may also be a header without its
// data (luks.ReadHeaderFile). Of a LUKS2 header with one damaged copy cryptsetup writes that copy anew. Errors: ErrPassphrase,
// those of package luks.
func (t Tool) VolumeKey(ctx context.Context, dev string, passphrase []byte) ([]byte, error) {
	h, err := luks.ReadHeaderFile(dev)
	if err != nil {
		return nil, err
	}
	op := operation(dev, "luksDump --dump-volume-key")
	out, err := t.run(ctx, op, [][]byte{passphrase},
		"luksDump", "--dump-volume-key", "--batch-mode", "--key-file", fd(0), "--", dev)
	defer clear(out)
	if err != nil {
		return nil, err
	}
	key, err := parseDump(out, h.KeyBits/8)
	if err != nil {
		return nil, fmt.Errorf("cryptsetup: %s: %w", op, err)
	}
	if err := h.VerifyVolumeKey(key); err != nil {
		clear(key)
		return nil, err
	}
	return key, nil
}

// parseDump reads the last field of the dump: "MK dump:" and a tab, then two hex digits a byte, 16 bytes a line, lines after
// the first indented by two tabs.
func parseDump(out []byte, want int) ([]byte, error) {
	_, text, ok := bytes.Cut(out, []byte("\nMK dump:\t"))
	if !ok {
		return nil, errors.New(`no "MK dump:" in the output`)
	}
	// Two digits and a blank for each byte; the rest is the indentation.
	digits := make([]byte, 0, len(text))
	defer func() { clear(digits[:cap(digits)]) }()
	for _, c := range text {
		if c != ' ' && c != '\t' && c != '\n' {
			digits = append(digits, c)
		}
	}
	if len(digits) != 2*want {
		return nil, fmt.Errorf("volume key of %d hex digits, must be %d", len(digits), 2*want)
	}
	key := make([]byte, want)
	if _, err := hex.Decode(key, digits); err != nil {
		clear(key)
		return nil, errors.New("volume key is not hex") // err would quote a digit of it
	}
	return key, nil
}

// Test proves that a passphrase opens a keyslot, and returns which. With AnySlot cryptsetup tries all in its order, but for
// those of priority ignore. Errors: ErrPassphrase, ErrSlot when the keyslot is not active.
func (t Tool) Test(ctx context.Context, dev string, passphrase []byte, slot int) (int, error) {
	h, err := luks.ReadFile(dev)
	if err != nil {
		return 0, err
	}
	op := operation(dev, "open --test-passphrase")
	args := []string{
		"open", "--test-passphrase", "--verbose", "--disable-external-tokens", "--token-type", noToken,
		"--type", h.Type, "--key-file", fd(0),
	}
	if slot != AnySlot {
		if _, ok := h.Slot(slot); !ok {
			return 0, fmt.Errorf("%w: %s: keyslot %d is not active", ErrSlot, op, slot)
		}
		args = append(args, "--key-slot", strconv.Itoa(slot))
	}
	out, err := t.run(ctx, op, [][]byte{passphrase}, append(args, "--", dev)...)
	if err != nil {
		return 0, err
	}
	opened, err := parseUnlocked(string(out))
	if err != nil {
		return 0, fmt.Errorf("cryptsetup: %s: %w", op, err)
	}
	if slot != AnySlot && opened != slot {
		return 0, fmt.Errorf("%w: %s: asked for keyslot %d, keyslot %d opened", ErrSlot, op, slot, opened)
	}
	if s, ok := h.Slot(opened); !ok || !s.Bound {
		return 0, fmt.Errorf("%w: %s: keyslot %d does not hold the volume key", ErrSlot, op, opened)
	}
	return opened, nil
}

// parseUnlocked reads the line "Key slot N unlocked."
func parseUnlocked(out string) (int, error) {
	for line := range strings.Lines(out) {
		number, ok := strings.CutPrefix(strings.TrimSpace(line), "Key slot ")
		if !ok {
			continue
		}
		if number, ok = strings.CutSuffix(number, " unlocked."); ok {
			return strconv.Atoi(number)
		}
	}
	return 0, errors.New("it does not say which keyslot opened")
}

// unlocking returns the options that pass a key as the first secret, after proving a volume key by the header's digest:
// cryptsetup's own exit code does not tell a wrong volume key from a wrong passphrase.
func (k Key) unlocking(h *luks.Header) ([]byte, []string, error) {
	switch {
	case len(k.Passphrase) != 0 && len(k.VolumeKey) == 0:
		return k.Passphrase, []string{"--key-file", fd(0)}, nil
	case len(k.VolumeKey) != 0 && len(k.Passphrase) == 0:
		if err := h.VerifyVolumeKey(k.VolumeKey); err != nil {
			return nil, nil, err
		}
		// A LUKS2 header without keyslots does not tell the key's size.
		return k.VolumeKey, []string{"--volume-key-file", fd(0), "--key-size", strconv.Itoa(len(k.VolumeKey) * 8)}, nil
	}
	return nil, nil, errors.New("cryptsetup: needs either a passphrase or a volume key")
}

// AddKey adds a passphrase in a given free keyslot, and sees to it that it is there. Cheap is for random passphrases, which need
// no stretching: PBKDF2 with 1000 iterations; otherwise cryptsetup's defaults. Errors: ErrPassphrase, luks.ErrVolumeKey,
// ErrFull, ErrSlot when the keyslot is in use.
func (t Tool) AddKey(ctx context.Context, dev string, key Key, passphrase []byte, slot int, cheap bool) error {
	h, err := luks.ReadFile(dev)
	if err != nil {
		return err
	}
	op := operation(dev, "luksAddKey")
	free := h.Free()
	if len(free) == 0 {
		return fmt.Errorf("%w: %s: %d keyslots are in use", ErrFull, op, len(h.Slots))
	}
	if _, used := h.Slot(slot); used || slot < 0 || slot >= h.MaxSlots {
		return fmt.Errorf("%w: %s: keyslot %d is not free, free are %v", ErrSlot, op, slot, free)
	}
	unlock, options, err := key.unlocking(h)
	if err != nil {
		return err
	}
	args := slices.Concat([]string{"luksAddKey", "--batch-mode"}, options,
		[]string{"--new-keyfile", fd(1), "--new-key-slot", strconv.Itoa(slot)})
	if cheap {
		args = append(args, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
	}
	if _, err := t.run(ctx, op, [][]byte{unlock, passphrase}, append(args, "--", dev)...); err != nil {
		return err
	}
	return expect(dev, op, func(h *luks.Header) bool { s, ok := h.Slot(slot); return ok && s.Bound })
}

// expect reads the header again after a change.
func expect(dev, op string, holds func(*luks.Header) bool) error {
	h, err := luks.ReadFileWithin(dev, luks.AnyMemory)
	if err != nil {
		return err
	}
	if !holds(h) {
		return fmt.Errorf("cryptsetup: %s: it reported success, but the header does not show the change", op)
	}
	return nil
}
