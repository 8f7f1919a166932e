package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/term"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/recovery"
)

// runRelease collects an approved request. Where the result goes is made ready
// first: what was released cannot be collected twice.
func runRelease(ctx context.Context, g *globals, o recoverOptions) error {
	deliver, cleanup, err := delivery(ctx, g, o)
	if err != nil {
		return err
	}
	defer cleanup()
	s, err := g.connectHome()
	if err != nil {
		return err
	}
	defer s.close()
	id, err := s.home.FindRequest(o.release)
	if err != nil {
		return err
	}
	signed, keyText, err := s.home.Request(id)
	if err != nil {
		return err
	}
	defer secret.Wipe(keyText)
	released, kept, err := s.collect(ctx, id)
	if err != nil {
		return err
	}
	opened, err := s.openRelease(signed, keyText, released)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	if err := s.home.KeepRelease(id, kept); err != nil {
		return err
	}
	if err := deliver(opened); err != nil {
		return err
	}
	return s.home.ForgetRequest(id)
}

// collect asks the server once. Its reply, which only the one-off key opens, is
// kept, if it opens, until it was delivered, so that a full disk or a wrong
// device afterwards does not cost another approval.
func (s *session) collect(ctx context.Context, id string) (released *api.Release, kept []byte, err error) {
	released = &api.Release{}
	kept, err = s.home.Release(id)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.Call(ctx, "POST", "/v1/requests/"+url.PathEscape(id)+"/release", nil, released); err != nil {
			return nil, nil, err
		}
		kept, err = json.Marshal(released)
		return released, kept, err
	}
	if err != nil {
		return nil, nil, err
	}
	return released, kept, json.Unmarshal(kept, released)
}

// openRelease combines the re-sealed shares. Everything is checked against the
// request as this home signed it.
func (s *session) openRelease(signed, keyText []byte, released *api.Release) (*escrow.Opened, error) {
	if !bytes.Equal(signed, released.Request) {
		return nil, fmt.Errorf("%w: the server released another request", recovery.ErrRequest)
	}
	request, err := recovery.ParseRequest(signed)
	if err != nil {
		return nil, err
	}
	oneOff, err := seal.ParsePrivate(keyText, nil)
	if err != nil {
		return nil, err
	}
	packet, err := escrow.Parse(released.Packet)
	if err != nil {
		return nil, err
	}
	if packet.Digest != request.PacketDigest {
		return nil, fmt.Errorf("%w: the server released another packet", recovery.ErrRequest)
	}
	if err := packet.CheckPolicy(s.membership.Policy); err != nil {
		return nil, fmt.Errorf("%w: %w", errForeign, err)
	}
	digest := recovery.Digest(signed)
	var shares []*escrow.Share
	defer func() {
		for _, share := range shares {
			share.Wipe()
		}
	}()
	for _, a := range released.Approvals {
		if _, err := recovery.ParseApproval(a.Approval, digest, a.Share); err != nil {
			return nil, err
		}
		share, err := recovery.OpenResealed(a.Share, oneOff, digest)
		if err != nil {
			return nil, err
		}
		shares = append(shares, share)
	}
	return packet.Open(request.Payload, shares)
}

// delivery makes ready where a release goes, and refuses what cannot work
// before anything is asked for.
func delivery(ctx context.Context, g *globals, o recoverOptions) (deliver func(*escrow.Opened) error, cleanup func(), err error) {
	ways := 0
	for _, chosen := range []bool{o.out != "", o.phone, o.device != ""} {
		if chosen {
			ways++
		}
	}
	if ways != 1 {
		return nil, nil, usage("recover --release needs one of --out FILE, --phone, --device DEV")
	}
	switch {
	case o.phone:
		tty, err := terminal(g)
		if err != nil {
			return nil, nil, err
		}
		return func(opened *escrow.Opened) error { return readOut(tty, opened) }, func() {}, nil
	case o.device != "":
		passphrase, err := g.newSecret(o.newPassphraseFile, "--new-passphrase-file", "New passphrase of the volume: ")
		if err != nil {
			return nil, nil, err
		}
		if _, err := luks.ReadFile(o.device); err != nil {
			secret.Wipe(passphrase)
			return nil, nil, err
		}
		deliver := func(opened *escrow.Opened) error { return restore(ctx, g, opened, o.device, passphrase) }
		return deliver, func() { secret.Wipe(passphrase) }, nil
	}
	return packetDelivery(g, o)
}

// packetDelivery writes a packet under a one-time password, and the password
// to a file of its own or the terminal, both or none.
func packetDelivery(g *globals, o recoverOptions) (func(*escrow.Opened) error, func(), error) {
	if filepath.Clean(o.out) == filepath.Clean(o.otpFile) {
		return nil, nil, usage("--out and --otp-file are the same file: a packet and its password go different ways")
	}
	packet, err := config.NewOutput(o.out)
	if err != nil {
		return nil, nil, err
	}
	var otp *config.Output
	var tty *os.File
	if o.otpFile != "" {
		otp, err = config.NewOutput(o.otpFile)
	} else {
		tty, err = terminal(g)
	}
	if err != nil {
		packet.Discard()
		return nil, nil, err
	}
	cleanup := func() {
		packet.Discard()
		if otp != nil {
			otp.Discard()
		}
	}
	deliver := func(opened *escrow.Opened) error {
		password := secret.OneTimePassword()
		defer secret.Wipe(password)
		text, err := escrow.SealOffline(opened, password, time.Now())
		if err != nil {
			return err
		}
		if _, err := packet.Write(text); err != nil {
			return fmt.Errorf("write %s: %w", o.out, err)
		}
		if otp == nil {
			if _, err := fmt.Fprintf(tty, "one-time password of %s: %s\n", o.out, password); err != nil {
				return fmt.Errorf("show the one-time password: %w", err)
			}
			return packet.Commit()
		}
		if _, err := otp.Write(password); err != nil {
			return fmt.Errorf("write %s: %w", o.otpFile, err)
		}
		if err := otp.Commit(); err != nil {
			return err
		}
		if err := packet.Commit(); err != nil {
			return errors.Join(err, config.Remove(o.otpFile)) // a password of nothing
		}
		g.say("wrote %s and its one-time password %s; send them by different ways", o.out, o.otpFile)
		return nil
	}
	return deliver, cleanup, nil
}

// terminal returns standard output if it is a terminal: secrets go nowhere else
// but into files of mode 0600.
func terminal(g *globals) (*os.File, error) {
	if g.tty != nil && term.IsTerminal(int(g.tty.Fd())) {
		return g.tty, nil
	}
	return nil, usage("secrets are shown on a terminal only: give --out FILE and --otp-file FILE, or --device DEV")
}

// readOut shows a recovery passphrase group by group.
func readOut(tty *os.File, opened *escrow.Opened) error {
	if opened.Passphrase == nil {
		return usage("--phone reads a recovery passphrase; this request is for the volume key: collect it with --out or --device")
	}
	_, err := fmt.Fprintf(tty, "recovery passphrase of volume %s of %s; the dashes are typed too:\n", safe(opened.Header.Volume.UUID), safe(opened.Header.Machine))
	for i, group := range bytes.Split(opened.Passphrase.Passphrase, []byte("-")) {
		if err == nil {
			_, err = fmt.Fprintf(tty, "  group %d   %s\n", i+1, group)
		}
	}
	if err != nil {
		return fmt.Errorf("show the recovery passphrase: %w", err)
	}
	return nil
}

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
