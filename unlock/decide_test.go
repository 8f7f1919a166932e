package unlock

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func at(seconds int) time.Time { return epoch.Add(time.Duration(seconds) * time.Second) }

func seconds(n int) Duration { return Duration(time.Duration(n) * time.Second) }

// enabled is a machine that was enabled at second 0.
func enabled(change func(*Settings)) Machine {
	m := Machine{Settings: Defaults()}
	if change != nil {
		change(&m.Settings)
	}
	return m.Enable(at(0))
}

func TestDecide(t *testing.T) {
	delayed := func(s *Settings) { s.ApprovalDelay, s.ApprovalDuration = seconds(30), seconds(60) }
	strict := func(s *Settings) { delayed(s); s.ApprovedByDefault = false }
	timed := func(s *Settings) { s.Timeout, s.ApprovalDuration = seconds(100), seconds(60) }
	for name, c := range map[string]struct {
		machine        Machine
		requested, now int
		want           Decision
	}{
		"never enabled":                {Machine{Settings: Defaults()}, 0, 0, Decision{Refuse, ReasonDisabled, time.Time{}}},
		"as Mandos by default":         {enabled(nil), 5, 5, Decision{Release, ReasonByDefault, time.Time{}}},
		"disabled":                     {enabled(nil).Disable(at(1), "stolen"), 5, 5, Decision{Refuse, ReasonDisabled, time.Time{}}},
		"just before the timeout":      {enabled(timed), 99, 99, Decision{Release, ReasonByDefault, time.Time{}}},
		"at the timeout":               {enabled(timed), 100, 100, Decision{Refuse, ReasonTimedOut, time.Time{}}},
		"timed out beats an approval":  {enabled(timed).Approve(at(99), "a"), 100, 100, Decision{Refuse, ReasonTimedOut, time.Time{}}},
		"waits":                        {enabled(delayed), 5, 10, Decision{Wait, ReasonWaiting, at(35)}},
		"waits no longer than it has":  {enabled(func(s *Settings) { delayed(s); s.Timeout = seconds(20) }), 5, 10, Decision{Wait, ReasonWaiting, at(20)}},
		"waited, by default":           {enabled(delayed), 5, 35, Decision{Release, ReasonByDefault, time.Time{}}},
		"waited, not by default":       {enabled(strict), 5, 35, Decision{Refuse, ReasonNotApproved, time.Time{}}},
		"approved while waiting":       {enabled(strict).Approve(at(8), "a"), 5, 8, Decision{Release, ReasonApproved, time.Time{}}},
		"approved before":              {enabled(strict).Approve(at(1), "a"), 60, 60, Decision{Release, ReasonApproved, time.Time{}}},
		"approval is over":             {enabled(strict).Approve(at(1), "a"), 61, 61, Decision{Wait, ReasonWaiting, at(91)}},
		"clock before the approval":    {enabled(strict).Approve(at(10), "a"), 5, 5, Decision{Wait, ReasonWaiting, at(35)}},
		"denied while waiting":         {enabled(delayed).Deny(at(8), "a"), 5, 8, Decision{Refuse, ReasonDenied, time.Time{}}},
		"clock before the denial":      {enabled(delayed).Deny(at(10), "a"), 5, 5, Decision{Refuse, ReasonDenied, time.Time{}}},
		"denial is over":               {enabled(delayed).Deny(at(8), "a"), 5, 68, Decision{Release, ReasonByDefault, time.Time{}}},
		"denied without a delay":       {enabled(timed).Deny(at(8), "a"), 9, 9, Decision{Refuse, ReasonDenied, time.Time{}}},
		"no delay, not by default":     {enabled(func(s *Settings) { s.ApprovedByDefault = false }), 9, 9, Decision{Refuse, ReasonNotApproved, time.Time{}}},
		"approval died with disabling": {enabled(strict).Approve(at(1), "a").Disable(at(2), "x").Enable(at(3)), 4, 4, Decision{Wait, ReasonWaiting, at(34)}},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.machine.Decide(at(c.requested), at(c.now))
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
			if released := got.Err() == nil; released != (c.want.Action == Release) || !released && !errors.Is(got.Err(), ErrRefused) {
				t.Errorf("Err: %v", got.Err())
			}
		})
	}
}

