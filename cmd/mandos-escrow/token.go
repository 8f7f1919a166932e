package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
)

func newToken(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "one-off strings that let machines enroll"}
	cmd.AddCommand(newTokenCreate(g), newTokenList(g), newTokenRevoke(g))
	return cmd
}

func newTokenCreate(g *globals) *cobra.Command {
	var o api.NewToken
	cmd := &cobra.Command{
		Use:   "create",
		Short: "print a new token",
		Long: `Prints a token. It carries the server's addresses, its key ID and the digest of
the policy, so a machine that has it needs nothing else; it can add machines and
packets, and never reads or replaces any. See docs/operations.md for how to get
one into a kickstart.`,
		Example: `  mandos-escrow token create --uses 1 --ttl 30m --state DIR >token`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			var reply api.Text
			if err := s.Call(cmd.Context(), "POST", "/v1/tokens", o, &reply); err != nil {
				return err
			}
			text, err := s.checkedToken(reply.Text)
			if err != nil {
				return err
			}
			fmt.Fprintln(g.out, text)
			return nil
		},
	}
	cmd.Flags().IntVar(&o.Uses, "uses", 1, "how many machines may enroll with it")
	cmd.Flags().DurationVar(&o.TTL, "ttl", time.Hour, "how long it lives, as in 1h or 30m")
	cmd.Flags().StringVar(&o.Group, "group", "", "group of the machines that enroll with it")
	cmd.Flags().BoolVar(&o.Hold, "hold", false, "keep their packets whatever happens")
	return g.withState(cmd, "")
}

// checkedToken refuses a token that would make machines trust another server or
// other trustees than this home has pinned: a token is a trust anchor. It is
// written again from what was understood of it.
func (s *session) checkedToken(text string) (string, error) {
	token, err := api.ParseToken([]byte(text))
	if err != nil {
		return "", err
	}
	if s.key != nil {
		pinned := s.membership
		if token.PolicyDigest != pinned.Policy.Digest() || token.Threshold != pinned.Policy.Threshold ||
			len(token.Servers) != 1 || token.Servers[0].KeyID != pinned.Server.KeyID {
			return "", fmt.Errorf("%w: the server made a token for another policy or another server", errForeign)
		}
	}
	return token.Text()
}

func newTokenList(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list tokens, without their secrets",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var tokens []api.TokenInfo
			if err := g.call(cmd.Context(), "GET", "/v1/tokens", nil, &tokens); err != nil {
				return err
			}
			return list(g, tokens, []string{"ID", "USED", "EXPIRES", "GROUP", "BY", "STATE"}, func(t api.TokenInfo) []string {
				state := "valid"
				switch {
				case t.Revoked:
					state = "revoked"
				case !time.Now().Before(t.Expires):
					state = "expired"
				case len(t.UsedBy) >= t.Uses:
					state = "used up"
				}
				return []string{t.ID, fmt.Sprintf("%d of %d", len(t.UsedBy), t.Uses), t.Expires.Local().Format(time.DateTime), t.Group, t.By, state}
			})
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

func newTokenRevoke(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revoke ID",
		Short: "make a token worthless; machines that enrolled with it stay",
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.call(cmd.Context(), "DELETE", "/v1/tokens", api.Name{Name: args[0]}, nil)
		},
	}
	return g.withState(cmd, "")
}
