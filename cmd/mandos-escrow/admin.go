package main

import (
	"context"
	"crypto/sha256"
	"fmt"

	"github.com/spf13/cobra"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
)

func newAdmin(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "admin", Short: "administrators: who may look, ask, approve and change"}
	cmd.AddCommand(newAdminAdd(g), newAdminList(g), newAdminRemove(g), newAdminLogin(g))
	return cmd
}

func newAdminAdd(g *globals) *cobra.Command {
	var role string
	cmd := &cobra.Command{
		Use:   "add NAME --role ROLE",
		Short: "add an administrator and print their invite",
		Long: `Adds an administrator and prints an invite, with which they log in once, within
seven days. Roles, each with the rights of those before it: viewer looks,
helpdesk requests recoveries, approver approves them, admin changes machines,
tokens and administrators. Nobody approves their own request.`,
		Example: `  mandos-escrow admin add alice --role approver --state DIR >alice.invite`,
		Args:    exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if role == "" {
				return usage("admin add needs --role viewer, helpdesk, approver or admin")
			}
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			var reply api.Text
			if err := s.Call(cmd.Context(), "POST", "/v1/admins", api.NewAdmin{Name: args[0], Role: role}, &reply); err != nil {
				return err
			}
			text, err := s.checkedInvite(reply.Text, args[0])
			if err != nil {
				return err
			}
			fmt.Fprintln(g.out, text)
			return nil
		},
	}
	cmd.Flags().StringVar(&role, "role", "", "viewer, helpdesk, approver or admin")
	return g.withState(cmd, "")
}

// checkedInvite is checkedToken for an invite.
func (s *session) checkedInvite(text, name string) (string, error) {
	invite, err := api.ParseInvite([]byte(text))
	if err != nil {
		return "", err
	}
	if s.key != nil {
		pinned := s.membership
		if invite.PolicyDigest != pinned.Policy.Digest() || invite.Server.KeyID != pinned.Server.KeyID || invite.Name != name {
			return "", fmt.Errorf("%w: the server made an invite for another policy, server or person", errForeign)
		}
	}
	return invite.Text()
}

func newAdminList(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list administrators",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			answers, err := lists[api.AdminInfo](cmd.Context(), g, "/v1/admins")
			if err != nil {
				return err
			}
			return listOfEach(g, answers, []string{"NAME", "ROLE", "KEY ID", "STATE"}, func(a api.AdminInfo) []string {
				state := "active"
				switch {
				case a.Removed:
					state = "removed"
				case a.KeyID == "":
					state = "invited"
				}
				if r := a.Rescue; r != nil {
					state = fmt.Sprintf("%s; volume %s, invited by %s, until %s", state, r.Volume, r.InvitedBy, when(r.Expires))
				}
				return []string{a.Name, a.Role, a.KeyID.Short(), state}
			})
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

func newAdminRemove(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "remove an administrator, who may then do nothing",
		Long: `Removes an administrator at this server. It takes back what they may do, not what
they know: whoever approved before was given the master key under its passphrase,
and may have kept it.`,
		Args: exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var left api.Removed
			if err := g.call(cmd.Context(), "DELETE", "/v1/admins", api.Name{Name: args[0]}, &left); err != nil {
				return err
			}
			g.say("removed %s; if they knew the master key's passphrase, or kept a copy of the key, only a new master key locks them out of packets that they can get at", safe(args[0]))
			if left.Approvers == 0 {
				g.warn("nobody is left who may approve a recovery")
			}
			return nil
		},
	}
	return g.withState(cmd, "")
}

func newAdminLogin(g *globals) *cobra.Command {
	var inviteFile string
	cmd := &cobra.Command{
		Use:   "login --invite-file FILE",
		Short: "make an identity in --home and make it known with an invite",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if inviteFile == "" {
				return usage("admin login needs --invite-file")
			}
			return runLogin(cmd.Context(), g, inviteFile)
		},
	}
	cmd.Flags().StringVar(&inviteFile, "invite-file", "", "file with the invite, - for standard input")
	return cmd
}

func runLogin(ctx context.Context, g *globals, inviteFile string) error {
	text, err := config.ReadInput(inviteFile, g.in, nil) // an invite is of use once
	if err != nil {
		return err
	}
	invite, err := api.ParseInvite(text)
	if err != nil {
		return fmt.Errorf("%s: %w", inviteFile, err)
	}
	defer secret.Wipe(invite.Secret)
	dir, err := g.homeDir()
	if err != nil {
		return err
	}
	home := config.Home{Dir: dir}
	key, err := home.Make()
	if err != nil {
		return err
	}
	c, err := api.Dial(invite.Server, key, api.NewWitness(home.HeadFile(invite.Server.KeyID), invite.Server.KeyID))
	if err != nil {
		return err
	}
	defer c.Close()
	var reply api.LoginReply
	if err := c.Call(ctx, "POST", "/v1/login", api.Login{Secret: invite.Secret}, &reply); err != nil {
		return err
	}
	policy, err := escrow.ParsePolicy([]byte(reply.Policy.Policy))
	if err != nil {
		return err
	}
	if sha256.Sum256(policy.Bytes()) != invite.PolicyDigest {
		return fmt.Errorf("%w: %s shows another policy than the invite names", errForeign, safe(invite.Server.Name))
	}
	if err := home.Join(config.Membership{Server: invite.Server, Name: reply.Name, Policy: policy}); err != nil {
		return err
	}
	g.say("logged in at %s as %s, role %s; your identity is in %s", safe(invite.Server.Name), safe(reply.Name), safe(reply.Role), dir)
	return nil
}
