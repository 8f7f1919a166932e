package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/unlock"
)

func newMachine(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "machine", Short: "enrolled machines: who may boot"}
	yes, no := true, false
	cmd.AddCommand(
		newMachineList(g), newMachineShow(g), newMachineSet(g),
		newMachineChange(g, "enable", "let machines boot", "enabled", api.Change{Enable: &yes}),
		newMachineChange(g, "disable", "give machines nothing from now on, whatever happens", "disabled", api.Change{Enable: &no}),
		newMachineChange(g, "approve", "approve the boot that waits; holds for approval_duration", "approved", api.Change{Approve: &yes}),
		newMachineChange(g, "deny", "deny the boot that waits; holds for approval_duration (disable is for good)", "denied", api.Change{Approve: &no}),
		newMachineChange(g, "remove", "forget machines and their sealed blobs; their packets stay", "removed", api.Change{Remove: true}),
	)
	return cmd
}

func newMachineList(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list machines",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var machines []api.Machine
			if err := g.call(cmd.Context(), "GET", "/v1/machines", nil, &machines); err != nil {
				return err
			}
			return list(g, machines, []string{"NAME", "KEY ID", "STATE", "VOLUMES", "LAST BOOT", "GROUP"}, func(m api.Machine) []string {
				return []string{m.Name, m.KeyID.Short(), m.State, fmt.Sprint(len(m.Volumes)), when(m.LastReleased), m.Group}
			})
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}

func newMachineShow(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show MACHINE",
		Short: "show all that is kept of a machine",
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var found []api.Machine
			if err := g.call(cmd.Context(), "GET", "/v1/machines?machine="+queryEscape(args[0]), nil, &found); err != nil {
				return err
			}
			if len(found) != 1 {
				return fmt.Errorf("%w: %d machines in place of one", api.ErrReply, len(found))
			}
			if g.json {
				return g.printJSON(found[0])
			}
			printMachine(g, found[0])
			return nil
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

func printMachine(g *globals, m api.Machine) {
	for _, line := range [][2]string{
		{"name", m.Name},
		{"key_id", string(m.KeyID)},
		{"running key ID", string(m.RunningKeyID)},
		{"state", m.State},
		{"group", m.Group},
		{"host", m.Host},
		{"volumes", strings.Join(m.Volumes, " ")},
		{"created", when(m.Created)},
		{"last enabled", when(m.LastEnabled)},
		{"last disabled", when(m.LastDisabled)},
		{"last released", when(m.LastReleased)},
		{"last checked ok", when(m.LastCheckedOK)},
		{"last approval request", when(m.LastApprovalRequest)},
		{"expires", when(m.Expires)},
		{"unenrolled", when(m.Unenrolled)},
		{"timeout", m.Timeout.String()},
		{"extended_timeout", m.ExtendedTimeout.String()},
		{"interval", m.Interval.String()},
		{"checker", m.Checker},
		{"approved_by_default", fmt.Sprint(m.ApprovedByDefault)},
		{"approval_delay", m.ApprovalDelay.String()},
		{"approval_duration", m.ApprovalDuration.String()},
	} {
		fmt.Fprintf(g.out, "%-22s %s\n", line[0], safe(line[1]))
	}
	for _, v := range m.LastBoot.Volumes {
		fmt.Fprintf(g.out, "%-22s %s: volume %s %s\n", "last boot", when(m.LastBoot.Told), v.UUID, becauseOf(v))
	}
}

// becauseOf is what became of a volume in a boot, and why.
func becauseOf(v unlock.VolumeBoot) string {
	if v.Reason == "" {
		return string(v.Outcome)
	}
	return fmt.Sprintf("%s: %s", v.Outcome, safe(v.Reason))
}

// newMachineChange makes a verb that changes machines in one way.
func newMachineChange(g *globals, verb, short, done string, change api.Change) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   verb + " MACHINE... | --all",
		Short: short,
		Long: short + `.

A machine is named by its name, its key ID or the beginning of it, or a volume's
UUID. All that are named are changed, or none. The change is on disk when the
command ends.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			change.Machines, change.All = args, all
			return g.change(cmd, change, done)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all machines")
	return g.withState(cmd, "")
}

func (g *globals) change(cmd *cobra.Command, change api.Change, done string) error {
	if change.All == (len(change.Machines) > 0) {
		return usage("%s: name machines, or say --all", cmd.CommandPath())
	}
	var changed []string
	if err := g.call(cmd.Context(), "POST", "/v1/machines", change, &changed); err != nil {
		return err
	}
	for _, name := range changed {
		g.say("%s: %s", safe(name), done)
	}
	return nil
}

func newMachineSet(g *globals) *cobra.Command {
	var all, approveByDefault, denyByDefault bool
	texts := map[string]*string{}
	durations := map[string]*string{}
	cmd := &cobra.Command{
		Use:   "set MACHINE... | --all",
		Short: "change settings, with the meanings of mandos-clients.conf(5)",
		Long: `Changes settings of machines; their names and meanings are those of
mandos-clients.conf(5). Durations are RFC 3339: PT5M is five minutes, P1D a day,
PT0S none.`,
		Example: `  mandos-escrow machine set web1 web2 --timeout PT1H --deny-by-default --approval-delay PT2M --state DIR`,
	}
	for name, help := range map[string]string{
		"timeout": "disable so long after the last sign of life; PT0S: never", "extended-timeout": "the same, once, after a boot",
		"interval": "time between checks", "approval-delay": "wait so long for an approval or denial", "approval-duration": "how long one approval lasts",
	} {
		durations[name] = cmd.Flags().String(name, "", help)
	}
	for name, help := range map[string]string{"checker": "command that checks it", "host": "where the checker reaches it", "group": "its group", "name": "its name"} {
		texts[name] = cmd.Flags().String(name, "", help)
	}
	cmd.Flags().BoolVar(&all, "all", false, "all machines")
	cmd.Flags().BoolVar(&approveByDefault, "approve-by-default", false, "boot without anybody's approval")
	cmd.Flags().BoolVar(&denyByDefault, "deny-by-default", false, "boot only when approved")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		set, err := settingsOf(cmd, durations, texts)
		if err != nil {
			return err
		}
		if approveByDefault && denyByDefault {
			return usage("machine set: --approve-by-default and --deny-by-default exclude each other")
		}
		if approveByDefault || denyByDefault {
			set.ApprovedByDefault = &approveByDefault
		}
		if *set == (api.MachineSettings{}) {
			return usage("machine set: nothing to set; --help lists the settings")
		}
		return g.change(cmd, api.Change{Machines: args, All: all, Set: set}, "set")
	}
	return g.withState(cmd, "")
}

func settingsOf(cmd *cobra.Command, durations, texts map[string]*string) (*api.MachineSettings, error) {
	set := &api.MachineSettings{}
	for name, field := range map[string]**unlock.Duration{
		"timeout": &set.Timeout, "extended-timeout": &set.ExtendedTimeout, "interval": &set.Interval,
		"approval-delay": &set.ApprovalDelay, "approval-duration": &set.ApprovalDuration,
	} {
		if !cmd.Flags().Changed(name) {
			continue
		}
		d, err := unlock.ParseDuration(*durations[name])
		if err != nil {
			return nil, usage("--%s: %v", name, err)
		}
		*field = &d
	}
	for name, field := range map[string]**string{"checker": &set.Checker, "host": &set.Host, "group": &set.Group, "name": &set.Name} {
		if cmd.Flags().Changed(name) {
			*field = texts[name]
		}
	}
	return set, nil
}
