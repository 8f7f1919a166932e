package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// manPage is the page of a command with all that stands below it (man(7)).
func manPage(cmd *cobra.Command, all []string) string {
	var b strings.Builder
	name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
	fmt.Fprintf(&b, ".\\\" Made by TestManPages in cmd/mandos-escrow; do not edit.\n")
	fmt.Fprintf(&b, ".TH %s 8 \"\" mandos\\-escrow \"System Administration\"\n", strings.ToUpper(roff(name)))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(name), roff(cmd.Short))
	b.WriteString(".SH SYNOPSIS\n.nf\n")
	if cmd.HasParent() {
		for _, leaf := range leaves(cmd) {
			b.WriteString(synopsis(leaf) + "\n")
		}
	} else {
		fmt.Fprintf(&b, "\\fB%s\\fR \\fICOMMAND\\fR [OPTION]...\n", roff(name))
	}
	b.WriteString(".fi\n.SH DESCRIPTION\n" + manText(long(cmd)))
	if cmd.HasParent() {
		writeLeaves(&b, cmd)
	} else {
		writeIndex(&b, cmd)
	}
	b.WriteString(".SH OPTIONS OF EVERY COMMAND\n" + manFlags(cmd.Root().PersistentFlags().FlagUsages()) + ".TP\n.B \\-\\-help\nsay how the command is used\n")
	writeFixed(&b, cmd)
	writeSeeAlso(&b, name, all)
	return b.String()
}

// writeLeaves describes each verb: in sections of their own where there are
// several.
func writeLeaves(b *strings.Builder, cmd *cobra.Command) {
	if !cmd.HasAvailableSubCommands() {
		b.WriteString(".SH OPTIONS\n" + manFlags(cmd.LocalNonPersistentFlags().FlagUsages()))
		return
	}
	b.WriteString(".SH COMMANDS\n")
	for _, leaf := range leaves(cmd) {
		fmt.Fprintf(b, ".SS %s\n%s", roff(strings.TrimPrefix(leaf.CommandPath(), leaf.Root().Name()+" ")), manText(long(leaf)))
		b.WriteString(manFlags(leaf.LocalNonPersistentFlags().FlagUsages()))
	}
}

func writeIndex(b *strings.Builder, root *cobra.Command) {
	b.WriteString(".SH COMMANDS\n")
	for _, cmd := range root.Commands() {
		if cmd.IsAvailableCommand() {
			fmt.Fprintf(b, ".TP\n.BR %s\\-%s (8)\n%s\n", roff(root.Name()), roff(cmd.Name()), roff(cmd.Short))
		}
	}
}

// writeFixed adds what is the same for all commands, and the examples.
func writeFixed(b *strings.Builder, cmd *cobra.Command) {
	b.WriteString(".SH EXIT STATUS\n")
	for _, e := range []struct {
		code int
		text string
	}{
		{exitDone, "done"},
		{exitFailed, "failed; the message says what was tried and what to do"},
		{exitUsage, "the call cannot be understood; also a chosen passphrase that is too weak"},
		{exitNotApproved, "not approved yet"},
		{exitMismatch, "not this volume: the packet or the enrolment is of another one"},
		{exitIntegrity, "integrity: something is damaged, changed or mistyped, or the one\\-time password is wrong; also a LUKS header that is refused"},
		{exitLimit, "a limit was reached: no free keyslot, no room on the server, too many packets"},
		{exitRefused, "refused: a role, an approval, a token, a policy or a pinned key forbids it; also a server that is not confirmed"},
	} {
		fmt.Fprintf(b, ".TP\n.B %d\n%s\n", e.code, e.text)
	}
	if examples := examplesOf(cmd); examples != "" {
		b.WriteString(".SH EXAMPLES\n.EX\n" + examples + ".EE\n")
	}
	b.WriteString(".SH FILES\n")
	for _, f := range files(cmd.Name()) {
		fmt.Fprintf(b, ".TP\n.I %s\n%s\n", roff(f[0]), roff(f[1]))
	}
}

