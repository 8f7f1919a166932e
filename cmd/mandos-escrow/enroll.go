package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
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
}

func newEnroll(g *globals) *cobra.Command {
	var o enrollOptions
	cmd := &cobra.Command{
		Use:   "enroll --token-file FILE --device DEV...",
		Short: "register this machine and escrow its volumes",
		Long: `Registers this machine at the token's server, escrows the volume key and a new
recovery passphrase of each device, and prepares unattended boot with a new boot
passphrase. Both passphrases get a keyslot each and are proved to open it.

It can be killed at any point and run again with the same token: it ends with
exactly one boot and one recovery keyslot of its own on each volume, and removes
nothing that it did not make, unless --remove-passphrase says so.`,
		Example: `  mandos-escrow enroll --token-file token --device /dev/vda3 --passphrase-file user.pass
  mandos-escrow enroll --token-file token --device /dev/vda3 --passphrase-file user.pass --root /mnt/sysimage`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runEnroll(cmd.Context(), g, o) },
	}
	cmd.Flags().StringVar(&o.tokenFile, "token-file", "", "file with the token, - for standard input")
	cmd.Flags().StringArrayVar(&o.devices, "device", nil, "LUKS device or image file; may be repeated")
	cmd.Flags().StringVar(&o.passphraseFile, "passphrase-file", "", "file with a passphrase that opens the devices (asked for otherwise)")
	cmd.Flags().BoolVar(&o.removePassphrase, "remove-passphrase", false, "remove that passphrase once ours are proved")
	cmd.Flags().StringVar(&o.root, "root", "/", "prefix of what is written, and of /etc/machine-id")
	cmd.Flags().BoolVar(&o.noBoot, "no-boot", false, "escrow only: no unattended boot")
	cmd.Flags().StringVar(&o.name, "name", "", "name of the machine (default: the host name)")
	return g.withJSON(cmd)
}

func runEnroll(ctx context.Context, g *globals, o enrollOptions) error {
	if o.tokenFile == "" || len(o.devices) == 0 {
		return usage("enroll needs --token-file and at least one --device")
	}
	if info, err := os.Stat(o.root); err != nil || !info.IsDir() {
		return fmt.Errorf("enroll: --root %s is not a folder", o.root)
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
	if g.json {
		if printErr := g.printJSON(results); printErr != nil && err == nil {
			err = printErr
		}
	} else {
		for _, r := range results {
			printEnrolled(g, r)
		}
	}
	if err != nil {
		return err
	}
	if !o.noBoot {
		warnBoot(g, o.root)
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

// warnBoot says what is still missing for the next boot to be unattended.
func warnBoot(g *globals, root string) {
	systems := map[string]string{"initramfs-tools": "usr/share/initramfs-tools", "dracut": "usr/lib/dracut"}
	for name, path := range systems {
		if _, err := os.Stat(filepath.Join(root, path)); err == nil {
			g.warn(fmt.Sprintf("this version does not install itself into %s images: see docs/operations.md for what the boot image must contain", name))
			return
		}
	}
	g.warn("no initramfs system was found below " + root + ": the boot image must be given mandos-escrow-unlock and /etc/mandos-escrow by hand")
}