func TestTransitions(t *testing.T) {
	timed := func(s *Settings) { s.Timeout, s.ExtendedTimeout = seconds(100), seconds(900) }
	for name, c := range map[string]struct {
		machine Machine
		expires time.Time // zero: disabled, or no timeout
		because string
	}{
		"enabled":                       {enabled(timed), at(100), ""},
		"enabled twice":                 {enabled(timed).Enable(at(50)), at(100), ""},
		"enabled after it timed out":    {enabled(timed).Enable(at(150)), at(250), ""},
		"no timeout":                    {enabled(nil), time.Time{}, ""},
		"no timeout, released":          {enabled(nil).Released(at(5), "n"), time.Time{}, ""},
		"released":                      {enabled(timed).Released(at(10), "n"), at(910), ""},
		"extended only once":            {enabled(timed).Released(at(10), "n").Released(at(800), "n"), at(910), ""},
		"extended after a sign of life": {enabled(timed).Released(at(10), "n").CheckedOK(at(20)).Released(at(90), "n"), at(990), ""},
		"never shortened":               {enabled(func(s *Settings) { s.Timeout = seconds(5000) }).Released(at(10), "n"), at(5000), ""},
		"sign of life":                  {enabled(timed).CheckedOK(at(60)), at(160), ""},
		"sign of life too late":         {enabled(timed).CheckedOK(at(100)), time.Time{}, TimedOut},
		"expired":                       {enabled(timed).Expire(at(100)), time.Time{}, TimedOut},
		"not expired yet":               {enabled(timed).Expire(at(99)), at(100), ""},
		"disabled once timed out":       {enabled(timed).Expire(at(100)).Disable(at(101), "stolen"), time.Time{}, "stolen"},
		"the first reason stays":        {enabled(timed).Disable(at(5), "stolen").Disable(at(6), "other").Expire(at(200)), time.Time{}, "stolen"},
		"shorter timeout":               {enabled(timed).Set(at(10), Settings{Timeout: seconds(60)}), at(60), ""},
		"much shorter timeout":          {enabled(timed).Set(at(70), Settings{Timeout: seconds(60)}), time.Time{}, TimedOut},
		"timeout begins":                {enabled(nil).Set(at(10), Settings{Timeout: seconds(60)}), at(70), ""},
		"timeout ends":                  {enabled(timed).Set(at(10), Settings{}), time.Time{}, ""},
		"longer timeout, too late":      {enabled(timed).Set(at(100), Settings{Timeout: seconds(600)}), time.Time{}, TimedOut},
		"set while disabled":            {enabled(timed).Disable(at(1), "x").Set(at(2), Settings{Timeout: seconds(9)}), time.Time{}, "x"},
	} {
		t.Run(name, func(t *testing.T) {
			m := c.machine
			if !m.Expires.Equal(c.expires) || m.DisabledBecause != c.because || m.Enabled != (c.because == "") {
				t.Errorf("expires %v, enabled %v, because %q", m.Expires, m.Enabled, m.DisabledBecause)
			}
		})
	}
	if m := enabled(nil).ApprovalRequested(at(7)).Released(at(9), "n"); m.LastApprovalRequest != at(7) || m.LastReleased != at(9) || m.LastNonce != "n" {
		t.Errorf("not noted: %+v", m)
	}
}

// model is the rules once more, told as a story in whole seconds.
type model struct {
	on                     bool
	ends                   int // 0: no timeout
	released, alive        bool
	verdict                string
	verdictFrom, verdictTo int
}

func (o *model) ended(now int) bool { return o.ends != 0 && now >= o.ends }

func (o *model) step(event, now int, s Settings) {
	timeout, extended := int(time.Duration(s.Timeout)/time.Second), int(time.Duration(s.ExtendedTimeout)/time.Second)
	begin := func() {
		o.ends = 0
		if timeout != 0 {
			o.ends = now + timeout
		}
	}
	switch event {
	case 0: // enable
		if !o.on || o.ended(now) {
			o.on, o.alive = true, true
			begin()
		}
	case 1: // disable, or expire
		o.on, o.ends = false, 0
		if o.verdict == "yes" {
			o.verdict = ""
		}
	case 2: // released
		if (!o.released || o.alive) && o.ends != 0 {
			o.ends = max(o.ends, now+extended)
		}
		o.released, o.alive = true, false
	case 3: // checked
		if o.on && o.ended(now) {
			o.step(1, now, s)
		}
		o.alive = true
		if o.on {
			begin()
		}
	case 4, 5: // approve, deny
		o.verdict = []string{"yes", "no"}[event-4]
		o.verdictFrom, o.verdictTo = now, now+int(time.Duration(s.ApprovalDuration)/time.Second)
	}
}

