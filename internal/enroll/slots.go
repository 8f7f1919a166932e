package enroll

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

// TokenType is the type of the LUKS2 tokens that mark our keyslots.
const TokenType = "mandos-escrow"

// addSlots adds our keyslots and proves that each opens. Their passphrases are
// random, so stretching them would only make boots slow.
func (e *enrolment) addSlots(ctx context.Context, v *volume, j *journal, p *passphrases) error {
	for _, s := range []struct {
		number     int
		purpose    string
		passphrase []byte
	}{{j.boot.number, "boot", p.boot}, {j.recovery.number, "recovery", p.recovery}} {
		if s.number < 0 {
			continue
		}
		if err := e.Tool.AddKey(ctx, v.device, cryptsetup.Key{Passphrase: v.opener}, s.passphrase, s.number, true); err != nil {
			return err
		}
		e.Checkpoint("added the " + s.purpose + " slot")
		if v.header.Type == luks.Type2 {
			if err := e.mark(ctx, v, s.number, s.purpose, j.packet); err != nil {
				return err
			}
			e.Checkpoint("marked the " + s.purpose + " slot")
		}
		if _, err := e.Tool.Test(ctx, v.device, s.passphrase, s.number); err != nil {
			return fmt.Errorf("prove the %s passphrase: %w", s.purpose, err)
		}
		e.Progress("%s: %s passphrase in keyslot %d, proved", v.device, s.purpose, s.number)
	}
	return v.reread()
}

// mark makes a LUKS2 keyslot known as ours, and the boot slot the first tried.
func (e *enrolment) mark(ctx context.Context, v *volume, number int, purpose, packet string) error {
	if purpose == "boot" {
		if err := e.Tool.SetPriority(ctx, v.device, number, luks.Prefer); err != nil {
			return err
		}
	}
	token, err := json.Marshal(map[string]any{
		"type": TokenType, "keyslots": []string{strconv.Itoa(number)}, "purpose": purpose, "packet": packet,
	})
	if err != nil {
		return err
	}
	_, err = e.Tool.ImportToken(ctx, v.device, token)
	return err
}

// markMissing marks the keyslots that an interrupted run added and did not come to
// mark.
func (e *enrolment) markMissing(ctx context.Context, v *volume, j *journal) error {
	if v.header.Type != luks.Type2 {
		return nil
	}
	for number, purpose := range map[int]string{j.boot.number: "boot", j.recovery.number: "recovery"} {
		marked := slices.ContainsFunc(v.header.Tokens, func(t luks.Token) bool {
			return t.Type == TokenType && slices.Contains(t.Keyslots, number)
		})
		if number < 0 || marked {
			continue
		}
		if err := e.mark(ctx, v, number, purpose, j.packet); err != nil {
			return err
		}
		e.Checkpoint("marked the " + purpose + " slot")
	}
	return v.reread()
}

// tokenPacket is the packet that a token of ours names, or "".
func tokenPacket(text []byte) string {
	var token struct {
		Packet string `json:"packet"`
	}
	if json.Unmarshal(text, &token) != nil {
		return ""
	}
	return token.Packet
}

// rollBack removes the keyslots of an interrupted run, which its passphrases
// have just opened, so they are ours; a passphrase of another keyslot has just
// been proved, so another way in remains.
func (e *enrolment) rollBack(ctx context.Context, v *volume) error {
	for _, number := range v.added {
		if !v.users && !v.apart {
			return errors.New("an interrupted enrolment must be undone, which needs a passphrase that is not ours: give --passphrase-file")
		}
		if err := e.Tool.KillSlot(ctx, v.device, number, cryptsetup.Key{Passphrase: v.opener}); err != nil {
			return err
		}
		e.Progress("%s: removed keyslot %d of an interrupted enrolment", v.device, number)
		e.Checkpoint("rolled back a slot")
	}
	return e.dropTokens(ctx, v, nil)
}

// dropOldSlots removes the keyslots of an enrolment that this one replaces. A
// slot that changed since then is left alone: it may be somebody else's now.
func (e *enrolment) dropOldSlots(ctx context.Context, v *volume, j *journal, p *passphrases) error {
	var gone []int
	for _, s := range j.old {
		if s.number == j.boot.number || s.number == j.recovery.number {
			continue
		}
		gone = append(gone, s.number)
		if !v.unchanged(s) {
			continue
		}
		if err := e.Tool.KillSlot(ctx, v.device, s.number, cryptsetup.Key{Passphrase: p.recovery}); err != nil {
			return err
		}
		e.Progress("%s: removed keyslot %d of the enrolment before", v.device, s.number)
		e.Checkpoint("dropped an old slot")
	}
	return e.dropTokens(ctx, v, gone)
}

// dropTokens removes our LUKS2 tokens that mark nothing any more, or nothing
// but keyslots that were ours. cryptsetup takes a keyslot that it removes out
// of its tokens. The tokens of another system on the same volume stay.
func (e *enrolment) dropTokens(ctx context.Context, v *volume, gone []int) error {
	if err := v.reread(); err != nil {
		return err
	}
	for _, t := range v.header.Tokens {
		marks := slices.ContainsFunc(t.Keyslots, func(n int) bool { return !slices.Contains(gone, n) })
		if t.Type != TokenType || marks {
			continue
		}
		if err := e.Tool.RemoveToken(ctx, v.device, t.ID); err != nil {
			return err
		}
		e.Checkpoint("dropped a token")
	}
	return v.reread()
}

// removePassphrase removes every keyslot that the given passphrase opens,
// also one that cryptsetup tries only when it is named (LUKS2 priority
// ignore). The recovery passphrase was just proved, and is again by KillSlot.
func (e *enrolment) removePassphrase(ctx context.Context, v *volume, j *journal, p *passphrases) error {
	for _, s := range v.header.Slots {
		if !s.Bound || s.Number == j.boot.number || s.Number == j.recovery.number {
			continue
		}
		_, err := e.Tool.Test(ctx, v.device, v.opener, s.Number)
		if errors.Is(err, cryptsetup.ErrPassphrase) {
			continue
		}
		if err != nil {
			return err
		}
		if err := e.Tool.KillSlot(ctx, v.device, s.Number, cryptsetup.Key{Passphrase: p.recovery}); err != nil {
			return err
		}
		e.Progress("%s: removed the given passphrase from keyslot %d", v.device, s.Number)
		e.Checkpoint("removed the passphrase")
	}
	return v.reread()
}
