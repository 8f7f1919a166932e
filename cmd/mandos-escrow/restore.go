package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

func runRestore(ctx context.Context, g *globals, o recoverOptions) error {
	if o.device == "" {
		return usage("recover --restore needs --device")
	}
	opened, err := openPacket(g, o, o.restore)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	if err := sameVolume(opened, o.device); err != nil {
		return err
	}
	passphrase, err := g.newSecret(o.newPassphraseFile, "--new-passphrase-file", "New passphrase of the volume: ")
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	return restore(ctx, g, opened, o.device, passphrase)
}

// openPacket opens an off-line packet with its one-time password.
func openPacket(g *globals, o recoverOptions, path string) (*escrow.Opened, error) {
	text, err := config.ReadInput(path, g.in, nil)
	if err != nil {
		return nil, err
	}
	if record.Kind(text) == "mandos-escrow-packet" {
		return openSealed(g, o, text)
	}
	password, err := g.secretInput(o.otpFile, "--otp-file", "One-time password: ")
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(password)
	return openOneTime(path, text, password)
}

// openOneTime tries a one-time password as it was read, then as it would be
// with the dashes that somebody left out, or in capitals.
func openOneTime(path string, text, password []byte) (*escrow.Opened, error) {
	opened, err := escrow.OpenOffline(text, password)
	if again := secret.NormalizeOneTime(password); errors.Is(err, escrow.ErrIntegrity) && again != nil && !bytes.Equal(again, password) {
		defer secret.Wipe(again)
		opened, err = escrow.OpenOffline(text, again)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: wrong one-time password, or a damaged packet (they cannot be told apart): %w", path, err)
	}
	return opened, nil
}

// openSealed opens an exported packet with the trustee's own key, off-line.
func openSealed(g *globals, o recoverOptions, data []byte) (*escrow.Opened, error) {
	if o.key == "" {
		return nil, usage("this packet is sealed to trustees: give --key FILE with the private key of one")
	}
	packet, err := escrow.Parse(data)
	if err != nil {
		return nil, err
	}
	text, err := g.input(o.key)
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(text)
	passphrase, err := g.secretInput(o.keyPassphraseFile, "--key-passphrase-file", "Passphrase of the trustee's key: ")
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(passphrase)
	trustee, err := seal.ParsePrivate(text, passphrase)
	if err != nil {
		return nil, err
	}
	_, message, err := packet.Share(o.payload, trustee.Public().Fingerprint())
	if err != nil {
		return nil, err
	}
	share, err := escrow.OpenShare(message, trustee, packet, o.payload)
	if err != nil {
		return nil, err
	}
	defer share.Wipe()
	return packet.Open(o.payload, []*escrow.Share{share})
}

func sameVolume(opened *escrow.Opened, device string) error {
	header, err := luks.ReadFile(device)
	if err != nil {
		return err
	}
	if header.UUID != opened.Header.Volume.UUID {
		return fmt.Errorf("%w: the packet is of volume %s, %s is volume %s", errOtherVolume, opened.Header.Volume.UUID, device, header.UUID)
	}
	return nil
}

// restore adds a passphrase to a volume with what a packet holds, and proves
// it. No keyslot is removed.
func restore(ctx context.Context, g *globals, opened *escrow.Opened, device string, passphrase []byte) error {
	if err := sameVolume(opened, device); err != nil {
		return err
	}
	header, err := luks.ReadFile(device)
	if err != nil {
		return err
	}
	free := header.Free()
	if len(free) == 0 {
		return fmt.Errorf("%w on %s: remove one that is not used with cryptsetup luksKillSlot", cryptsetup.ErrFull, device)
	}
	key := cryptsetup.Key{}
	if opened.Passphrase != nil {
		key.Passphrase = opened.Passphrase.Passphrase
	} else {
		key.VolumeKey = opened.VolumeKey.Key
	}
	var tool cryptsetup.Tool
	err = tool.AddKey(ctx, device, key, passphrase, free[0], false)
	if errors.Is(err, cryptsetup.ErrPassphrase) {
		return fmt.Errorf("%w: %s", errStale, device)
	}
	if err != nil {
		return err
	}
	if _, err := tool.Test(ctx, device, passphrase, free[0]); err != nil {
		return fmt.Errorf("prove the new passphrase: %w", err)
	}
	fmt.Fprintf(g.out, "%s: new passphrase in keyslot %d, proved\n", device, free[0])
	g.say("the escrow of this volume is unchanged; its recovery passphrase has been revealed: run `mandos-escrow enroll` on the machine to replace it")
	return nil
}

// runOpen writes what is in a packet. To the terminal, or a new file.
func runOpen(_ context.Context, g *globals, o recoverOptions) error {
	if o.out == "" {
		if _, err := terminal(g); err != nil {
			return usage("secrets are shown on a terminal only: give --out FILE")
		}
		o.out = "-"
	} else if o.out == "-" {
		return usage("--out - could be read by others: name a file, or leave it out on a terminal")
	}
	opened, err := openPacket(g, o, o.openFile)
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
