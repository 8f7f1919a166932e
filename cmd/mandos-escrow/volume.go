package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"mandos-escrow/luks"
)

func newVolume(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Short: "LUKS volumes, without any server"}
	cmd.AddCommand(newVolumeInspect(g), newVolumeSave(g), newVolumeShow(g), newVolumeRestore(g), newVolumeSetup(g))
	return cmd
}

func newVolumeInspect(g *globals) *cobra.Command {
	return g.withJSON(&cobra.Command{
		Use:   "inspect DEV",
		Short: "show a LUKS header as this program reads it, or why it refuses it (exit 5)",
		Long: `Reads a LUKS1 or LUKS2 header as strictly as enroll, the boot program and restore
do, and shows it. A header that is damaged, hostile or too expensive is refused
with the field that is wrong, and exit code 5. Nothing is changed. DEV may also be a
file that "cryptsetup luksHeaderBackup" wrote.`,
		Example: `  mandos-escrow volume inspect /dev/sda3`,
		Args:    exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			h, err := luks.ReadHeaderFile(args[0])
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if h.Alone {
				h.Warnings = append(h.Warnings, "a header without its data")
			}
			for _, w := range h.Warnings {
				g.warn(safe(w))
			}
			if g.json {
				if h.Slots == nil {
					h.Slots = []luks.Slot{}
				}
				return g.printJSON(h)
			}
			printHeader(g, h)
			return nil
		},
	})
}

// newVolumeRestore puts a passphrase back.
func newVolumeRestore(g *globals) *cobra.Command {
	o, how, newPassphraseFile := packetPassphrase(), restoreOptions{}, ""
	cmd := &cobra.Command{
		Use:   "restore DEV FILE",
		Short: "put a new passphrase on a volume, with a packet in a file",
		Long: `Adds a new passphrase to DEV with the volume key or the recovery passphrase of the
packet in FILE, says in which keyslot, and proves it. No keyslot is removed. It works
with keyslots that were wiped, too, if the packet has the volume key.

With --rebuild a header that is gone or damaged is written anew around the data, which
are left alone. Before anything is written, the packet's key has to make sense of them:
they must have the packet's fingerprint, or be a known file system or LVM. What
cryptsetup could still read or repair, and what is not encrypted, is not written over.

On an enrolled machine "mandos-escrow rotate --passphrase-file F", with the new
passphrase in F, then makes the keyslots for boot and recovery anew; no token is needed.

FILE is any packet: of "volume save", "recover --release", "packet export", or a
printed sheet that was typed or scanned. A packet of another volume is refused (exit 4).`,
		Example: `  mandos-escrow volume restore /dev/sda3 laptop7.asc --packet-passphrase-file P --new-passphrase-file N
  mandos-escrow volume restore /dev/sda3 laptop7.packet --key escrow-key.pem
  mandos-escrow volume restore /dev/sda3 laptop7.packet --key escrow-key.pem --rebuild`,
		Args: exactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return restoreFile(cmd.Context(), g, o, args[1], args[0], newPassphraseFile, how)
		},
	}
	withOpen(cmd, &o)
	withRebuild(cmd, &how)
	cmd.Flags().StringVar(&newPassphraseFile, "new-passphrase-file", "", "file with the passphrase that the volume gets (asked for otherwise)")
	return cmd
}

func printHeader(g *globals, h *luks.Header) {
	for _, line := range [][2]string{
		{"type", h.Type},
		{"uuid", h.UUID},
		{"label", h.Label},
		{"cipher", h.Cipher},
		{"key bits", strconv.Itoa(h.KeyBits)},
		{"offset", strconv.FormatInt(h.Offset, 10) + " bytes"},
		{"sector size", strconv.Itoa(h.SectorSize) + " bytes"},
		{"digest", fmt.Sprintf("pbkdf2 %s, %d iterations", h.Digest.Hash, h.Digest.Iterations)},
	} {
		fmt.Fprintf(g.out, "%-12s %s\n", line[0], safe(line[1]))
	}
	free := []string{}
	for _, n := range h.Free() {
		free = append(free, strconv.Itoa(n))
	}
	for _, s := range h.Slots {
		fmt.Fprintf(g.out, "keyslot %-4d %s, %d bits%s\n", s.Number, safe(s.KDF.Type), s.KeyBits, notes(s))
	}
	fmt.Fprintf(g.out, "%-12s %s\n", "free slots", strings.Join(free, " "))
	for _, t := range h.Tokens {
		fmt.Fprintf(g.out, "token %-6d %s, keyslots %v\n", t.ID, safe(t.Type), t.Keyslots)
	}
}

func notes(s luks.Slot) string {
	out := ""
	if s.Priority != "" && s.Priority != luks.Normal {
		out += ", priority " + s.Priority
	}
	if !s.Bound {
		out += ", of another key"
	}
	return out
}
