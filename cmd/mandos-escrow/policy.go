package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/unlock"
)

func newPolicy(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "who must agree before a packet opens, and how long packets live and are kept"}
	cmd.AddCommand(newPolicyShow(g), newPolicySet(g))
	return cmd
}

// policyShown is a policy with what a server adds of its own.
type policyShown struct {
	api.Policy
	Lives []api.Life `json:"lives"`
}

func newPolicyShow(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show",
		Short: "show the policy that packets are sealed under, and how long they live and are kept",
		Long: `Shows the policy record, and after it, of each group, how long a packet's
secrets may live, how long an obsolete packet is kept, and whether all are held.`,
		Example: `  mandos-escrow --home adam policy show`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			var p policyShown
			if err := s.Call(cmd.Context(), "GET", "/v1/policy", nil, &p.Policy); err != nil {
				return err
			}
			policy, err := escrow.ParsePolicy([]byte(p.Policy.Policy))
			if err != nil {
				return err
			}
			if err := s.Call(cmd.Context(), "GET", "/v1/lives", nil, &p.Lives); err != nil {
				return err
			}
			if g.json {
				return g.printJSON(p)
			}
			if _, err := g.out.Write(policy.Bytes()); err != nil {
				return err
			}
			fmt.Fprintln(g.out)
			return list(g, withDefault(p.Lives), []string{"GROUP", "LIFETIME", "RETENTION", "HOLD"}, lifeRow)
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

// withDefault adds what holds when nothing was set: everything is kept for ever.
func withDefault(lives []api.Life) []api.Life {
	if len(lives) > 0 && lives[0].Group == "" {
		return lives
	}
	return append([]api.Life{{}}, lives...)
}

func lifeRow(l api.Life) []string {
	group := l.Group
	if group == "" {
		group = "(other)"
	}
	return []string{group, forEver(l.Lifetime), forEver(l.Retention), fmt.Sprint(l.Hold)}
}

// year is what unlock.ParseDuration reads P1Y as.
const year = unlock.Duration(52 * 7 * 24 * time.Hour)

// forEver shows a duration; whole years as they are typed.
func forEver(d unlock.Duration) string {
	switch {
	case d == 0:
		return "for ever"
	case d%year == 0:
		return fmt.Sprintf("P%dY", d/year)
	}
	return d.String()
}

func newPolicySet(g *globals) *cobra.Command {
	var in api.SetLife
	var lifetime, retention string
	var hold bool
	cmd := &cobra.Command{
		Use:   "set [--group GROUP] --lifetime D --retention D [--hold]",
		Short: "say how long packets live, and how long obsolete ones are kept",
		Long: `Sets, for a group, or for all that have no settings of their own:

--lifetime: how old the secrets of a verified packet may become; then it is
expired, its machine makes a new recovery passphrase at its next contact, and it
can still be recovered until it is purged.
--retention: how long an obsolete packet is kept; then the server removes its
bytes, and its entry stays. The newest packet of a machine's volume, and one that
is held, is never removed so.
--hold: keeps all packets of the group (legal hold); --hold=false ends that.

Durations are RFC 3339: P30D is thirty days, P1Y a year of 52 weeks, PT0S for
ever; at least an hour. What is not given stays as it is.`,
		Example: `  mandos-escrow policy set --retention P1Y --state DIR
  mandos-escrow --home adam policy set --group laptops --lifetime P180D --retention P90D
  mandos-escrow --home adam policy set --group laptops --inherit`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, d := range []struct {
				name, text string
				to         **unlock.Duration
			}{{"lifetime", lifetime, &in.Lifetime}, {"retention", retention, &in.Retention}} {
				if !cmd.Flags().Changed(d.name) {
					continue
				}
				value, err := unlock.ParseDuration(d.text)
				if err != nil {
					return usage("--%s: %v", d.name, err)
				}
				*d.to = &value
			}
			if cmd.Flags().Changed("hold") {
				in.Hold = &hold
			}
			sets := in.Lifetime != nil || in.Retention != nil || in.Hold != nil
			switch {
			case in.Inherit && (in.Group == "" || sets):
				return usage("policy set --inherit takes --group and nothing else")
			case !in.Inherit && !sets:
				return usage("policy set: nothing to set; give --lifetime, --retention or --hold")
			}
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			done, err := everywhere(callAll[any](cmd.Context(), c, "PUT", "/v1/lives", in))
			if len(done) > 0 {
				g.say("set at %s", namesOf(done))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&in.Group, "group", "", "the group (all without settings of their own)")
	f.StringVar(&lifetime, "lifetime", "", "how long the secrets of a packet may live, as in P180D; PT0S for ever")
	f.StringVar(&retention, "retention", "", "how long an obsolete packet is kept, as in P1Y; PT0S for ever")
	f.BoolVar(&hold, "hold", false, "keep all packets of the group, whatever happens")
	f.BoolVar(&in.Inherit, "inherit", false, "remove the group's own settings")
	return g.withState(cmd, "")
}
