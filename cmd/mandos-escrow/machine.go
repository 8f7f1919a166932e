package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
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
			answers, err := pagedLists(cmd.Context(), g, "/v1/machines", nil, 0, func(m api.Machine) string { return string(m.KeyID) })
			if err != nil {
				return err
			}
			found := mergeMachines(answers)
			slices.SortStableFunc(found, func(a, b machineAt) int { return cmp.Compare(a.Name, b.Name) })
			return list(g, found, []string{"NAME", "KEY ID", "STATE", "VOLUMES", "LAST BOOT", "GROUP"}, func(m machineAt) []string {
				return []string{m.Name, m.KeyID.Short(), m.State, fmt.Sprint(len(m.Volumes)), when(m.LastReleased), m.Group}
			})
		},
	}
	return g.withState(g.withJSON(cmd), "")
}

// machineAt is a machine, as the first server that was asked knows it, with what
// else the servers say of it when there are several.
type machineAt struct {
	api.Machine
	At []stateAt `json:"at,omitempty"`
}

// stateAt is what one server says.
type stateAt struct {
	Server string `json:"server"`
	State  string `json:"state"`
}

func mergeMachines(answers []answer[[]api.Machine]) []machineAt {
	out := []machineAt{}
	for _, same := range group(answers, func(m api.Machine) string { return string(m.KeyID) }) {
		m := machineAt{Machine: same[0].value}
		for _, a := range same {
			if len(answers) > 1 {
				m.At = append(m.At, stateAt{a.Name, a.value.State})
			}
			if a.value.LastReleased.After(m.LastReleased) {
				m.LastReleased = a.value.LastReleased
			}
		}
		m.State = perServer(same, func(m api.Machine) string { return m.State })
		out = append(out, m)
	}
	return out
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
			c, err := g.connectAll(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			answers, err := good(g, callAll[[]api.Machine](cmd.Context(), c, "GET", "/v1/machines?machine="+queryEscape(args[0]), nil))
			if err != nil {
				return err
			}
			found := mergeMachines(answers)
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

func printMachine(g *globals, m machineAt) {
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
		{"boots from", holders(m.Boots)},
	} {
		fmt.Fprintf(g.out, "%-22s %s\n", line[0], safe(line[1]))
	}
	for _, v := range m.LastBoot.Volumes {
		fmt.Fprintf(g.out, "%-22s %s: volume %s %s\n", "last boot", when(m.LastBoot.Told), v.UUID, becauseOf(v))
	}
	for _, v := range m.Checks {
		fmt.Fprintf(g.out, "%-22s %s: volume %s %s\n", "verified", when(v.Checked), v.UUID, checked(v.Reason))
	}
}

// checked is what a machine found, for people.
func checked(reason string) string {
	if reason == "" {
		return "ok"
	}
	return "FAILED: " + safe(reason)
}

// holders are the servers that hold a machine's blobs.
func holders(h unlock.Holders) string {
	if len(h.Servers) == 0 {
		return "this server"
	}
	names := []string{}
	for _, s := range h.Servers {
		names = append(names, s.Name)
	}
	return fmt.Sprintf("%d of %d: %s", h.Threshold, len(names), strings.Join(names, " "))
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
	more := ""
	if change.Enable != nil && !*change.Enable {
		more = `

A machine that boots from N of M servers is disabled once M-N+1 of them have it: until
then this says NOT DISABLED, names the rest, and exits with 1. Run it again when they
answer.`
	}
	cmd := &cobra.Command{
		Use:   verb + " MACHINE... | --all",
		Short: short,
		Long: short + `.

A machine is named by its name, its key ID or the beginning of it, or a volume's
UUID. At a server all that are named are changed, or none. The change is on disk when
the command ends.` + more,
		RunE: func(cmd *cobra.Command, args []string) error {
			change.Machines, change.All = args, all
			return g.change(cmd, change, done)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all machines")
	return g.withState(cmd, "")
}

// change changes machines at every server. A word must mean the same machine
// everywhere, so each is looked up first, where there are several servers.
func (g *globals) change(cmd *cobra.Command, change api.Change, done string) error {
	if change.All == (len(change.Machines) > 0) {
		return usage("%s: name machines, or say --all", cmd.CommandPath())
	}
	c, err := g.connectAll(cmd.Context())
	if err != nil {
		return err
	}
	defer c.close()
	if len(c) > 1 && !change.All {
		if change.Machines, err = c.resolve(cmd.Context(), change.Machines); err != nil {
			return err
		}
	}
	answers := callAll[[]string](cmd.Context(), c, "POST", "/v1/machines", change)
	ok, err := everywhere(answers)
	if change.Enable != nil && !*change.Enable {
		return g.sayDisabled(cmd.Context(), c, change, answers)
	}
	for _, names := range group(ok, func(name string) string { return name }) {
		where := ""
		if len(c) > 1 {
			where = " at " + namesOf(names)
		}
		g.say("%s: %s%s", safe(names[0].value), done, where)
	}
	return err
}

// resolve finds the key IDs that words mean. Servers that do not know one are
// left alone; two that mean different machines by it stop the command. A key ID
// means itself, whatever a server says.
func (c circle) resolve(ctx context.Context, words []string) (ids []string, err error) {
	for _, word := range words {
		if id, err := identity.ParseKeyID(word); err == nil {
			ids = append(ids, string(id))
			continue
		}
		answers := callAll[[]api.Machine](ctx, c, "GET", "/v1/machines?machine="+queryEscape(word), nil)
		found := map[identity.KeyID][]string{}
		for _, a := range answers {
			if code := api.CodeOf(a.err); code == api.CodeAmbiguous {
				return nil, a.fault()
			}
			for _, m := range a.value {
				found[m.KeyID] = append(found[m.KeyID], safe(a.Name))
			}
		}
		switch len(found) {
		case 0:
			return nil, worst(answers)
		case 1:
			for id := range found {
				ids = append(ids, string(id))
			}
		default:
			var lines []string
			for id, names := range found {
				lines = append(lines, string(id)+"  at "+strings.Join(names, ", "))
			}
			slices.Sort(lines)
			return nil, api.Errorf(api.CodeAmbiguous, "%q means different machines at different servers; name one by its key ID:\n  %s", word, strings.Join(lines, "\n  "))
		}
	}
	return ids, nil
}

// errNotDisabled: too few servers have disabled a machine; the others boot it.
var errNotDisabled = errors.New("NOT DISABLED")

// sayDisabled says of each machine whether it is disabled: only when M-N+1 of the
// servers that hold its blobs have it on disk can the others not boot it. What a
// server says of a machine's other servers may be a lie that makes too few look
// enough, so the most that any of them demands counts.
func (g *globals) sayDisabled(ctx context.Context, c circle, change api.Change, answers []answer[[]string]) error {
	words := change.Machines
	if change.All {
		words = []string{""}
	}
	if len(answers) == 1 && answers[0].err != nil {
		return answers[0].err
	}
	var errs []error
	some := false
	for _, word := range words {
		path := "/v1/machines"
		if word != "" {
			path += "?machine=" + queryEscape(word)
		}
		states := askAll(c, func(s *session) (out []api.Machine, err error) { return out, s.Call(ctx, "GET", path, nil, &out) })
		for i, a := range answers {
			if a.err != nil { // what it says now is not what this command did
				states[i].value = nil
			}
		}
		for i := range states {
			states[i].value = slices.DeleteFunc(states[i].value, func(m api.Machine) bool { // nobody asked for that one
				return len(c) > 1 && word != "" && string(m.KeyID) != word
			})
		}
		for _, machine := range group(states, func(m api.Machine) string { return string(m.KeyID) }) {
			some = true
			if err := judgeDisabled(ctx, g, machine); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if !some {
		if err := worst(answers); err != nil || change.All {
			return err
		}
		return fmt.Errorf("%w: no server said afterwards that it is: run this again", errNotDisabled)
	}
	for _, a := range answers { // not needed, if there is no error
		if a.err != nil && api.CodeOf(a.err) != api.CodeNotFound {
			g.warn(a.fault().Error())
		}
	}
	return errors.Join(errs...)
}

// judgeDisabled judges what the servers that took the change say of one machine.
func judgeDisabled(ctx context.Context, g *globals, machine []answer[api.Machine]) error {
	needed, done := 1, []answer[api.Machine]{}
	missing := map[identity.KeyID]string{}
	for _, a := range machine {
		needed = max(needed, a.value.Boots.ToDisable())
		for _, s := range a.value.Boots.Servers {
			missing[s.KeyID] = safe(s.Name)
		}
	}
	holders := len(missing)
	for _, a := range machine {
		if a.value.Enabled {
			continue
		}
		if holders > 0 {
			id, err := a.serverID(ctx)
			if err != nil {
				return err
			}
			if _, holds := missing[id]; !holds { // it boots nothing of this machine
				continue
			}
			delete(missing, id)
		}
		done = append(done, a)
	}
	name := safe(machine[0].value.Name)
	if len(done) >= needed {
		if len(machine) > 1 {
			name += " at " + namesOf(done)
		}
		g.say("%s: disabled", name)
		return nil
	}
	rest := slices.Sorted(maps.Values(missing))
	return fmt.Errorf("%s: %w: %d of the %d servers that are needed have it; the rest (%s) may still boot it: run this again when they answer, or on them with --state", name, errNotDisabled, len(done), needed, strings.Join(rest, ", "))
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
