package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/internal/secret"
)

type enrollOptions struct {
	tokenFile, passphraseFile, root, name string
	devices                               []string
	removePassphrase, noBoot              bool
	noImage, test                         bool
}

func newEnroll(g *globals) *cobra.Command {
	var o enrollOptions
	cmd := &cobra.Command{
		Use:   "enroll {--token-file FILE --device DEV... | --test}",
		Short: "register this machine and escrow its volumes",
		Long: `Registers this machine at the token's servers, escrows the volume key and a new
recovery passphrase of each device, and prepares unattended boot with a new boot
passphrase. Both passphrases get a keyslot each and are proved to open it.

Then it installs the boot program into the boot images: it writes the files for
initramfs-tools or dracut, whichever makes them, has the image of every kernel
made anew, and looks into it. If that fails, images and files are as they were,
the escrow stands, and the exit code is 1. Where another program makes the images
it says so, and leaves them alone.

With several servers (token merge) each keeps the whole packet and a share of the
boot passphrase. One that does not answer is named, and gets its part when the same
command is run again; with fewer than are needed nothing counts.

With --test it does what the next boot does, and says for each step whether it
went well: the boot program fetches each volume's boot passphrase and decrypts
it, that opens the boot keyslot, and the images hold what they must, and nobody
but root can read them. To the server this is a boot. Without --token-file it
only tests what is enrolled.

It can be killed at any point and run again with the same token: it ends with
exactly one boot and one recovery keyslot of its own on each volume, and removes
nothing that it did not make, unless --remove-passphrase says so.`,
		Example: `  mandos-escrow enroll --token-file token --device /dev/vda3 --passphrase-file user.pass
  mandos-escrow enroll --token-file token --device /dev/vda3 --passphrase-file user.pass --root /mnt/sysimage
  mandos-escrow enroll --test`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runEnroll(cmd.Context(), g, o) },
	}
	cmd.Flags().StringVar(&o.tokenFile, "token-file", "", "file with the token, - for standard input")
	cmd.Flags().StringArrayVar(&o.devices, "device", nil, "LUKS device or image file; may be repeated")
	cmd.Flags().StringVar(&o.passphraseFile, "passphrase-file", "", "file with a passphrase that opens the devices (asked for otherwise)")
	cmd.Flags().BoolVar(&o.removePassphrase, "remove-passphrase", false, "remove that passphrase once ours are proved")
	cmd.Flags().StringVar(&o.root, "root", "/", "prefix of what is written, and of /etc/machine-id")
	cmd.Flags().BoolVar(&o.noBoot, "no-boot", false, "escrow only: no unattended boot")
	cmd.Flags().BoolVar(&o.noImage, "no-image", false, "leave the boot image alone, and out of --test")
	cmd.Flags().BoolVar(&o.test, "test", false, "prove that the next boot is unattended; alone: of what is enrolled")
	cmd.Flags().StringVar(&o.name, "name", "", "name of the machine (default: the host name)")
	return g.withJSON(cmd)
}

func runEnroll(ctx context.Context, g *globals, o enrollOptions) error {
	testOnly := o.test && o.tokenFile == "" && len(o.devices) == 0
	if !testOnly && (o.tokenFile == "" || len(o.devices) == 0) {
		return usage("enroll needs --token-file and at least one --device; or --test alone")
	}
	if o.test && o.noBoot {
		return usage("enroll: with --no-boot there is no boot to test")
	}
	if info, err := os.Stat(o.root); err != nil || !info.IsDir() {
		return fmt.Errorf("enroll: --root %s is not a folder", o.root)
	}
	if testOnly {
		return testBoot(ctx, g, o, nil)
	}
	if o.tokenFile == "-" && o.passphraseFile == "-" {
		return usage("enroll: the token and the passphrase cannot both come from standard input")
	}
	text, err := config.ReadInput(o.tokenFile, g.in, nil) // a token is short-lived, and adds only
	if err != nil {
		return err
	}
	token, err := api.ParseToken(text)
	if err != nil {
		return fmt.Errorf("%s: %w", o.tokenFile, err)
	}
	var passphrase []byte
	if o.passphraseFile != "" {
		passphrase, err = g.input(o.passphraseFile)
	} else {
		passphrase, err = g.ask("A passphrase that opens "+o.devices[0]+": ", "--passphrase-file")
	}
	if err == nil && len(passphrase) == 0 && o.passphraseFile != "" {
		err = fmt.Errorf("enroll: %s is empty", o.passphraseFile)
	}
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	results, err := enroll.Run(ctx, enroll.Options{
		Token: token, Root: o.root, Devices: o.devices, Passphrase: passphrase, RemovePassphrase: o.removePassphrase,
		NoBoot: o.noBoot, Name: o.name, Now: time.Now,
		Progress: func(format string, args ...any) { g.say("%s", safe(fmt.Sprintf(format, args...))) },
	})
	if !o.test { // otherwise they are printed with the checks
		err = errors.Join(err, printResults(g, results))
	}
	if err == nil && !o.noImage {
		err = updateImage(ctx, g, o)
	}
	switch {
	case o.test && err == nil:
		return testBoot(ctx, g, o, results)
	case o.test:
		return errors.Join(err, printTest(g, results, nil))
	}
	return err
}

func printResults(g *globals, results []enroll.Result) error {
	if g.json {
		return g.printJSON(results)
	}
	for _, r := range results {
		printEnrolled(g, r)
	}
	return nil
}

func printEnrolled(g *globals, r enroll.Result) {
	how := "enrolled"
	if r.Already {
		how = "already enrolled"
	}
	boot := "no unattended boot"
	if r.BootSlot >= 0 {
		boot = fmt.Sprintf("boot passphrase in keyslot %d", r.BootSlot)
	}
	fmt.Fprintf(g.out, "%s: volume %s %s, packet %s, recovery passphrase in keyslot %d, %s\n", r.Device, r.UUID, how, r.Packet, r.RecoverySlot, boot)
}
