package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/unlock"
)

// maxItems bounds a list, which a server could otherwise make endless.
const maxItems = 1_000_000

// pages fetches a list page by page, in the order of its ids, at most limit items
// of it; 0: all.
func pages[T any](ctx context.Context, s *session, path string, query url.Values, limit int, id func(T) string) ([]T, error) {
	if limit == 0 {
		limit = maxItems
	}
	all, after := []T{}, ""
	for len(all) < limit {
		size := min(limit-len(all), api.MaxPage)
		asked := url.Values{"limit": {strconv.Itoa(size)}, "after": {after}}
		maps.Copy(asked, query)
		var page []T
		if err := s.Call(ctx, "GET", path+"?"+asked.Encode(), nil, &page); err != nil {
			return nil, err
		}
		if all = append(all, page...); len(page) != size { // a server of before there were pages sends all
			return all, nil
		}
		last := id(page[size-1])
		if last <= after {
			return nil, fmt.Errorf("GET %s at %s: %w: its pages are out of order", path, safe(s.Name), api.ErrReply)
		}
		after = last
	}
	return all, nil
}

// pagedLists is pages of every server.
func pagedLists[T any](ctx context.Context, g *globals, path string, query url.Values, limit int, id func(T) string) ([]answer[[]T], error) {
	c, err := g.connectAll(ctx)
	if err != nil {
		return nil, err
	}
	defer c.close()
	return good(g, askAll(c, func(s *session) ([]T, error) { return pages(ctx, s, path, query, limit, id) }))
}

type packetListOptions struct {
	machine, group, state, volume, since string
	unverified                           bool
	limit                                int
}

func (o packetListOptions) query() (url.Values, error) {
	query := url.Values{}
	for name, text := range map[string]string{"machine": o.machine, "group": o.group, "state": o.state, "volume": o.volume, "since": o.since} {
		if text != "" {
			query.Set(name, text)
		}
	}
	if o.unverified {
		query.Set("unverified", "true")
	}
	switch {
	case o.state != "" && !slices.Contains(escrow.States, escrow.PacketState(o.state)):
		return nil, usage("--in-state %s: one of %v", o.state, escrow.States)
	case o.since != "" && !o.unverified:
		return nil, usage("--since goes with --unverified")
	case o.limit < 0:
		return nil, usage("--limit %d: 1 or more", o.limit)
	}
	if o.since != "" {
		if _, err := unlock.ParseDuration(o.since); err != nil {
			return nil, usage("--since: %v", err)
		}
	}
	return query, nil
}

