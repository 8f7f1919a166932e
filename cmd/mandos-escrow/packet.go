package main

import (
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
)

func queryEscape(text string) string { return url.QueryEscape(text) }

func newPacket(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "packet", Short: "escrow packets: what is kept of which volume"}
	cmd.AddCommand(newPacketList(g), newPacketShow(g), newPacketExport(g),
		newPacketChange(g, "obsolete", "mark a packet as replaced; it can still be recovered", "obsolete", nil),
		newPacketChange(g, "hold", "keep a packet whatever happens", "hold", &api.Hold{Hold: true}),
		newPacketChange(g, "unhold", "end a hold", "hold", &api.Hold{}))
	return cmd
}

func newPacketList(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list packets; never a secret",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var packets []api.Packet
			if err := g.call(cmd.Context(), "GET", "/v1/packets", nil, &packets); err != nil {
				return err
			}
			return list(g, packets, []string{"ID", "MACHINE", "VOLUME", "STATE", "STORED", "REVEALED"}, func(p api.Packet) []string {
				return []string{p.ID, p.Machine, p.Volume.UUID, stateOf(p), when(p.Stored), strings.Join(revealed(p), " ")}
			})
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

func stateOf(p api.Packet) string {
	if p.Hold {
		return string(p.State) + ", held"
	}
	return string(p.State)
}

func revealed(p api.Packet) []string {
	var names []string
	for _, name := range []string{"passphrase", "volume-key"} {
		if _, ok := p.RevealedAt[name]; ok {
			names = append(names, name)
		}
	}
	return names
}

func newPacketShow(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "show what is known of a packet; never a secret",
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var p api.Packet
			if err := g.call(cmd.Context(), "GET", "/v1/packets/"+url.PathEscape(args[0]), nil, &p); err != nil {
				return err
			}
			if g.json {
				return g.printJSON(p)
			}
			for _, line := range [][2]string{
				{"id", p.ID},
				{"supersedes", p.Supersedes},
				{"superseded by", p.SupersededBy},
				{"machine", p.Machine},
				{"key ID", string(p.KeyID)},
				{"group", p.Group},
				{"volume UUID", p.Volume.UUID},
				{"volume label", p.Volume.Label},
				{"volume by-id", p.Volume.ByID},
				{"state", stateOf(p)},
				{"created", when(p.Created)},
				{"stored", when(p.Stored)},
				{"verified", when(p.VerifiedAt)},
				{"obsolete since", when(p.ObsoleteAt)},
				{"revealed", strings.Join(revealed(p), " ")},
				{"size", fmt.Sprint(p.Size)},
				{"SHA-256", p.Digest},
			} {
				fmt.Fprintf(g.out, "%-15s %s\n", line[0], safe(line[1]))
			}
			return nil
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

func newPacketExport(g *globals) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "export ID --out FILE",
		Short: "write a packet, sealed as it is, to a file",
		Long: `Writes a packet as the server keeps it: sealed to its trustees, and of no use
without their keys. docs/packet-format.md shows how stock gpg opens it.`,
		Example: `  mandos-escrow packet export 3f9c --out laptop7.packet`,
		Args:    exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return usage("packet export needs --out FILE, - for standard output")
			}
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			path := "/v1/packets/" + url.PathEscape(args[0]) + "/file"
			return g.writeFrom(out, func(w io.Writer) error { return s.Stream(cmd.Context(), path, w) })
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file to write, - for standard output")
	return g.withState(cmd, "")
}

func newPacketChange(g *globals, verb, short, route string, body any) *cobra.Command {
	cmd := &cobra.Command{
		Use:   verb + " ID",
		Short: short,
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.call(cmd.Context(), "POST", "/v1/packets/"+url.PathEscape(args[0])+"/"+route, body, nil)
		},
	}
	return g.withState(cmd, "")
}

// write writes to a new file, or to standard output for "-".
func (g *globals) write(path string, data []byte) error {
	return g.writeFrom(path, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// writeFrom is write for what comes in pieces: the file appears when it is
// whole.
func (g *globals) writeFrom(path string, fill func(io.Writer) error) error {
	if path == "-" {
		return fill(g.out)
	}
	out, err := config.NewOutput(path)
	if err != nil {
		return err
	}
	defer out.Discard()
	if err := fill(out); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return out.Commit()
}
