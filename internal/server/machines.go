package server

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

func (s *Server) machines(c call) (any, error) {
	out := []api.Machine{}
	word := c.FormValue("machine")
	page, err := pageOf(c)
	if err != nil {
		return nil, err
	}
	err = s.store.View(func(tx *store.Tx) error {
		if word != "" {
			found, err := named(tx, api.Change{Machines: []string{word}})
			if err == nil {
				out = append(out, api.Machine{Machine: found[0], State: stateOf(found[0], c.now)})
			}
			return err
		}
		for m, err := range tx.MachinesAfter(identity.KeyID(page.after)) {
			if err != nil {
				return err
			}
			out = append(out, api.Machine{Machine: m, State: stateOf(m, c.now)})
			if len(out) == page.limit {
				break
			}
		}
		return nil
	})
	if page.limit == 0 {
		slices.SortFunc(out, func(a, b api.Machine) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.KeyID, b.KeyID))
		})
	}
	return &out, err
}

func stateOf(m unlock.Machine, now time.Time) string {
	switch {
	case m.Enabled && !m.Expires.IsZero() && !now.Before(m.Expires):
		return unlock.TimedOut
	case m.Enabled:
		return "enabled"
	case m.DisabledBecause != "" && m.DisabledBecause != unlock.TimedOut:
		return "disabled: " + m.DisabledBecause
	case m.DisabledBecause != "":
		return m.DisabledBecause
	}
	return "disabled"
}

// change changes all the machines that it names, or none.
func (s *Server) change(c call) (any, error) {
	in, err := decode[api.Change](c)
	if err != nil {
		return nil, err
	}
	changed := []string{}
	err = s.store.Update(func(tx *store.Tx) error {
		changed = changed[:0]
		machines, err := named(tx, in)
		if err != nil {
			return err
		}
		for _, m := range machines {
			if err := s.changeOne(tx, c, m, in); err != nil {
				return err
			}
			changed = append(changed, m.Name)
		}
		return nil
	})
	return &changed, err
}

func (s *Server) changeOne(tx *store.Tx, c call, m unlock.Machine, in api.Change) error {
	if in.Remove {
		if err := tx.DeleteMachine(m.KeyID); err != nil {
			return err
		}
		return c.record(tx, store.Event{Action: "machine.remove", Machine: string(m.KeyID), Detail: m.Name})
	}
	if in.Set != nil {
		var what []string
		var err error
		if m, what, err = applySettings(m, *in.Set, c.now); err != nil {
			return err
		}
		if err := regroup(tx, m); err != nil {
			return err
		}
		if err := c.record(tx, store.Event{Action: "machine.set", Machine: string(m.KeyID), Detail: m.Name + ": " + strings.Join(what, ", ")}); err != nil {
			return err
		}
	}
	steps := []struct {
		wanted *bool
		yes    string
		no     string
		apply  func(yes bool) unlock.Machine
	}{
		{in.Enable, "machine.enable", "machine.disable", func(yes bool) unlock.Machine {
			if yes {
				return m.Enable(c.now)
			}
			if m.DisabledBecause == notEnrolled {
				m.DisabledBecause = "" // so that finishing the enrolment does not enable it
			}
			return m.Disable(c.now, "by "+c.actor)
		}},
		{in.Approve, "machine.approve", "machine.deny", func(yes bool) unlock.Machine {
			if yes {
				return m.Approve(c.now, c.actor)
			}
			return m.Deny(c.now, c.actor)
		}},
	}
	for _, step := range steps {
		if step.wanted == nil {
			continue
		}
		if *step.wanted && m.DisabledBecause == notEnrolled {
			return api.Errorf(api.CodeConflict, "%s has not finished to enroll: run `mandos-escrow enroll` on it again", m.Name)
		}
		action := step.no
		if *step.wanted {
			action = step.yes
		}
		m = step.apply(*step.wanted)
		if err := c.record(tx, store.Event{Action: action, Machine: string(m.KeyID), Detail: m.Name}); err != nil {
			return err
		}
	}
	return tx.PutMachine(m)
}

// regroup takes a machine's packets with it into its group: how long they are
// kept goes by that.
func regroup(tx *store.Tx, m unlock.Machine) error {
	for e, err := range tx.EntriesOf(m.KeyID) {
		if err != nil {
			return err
		}
		if e.Group == m.Group {
			continue
		}
		e.Group = m.Group
		if err := tx.PutEntry(e); err != nil {
			return err
		}
	}
	return nil
}