func (o *model) decide(requested, now int, s Settings) Action {
	holds := o.verdict != "" && now < o.verdictTo && (o.verdict == "no" || now >= o.verdictFrom)
	switch {
	case !o.on, o.ended(now), holds && o.verdict == "no":
		return Refuse
	case holds:
		return Release
	case now < requested+int(time.Duration(s.ApprovalDelay)/time.Second):
		return Wait
	case s.ApprovedByDefault:
		return Release
	}
	return Refuse
}

func step(m Machine, event, now int) Machine {
	switch event {
	case 0:
		return m.Enable(at(now))
	case 1:
		return m.Disable(at(now), "test")
	case 2:
		return m.Released(at(now), "n")
	case 3:
		return m.CheckedOK(at(now))
	case 4:
		return m.Approve(at(now), "a")
	}
	return m.Deny(at(now), "a")
}

func TestDecideAgainstModel(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		settings := Settings{
			Timeout: seconds(r.IntN(3) * 40), ExtendedTimeout: seconds(r.IntN(200)), ApprovedByDefault: r.IntN(2) == 0,
			ApprovalDelay: seconds(r.IntN(3) * 15), ApprovalDuration: seconds(r.IntN(60)),
		}
		m, o, now, story := Machine{Settings: settings}, &model{}, 0, ""
		for range 25 {
			now += 1 + r.IntN(40)
			event := r.IntN(6)
			story += fmt.Sprintf(" %d@%d", event, now)
			m = step(m, event, now)
			o.step(event, now, settings)
			look := now - 20 + r.IntN(80) // the clock may be set back
			requested := look - r.IntN(40)
			if got, want := m.Decide(at(requested), at(look)).Action, o.decide(requested, look, settings); got != want {
				t.Fatalf("seed %d, %+v,%s, request at %d, now %d: %v, want %v", seed, settings, story, requested, look, got, want)
			}
		}
	}
}

// TestNothingRevives: once a machine is disabled, for whatever reason, nothing
// but Enable gives it anything, at whatever time the clock stands.
func TestNothingRevives(t *testing.T) {
	for seed := range uint64(1000) {
		r := rand.New(rand.NewPCG(seed, 2))
		m := enabled(func(s *Settings) { s.Timeout = seconds(100) })
		if seed%2 == 0 {
			m = m.Expire(at(100 + r.IntN(50)))
		} else {
			m = m.Disable(at(r.IntN(200)), "stolen")
		}
		for range 30 {
			if event := 2 + r.IntN(5); event < 6 {
				m = step(m, event, r.IntN(1000)-500)
			} else {
				m = m.Set(at(r.IntN(1000)-500), Defaults())
			}
			if d := m.Decide(at(r.IntN(1000)-500), at(r.IntN(1000)-500)); d.Action != Refuse {
				t.Fatalf("seed %d: %+v", seed, d)
			}
		}
	}
}

func TestAskingDoesNotKeepAlive(t *testing.T) {
	m := enabled(func(s *Settings) { s.Timeout, s.ExtendedTimeout = seconds(300), seconds(900) })
	for now := 10; now < 5000; now += 10 {
		if m.Decide(at(now), at(now)).Action != Release {
			if now != 910 {
				t.Errorf("refused at %d, want 910", now)
			}
			return
		}
		m = m.Released(at(now), "n")
	}
	t.Error("served for ever")
}

func TestSettingsCheck(t *testing.T) {
	if err := Defaults().Check(); err != nil {
		t.Error(err)
	}
	for name, s := range map[string]Settings{
		"long delay": {ApprovalDelay: seconds(601)}, "negative delay": {ApprovalDelay: -1},
		"negative timeout": {Timeout: seconds(-1)}, "half a second": {Interval: Duration(time.Second / 2)},
	} {
		if err := s.Check(); !errors.Is(err, ErrSettings) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