// files are the files that a command reads or writes by itself.
func files(command string) [][2]string {
	state := [][2]string{
		{"/var/lib/mandos-escrow", "a server's data folder (--state), for its own user only: server.conf, store.db, keys and the control socket"},
	}
	home := [][2]string{
		{"~/.config/mandos-escrow", "an administrator's folder (--home): identity, pinned servers and policies, one-off keys of open requests"},
	}
	machine := [][2]string{
		{"/etc/mandos-escrow", "a machine's boot identity and unlock.conf: what the boot image must contain"},
		{"/var/lib/mandos-escrow-agent", "a machine's running identity and its journals: never in a boot image"},
	}
	switch command {
	case "server", "backup":
		return state
	case "recover":
		return home
	case "enroll":
		return machine
	case "volume":
		return [][2]string{{"none", "the command reads the device that it is given, and nothing else"}}
	case "mandos-escrow":
		return slices.Concat(state, home, machine)
	}
	return append(state, home...)
}

func writeSeeAlso(b *strings.Builder, self string, all []string) {
	b.WriteString(".SH SEE ALSO\n")
	for _, other := range all {
		if other != self {
			fmt.Fprintf(b, ".BR %s (8),\n", roff(other))
		}
	}
	b.WriteString(".BR cryptsetup (8)\n.PP\nThe documents beside this program: operations.md, flow.md, threat\\-model.md, packet\\-format.md.\n")
}

// leaves are the commands that do something, in the order of the help.
func leaves(cmd *cobra.Command) []*cobra.Command {
	if !cmd.HasAvailableSubCommands() {
		return []*cobra.Command{cmd}
	}
	var out []*cobra.Command
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			out = append(out, leaves(sub)...)
		}
	}
	return out
}

func synopsis(cmd *cobra.Command) string {
	_, arguments, _ := strings.Cut(cmd.Use, " ")
	return fmt.Sprintf("\\fB%s\\fR %s", roff(cmd.CommandPath()), roff(strings.TrimSpace(arguments+" [OPTION]...")))
}

// long is the long help, or the short one as a sentence.
func long(cmd *cobra.Command) string {
	if cmd.Long != "" {
		return cmd.Long
	}
	return strings.ToUpper(cmd.Short[:1]) + cmd.Short[1:] + "."
}

func examplesOf(cmd *cobra.Command) string {
	var out strings.Builder
	for _, leaf := range leaves(cmd) {
		for line := range strings.Lines(leaf.Example) {
			out.WriteString(roff(strings.TrimSpace(line)) + "\n")
		}
	}
	return out.String()
}

// kinds are better words for the types of flags.
var kinds = map[string]string{"string": "TEXT", "stringArray": "TEXT", "strings": "TEXT", "duration": "DURATION", "int": "N"}

// manFlags makes a page's list of flags of pflag's: a line for each, the flag
// and its help at least three spaces apart, hidden ones left out.
func manFlags(usages string) string {
	var out strings.Builder
	for line := range strings.Lines(usages) {
		flag, help, _ := strings.Cut(strings.TrimSpace(line), "   ")
		_, flag, _ = strings.Cut(flag, "--")
		name, value, _ := strings.Cut(flag, " ")
		if name == "help" {
			continue
		}
		if named, generic := kinds[value]; generic {
			value = named
		}
		fmt.Fprintf(&out, ".TP\n.B \\-\\-%s", roff(name))
		if value != "" {
			fmt.Fprintf(&out, " \\fI%s\\fR", roff(value))
		}
		fmt.Fprintf(&out, "\n%s\n", roff(strings.TrimSpace(help)))
	}
	return out.String()
}

// manText makes a page's text of a help text: paragraphs are filled, indented
// blocks stay as they are.
func manText(text string) string {
	var out strings.Builder
	for i, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			out.WriteString(".PP\n")
		}
		block := strings.HasPrefix(paragraph, " ")
		if block {
			out.WriteString(".EX\n")
		}
		for line := range strings.Lines(paragraph) {
			out.WriteString(roff(strings.TrimSuffix(line, "\n")) + "\n")
		}
		if block {
			out.WriteString(".EE\n")
		}
	}
	return out.String()
}

// roff escapes a text (groff_char(7)).
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
