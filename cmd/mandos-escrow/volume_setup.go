package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
)

func newVolumeSetup(g *globals) *cobra.Command {
	o := packetPassphrase()
	cmd := &cobra.Command{
		Use:   "setup DEV FILE NAME",
		Short: "open a volume as /dev/mapper/NAME, with a packet in a file",
		Long: `Opens DEV with the volume key or the passphrase of the packet in FILE, as
/dev/mapper/NAME, to be mounted. Nothing is changed on DEV. It takes root, and a
kernel with device-mapper; "cryptsetup close NAME" closes it.`,
		Example: `  mandos-escrow volume setup /dev/sda3 laptop7.asc rescued --packet-passphrase-file P
  mount /dev/mapper/rescued /mnt`,
		Args: exactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runSetup(cmd.Context(), g, o, args[0], args[1], args[2])
		},
	}
	withOpen(cmd, &o)
	return cmd
}

func runSetup(ctx context.Context, g *globals, o openOptions, device, path, name string) error {
	if err := cryptsetup.CheckMapping(name); err != nil {
		return err
	}
	header, err := luks.ReadFile(device)
	if err != nil {
		return err
	}
	opened, err := openFile(g, o, path)
	if err != nil {
		return err
	}
	defer opened.Wipe()
	if err := sameVolume(opened.Opened, header, device); err != nil {
		return err
	}
	key, err := keyFor(ctx, opened.Opened, header, device)
	if err != nil {
		return opened.doubt(err)
	}
	if err := (cryptsetup.Tool{}).Open(ctx, device, key, name); err != nil {
		return err
	}
	fmt.Fprintf(g.out, "/dev/mapper/%s: volume %s, open\n", name, header.UUID)
	return nil
}
