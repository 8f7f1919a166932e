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
	inspect := &cobra.Command{
		Use:   "inspect DEV",
		Short: "show a LUKS header as this program reads it, or why it refuses it (exit 5)",
		Long: `Reads a LUKS1 or LUKS2 header as strictly as enroll, the boot program and restore
do, and shows it. A header that is damaged, hostile or too expensive is refused
with the field that is wrong, and exit code 5. Nothing is changed.`,
		Example: `  mandos-escrow volume inspect /dev/sda3`,
		Args:    exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			h, err := luks.ReadFileWithin(args[0], luks.AnyMemory)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			for _, w := range h.Warnings {
				g.warn(safe(w))
			}
			if g.json {
				return g.printJSON(h)
			}
			printHeader(g, h)
			return nil
		},
	}
	cmd.AddCommand(g.withJSON(inspect))
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