func newPacketList(g *globals) *cobra.Command {
	var o packetListOptions
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list packets; never a secret",
		Long: `Lists packets: all, or those that fit every flag. The server picks them.

States: pending (stored; not proved yet), verified, revealed (a payload was
released), expired (its secrets are to be replaced; it can still be recovered),
obsolete (replaced), purged (its bytes are gone). CHECKED is when a packet was last
proved, or verified by its machine; FAILED: "packet show" says what was wrong. DUE says what is to be done: rotate,
which the machine does when it enrolls again or rotates, and re-encrypt, because the
volume key may be known to others.`,
		Example: `  mandos-escrow --home alice packet list --machine laptop7
  mandos-escrow --home alice packet list --group laptops --in-state expired
  mandos-escrow --home alice packet list --unverified --since P30D --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query, err := o.query()
			if err != nil {
				return err
			}
			answers, err := pagedLists(cmd.Context(), g, "/v1/packets", query, o.limit, func(p api.Packet) string { return p.ID })
			if err != nil {
				return err
			}
			found := mergePackets(answers)
			slices.SortStableFunc(found, func(a, b packetAt) int {
				return cmp.Or(cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Volume.UUID, b.Volume.UUID), a.Stored.Compare(b.Stored))
			})
			return list(g, found, []string{"ID", "MACHINE", "VOLUME", "STATE", "STORED", "CHECKED", "REVEALED", "DUE"}, func(p packetAt) []string {
				return []string{p.ID, p.Machine, p.Volume.UUID, p.states, when(p.Stored), lastCheck(p.Packet), strings.Join(revealed(p.Packet), " "), strings.Join(p.Due, " ")}
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.machine, "machine", "", "of a machine: its name, or its key ID or the beginning of it")
	f.StringVar(&o.group, "group", "", "of a group")
	f.StringVar(&o.state, "in-state", "", "in a state, as in expired")
	f.StringVar(&o.volume, "volume", "", "of a volume: its UUID or the beginning of it")
	f.BoolVar(&o.unverified, "unverified", false, "in use, and not proved to open its volume")
	f.StringVar(&o.since, "since", "", "with --unverified: or not proved again for so long, as in P30D")
	f.IntVar(&o.limit, "limit", 0, "so many at most, of each server, in the order of their ids")
	return g.withState(g.withJSON(cmd), "")
}

func newPacketExpire(g *globals) *cobra.Command {
	var in api.Expire
	cmd := &cobra.Command{
		Use:   "expire ID | --machine NAME | --group GROUP",
		Short: "say that others may know the secrets of packets, so that they are replaced",
		Long: `Marks packets in use as expired at once: the one that is named, or all of a
machine or a group. Their machines hear it at their next contact and are due for a
new recovery passphrase ("rotate --due", or "enroll" again); the volume is due for
re-encryption, which a person does and says ("rotate --reencrypted"). An expired packet can still be recovered.`,
		Example: `  mandos-escrow --home adam packet expire --machine laptop7`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := in
			if len(args) == 1 {
				in.Packet = args[0]
			}
			given := len(slices.DeleteFunc([]string{in.Packet, in.Machine, in.Group}, func(s string) bool { return s == "" }))
			if given != 1 {
				return usage("packet expire: name a packet, or --machine, or --group: one of them")
			}
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			done, err := everywhere(callAll[api.Expired](cmd.Context(), c, "POST", "/v1/packets/expire", in))
			for _, a := range done {
				g.say("%s: %d packets expired; their volumes are due for rotation and re-encryption", safe(a.Name), a.value.Packets)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&in.Machine, "machine", "", "all packets in use of a machine: its name, or its key ID or the beginning of it")
	cmd.Flags().StringVar(&in.Group, "group", "", "all packets in use of a group")
	return g.withState(cmd, "")
}

func newPacketDelete(g *globals) *cobra.Command {
	var newest bool
	cmd := &cobra.Command{
		Use:   "delete ID ID",
		Short: "remove a packet's bytes for good; its entry stays",
		Long: `Removes one packet, which is named twice by its whole id. One that is held is
refused (exit 7), and so is the newest of a machine's volume without --newest: without
it nothing recovers that volume. That it was there stays in the list, as purged.

Copies in backups are not removed, nor are exported files. docs/operations.md
says what stays on the disk.`,
		Example: `  mandos-escrow --home adam packet delete 0f1e...d2 0f1e...d2`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return usage("packet delete: name the packet twice, by its whole id")
			}
			return exactArgs(2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] != args[1] {
				return usage("packet delete: %s and %s are not the same: name one packet twice", safe(args[0]), safe(args[1]))
			}
			if len(args[0]) != packetIDSize {
				return usage("packet delete: %s is not a whole id: it has %d hex digits", safe(args[0]), packetIDSize)
			}
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			done, err := everywhere(callAll[any](cmd.Context(), c, "DELETE", "/v1/packets/"+url.PathEscape(args[0]), api.Delete{ID: args[1], Newest: newest}))
			if len(done) > 0 {
				g.say("deleted at %s; backups and exported files still have it", namesOf(done))
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&newest, "newest", false, "also if it is the newest of its volume")
	return g.withState(cmd, "")
}

// packetIDSize is how many hex digits a packet's id has.
const packetIDSize = 32
