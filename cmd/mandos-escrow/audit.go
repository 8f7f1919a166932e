package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/store"
)

func newAudit(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "the log of who did what: hash-chained, never a secret"}
	cmd.AddCommand(newAuditShow(g), newAuditVerify(g))
	return cmd
}

func newAuditShow(g *globals) *cobra.Command {
	var request string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "show the audit log",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			events, err := s.fetchAudit(cmd.Context(), 0)
			if err != nil {
				return err
			}
			shown := []store.Event{}
			for _, e := range events {
				if request == "" || strings.HasPrefix(e.Request, request) {
					shown = append(shown, e)
				}
			}
			return list(g, shown, []string{"SEQ", "TIME", "ACTOR", "ACTION", "ABOUT", "DETAIL"}, func(e store.Event) []string {
				about := ""
				for _, id := range []string{e.Request, e.Machine, e.Packet} {
					if id != "" && about == "" {
						about = id[:min(8, len(id))]
					}
				}
				return []string{fmt.Sprint(e.Seq), e.Time.Local().Format(time.DateTime), e.Actor, e.Action, about, e.Detail}
			})
		},
	}
	cmd.Flags().StringVar(&request, "request", "", "only entries about the request `ID`")
	return g.withState(g.withJSON(cmd), "")
}

// fetchAudit returns all events after a number.
func (s *session) fetchAudit(ctx context.Context, after uint64) ([]store.Event, error) {
	var all []store.Event
	for {
		var page []store.Event
		if err := s.Call(ctx, "GET", fmt.Sprintf("/v1/audit?after=%d", after), nil, &page); err != nil {
			return nil, err
		}
		if len(page) == 0 {
			return all, nil
		}
		last := page[len(page)-1].Seq
		if last <= after {
			return nil, fmt.Errorf("%w: the server's pages do not go on", store.ErrAudit)
		}
		all, after = append(all, page...), last
	}
}

func newAuditVerify(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "prove that the audit log is a whole chain",
		Long: `With --state, proves that the log is consistent in itself: no entry was changed,
left out or moved. Whoever owns the server could still have written all of it
anew. With --home, proves also that the log goes on from the newest head that
this home has seen, which the server signed: what was seen cannot be rewritten.`,
		Example: `  mandos-escrow --home alice audit verify`,
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runAuditVerify(cmd.Context(), g) },
	}
	return g.withState(cmd, "")
}

func runAuditVerify(ctx context.Context, g *globals) error {
	s, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	var seen store.Head
	if s.key != nil {
		// before the first call, whose reply is newer than what was seen
		if seen, err = s.witness().Kept(); err != nil {
			return err
		}
	}
	events, err := s.fetchAudit(ctx, 0)
	if err != nil {
		return err
	}
	if len(events) == 0 {
		return fmt.Errorf("%w: it is empty, and every server's log begins with server.init", store.ErrAudit)
	}
	head, err := store.VerifyChain(events, store.Head{})
	if err != nil {
		return err
	}
	if s.key == nil {
		fmt.Fprintf(g.out, "consistent: %d entries, head %s\n", head.Seq, head.Hash)
		g.say("this proves that the log is a whole chain; `audit verify --home DIR` proves that it goes on from what an administrator has seen")
		return nil
	}
	if err := extends(events, seen); err != nil {
		return err
	}
	fmt.Fprintf(g.out, "consistent, and goes on from the head seen last (entry %d): %d entries, head %s\n", seen.Seq, head.Seq, head.Hash)
	return nil
}

// extends proves that the entry of the head that was seen is in the log. A log
// that an administrator took back says so in an entry server.confirm.
func extends(events []store.Event, seen store.Head) error {
	if seen.Seq == 0 {
		return nil
	}
	for _, e := range events {
		if e.Seq == seen.Seq && e.Hash == seen.Hash {
			return nil
		}
	}
	for _, e := range events {
		if e.Action == "server.confirm" {
			return fmt.Errorf("%w: entry %d, which this home has seen, is not in it; the log was taken back and confirmed by %s on %s", store.ErrAudit, seen.Seq, safe(e.Actor), when(e.Time))
		}
	}
	return fmt.Errorf("%w: entry %d, which this home has seen, is not in it: the log was rewritten", store.ErrAudit, seen.Seq)
}

func (s *session) witness() *api.Witness {
	return api.NewWitness(s.home.HeadFile(s.membership.Server.KeyID), s.membership.Server.KeyID)
}
