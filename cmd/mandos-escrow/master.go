package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
)

func newMaster(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "master", Short: "the key that a server's packets are sealed to"}
	cmd.AddCommand(newMasterExport(g), newMasterPasswd(g))
	return cmd
}

func newMasterExport(g *globals) *cobra.Command {
	var private bool
	var out string
	cmd := &cobra.Command{
		Use:   "export",
		Short: "print the public half, or the private half under its passphrase",
		Long: `Prints the master key's public half. With --private it prints the private half,
still under its passphrase: put it away where the server is not. Whoever has it
and the passphrase can open packets without the server.`,
		Example: `  mandos-escrow master export --private --state DIR --out master-key.asc`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			var key api.Text
			if !private {
				if err := s.Call(cmd.Context(), "GET", "/v1/master", nil, &key); err != nil {
					return err
				}
				public, err := seal.ParsePublic([]byte(key.Text))
				if err != nil {
					return err
				}
				text, err := public.Armor()
				if err != nil {
					return err
				}
				return g.write(out, text)
			}
			if err := s.Call(cmd.Context(), "POST", "/v1/master/export", nil, &key); err != nil {
				return err
			}
			if locked, err := seal.Protected([]byte(key.Text)); err != nil || !locked || !plainText(key.Text) {
				return fmt.Errorf("%w: not a private key under a passphrase", api.ErrReply)
			}
			if err := g.write(out, []byte(key.Text)); err != nil {
				return err
			}
			// Only now does the server stop to ask for it.
			return s.Call(cmd.Context(), "POST", "/v1/master/saved", nil, nil)
		},
	}
	cmd.Flags().BoolVar(&private, "private", false, "the private half, under its passphrase")
	cmd.Flags().StringVar(&out, "out", "-", "file to write, - for standard output")
	return g.withState(cmd, "")
}

// plainText reports whether a text has printable ASCII and newlines only, as
// ASCII armor has.
func plainText(text string) bool {
	for _, c := range []byte(text) {
		if c != '\n' && (c < ' ' || c > '~') {
			return false
		}
	}
	return true
}

func newMasterPasswd(g *globals) *cobra.Command {
	var oldFile, newFile string
	cmd := &cobra.Command{
		Use:   "passwd",
		Short: "change the passphrase of the master key",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := g.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer s.close()
			var key api.Text
			if err := s.Call(cmd.Context(), "POST", "/v1/master/export", nil, &key); err != nil {
				return err
			}
			old, err := g.secretInput(oldFile, "--key-passphrase-file", "Passphrase of the master key: ")
			if err != nil {
				return err
			}
			defer secret.Wipe(old)
			private, err := seal.ParsePrivate([]byte(key.Text), old)
			if err != nil {
				return err
			}
			passphrase, err := g.newSecret(newFile, "--new-passphrase-file", "New passphrase: ")
			if err != nil {
				return err
			}
			defer secret.Wipe(passphrase)
			locked, err := private.ArmorProtected(passphrase)
			if err != nil {
				return err
			}
			if err := s.Call(cmd.Context(), "PUT", "/v1/master", api.Text{Text: string(locked)}, nil); err != nil {
				return err
			}
			g.say("changed; copies that were put away, and backups, still have the old passphrase")
			return nil
		},
	}
	cmd.Flags().StringVar(&oldFile, "key-passphrase-file", "", "file with the passphrase that it has (asked for otherwise)")
	cmd.Flags().StringVar(&newFile, "new-passphrase-file", "", "file with the passphrase that it gets (asked for otherwise)")
	return g.withState(cmd, "")
}
