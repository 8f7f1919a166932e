package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/enroll"
	"mandos-escrow/unlock"
)

func newAgent(g *globals) *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "tell the servers what became of this boot",
		Long: `Reads what the boot program left in /run/mandos-escrow, and tells it to each
server of the enrolment, once a boot: which volumes it opened, whether a boot
passphrase was rejected, whether a header was not the enrolled one. Its unit,
mandos-escrow-agent.service, runs it once the network is up, and again when it
fails. "mandos-escrow machine show" shows it.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runAgent(cmd.Context(), g, root) },
	}
	cmd.Flags().StringVar(&root, "root", "/", "prefix of /run and of what enroll wrote")
	return cmd
}

func runAgent(ctx context.Context, g *globals, root string) error {
	report, err := readReport(root)
	if errors.Is(err, fs.ErrNotExist) {
		g.say("agent: the boot program left no report: it did not run in this boot")
		return nil
	}
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	state, err := enroll.Inspect(root)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	if !state.Enrolled {
		g.say("agent: this machine is not enrolled")
		return nil
	}
	told, err := enroll.TellBoot(ctx, root, bootOf(report, state))
	for _, name := range told {
		g.say("agent: %s was told of boot %s", safe(name), report.BootID)
	}
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	return nil
}

// readReport reads what the boot program left of this boot.
func readReport(root string) (initrd.Report, error) {
	path := filepath.Join(root, initrd.RunFolder, initrd.ReportFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return initrd.Report{}, err
	}
	report, err := initrd.ParseReport(data)
	if err != nil {
		return initrd.Report{}, fmt.Errorf("%s: %w", path, err)
	}
	return report, nil
}

// bootOf is a report as servers are told it. A boot program that could not work
// at all has opened none of the volumes.
func bootOf(r initrd.Report, state enroll.State) unlock.Boot {
	boot := unlock.Boot{ID: r.BootID, Volumes: []unlock.VolumeBoot{}}
	for _, v := range r.Volumes {
		boot.Volumes = append(boot.Volumes, v.VolumeBoot)
	}
	if r.Fault == "" || len(r.Volumes) > 0 {
		return boot
	}
	for _, v := range state.Volumes {
		if v.Boot && len(boot.Volumes) < unlock.MaxBlobs {
			boot.Volumes = append(boot.Volumes, unlock.VolumeBoot{UUID: v.UUID, Outcome: unlock.Unanswered, Reason: r.Fault})
		}
	}
	return boot
}
