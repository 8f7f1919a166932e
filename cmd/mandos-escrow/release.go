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
	"time"

	"golang.org/x/term"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
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
