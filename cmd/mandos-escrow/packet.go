package main

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
)

func queryEscape(text string) string { return url.QueryEscape(text) }

func newPacket(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "packet", Short: "escrow packets: what is kept of which volume"}
	cmd.AddCommand(newPacketList(g), newPacketShow(g), newPacketExport(g), newPacketImport(g), newPacketPrint(g),
		newPacketChange(g, "obsolete", "mark a packet as replaced; it can still be recovered", "obsolete", nil),
		newPacketChange(g, "hold", "keep a packet whatever happens", "hold", &api.Hold{Hold: true}),
		newPacketChange(g, "unhold", "end a hold", "hold", &api.Hold{}),
		newPacketExpire(g), newPacketDelete(g),
		newPacketChange(g, "reencrypted", "say that a packet's volume has another volume key since", "reencrypted", nil))
	return cmd
}

// packetAt is a packet, as the first server that was asked has it, with what else
// the servers say of it when there are several.
type packetAt struct {
	api.Packet
	At     []stateAt `json:"at,omitempty"`
	states string
}

func mergePackets(answers []answer[[]api.Packet]) []packetAt {
	out := []packetAt{}
	for _, same := range group(answers, func(p api.Packet) string { return p.ID }) {
		p := packetAt{Packet: same[0].value, states: perServer(same, stateOf)}
		for _, a := range same {
			if len(answers) > 1 {
				p.At = append(p.At, stateAt{a.Name, stateOf(a.value)})
			}
			for _, due := range a.value.Due {
				if !slices.Contains(p.Due, due) {
					p.Due = append(p.Due, due)
				}
			}
			for payload, at := range a.value.RevealedAt { // one server may have released what another did not
				p.Entry = p.Reveal(payload, at)
			}
		}
		out = append(out, p)
	}
	return out
}

func stateOf(p api.Packet) string {
	if p.Hold || p.Held {
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

// lastCheck is when it was last proved, or verified by its machine. What was wrong
// then may be long, and stands in packet show.
func lastCheck(p api.Packet) string {
	if p.CheckFailed == "" {
		return when(p.LastCheck())
	}
	return when(p.CheckedAt) + " FAILED"
}

func newPacketShow(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "show what is known of a packet; never a secret",
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			path := "/v1/packets/" + url.PathEscape(args[0])
			answers, err := good(g, askAll(c, func(s *session) (out []api.Packet, err error) {
				out = make([]api.Packet, 1)
				return out, s.Call(cmd.Context(), "GET", path, nil, &out[0])
			}))
			if err != nil {
				return err
			}
			found := mergePackets(answers)
			if len(found) != 1 {
				return api.Errorf(api.CodeAmbiguous, "%q means different packets at different servers; give more of its id", args[0])
			}
			p := found[0]
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
				{"state", p.states},
				{"created", when(p.Created)},
				{"stored", when(p.Stored)},
				{"verified", when(p.VerifiedAt)},
				{"checked", lastCheck(p.Packet)},
				{"check failed", p.CheckFailed},
				{"expired", when(p.ExpiredAt)},
				{"obsolete since", when(p.ObsoleteAt)},
				{"purged", when(p.PurgedAt)},
				{"revealed", strings.Join(revealed(p.Packet), " ")},
				{"due for", strings.Join(p.Due, ", ")},
				{"re-encrypt", sinceWhen(p.ReencryptSince)},
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

// sinceWhen is since when a volume is due for re-encryption.
func sinceWhen(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return "the volume key may be known to others since " + when(at)
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
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			return exportPacket(cmd.Context(), g, c, args[0], out)
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file to write, - for standard output")
	return g.withState(cmd, "")
}

// exportPacket writes a packet of the first server that has it: each keeps the
// whole one.
func exportPacket(ctx context.Context, g *globals, c circle, id, out string) error {
	answers := askAll(c, func(s *session) (api.Packet, error) {
		var p api.Packet
		return p, s.Call(ctx, "GET", "/v1/packets/"+url.PathEscape(id), nil, &p)
	})
	if len(c) == 1 { // whose export says what is wrong
		answers[0].err = nil
	}
	holding, err := good(g, answers)
	if err != nil {
		return err
	}
	path := "/v1/packets/" + url.PathEscape(id) + "/file"
	return g.writeFrom(out, func(w io.Writer) error { return holding[0].Stream(ctx, path, w) })
}

func newPacketChange(g *globals, verb, short, route string, body any) *cobra.Command {
	cmd := &cobra.Command{
		Use:   verb + " ID",
		Short: short,
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			done, err := everywhere(callAll[api.Packet](cmd.Context(), c, "POST", "/v1/packets/"+url.PathEscape(args[0])+"/"+route, body))
			for _, a := range done {
				g.say("%s: packet %s: %s", safe(a.Name), safe(a.value.ID), stateOf(a.value))
			}
			return err
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
