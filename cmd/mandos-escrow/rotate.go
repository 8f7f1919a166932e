package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/bootimage"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/internal/secret"
)

type rotateOptions struct {
	root, passphraseFile, tokenFile string
	volumes, devices                []string
	due, reencrypted, noImage       bool
}

func newRotate(g *globals) *cobra.Command {
	var o rotateOptions
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "give this machine's volumes new boot and recovery passphrases, and escrow them",
		Long: `Makes a new boot passphrase, a new recovery passphrase and a new packet for each
enrolled volume, proves them, commits them at the servers, and only then removes the
keyslots before. It is the transaction of enroll: it can be killed at any point and
run again, and ends with one boot and one recovery keyslot, both escrowed. No token
is needed: servers, policy and the trustees' keys are those of the enrolment. A
machine that enrolled with an earlier version kept no keys: then it asks for
--token-file, once.

The volume is opened with --passphrase-file, or without it by the machine itself: it
fetches its boot passphrase as at a boot. Where that fails a person at the terminal
is asked. After a restore give the new passphrase: the keyslot for the boot may be gone.

With --due only those volumes are rotated whose recovery passphrase was released or
is older than its lifetime, whose packet or sealed blob a server that answers does
not hold whole, and those whose rotation was interrupted; a server that did not
answer before gets its part. Each server causes at most one rotation of a volume in
20 hours, so that one that lies keeps no machine busy; what is due and waits for that
is said. For a timer: nothing to do is exit code 0.

After "cryptsetup reencrypt" the header is another one than was enrolled, and could
be that of a swapped disk: exit code 4. Who encrypted the volume anew says so with
--reencrypted and --passphrase-file.`,
		Example: `  mandos-escrow rotate
  mandos-escrow rotate --due
  mandos-escrow rotate --volume 3f9c --reencrypted --passphrase-file user.pass`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRotate(cmd.Context(), g, o) },
	}
	cmd.Flags().StringVar(&o.root, "root", "/", "prefix of what enroll wrote")
	cmd.Flags().StringArrayVar(&o.volumes, "volume", nil, "UUID of a volume, or its beginning; may be repeated (default: all)")
	cmd.Flags().StringArrayVar(&o.devices, "device", nil, "where a volume lies that is not where it was; may be repeated")
	cmd.Flags().StringVar(&o.passphraseFile, "passphrase-file", "", "file with a passphrase that opens the volumes (default: the boot passphrase is fetched)")
	cmd.Flags().StringVar(&o.tokenFile, "token-file", "", "file with a token, for a machine that enrolled with an earlier version; - for standard input")
	cmd.Flags().BoolVar(&o.due, "due", false, "only what was released, is older than its lifetime, is not whole at a server, or is not finished")
	cmd.Flags().BoolVar(&o.reencrypted, "reencrypted", false, "the volume was encrypted anew by you: its header may be another one")
	cmd.Flags().BoolVar(&o.noImage, "no-image", false, "leave the boot image alone")
	return g.withJSON(cmd)
}

func runRotate(ctx context.Context, g *globals, o rotateOptions) error {
	if o.reencrypted && o.passphraseFile == "" {
		return usage("rotate: --reencrypted needs --passphrase-file: the enrolled boot passphrase is of the header before")
	}
	if o.passphraseFile == "-" && o.tokenFile == "-" {
		return usage("rotate: the token and the passphrase cannot both come from standard input")
	}
	options := enroll.RotateOptions{
		Root: o.root, Volumes: o.volumes, Devices: o.devices, Due: o.due, Reencrypted: o.reencrypted, Now: time.Now, Progress: g.progress,
	}
	if err := o.read(g, &options); err != nil {
		return err
	}
	defer secret.Wipe(options.Passphrase)
	if program, err := bootimage.Program(o.root); err == nil {
		options.Program = program
	}
	if o.passphraseFile == "" && atTerminal() {
		options.Ask = func(device string) ([]byte, error) {
			return g.ask("A passphrase that opens "+device+": ", "--passphrase-file")
		}
	}
	results, err := enroll.Rotate(ctx, options)
	if errors.Is(err, enroll.ErrNotKept) {
		err = fmt.Errorf("%w; give --token-file with a new token of the same servers, once", err)
	}
	if printErr := printRotated(g, results); printErr != nil {
		err = errors.Join(err, printErr)
	}
	if err == nil && !o.noImage {
		err = o.image(ctx, g, results)
	}
	return err
}

// read gets passphrase and token.
func (o rotateOptions) read(g *globals, options *enroll.RotateOptions) error {
	if o.tokenFile != "" {
		text, err := config.ReadInput(o.tokenFile, g.in, nil)
		if err != nil {
			return err
		}
		if options.Token, err = api.ParseToken(text); err != nil {
			return fmt.Errorf("%s: %w", o.tokenFile, err)
		}
	}
	if o.passphraseFile == "" {
		return nil
	}
	passphrase, err := g.input(o.passphraseFile)
	if err == nil && len(passphrase) == 0 {
		err = fmt.Errorf("rotate: %s is empty", o.passphraseFile)
	}
	options.Passphrase = passphrase
	return err
}

// image has the boot images made anew when a volume that boots was rotated: they
// hold unlock.conf, which has the digest of its header.
func (o rotateOptions) image(ctx context.Context, g *globals, results []enroll.Rotated) error {
	boots := slices.ContainsFunc(results, func(r enroll.Rotated) bool { return r.Rotated && r.BootSlot >= 0 })
	if _, err := os.Lstat(filepath.Join(o.root, config.BootFolder)); !boots || err != nil {
		return nil
	}
	return setUpImage(ctx, g, o.root)
}

func printRotated(g *globals, results []enroll.Rotated) error {
	if g.json {
		return g.printJSON(results)
	}
	for _, r := range results {
		if !r.Until.IsZero() {
			fmt.Fprintf(g.out, "%s: volume %s is due, but was rotated for the same server lately, and is not again before %s: %s\n", r.Device, r.UUID, when(r.Until), safe(r.Why))
			continue
		}
		if !r.Rotated {
			fmt.Fprintf(g.out, "%s: volume %s is not due, packet %s\n", r.Device, r.UUID, r.Packet)
			continue
		}
		boot := "no unattended boot"
		if r.BootSlot >= 0 {
			boot = fmt.Sprintf("boot passphrase in keyslot %d", r.BootSlot)
		}
		fmt.Fprintf(g.out, "%s: volume %s rotated, packet %s, recovery passphrase in keyslot %d, %s\n", r.Device, r.UUID, r.Packet, r.RecoverySlot, boot)
	}
	return nil
}
