package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

// errProblems: doctor found something that must be put right.
var errProblems = errors.New("problems were found")

// Levels of a finding.
const (
	fine    = "ok"
	warning = "warning" // it may be meant so
	problem = "problem" // something does not work, or is open to others
)

// finding is what one check says.
type finding struct {
	Level string `json:"level"`
	Text  string `json:"text"`
	Do    string `json:"do,omitempty"` // what puts it right
}

func newDoctor(g *globals) *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "look for what is wrong with this machine, or with a server, and say what to do; exit 1 when there is a problem",
		Long: `Without --state, checks this machine: what was enrolled and its keyslots, who
could still get in, the boot images, what happens after failed passphrases
(a root shell would be open to everybody at the console), the last boot,
crypttab, swap and hibernation.

With --state, checks a server: whether it runs and serves, whether its master
key was put away, who can read its files, its clock, and the machines that told
of a bad boot.

It changes nothing. Each line says ok, warning or problem, and what to do.`,
		Example: `  mandos-escrow doctor
  mandos-escrow doctor --state /var/lib/mandos-escrow`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			check := func() ([]finding, error) { return examineMachine(cmd.Context(), root) }
			if g.state != "" {
				check = func() ([]finding, error) { return examineServer(cmd.Context(), g) }
			}
			findings, err := check()
			if err != nil {
				return fmt.Errorf("doctor: %w", err)
			}
			return report(g, findings)
		},
	}
	cmd.Flags().StringVar(&root, "root", "/", "prefix of the system that is checked")
	return g.withState(g.withJSON(cmd), "")
}

func report(g *globals, findings []finding) error {
	if g.json {
		if err := g.printJSON(findings); err != nil {
			return err
		}
	}
	problems := 0
	for _, f := range findings {
		if f.Level == problem {
			problems++
		}
		if g.json {
			continue
		}
		fmt.Fprintf(g.out, "%s: %s\n", f.Level, safe(f.Text))
		if f.Do != "" {
			fmt.Fprintf(g.out, "  %s\n", safe(f.Do))
		}
	}
	if problems > 0 {
		return fmt.Errorf("doctor: %w: %d", errProblems, problems)
	}
	return nil
}
