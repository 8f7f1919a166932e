package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/internal/server"
)

func newServer(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "server", Short: "make, run and look after a server"}
	cmd.AddCommand(newServerInit(g), newServerRun(g), newServerStatus(g), newServerConfirm(g))
	return cmd
}

type initOptions struct {
	server.Settings
	passphraseFile, masterKey string
}

func newServerInit(g *globals) *cobra.Command {
	var o initOptions
	cmd := &cobra.Command{
		Use:   "init --name NAME --address HOST:PORT...",
		Short: "make a server: its folder, its keys, its first policy",
		Long: `Makes the data folder of a server, its TLS key, its store and its master key,
to which packets are sealed. The master key's private half is kept only under
the passphrase that is asked for here; the server never needs it, and whoever
approves a recovery does. With --master-key it was made elsewhere and is not
kept at all.`,
		Example: `  mandos-escrow server init --name srv1 --address srv1.example.org:7625
  mandos-escrow master export --private --state DIR >master-key.asc    # put this away`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runServerInit(g, o) },
	}
	cmd.Flags().StringVar(&o.Name, "name", "", "what people call this server")
	cmd.Flags().StringSliceVar(&o.Listen, "listen", []string{":7625"}, "HOST:PORT to listen on; may be repeated")
	cmd.Flags().StringSliceVar(&o.Addresses, "address", nil, "HOST:PORT where machines reach it; may be repeated")
	cmd.Flags().StringVar(&o.passphraseFile, "master-passphrase-file", "", "file with the master key's passphrase (asked for otherwise)")
	cmd.Flags().StringVar(&o.masterKey, "master-key", "", "file with the public half of a master key made elsewhere")
	return g.withState(cmd, defaultState)
}

func runServerInit(g *globals, o initOptions) error {
	if o.Name == "" || len(o.Addresses) == 0 {
		return usage("server init needs --name and at least one --address")
	}
	if o.masterKey != "" && o.passphraseFile != "" {
		return usage("--master-key is a public half and has no passphrase: leave --master-passphrase-file out")
	}
	if err := o.Check(); err != nil {
		return usage("server init: %v", err)
	}
	now := time.Now()
	var master server.Master
	if o.masterKey != "" {
		text, err := g.input(o.masterKey)
		if err != nil {
			return err
		}
		if master.Public, err = seal.ParsePublic(text); err != nil {
			return fmt.Errorf("%s: %w", o.masterKey, err)
		}
	} else {
		passphrase, err := g.newSecret(o.passphraseFile, "--master-passphrase-file", "Passphrase of the master key: ")
		if err != nil {
			return err
		}
		defer secret.Wipe(passphrase)
		private, err := seal.Generate("mandos-escrow master key of "+o.Name, now)
		if err != nil {
			return err
		}
		master.Public = private.Public()
		if master.Private, err = private.ArmorProtected(passphrase); err != nil {
			return err
		}
	}
	if err := server.Init(g.state, o.Settings, master, now); err != nil {
		return fmt.Errorf("server init: %w", err)
	}
	g.say("made server %s in %s, master key %s", safe(o.Name), g.state, master.Public.Fingerprint())
	if master.Private != nil {
		g.say("next: mandos-escrow server run --state %s, and put the master key away: mandos-escrow master export --private --state %s", g.state, g.state)
	}
	return nil
}

