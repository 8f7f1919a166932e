package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
)

func newToken(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "one-off strings that let machines enroll"}
	cmd.AddCommand(newTokenCreate(g), newTokenList(g), newTokenRevoke(g), newTokenMerge(g))
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
			answers, err := lists[api.TokenInfo](cmd.Context(), g, "/v1/tokens")
			if err != nil {
				return err
			}
			return listOfEach(g, answers, []string{"ID", "USED", "EXPIRES", "GROUP", "BY", "STATE"}, func(t api.TokenInfo) []string {
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

func newTokenMerge(g *globals) *cobra.Command {
	var threshold, bootOf int
	cmd := &cobra.Command{
		Use:   "merge --threshold N TOKEN-FILE...",
		Short: "make one token of tokens of several servers",
		Long: `Makes one token for several servers of a token that each of them made. It asks
nobody. A machine that enrolls with it seals to all the servers' master keys, so
that N of them open its packets and N-1 nothing; each server keeps the whole
packet, and is sent only its own part of the token. The merged token is worth as
long as each of the tokens in it, and as often.

The boot passphrase is split too, one share for each server, of which N are
needed. With --boot-threshold 1 each server keeps all of it: any one of them
boots the machine, also the one that was stolen.`,
		Example: `  mandos-escrow token merge --threshold 2 token1 token2 token3 >token`,
		RunE: func(_ *cobra.Command, args []string) error {
			var tokens []*api.Token
			for _, path := range args {
				text, err := config.ReadInput(path, g.in, nil) // short-lived, and they only add
				if err != nil {
					return err
				}
				token, err := api.ParseToken(text)
				if err != nil {
					return fmt.Errorf("%s: %w", path, err)
				}
				tokens = append(tokens, token)
			}
			merged, err := api.Merge(threshold, bootOf, tokens)
			if err != nil {
				return err
			}
			text, err := merged.Text()
			if err != nil {
				return err
			}
			fmt.Fprintln(g.out, text)
			return nil
		},
	}
	cmd.Flags().IntVar(&threshold, "threshold", 0, "how many of the servers' master keys open a packet")
	cmd.Flags().IntVar(&bootOf, "boot-threshold", 0, "how many servers boot a machine (default: the threshold)")
	return cmd
}
