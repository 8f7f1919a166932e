package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/secret"
	"mandos-escrow/internal/server"
)

func newBackup(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "backup", Short: "copies of a whole server, sealed under a passphrase of their own"}
	cmd.AddCommand(newBackupCreate(g), newBackupRestore(g), newBackupVerify(g))
	return cmd
}

func newBackupCreate(g *globals) *cobra.Command {
	var out, passphraseFile string
	cmd := &cobra.Command{
		Use:   "create --out FILE",
		Short: "write a backup; the server may be running",
		Long: `Writes the store, the server's keys and its settings to one file, sealed under a
passphrase (a binary OpenPGP message around a tar archive). Without that
passphrase it reveals nothing; with it, what the server's disk would: no
passphrase of a volume, and the master key only under its own passphrase.`,
		Example: `  mandos-escrow backup create --state DIR --out srv1.backup
  mandos-escrow backup verify srv1.backup
  mandos-escrow backup restore srv1.backup --state EMPTY-DIR`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" || g.state == "" {
				return usage("backup create needs --state and --out")
			}
			return runBackupCreate(cmd.Context(), g, out, passphraseFile)
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file to write, - for standard output")
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "file with the backup's passphrase (asked for otherwise)")
	return g.withState(cmd, defaultState)
}

func runBackupCreate(ctx context.Context, g *globals, path, passphraseFile string) error {
	passphrase, err := g.newSecret(passphraseFile, "--passphrase-file", "Passphrase of the backup: ")
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	s, err := g.connectState(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	// The size of a tar entry stands before it, so the copy of the store comes
	// to a file first; its values are sealed.
	snapshot, err := os.CreateTemp(g.state, ".backup.*")
	if err != nil {
		return err
	}
	defer snapshot.Close()
	if err := os.Remove(snapshot.Name()); err != nil {
		return err
	}
	if err := s.Stream(ctx, "/v1/backup", snapshot); err != nil {
		return err
	}
	return g.writeFrom(path, func(w io.Writer) error {
		return server.WriteBackup(w, g.state, snapshot, passphrase, time.Now())
	})
}

func newBackupRestore(g *globals) *cobra.Command {
	var passphraseFile string
	cmd := &cobra.Command{
		Use:   "restore FILE --state DIR",
		Short: "make a server's folder from a backup; it serves nothing until confirmed",
		Args:  exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return g.withBackup(args[0], passphraseFile, func(in *os.File, passphrase []byte) error {
				if err := server.RestoreBackup(in, g.state, passphrase, time.Now()); err != nil {
					return err
				}
				g.say("restored to %s; it serves nothing until `mandos-escrow server confirm --state %s`: first disable every machine that must not boot", g.state, g.state)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "file with the backup's passphrase (asked for otherwise)")
	return g.withState(cmd, defaultState)
}

func newBackupVerify(g *globals) *cobra.Command {
	var passphraseFile string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "prove that a backup can be restored: every value opens, the audit log is a whole chain",
		Args:  exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return g.withBackup(args[0], passphraseFile, func(in *os.File, passphrase []byte) error {
				head, err := server.VerifyBackup(in, passphrase)
				if err != nil {
					return err
				}
				fmt.Fprintf(g.out, "whole: audit log of %d entries, head %s\n", head.Seq, head.Hash)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "file with the backup's passphrase (asked for otherwise)")
	return cmd
}

func (g *globals) withBackup(path, passphraseFile string, use func(*os.File, []byte) error) error {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	passphrase, err := g.secretInput(passphraseFile, "--passphrase-file", "Passphrase of the backup: ")
	if err != nil {
		return err
	}
	defer secret.Wipe(passphrase)
	if err := use(in, passphrase); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