func applySettings(m unlock.Machine, in api.MachineSettings, now time.Time) (unlock.Machine, []string, error) {
	var what []string
	settings := m.Settings
	durations := []struct {
		name string
		from *unlock.Duration
		to   *unlock.Duration
	}{
		{"timeout", in.Timeout, &settings.Timeout},
		{"extended_timeout", in.ExtendedTimeout, &settings.ExtendedTimeout},
		{"interval", in.Interval, &settings.Interval},
		{"approval_delay", in.ApprovalDelay, &settings.ApprovalDelay},
		{"approval_duration", in.ApprovalDuration, &settings.ApprovalDuration},
	}
	for _, d := range durations {
		if d.from != nil {
			*d.to = *d.from
			what = append(what, fmt.Sprintf("%s %s", d.name, *d.from))
		}
	}
	if in.ApprovedByDefault != nil {
		settings.ApprovedByDefault = *in.ApprovedByDefault
		what = append(what, fmt.Sprintf("approved_by_default %t", *in.ApprovedByDefault))
	}
	texts := []struct {
		name string
		from *string
		to   *string
	}{{"checker", in.Checker, &settings.Checker}, {"host", in.Host, &m.Host}, {"group", in.Group, &m.Group}, {"name", in.Name, &m.Name}}
	for _, t := range texts {
		if t.from == nil {
			continue
		}
		if *t.from != "" || t.name == "name" {
			if err := checkName(t.name, *t.from); err != nil {
				return m, nil, err
			}
		}
		*t.to = *t.from
		what = append(what, t.name+" "+*t.from)
	}
	if err := settings.Check(); err != nil {
		return m, nil, api.Errorf(api.CodeUsage, "%v", err)
	}
	return m.Set(now, settings), what, nil
}

// named finds the machines of a change: by name, key ID or its prefix, volume
// UUID or its prefix. A word that fits several stops the call.
func named(tx *store.Tx, in api.Change) ([]unlock.Machine, error) {
	if in.All == (len(in.Machines) > 0) {
		return nil, api.Errorf(api.CodeUsage, "name machines, or say --all")
	}
	var all, out []unlock.Machine
	for m, err := range tx.Machines() {
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	if in.All {
		if len(all) == 0 {
			return nil, api.Errorf(api.CodeNotFound, "no machine is enrolled here")
		}
		return all, nil
	}
	for _, word := range in.Machines {
		var fits []unlock.Machine
		for _, m := range all {
			if string(m.KeyID) == word { // whatever others call themselves
				fits = []unlock.Machine{m}
				break
			}
			if m.Name == word || isPrefix(word, string(m.KeyID)) || slices.ContainsFunc(m.Volumes, func(v string) bool { return isPrefix(word, v) }) {
				fits = append(fits, m)
			}
		}
		switch len(fits) {
		case 0:
			return nil, api.Errorf(api.CodeNotFound, "no machine is called %q; `mandos-escrow machine list` shows them", word)
		case 1:
			if !slices.ContainsFunc(out, func(m unlock.Machine) bool { return m.KeyID == fits[0].KeyID }) {
				out = append(out, fits[0])
			}
		default:
			lines := []string{}
			for _, m := range fits {
				lines = append(lines, fmt.Sprintf("%s  %s, %s, last boot %s, volumes %s", m.KeyID.Short(), m.Name, stateOf(m, time.Now()), lastBoot(m), strings.Join(m.Volumes, " ")))
			}
			return nil, api.Errorf(api.CodeAmbiguous, "%q could be %d machines; name one by its key ID:\n  %s", word, len(fits), strings.Join(lines, "\n  "))
		}
	}
	return out, nil
}

func lastBoot(m unlock.Machine) string {
	if m.LastReleased.IsZero() {
		return "never"
	}
	return m.LastReleased.UTC().Format("2006-01-02 15:04")
}

// shortest is how much of an id or a UUID names something.
const shortest = 4

// isPrefix reports whether word is what or at least 4 characters of its start.
func isPrefix(word, what string) bool {
	return word == what || len(word) >= shortest && strings.HasPrefix(strings.ToLower(what), strings.ToLower(word))
}
