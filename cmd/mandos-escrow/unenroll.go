package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/internal/secret"
)

type unenrollOptions struct {
	root, passphraseFile, newPassphraseFile string
	devices, forget                         []string
	offline                                 bool
}

func newUnenroll(g *globals) *cobra.Command {
	var o unenrollOptions
	cmd := &cobra.Command{
		Use:   "unenroll",
		Short: "take back what enroll did on this machine",
		Long: `Tells the server, which disables the machine and drops its sealed blob; removes
our keyslots and LUKS2 tokens from every volume, the files in /etc/mandos-escrow
and /var/lib/mandos-escrow-agent, and what enroll installed; has the boot image
made anew without us. The server keeps the packets.

The last way in is never removed. Where only keyslots of ours open a volume, it
needs --new-passphrase-file, and adds and proves that passphrase first; with
--passphrase-file, or with the boot passphrase, which it asks of the server. A
keyslot that was changed since enrolment is named and left alone.

It can be killed at any point and run again.`,
		Example: `  mandos-escrow unenroll
  mandos-escrow unenroll --new-passphrase-file new.pass
  mandos-escrow unenroll --offline --passphrase-file user.pass`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runUnenroll(cmd.Context(), g, o) },
	}
	cmd.Flags().StringVar(&o.root, "root", "/", "prefix of what enroll wrote")
	cmd.Flags().StringVar(&o.passphraseFile, "passphrase-file", "", "file with a passphrase that opens every volume, to be proved first")
	cmd.Flags().StringVar(&o.newPassphraseFile, "new-passphrase-file", "", "file with a new passphrase for volumes that only ours open")
	cmd.Flags().BoolVar(&o.offline, "offline", false, "tell no server; say what is left there")
	cmd.Flags().StringArrayVar(&o.devices, "device", nil, "where an enrolled volume lies now, if it moved; may be repeated")
	cmd.Flags().StringArrayVar(&o.forget, "forget", nil, "UUID of an enrolled volume that is not there any more; may be repeated")
	return g.withJSON(cmd)
}

func runUnenroll(ctx context.Context, g *globals, o unenrollOptions) (err error) {
	if o.passphraseFile == "-" && o.newPassphraseFile == "-" {
		return usage("unenroll: the two passphrases cannot both come from standard input")
	}
	options := enroll.UnenrollOptions{
		Root: o.root, Devices: o.devices, Forget: o.forget, Offline: o.offline,
		Progress: g.progress,
		Image:    func(ctx context.Context) error { return takeOutOfImages(ctx, g, o.root) },
	}
	if o.passphraseFile != "" {
		if options.Passphrase, err = g.input(o.passphraseFile); err == nil && len(options.Passphrase) == 0 {
			err = fmt.Errorf("unenroll: %s is empty", o.passphraseFile)
		}
		if err != nil {
			return err
		}
		defer secret.Wipe(options.Passphrase)
	}
	if o.newPassphraseFile != "" {
		if options.NewPassphrase, err = g.newSecret(o.newPassphraseFile, "--new-passphrase-file", "New passphrase: "); err != nil {
			return err
		}
		defer secret.Wipe(options.NewPassphrase)
	}
	result, err := enroll.Unenroll(ctx, options)
	if g.json {
		return errors.Join(g.printJSON(result), err)
	}
	if err != nil {
		return err
	}
	printUnenrolled(g, result)
	return nil
}

// takeOutOfImages removes what enroll installed, and has the boot images made
// anew. A system that is not known has none of ours.
func takeOutOfImages(ctx context.Context, g *globals, root string) error {
	system, err := detectSystem(root)
	if errors.Is(err, bootimage.ErrUnknown) {
		g.warn("no boot image is made anew: " + safe(err.Error()))
		return nil
	}
	if err != nil {
		return err
	}
	system.Progress = g.progress
	removed, err := system.Remove(ctx)
	if err != nil {
		return err
	}
	for _, path := range removed {
		g.say("removed %s", safe(path))
	}
	_, err = system.Rebuild(ctx)
	return err
}

func printUnenrolled(g *globals, r enroll.Unenrolled) {
	if r.Already {
		fmt.Fprintln(g.out, "not enrolled: there is nothing to take back")
		return
	}
	for _, v := range r.Volumes {
		printReturned(g, v)
	}
	for _, s := range r.Servers {
		name := safe(s.Name)
		switch {
		case s.Unknown:
			fmt.Fprintf(g.out, "%s: does not know this machine any more\n", name)
		case s.Told:
			fmt.Fprintf(g.out, "%s: machine disabled, sealed blob removed; it keeps %d packets\n", name, s.Packets)
		default:
			word := string(r.KeyID)
			if word == "" {
				word = shellWord(r.Machine)
			}
			fmt.Fprintf(g.out, "%s: was NOT told: the machine is enabled there, and its sealed blob is there; on it:\n  mandos-escrow machine disable %s --state DIR\n  mandos-escrow machine remove %s --state DIR    # also drops the blob; packets stay\n", name, word, word)
		}
	}
	for _, path := range r.Kept {
		fmt.Fprintf(g.out, "%s is not ours, and stays\n", safe(path))
	}
}

func printReturned(g *globals, v enroll.VolumeReturned) {
	if v.Given {
		fmt.Fprintf(g.out, "volume %s: given up; its keyslots are as they were\n", safe(v.UUID))
		return
	}
	fmt.Fprintf(g.out, "%s: volume %s given back, %d keyslots removed\n", safe(v.Device), v.UUID, len(v.Removed))
	if v.NewSlot >= 0 {
		fmt.Fprintf(g.out, "%s: the new passphrase is in keyslot %d\n", safe(v.Device), v.NewSlot)
	}
	for _, d := range v.Doubtful {
		fmt.Fprintf(g.out, "%s: keyslot %d LEFT ALONE: %s; if it is nobody's: cryptsetup luksKillSlot %s %d\n", safe(v.Device), d.Slot, d.Why, shellWord(v.Device), d.Slot)
	}
}

// shellWord is text as one word of a command line.
func shellWord(text string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:@%+=-"
	if text != "" && strings.Trim(text, plain) == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
