package enroll

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/luks"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// ring are several servers, and a machine that enrolls with all of them.
type ring struct {
	*machine
	sites     []*site
	threshold int
	boot      int // 0: as the threshold
}

func newRing(t *testing.T, threshold, m int, typ string) *ring {
	t.Helper()
	r := &ring{threshold: threshold}
	for range m {
		r.sites = append(r.sites, newSite(t))
	}
	r.machine = newMachine(t, r.sites[0], typ)
	r.machine.token = r.merge(t)
	return r
}

// merge makes a token of new tokens of all servers.
func (r *ring) merge(t *testing.T) string {
	t.Helper()
	var tokens []*api.Token
	for i, s := range r.sites {
		token := parseToken(t, s.token(t))
		token.Servers[0].Name = fmt.Sprint("srv", i+1)
		tokens = append(tokens, token)
	}
	merged, err := api.Merge(r.threshold, r.boot, tokens)
	if err != nil {
		t.Fatal(err)
	}
	return textOf(t, merged)
}

func parseToken(t *testing.T, text string) *api.Token {
	t.Helper()
	token, err := api.ParseToken([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func textOf(t *testing.T, token *api.Token) string {
	t.Helper()
	text, err := token.Text()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// packetAt is the one verified packet of a server; "" if it has none.
func (r *ring) packetAt(t *testing.T, i int) (id string, data []byte) {
	t.Helper()
	entries := r.sites[i].entries(t, identityOf(t, r.machine.boot()).Key.KeyID(), r.uuids[0])
	switch verified := entries[escrow.Verified]; len(verified) {
	case 0:
		return "", nil
	case 1:
		err := r.sites[i].state.Store.View(func(tx *store.Tx) (err error) {
			_, data, err = tx.Packet(verified[0].ID)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return verified[0].ID, data
	}
	t.Fatalf("server %d has several verified packets", i+1)
	return "", nil
}

// check sees to it that the servers that are named, from 0, hold all of a
// finished enrolment: the same packet, that N of their master keys open and N-1 do
// not, and blobs that boot from every N of them.
func (r *ring) check(t *testing.T, at []int, others ...int) {
	t.Helper()
	j := r.journal(t, 0)
	if j == nil || !j.committed || j.sealed != nil || j.old != nil {
		t.Fatalf("the journal is not that of a finished enrolment: %+v", j)
	}
	want := append([]int{j.boot.number, j.recovery.number}, others...)
	slices.Sort(want)
	var active []int
	for _, s := range header(t, r.disks[0]).Slots {
		active = append(active, s.Number)
	}
	if !slices.Equal(active, want) {
		t.Fatalf("keyslots %v are active, want %v", active, want)
	}
	var data []byte
	for _, i := range at {
		id, bytes := r.packetAt(t, i)
		if id != j.packet || data != nil && string(bytes) != string(data) {
			t.Fatalf("server %d has packet %q, and the journal %s; or not the same bytes as the others", i+1, id, j.packet)
		}
		data = bytes
		for _, action := range auditOf(t, r.sites[i]) {
			if strings.HasPrefix(action, "alarm.") {
				t.Errorf("server %d: %s", i+1, action)
			}
		}
	}
	r.checkTrustees(t, data, j)
	r.checkBoots(t, at, j)
	if exists((&enrolment{Options: Options{Root: r.root}}).uploadsPath(r.uuids[0])) != (len(at) < len(r.sites)) {
		t.Error("what servers are owed is there when nobody is owed anything, or is not there")
	}
}

func auditOf(t *testing.T, s *site) (actions []string) {
	t.Helper()
	err := s.state.Store.View(func(tx *store.Tx) error {
		events, err := tx.AuditFrom(1, 1<<20)
		for _, e := range events {
			actions = append(actions, e.Action)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return actions
}

// checkTrustees tries every set of trustees.
func (r *ring) checkTrustees(t *testing.T, data []byte, j *journal) {
	t.Helper()
	p, err := escrow.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if p.Threshold != r.threshold || len(p.Trustees) != len(r.sites) {
		t.Fatalf("sealed to %d of %d", p.Threshold, len(p.Trustees))
	}
	shares := make([]*escrow.Share, len(r.sites))
	for i, s := range r.sites {
		_, message, err := p.Share(escrow.ForPassphrase, s.master.Public().Fingerprint())
		if err != nil {
			t.Fatal(err)
		}
		if shares[i], err = escrow.OpenShare(message, s.master, p, escrow.ForPassphrase); err != nil {
			t.Fatal(err)
		}
	}
	for _, set := range subsets(len(r.sites)) {
		var some []*escrow.Share
		for _, i := range set {
			some = append(some, shares[i])
		}
		opened, err := p.Open(escrow.ForPassphrase, some)
		switch {
		case len(set) < r.threshold && !errors.Is(err, escrow.ErrTooFew):
			t.Errorf("trustees %v opened it, or: %v", set, err)
		case len(set) >= r.threshold && err != nil:
			t.Errorf("trustees %v: %v", set, err)
		case err == nil && !opens(t, r.disks[0], opened.Passphrase.Passphrase, j.recovery.number):
			t.Errorf("trustees %v: the recovery passphrase opens nothing", set)
		}
	}
}

// subsets are all but the empty one.
func subsets(m int) (all [][]int) {
	for bits := 1; bits < 1<<m; bits++ {
		var set []int
		for i := range m {
			if bits>>i&1 == 1 {
				set = append(set, i)
			}
		}
		all = append(all, set)
	}
	return all
}

// checkBoots fetches from every set of servers.
func (r *ring) checkBoots(t *testing.T, at []int, j *journal) {
	t.Helper()
	needed := r.boot
	if needed == 0 {
		needed = r.threshold
	}
	proved := false
	for _, set := range subsets(len(r.sites)) {
		client := r.client(t, 0)
		if client.Config.Threshold != needed || len(client.Config.Servers) != len(r.sites) {
			t.Fatalf("unlock.conf says %d of %d", client.Config.Threshold, len(client.Config.Servers))
		}
		holding := 0
		for i := range client.Config.Servers {
			if !slices.Contains(set, i) {
				client.Config.Servers[i].Addresses = []string{"127.0.0.1:1"} // nobody
			} else if slices.Contains(at, i) {
				holding++
			}
		}
		result, err := client.Fetch(t.Context())
		if (err == nil) != (holding >= needed) {
			t.Errorf("servers %v: %v", set, err)
		}
		if err == nil && !proved {
			if proved = opens(t, r.disks[0], result.Passphrases[r.uuids[0]], j.boot.number); !proved {
				t.Error("the boot passphrase does not open its keyslot")
			}
		}
	}
	if !proved {
		t.Error("no set of servers boots it")
	}
}

// TestSeveralServers: 2 of 3 and 3 of 5, and full blobs at each of two.
func TestSeveralServers(t *testing.T) {
	for _, c := range []struct {
		threshold, m, boot int
		typ                string
	}{{2, 3, 0, luks.Type2}, {3, 5, 0, luks.Type1}, {2, 2, 1, luks.Type2}, {1, 2, 2, luks.Type1}} {
		t.Run(fmt.Sprintf("%d-of-%d-boots-%d", c.threshold, c.m, c.boot), func(t *testing.T) {
			t.Parallel()
			r := newRing(t, c.threshold, c.m, c.typ)
			r.boot = c.boot
			r.machine.token = r.merge(t)
			result := mustRun(t, r.job())[0]
			var all []int
			for i := range c.m {
				all = append(all, i)
			}
			r.check(t, all, userSlot, colleagueSlot)
			again := mustRun(t, r.job())[0]
			if result.Already || !again.Already || len(result.Behind)+len(again.Behind) != 0 {
				t.Errorf("%+v, then %+v", result, again)
			}
			r.check(t, all, userSlot, colleagueSlot)
			j := r.job()
			j.Remove = true // makes new keyslots, and so a new packet
			mustRun(t, j)
			r.check(t, all, colleagueSlot)
			for i, s := range r.sites {
				blobs, err := blobsOf(s, r.machine, t)
				if err != nil || blobs.Threshold != max(c.boot, 1) && blobs.Threshold != c.threshold || len(blobs.Servers) != c.m {
					t.Errorf("server %d knows %+v, %v", i+1, blobs, err)
				}
			}
		})
	}
}

func blobsOf(s *site, m *machine, t *testing.T) (h unlock.Holders, err error) {
	t.Helper()
	err = s.state.Store.View(func(tx *store.Tx) error {
		r, err := tx.Machine(identityOf(t, m.boot()).Key.KeyID())
		h = r.Boots
		return err
	})
	return h, err
}

// TestServersGone: a server that does not answer from some step on is left out,
// and follows with the next run. With fewer than are needed nothing counts.
func TestServersGone(t *testing.T) {
	for _, step := range []string{"before", "registered", "uploaded", "added the recovery slot", "committed at the server"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			r := newRing(t, 2, 3, luks.Type2)
			if step == "before" {
				r.sites[2].stop()
			}
			o, err := r.job().options()
			if err != nil {
				t.Fatal(err)
			}
			o.Checkpoint = func(reached string) {
				if reached == step {
					r.sites[2].stop()
				}
			}
			var said []string
			o.Progress = func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }
			results, err := Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(results[0].Behind, []string{"srv3"}) || !strings.Contains(strings.Join(said, "\n"), "without srv3") {
				t.Errorf("%+v\n%s", results[0], strings.Join(said, "\n"))
			}
			state, err := Inspect(r.root)
			if err != nil || len(state.Volumes) != 1 || !slices.Equal(state.Volumes[0].Behind, []string{"srv3"}) {
				t.Errorf("%+v, %v", state, err)
			}
			r.check(t, []int{0, 1}, userSlot, colleagueSlot)
			r.sites[2].start(t)
			j := r.job()
			j.Passphrase = nil // nothing needs it any more
			again := mustRun(t, j)[0]
			if !again.Already || len(again.Behind) != 0 || again.Packet != results[0].Packet {
				t.Errorf("%+v", again)
			}
			r.check(t, []int{0, 1, 2}, userSlot, colleagueSlot)
		})
	}
}

// TestTooFewServers: one of three is not enough, wherever the others stop. What
// was there stays; the next run comes to the end.
func TestTooFewServers(t *testing.T) {
	for _, step := range []string{"before", "registered", "journal", "uploaded", "added the recovery slot", "boot configuration"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			r := newRing(t, 2, 3, luks.Type2)
			stop := func() { r.sites[1].stop(); r.sites[2].stop() }
			if step == "before" {
				stop()
			}
			o, err := r.job().options()
			if err != nil {
				t.Fatal(err)
			}
			o.Checkpoint = func(reached string) {
				if reached == step {
					stop()
				}
			}
			if _, err = Run(t.Context(), o); !errors.Is(err, api.ErrUnreachable) || !strings.Contains(err.Error(), "1 of 3 servers answer, and 2 are needed") {
				t.Errorf("got %v", err)
			}
			before := !slices.Contains([]string{"added the recovery slot", "boot configuration"}, step)
			if n := len(header(t, r.disks[0]).Slots); before != (n == 2) {
				t.Errorf("%d keyslots", n)
			}
			if j := r.journal(t, 0); j != nil && j.committed {
				t.Error("it is committed")
			}
			r.sites[1].start(t)
			r.sites[2].start(t)
			mustRun(t, r.job())
			r.check(t, []int{0, 1, 2}, userSlot, colleagueSlot)
		})
	}
}

// TestSeveralServersKilled: killed at any checkpoint, with two servers that are
// both needed, and run again, also with one server away in between.
func TestSeveralServersKilled(t *testing.T) {
	const last = 14
	for k := 2; k <= last; k++ {
		t.Run(name(luks.Type2, k), func(t *testing.T) {
			t.Parallel()
			r := newRing(t, 2, 2, luks.Type2)
			j := r.job()
			j.Kill = k
			steps, killed := runKilled(t, j)
			if killed != (k < last) {
				t.Fatalf("%d checkpoints: %s", len(steps), strings.Join(steps, ", "))
			}
			j.Kill = 0
			mustRun(t, j)
			r.check(t, []int{0, 1}, userSlot, colleagueSlot)
		})
	}
	for k := 3; k <= last; k += 2 { // 1 of the 2 is enough for both, and each is away once
		t.Run("away-"+name(luks.Type1, k), func(t *testing.T) {
			t.Parallel()
			r := newRing(t, 1, 2, luks.Type1)
			j := r.job()
			j.Kill = k
			if steps, killed := runKilled(t, j); !killed && k < 11 {
				t.Fatalf("not killed: %s", strings.Join(steps, ", "))
			}
			r.sites[0].stop()
			j.Kill = 0
			mustRun(t, j)
			r.sites[0].start(t)
			mustRun(t, j)
			r.check(t, []int{0, 1}, userSlot, colleagueSlot)
		})
	}
}

// TestReenrolledWhileBehind: a new packet replaces one that a server never got. It
// gets both, in their order.
func TestReenrolledWhileBehind(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	r.sites[2].stop()
	j := r.job()
	mustRun(t, j)
	r.sites[2].start(t)
	j.Remove = true
	mustRun(t, j)
	r.check(t, []int{0, 1, 2}, colleagueSlot)
}

// TestKindChangedWhileBehind: the same for a server that has an older packet, and
// for a volume that boots unattended no more.
func TestKindChangedWhileBehind(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	j := r.job()
	mustRun(t, j)
	r.sites[2].stop()
	j.Remove = true
	mustRun(t, j)
	r.check(t, []int{0, 1}, colleagueSlot)
	r.sites[2].start(t)
	j.Remove, j.NoBoot, j.Passphrase = false, true, colleague
	result := mustRun(t, j)[0]
	for i, s := range r.sites {
		if id, _ := r.packetAt(t, i); id != result.Packet {
			t.Errorf("server %d has packet %s, want %s", i+1, id, result.Packet)
		}
		if all := strings.Join(auditOf(t, s), " "); strings.Contains(all, "alarm.") {
			t.Errorf("server %d: %s", i+1, all)
		}
	}
}

// TestOtherSet: a machine goes with no other set of servers, and no other
// thresholds, than those that it enrolled with.
func TestOtherSet(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	first := r.machine.token
	mustRun(t, r.job())
	one := r.job()
	one.Token = r.sites[0].token(t)
	r.refused(t, one, ErrOther)
	for name, change := range map[string]func(*ring){
		"fewer servers":          func(o *ring) { o.sites = o.sites[:2] },
		"another threshold":      func(o *ring) { o.threshold = 3 },
		"another boot threshold": func(o *ring) { o.boot = 1 },
	} {
		other := *r
		change(&other)
		j := r.job()
		j.Token = other.merge(t)
		t.Run(name, func(t *testing.T) { r.refused(t, j, ErrOther) })
	}
	r.machine.token = first
	mustRun(t, r.job())
}

// TestWrongMergedTokens: what was exchanged in a merged token is found before any
// server is asked.
func TestWrongMergedTokens(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	foreign := armoredKey(t)
	key, err := seal.ParsePublic([]byte(foreign))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*api.Token)
		want   error
	}{
		"lower threshold":       {func(m *api.Token) { m.Threshold, m.BootOf = 1, 2 }, ErrPolicy},
		"foreign trustee":       {func(m *api.Token) { m.Servers[1].Trustees = []string{key.Fingerprint() + " srv1"} }, ErrPolicy},
		"one server less":       {func(m *api.Token) { m.Servers = m.Servers[:2] }, ErrPolicy},
		"one server twice":      {func(m *api.Token) { m.Servers[1] = m.Servers[0] }, nil},
		"another policy":        {func(m *api.Token) { m.PolicyDigest[3] ^= 1 }, ErrPolicy},
		"threshold 0":           {func(m *api.Token) { m.Threshold = 0 }, escrow.ErrPolicy},
		"trustees' keys swaped": {func(m *api.Token) { m.Servers[0].Keys, m.Servers[1].Keys = m.Servers[1].Keys, m.Servers[0].Keys }, api.ErrTicket},
	} {
		t.Run(name, func(t *testing.T) {
			token := parseToken(t, r.machine.token)
			c.change(token)
			j := r.job()
			j.Token = textOf(t, token)
			r.refused(t, j, c.want)
		})
	}
	for i := range r.sites {
		r.machine.site, r.machine.token = r.sites[i], textOf(t, &api.Token{Servers: parseToken(t, r.merge(t)).Servers[i : i+1], Threshold: 1})
		if r.asked(t) {
			t.Errorf("server %d was asked", i+1)
		}
	}
}

// TestOneTokenExpired: a server that refuses is not gone: nothing is done without
// it.
func TestOneTokenExpired(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*store.Token){
		"expired": func(token *store.Token) { token.Expires = token.Created },
		"revoked": func(token *store.Token) { token.Revoked = true },
		"used up": func(token *store.Token) { token.UsedBy = append(token.UsedBy, "another") },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 2, 3, luks.Type1)
			second := *parseToken(t, r.machine.token)
			second.Servers = second.Servers[1:2]
			second.BootOf = 1
			r.sites[1].changeToken(t, textOf(t, &second), spoil)
			_, err := run(t, r.job())
			if api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "srv2: ") {
				t.Errorf("got %v", err)
			}
			if n := len(header(t, r.disks[0]).Slots); n != 2 {
				t.Errorf("%d keyslots", n)
			}
		})
	}
}

