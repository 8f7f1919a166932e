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
			if request != "" && len(shown) == 0 {
				return fmt.Errorf("no entry is about a request %s; `mandos-escrow recover --list` shows them", request)
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
	var acknowledge bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "prove that the audit log is a whole chain",
		Long: `With --state, proves that the log is consistent in itself: no entry was changed,
left out or moved. Whoever owns the server could still have written all of it
anew. With --home, proves also that the log goes on from the newest head that
this home has seen, which the server signed: what was seen cannot be rewritten.
What was lost when a server was restored from a backup is reported until it is
acknowledged.`,
		Example: `  mandos-escrow --home alice audit verify`,
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runAuditVerify(cmd.Context(), g, acknowledge) },
	}
	cmd.Flags().BoolVar(&acknowledge, "acknowledge", false, "report what a restored server has lost for the last time")
	return g.withState(cmd, "")
}

func runAuditVerify(ctx context.Context, g *globals, acknowledge bool) error {
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
	if err := s.checkShown(events); err != nil {
		return err
	}
	if err := s.checkSeen(g, events, seen, acknowledge); err != nil {
		return err
	}
	fmt.Fprintf(g.out, "consistent, and goes on from the head seen last (entry %d): %d entries, head %s\n", seen.Seq, head.Seq, head.Hash)
	return nil
}

// checkShown proves that the log is the one whose head the server signed with
// its replies; what was added since the last page is newer than all of it.
func (s *session) checkShown(events []store.Event) error {
	shown, err := s.witness().Kept()
	if err != nil {
		return err
	}
	if last := events[len(events)-1].Seq; shown.Seq > last {
		return fmt.Errorf("%w: the server signed entry %d and shows %d entries; was it busy, run the command again", store.ErrAudit, shown.Seq, last)
	}
	return extends(events, shown)
}

// checkSeen proves that what this home has seen is in the log: the newest head,
// and the last one before the server was set back, if it was. A loss is
// reported until somebody acknowledges it.
func (s *session) checkSeen(g *globals, events []store.Event, seen store.Head, acknowledge bool) error {
	before, err := s.witness().Before()
	if err != nil {
		return err
	}
	lost := extends(events, before)
	if lost == nil {
		if err := s.witness().Acknowledge(); err != nil { // nothing to remember
			return err
		}
	} else if acknowledge {
		g.warn(lost.Error())
		g.say("acknowledged: this home does not report it again")
		return s.witness().Acknowledge()
	}
	if lost != nil {
		return fmt.Errorf("%w; `mandos-escrow audit verify --acknowledge` ends this report", lost)
	}
	return extends(events, seen)
}

// extends proves that the entry of the head that was seen is in the log. A log
// that an administrator took back says so in an entry server.confirm.
func extends(events []store.Event, seen store.Head) error {
	if seen.Seq == 0 {
		return nil
	}
	confirmed := ""
	for _, e := range events {
		if e.Seq == seen.Seq && e.Hash == seen.Hash {
			return nil
		}
		if e.Action == "server.confirm" {
			confirmed = fmt.Sprintf("; the log was taken back, and confirmed by %s on %s", safe(e.Actor), when(e.Time))
		}
	}
	return fmt.Errorf("%w: entry %d, which this home has seen, is not in it%s", store.ErrAudit, seen.Seq, confirmed)
}

func (s *session) witness() *api.Witness {
	return api.NewWitness(s.home.HeadFile(s.membership.Server.KeyID), s.membership.Server.KeyID)
}
