package cryptsetup

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"mandos-escrow/luks"
)

// KillSlot removes a keyslot, and sees to it that it is gone. The key must open the volume without that keyslot: a passphrase
// that cryptsetup finds in the very keyslot is refused (also when it opens another one too), and so is removing the last one.
// None of this is left to cryptsetup, which under --batch-mode removes the last keyslot without a word. Errors: ErrSlot,
// ErrLastSlot, ErrOwnSlot, ErrPassphrase, luks.ErrVolumeKey.
func (t Tool) KillSlot(ctx context.Context, dev string, slot int, key Key) error {
	h, err := luks.ReadFile(dev)
	if err != nil {
		return err
	}
	op := operation(dev, "luksKillSlot", strconv.Itoa(slot))
	if _, ok := h.Slot(slot); !ok {
		return fmt.Errorf("%w: %s: it is not active", ErrSlot, op)
	}
	if !slices.ContainsFunc(h.Slots, func(s luks.Slot) bool { return s.Bound && s.Number != slot }) {
		return fmt.Errorf("%w: %s", ErrLastSlot, op)
	}
	args := []string{"luksKillSlot", "--batch-mode"}
	var secrets [][]byte
	passphrase, _, err := key.unlocking(h)
	if err != nil {
		return err
	}
	if len(key.Passphrase) != 0 {
		opened, err := t.Test(ctx, dev, passphrase, AnySlot)
		if err != nil {
			return err
		}
		if opened == slot {
			return fmt.Errorf("%w: %s", ErrOwnSlot, op)
		}
		secrets, args = [][]byte{passphrase}, append(args, "--key-file", fd(0))
	}
	return t.killSlot(ctx, dev, op, slot, secrets, args...) // a volume key was proved above
}

// KillSlotBeside removes a keyslot without any passphrase, because another one, keep, stays: the caller has just proved it, or
// knows that it is not ours. Errors: ErrSlot when one of the two is not active or keep does not hold the volume key, ErrLastSlot
// when they are the same.
func (t Tool) KillSlotBeside(ctx context.Context, dev string, slot, keep int) error {
	h, err := luks.ReadFileWithin(dev, luks.AnyMemory)
	if err != nil {
		return err
	}
	op := operation(dev, "luksKillSlot", strconv.Itoa(slot))
	if _, ok := h.Slot(slot); !ok {
		return fmt.Errorf("%w: %s: it is not active", ErrSlot, op)
	}
	if slot == keep {
		return fmt.Errorf("%w: %s", ErrLastSlot, op)
	}
	if s, ok := h.Slot(keep); !ok || !s.Bound {
		return fmt.Errorf("%w: %s: keyslot %d, which should remain, does not hold the volume key", ErrSlot, op, keep)
	}
	return t.killSlot(ctx, dev, op, slot, nil, "luksKillSlot", "--batch-mode")
}

// killSlot removes a keyslot. Without a key file cryptsetup finds its standard input empty, and goes ahead.
func (t Tool) killSlot(ctx context.Context, dev, op string, slot int, secrets [][]byte, args ...string) error {
	if _, err := t.run(ctx, op, secrets, append(args, "--", dev, strconv.Itoa(slot))...); err != nil {
		return err
	}
	return expect(dev, op, func(h *luks.Header) bool { _, still := h.Slot(slot); return !still })
}

// SetPriority sets a LUKS2 keyslot's priority: luks.Ignore, luks.Normal or luks.Prefer.
func (t Tool) SetPriority(ctx context.Context, dev string, slot int, priority string) error {
	op := operation(dev, "config --priority", priority)
	if _, err := read2(dev, op); err != nil {
		return err
	}
	_, err := t.run(ctx, op, nil, "config", "--priority", priority, "--key-slot", strconv.Itoa(slot), "--", dev)
	if err != nil {
		return err
	}
	return expect(dev, op, func(h *luks.Header) bool { s, ok := h.Slot(slot); return ok && s.Priority == priority })
}

// ImportToken adds a LUKS2 token and returns its number, the lowest that is free.
func (t Tool) ImportToken(ctx context.Context, dev string, json []byte) (int, error) {
	op := operation(dev, "token import")
	h, err := read2(dev, op)
	if err != nil {
		return 0, err
	}
	id := 0
	for hasToken(h, id) {
		id++
	}
	if _, err := t.run(ctx, op, [][]byte{json}, "token", "import", "--json-file", fd(0), "--token-id", strconv.Itoa(id), "--", dev); err != nil {
		return 0, err
	}
	return id, expect(dev, op, func(h *luks.Header) bool { return hasToken(h, id) })
}

// ExportToken returns a LUKS2 token's JSON.
func (t Tool) ExportToken(ctx context.Context, dev string, id int) ([]byte, error) {
	return t.run(ctx, operation(dev, "token export"), nil, "token", "export", "--token-id", strconv.Itoa(id), "--", dev)
}

// RemoveToken removes a LUKS2 token. Removing one that does not exist is an error.
func (t Tool) RemoveToken(ctx context.Context, dev string, id int) error {
	op := operation(dev, "token remove")
	if _, err := t.run(ctx, op, nil, "token", "remove", "--token-id", strconv.Itoa(id), "--", dev); err != nil {
		return err
	}
	return expect(dev, op, func(h *luks.Header) bool { return !hasToken(h, id) })
}

func hasToken(h *luks.Header, id int) bool {
	return slices.ContainsFunc(h.Tokens, func(t luks.Token) bool { return t.ID == id })
}

// read2 reads the header for a command that derives no key, and refuses LUKS1, which has neither priorities nor tokens.
func read2(dev, op string) (*luks.Header, error) {
	h, err := luks.ReadFileWithin(dev, luks.AnyMemory)
	if err != nil {
		return nil, err
	}
	if h.Type != luks.Type2 {
		return nil, fmt.Errorf("%w: %s: only LUKS2 has this, the volume is %s", luks.ErrUnsupported, op, h.Type)
	}
	return h, nil
}