func newServerRun(g *globals) *cobra.Command {
	var debug, silent bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "serve, until SIGTERM or SIGINT",
		Long: `Serves until SIGTERM or SIGINT. Log lines go to standard error.

On the links that it listens on it tells by multicast DNS (UDP port 5353) that
there is a server with its key ID, so that machines find it without a
configured address; loopback addresses are never announced. --no-announce
leaves that out.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if debug {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(g.err, &slog.HandlerOptions{Level: level}))
			state, err := server.OpenState(g.state)
			if err != nil {
				return fmt.Errorf("server run: %w", err)
			}
			defer state.Close()
			slog.SetDefault(log) // for what libraries print
			srv := server.New(state, log, time.Now)
			srv.Announce = !silent
			return srv.Run(cmd.Context())
		},
	}
	cmd.Flags().BoolVar(&debug, "debug", false, "log more; never secrets")
	cmd.Flags().BoolVar(&silent, "no-announce", false, "do not announce this server by multicast DNS")
	return g.withState(cmd, defaultState)
}

func newServerStatus(g *globals) *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "say what a server is and how it does; exit 1 when it does not run",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runServerStatus(cmd.Context(), g, wait)
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait so long for it to run, as in 30s")
	return g.withState(g.withJSON(cmd), "")
}

func runServerStatus(ctx context.Context, g *globals, wait time.Duration) error {
	if _, err := os.Stat(defaultState); err == nil && g.state == "" && g.home == "" {
		g.state = defaultState
	}
	var st api.Status
	if g.state == "" {
		if err := g.call(ctx, "GET", "/v1/status", nil, &st); err != nil {
			return err
		}
		return printStatus(g, st)
	}
	deadline := time.Now().Add(wait)
	for {
		c := api.DialControl(server.Socket(g.state))
		err := c.Call(ctx, "GET", "/v1/status", nil, &st)
		c.Close()
		if err == nil {
			return printStatus(g, st)
		}
		switch {
		case !errors.Is(err, api.ErrUnreachable):
			return err
		case errors.Is(err, fs.ErrPermission):
			return fmt.Errorf("the server of %s: %w", g.state, fs.ErrPermission)
		case !time.Now().Before(deadline):
			return fmt.Errorf("%w on %s", errNotRunning, g.state)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func printStatus(g *globals, st api.Status) error {
	if g.json {
		return g.printJSON(st)
	}
	fmt.Fprintf(g.out, "server      %s, key ID %s\n", safe(st.Name), st.KeyID)
	for _, a := range st.Addresses {
		fmt.Fprintf(g.out, "address     %s\n", safe(a))
	}
	fmt.Fprintf(g.out, "version     %s, running since %s\n", safe(st.Version), st.Started.Local().Format(time.DateTime))
	fmt.Fprintf(g.out, "policy      epoch %d, %d of %d trustees, SHA-256 %s\n", st.PolicyEpoch, st.Threshold, len(st.Trustees), safe(st.PolicyDigest))
	fmt.Fprintf(g.out, "audit log   epoch %d, %d entries, head %s\n", st.Epoch, st.AuditSeq, safe(st.AuditHash))
	fmt.Fprintf(g.out, "holds       %d machines, %d packets, %d open requests\n", st.Machines, st.Packets, st.OpenRequests)
	fmt.Fprintf(g.out, "packets     %d machines have no verified one, %d are due for rotation, %d for re-encryption\n", st.Unproved, st.RotateDue, st.ReencryptDue)
	switch {
	case !st.MasterHere:
		fmt.Fprintf(g.out, "master key  %s, private half kept elsewhere\n", safe(st.Master))
	case st.MasterSaved.IsZero():
		fmt.Fprintf(g.out, "master key  %s, NOT PUT AWAY YET: mandos-escrow master export --private\n", safe(st.Master))
	default:
		fmt.Fprintf(g.out, "master key  %s, put away %s\n", safe(st.Master), st.MasterSaved.Local().Format(time.DateTime))
	}
	if st.Unconfirmed != "" {
		fmt.Fprintf(g.out, "SERVES NOTHING: %s\n  check `mandos-escrow machine list --state DIR`, then `mandos-escrow server confirm --state DIR`\n", safe(st.Unconfirmed))
	}
	return nil
}

func newServerConfirm(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "confirm",
		Short: "let a server that was set back or restored serve again",
		Long: `A server that was restored from a backup, or that meets somebody who has seen a
later audit log than its own, serves nothing: machines that were disabled since
would be served again. Look at "machine list", disable what must not boot, then
confirm.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := g.call(cmd.Context(), "POST", "/v1/confirm", nil, nil); err != nil {
				return err
			}
			g.say("confirmed: the server serves again")
			return nil
		},
	}
	return g.withState(cmd, defaultState)
}
