package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mandos-escrow/internal/record"
	"mandos-escrow/internal/server"
)

// globals are what every verb may need: streams and the two flags that say as
// whom a command acts.
type globals struct {
	ctx      context.Context // of the whole command: ended by SIGINT and SIGTERM
	in       io.Reader
	out, err io.Writer
	tty      *os.File // standard output, if it is a file
	home     string
	server   string // of several that the home is known to
	state    string
	json     bool
	saying   sync.Mutex // servers are asked at once, and each may be warned of
}

// run is the whole program: arguments in, exit code out.
func run(args []string, in io.Reader, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends what does not listen to the first
	written := &output{w: out}
	g := &globals{ctx: ctx, in: in, out: written, err: errOut}
	g.tty, _ = out.(*os.File)
	root := newRoot(g)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(written)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	if err == nil && written.err != nil {
		err = fmt.Errorf("what was done could not be told: %w", written.err)
	}
	if err != nil {
		fmt.Fprintf(errOut, "mandos-escrow: %v\n", err)
		if hint := hintFor(err); hint != "" {
			fmt.Fprintf(errOut, "  %s\n", hint)
		}
	}
	return exitCode(err)
}

// output is standard output. It keeps its first error: a token that nobody got
// was not made, whatever the server says.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

func newRoot(g *globals) *cobra.Command {
	root := &cobra.Command{
		Use:   "mandos-escrow",
		Short: "boots LUKS machines unattended, keeps the keys to get back in, and gives them out only when the right people say so",
		Long: `mandos-escrow boots LUKS-encrypted machines unattended, escrows the keys to get
back in, and gives those keys out only when the right people say so.

A command acts as an administrator, whose identity is in --home, or on the
server itself, whose data is in --state.`,
		Version:       server.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage("%v", err) })
	root.PersistentFlags().StringVar(&g.home, "home", "", "administrator's folder (default: mandos-escrow in the user's config folder)")
	root.PersistentFlags().StringVar(&g.server, "server", "", "of several servers that --home is known to, act on this one (name, or key ID)")
	for _, verb := range []func(*globals) *cobra.Command{
		newServer, newMaster, newPolicy, newAdmin, newToken, newEnroll, newUnenroll, newVerify, newRotate, newStatus, newDoctor, newAgent, newMachine, newPacket, newRecover, newVolume, newAudit, newBackup,
	} {
		root.AddCommand(verb(g))
	}
	demandSubcommand(root)
	return root
}

// demandSubcommand makes a group without a verb, or with an unknown one, a
// usage error instead of a help page with exit code 0.
func demandSubcommand(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		demandSubcommand(sub)
	}
	if cmd.HasSubCommands() && cmd.Run == nil && cmd.RunE == nil {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("%s has no command %q", cmd.CommandPath(), args[0])
			}
			return usage("%s needs a command; --help lists them", cmd.CommandPath())
		}
	}
}

// withState adds --state to a verb that may also run on the server. The
// fallback is set when the verb runs: all verbs share the one variable.
func (g *globals) withState(cmd *cobra.Command, fallback string) *cobra.Command {
	help := "the server's data folder: acts on the server itself"
	if fallback != "" {
		help += " (default " + fallback + ")"
		cmd.PreRun = func(*cobra.Command, []string) {
			if g.state == "" {
				g.state = fallback
			}
		}
	}
	cmd.Flags().StringVar(&g.state, "state", "", help)
	return cmd
}

// withJSON adds --json.
func (g *globals) withJSON(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&g.json, "json", false, "print JSON")
	return cmd
}

const defaultState = "/var/lib/mandos-escrow"

func (g *globals) homeDir() (string, error) {
	if g.home != "" {
		return g.home, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the config folder: %w; name one with --home", err)
	}
	return filepath.Join(dir, "mandos-escrow"), nil
}

// list prints a listing: one JSON array, or a table.
func list[T any](g *globals, items []T, header []string, row func(T) []string) error {
	if g.json {
		return g.printJSON(items)
	}
	w := tabwriter.NewWriter(g.out, 0, 4, 2, ' ', 0)
	printRow(w, header)
	for _, item := range items {
		cells := row(item)
		for i, c := range cells {
			cells[i] = safe(c)
		}
		printRow(w, cells)
	}
	return w.Flush()
}

func printRow(w io.Writer, cells []string) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprint(w, c)
	}
	fmt.Fprintln(w)
}

func (g *globals) printJSON(v any) error {
	e := json.NewEncoder(g.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// safe shows text that came from others: quoted where it could deceive.
func safe(text string) string {
	if text == "" || record.Printable(text) == nil {
		return text
	}
	return strconv.Quote(text)
}

func (g *globals) warn(text string) { g.say("warning: %s", text) }

func (g *globals) say(format string, args ...any) {
	g.saying.Lock()
	defer g.saying.Unlock()
	fmt.Fprintf(g.err, format+"\n", args...)
}

// usageError is a call that cannot be understood: exit code 2.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usage(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

func isUsage(err error) bool {
	var u usageError
	return errors.As(err, &u)
}

// noArgs refuses arguments with a usage error.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("%s takes no argument %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// exactArgs demands arguments, which the use line names.
func exactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usage("usage: %s", cmd.UseLine())
		}
		return nil
	}
}