// TestCorruptAmongSeveral: one of three servers shows what was not merged, and is
// named. The others get nothing either.
func TestCorruptAmongSeveral(t *testing.T) {
	t.Parallel()
	evil := armoredKey(t)
	for name, c := range map[string]struct {
		shown func(own api.Policy) api.Policy
		want  error
	}{
		"another trustee": {func(api.Policy) api.Policy { return api.Policy{Policy: policyOf(t, 1, evil), Keys: []string{evil}} }, ErrPolicy},
		"one trustee more": {func(own api.Policy) api.Policy {
			return api.Policy{Policy: policyOf(t, 1, own.Keys[0], evil), Keys: []string{own.Keys[0], evil}}
		}, ErrPolicy},
		"another key": {func(own api.Policy) api.Policy { return api.Policy{Policy: own.Policy, Keys: []string{evil}} }, ErrPolicy},
		"no key":      {func(own api.Policy) api.Policy { return api.Policy{Policy: own.Policy} }, ErrPolicy},
		"no policy":   {func(own api.Policy) api.Policy { return api.Policy{Keys: own.Keys} }, escrow.ErrPolicy},
		"a key of its own": {func(own api.Policy) api.Policy {
			return api.Policy{Policy: own.Policy, Keys: []string{splice(t, own.Keys[0], evil, 14)}}
		}, seal.ErrKey},
		"a later policy": {func(own api.Policy) api.Policy {
			p, err := escrow.ParsePolicy([]byte(own.Policy))
			if err == nil {
				p, err = escrow.NewPolicy(2, 1, make([]byte, 32), p.Trustees)
			}
			if err != nil {
				t.Fatal(err)
			}
			return api.Policy{Policy: string(p.Bytes()), Keys: own.Keys}
		}, ErrPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 2, 3, luks.Type2)
			key, err := identity.Generate()
			if err != nil {
				t.Fatal(err)
			}
			var own api.Policy
			r.sites[2].local(t, "GET", "/v1/policy", nil, &own)
			var after atomic.Bool
			token := parseToken(t, r.machine.token)
			token.Servers[2].KeyID = key.KeyID()
			token.Servers[2].Addresses = []string{fakeServer(t, key, func(w http.ResponseWriter, q *http.Request) {
				if q.URL.Path != "/v1/enroll" {
					after.Store(true)
				}
				if err := json.NewEncoder(w).Encode(c.shown(own)); err != nil {
					t.Error(err)
				}
			})}
			j := r.job()
			j.Token = textOf(t, token)
			if _, err := run(t, j); !errors.Is(err, c.want) || !strings.Contains(err.Error(), "srv3: ") {
				t.Errorf("got %v", err)
			}
			if after.Load() || exists(r.running()+"/policy") || len(header(t, r.disks[0]).Slots) != 2 {
				t.Error("it went on")
			}
			for i := range 2 {
				if id, _ := r.packetAt(t, i); id != "" {
					t.Errorf("server %d has packet %s", i+1, id)
				}
			}
		})
	}
}

// TestSeveralUnenroll: every server that answers is told, and nothing is given back
// before all were.
func TestSeveralUnenroll(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	mustRun(t, r.job())
	id := identityOf(t, r.machine.boot()).Key.KeyID()
	r.sites[1].stop()
	if _, err := unenroll(t, r.leave()); !errors.Is(err, api.ErrUnreachable) || !strings.Contains(err.Error(), "tell srv2") {
		t.Errorf("got %v", err)
	}
	if n := len(header(t, r.disks[0]).Slots); n != 4 {
		t.Errorf("%d keyslots", n)
	}
	left := func(s *site) bool {
		var m unlock.Machine
		err := s.state.Store.View(func(tx *store.Tx) (err error) {
			m, err = tx.Machine(id)
			return err
		})
		return err == nil && !m.Enabled && m.DisabledBecause == unlock.SelfUnenrolled
	}
	if !left(r.sites[0]) || !left(r.sites[2]) {
		t.Error("the servers that answer were not told")
	}
	r.sites[1].start(t)
	result := mustUnenroll(t, r.leave())
	if !left(r.sites[1]) || len(result.Servers) != 3 || len(header(t, r.disks[0]).Slots) != 2 || exists(r.running()) {
		t.Errorf("%+v", result)
	}
}
