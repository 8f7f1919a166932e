package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/unlock"
)

// ring are several servers that do their work, but for what a test changes, and
// bob, who is known to all of them.
type ring struct {
	*corrupt // the first; its folder has bob's home
	servers  []*corrupt
	keys     []*seal.PrivateKey // their master keys
	own      []escrow.Policy
	packet   *escrow.Packet
}

func newRing(t *testing.T, threshold, m int) *ring {
	t.Helper()
	r := &ring{}
	var trustees []escrow.Trustee
	for i := range m {
		key := must(seal.Generate("master", time.Now().Add(-time.Hour)))
		own := []escrow.Trustee{{Fingerprint: key.Public().Fingerprint(), Name: fmt.Sprint("srv", i+1)}}
		r.keys, trustees = append(r.keys, key), append(trustees, own...)
		r.own = append(r.own, must(escrow.NewPolicy(1, 1, nil, own)))
	}
	r.packet = r.seal("laptop7", must(escrow.NewPolicy(1, threshold, nil, trustees)), r.keys...)
	for i := range m {
		c := newCorrupt(t)
		c.packet = r.packet
		r.servers = append(r.servers, c)
		r.corrupt = r.servers[0]
		must(config.Home{Dir: r.home("bob")}.Make())
		listed := must(config.Home{Dir: c.home("bob")}.Memberships())[0]
		if i == 0 { // pinned with the policy of the other tests
			if err := os.RemoveAll(filepath.Join(r.home("bob"), "servers")); err != nil {
				t.Fatal(err)
			}
			must(config.Home{Dir: r.home("bob")}.Make())
		}
		server := unlock.Server{Name: fmt.Sprint("srv", i+1), KeyID: listed.Server.KeyID, Addresses: listed.Server.Addresses}
		if err := (config.Home{Dir: r.home("bob")}).Join(config.Membership{Server: server, Name: "bob", Policy: r.own[i]}); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// seal makes a packet under a policy of some of the keys.
func (r *ring) seal(machine string, policy escrow.Policy, keys ...*seal.PrivateKey) *escrow.Packet {
	return r.sealVolume(machine, corruptVolume, policy, keys...)
}

func (r *ring) sealVolume(machine, uuid string, policy escrow.Policy, keys ...*seal.PrivateKey) *escrow.Packet {
	var public []*seal.PublicKey
	for _, k := range keys {
		public = append(public, k.Public())
	}
	header := escrow.Header{Machine: machine, KeyID: corruptKeys().machine.KeyID(), MachineIDHash: strings.Repeat("ab", 32), Volume: escrow.Volume{UUID: uuid}}
	payload := &escrow.PassphrasePayload{Passphrase: []byte(corruptRecovery), Slot: 1, LUKSType: "luks2"}
	data := must(escrow.Make(header, policy, public, []escrow.Payload{payload}, corruptKeys().machine, time.Now()))
	p := must(escrow.Parse(data))
	corruptKeys().raw[p] = data
	return p
}

// ask makes bob ask, and returns the id. All servers that have the packet have the
// same request.
func (r *ring) ask(t *testing.T) string {
	t.Helper()
	for _, c := range r.servers {
		c.filed, c.approved = nil, nil
	}
	var out api.Request
	text := r.command("bob", exitDone, "", "recover", "--request", "--volume", "laptop7", "--reason", "forgot it", "--json")
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	for i, c := range r.servers {
		if c.packet == r.packet && !bytes.Equal(c.filed, r.servers[0].filed) {
			t.Errorf("server %d has another request", i+1)
		}
	}
	return r.filedID()
}

// approveAt puts the approval of one server's trustee there.
func (r *ring) approveAt(i int) {
	c := r.servers[i]
	by := must(identity.Generate())
	digest, request := recovery.Digest(c.filed), must(recovery.ParseRequest(c.filed))
	_, message, err := r.packet.Share(escrow.ForPassphrase, r.keys[i].Public().Fingerprint())
	share := must(escrow.OpenShare(must(message, err), r.keys[i], r.packet, escrow.ForPassphrase))
	resealed := must(recovery.Reseal(share, request, digest, time.Now()))
	c.approved = append(c.approved, api.Approve{Share: resealed, Approval: must(recovery.Approval{
		RequestDigest: digest, Trustee: r.keys[i].Public().Fingerprint(), ShareDigest: sha256.Sum256(resealed),
		Approver: fmt.Sprint("alice", i+1), ApproverID: by.KeyID(), Created: time.Now(),
	}.Sign(by))})
}

func (r *ring) collect(t *testing.T, exit int, part, id string) {
	t.Helper()
	files := []string{filepath.Join(r.dir, "packet.asc"), filepath.Join(r.dir, "otp")}
	r.release(exit, part, id)
	for _, file := range files {
		if _, err := os.Stat(file); (err == nil) != (exit == exitDone) {
			t.Errorf("exit %d, and %s: %v", exit, file, err)
		}
	}
	if exit != exitDone {
		return
	}
	opened, err := escrow.OpenOffline(must(os.ReadFile(files[0])), must(os.ReadFile(files[1])))
	if err != nil || string(opened.Passphrase.Passphrase) != corruptRecovery {
		t.Errorf("%v", err)
	}
	for _, file := range files {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEverySubset: 3 of 5 servers' people are enough, whichever they are, and none
// of the subsets of 2; whoever asks too early costs nothing.
func TestEverySubset(t *testing.T) {
	r := newRing(t, 3, 5)
	for bits := range 1 << 5 {
		var set []int
		for i := range 5 {
			if bits>>i&1 == 1 {
				set = append(set, i)
			}
		}
		id := r.ask(t)
		for n, i := range set {
			if n == 2 {
				r.collect(t, exitNotApproved, "2 of the 3 trustees", id)
			}
			r.approveAt(i)
		}
		if len(set) < 3 {
			for _, c := range r.servers {
				c.calls = nil
			}
			r.collect(t, exitNotApproved, fmt.Sprintf("%d of the 3 trustees", len(set)), id)
			for i, c := range r.servers {
				if strings.Contains(strings.Join(c.calls, " "), "/release") {
					t.Errorf("%v: server %d was made to release", set, i+1)
				}
			}
			continue
		}
		r.collect(t, exitDone, "one-time password", id)
	}
}

// TestOneLiesToTheRequester: what one of three servers releases in place of its
// part is named, and left out; with the others there are enough, and without them
// what was collected is kept.
func TestOneLiesToTheRequester(t *testing.T) {
	for name, x := range map[string]struct {
		change func(*ring, *api.Release)
		part   string
	}{
		"another packet": {func(r *ring, out *api.Release) { out.Packet = corruptKeys().raw[corruptKeys().packet] }, "another packet"},
		"its own packet": {func(r *ring, out *api.Release) {
			out.Packet = corruptKeys().raw[r.seal("laptop7", r.own[1], r.keys[1])]
		}, "another packet"},
		"another request": {func(r *ring, out *api.Release) {
			out.Request = r.forge(func(*recovery.Request) {}, corruptKeys().thief)
		}, "another request"},
		"nothing":                   {func(r *ring, out *api.Release) { *out = api.Release{} }, "another request"},
		"a share cut":               {func(r *ring, out *api.Release) { out.Approvals[0].Share = out.Approvals[0].Share[:99] }, "is another one"},
		"a share twice":             {func(r *ring, out *api.Release) { out.Approvals = append(out.Approvals, out.Approvals[0]) }, "twice"},
		"a share of another's":      {func(r *ring, out *api.Release) { out.Approvals = r.servers[0].approved }, ""},
		"fewer shares than it said": {func(r *ring, out *api.Release) { out.Approvals = nil }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 2, 3)
			liar := r.servers[1]
			liar.released = func(out *api.Release) {
				out.Approvals = append([]api.Approve(nil), out.Approvals...)
				x.change(r, out)
			}
			id := r.ask(t)
			r.approveAt(0)
			r.approveAt(1)
			exit := exitIntegrity
			if x.part == "" {
				exit = exitFailed
			}
			r.collect(t, exit, x.part, id)
			if n := filesIn(t, r.home("bob")+"/requests"); !strings.Contains(n, ".release") {
				t.Errorf("what the honest server gave was not kept: %s", n)
			}
			r.servers[0].released = func(out *api.Release) { *out = api.Release{} } // it gives once
			r.approveAt(2)
			r.collect(t, exitDone, "one-time password", id)
			if n := filesIn(t, r.home("bob")+"/requests"); n != "" {
				t.Errorf("bob's home still has %s", n)
			}
		})
	}
}

// TestOneLiesAboutARequest: what one of three servers says of a request, or releases
// beside it, keeps nobody from what the two others have.
func TestOneLiesAboutARequest(t *testing.T) {
	for name, lie := range map[string]func(*ring, *api.Request){
		"a high threshold": func(_ *ring, out *api.Request) { out.Threshold = 99 },
		"a low threshold":  func(_ *ring, out *api.Request) { out.Threshold = 1 },
		"shares of all": func(r *ring, out *api.Request) {
			for _, k := range r.keys {
				out.Approved = append(out.Approved, k.Public().Fingerprint())
			}
		},
		"it is released": func(_ *ring, out *api.Request) { out.State = recovery.Released },
		"it is denied":   func(_ *ring, out *api.Request) { out.State = recovery.Denied },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 2, 3)
			liar := r.servers[0]
			liar.lists = func(out *api.Request) { lie(r, out) }
			liar.released = func(out *api.Release) { *out = api.Release{} }
			id := r.ask(t)
			r.collect(t, exitNotApproved, "of the 2 trustees", id)
			r.approveAt(1)
			r.approveAt(2)
			r.collect(t, exitDone, "one-time password", id)
		})
	}
}

// TestOneMakesAWordAmbiguous: a server that shows another volume for a word does not
// keep others from being asked for what they have.
func TestOneMakesAWordAmbiguous(t *testing.T) {
	r := newRing(t, 2, 3)
	all := slices.Concat(r.own[0].Trustees, r.own[1].Trustees, r.own[2].Trustees)
	for name, policy := range map[string]escrow.Policy{
		"of its own policy": r.own[1],
		"of the same":       must(escrow.NewPolicy(1, 2, nil, all)),
		"of a higher one":   must(escrow.NewPolicy(1, 3, nil, all)),
	} {
		t.Run(name, func(t *testing.T) {
			keys := r.keys
			if len(policy.Trustees) == 1 {
				keys = r.keys[1:2]
			}
			r.servers[1].packet = r.sealVolume("laptop7", strings.Replace(corruptVolume, "0f", "ff", 1), policy, keys...)
			id := r.ask(t)
			r.approveAt(0)
			r.approveAt(2)
			r.collect(t, exitDone, "one-time password", id)
		})
	}
}

// TestOneLiesAboutThePacket: a server that shows a packet of its own does not get a
// request for it, while the others hold another one.
func TestOneLiesAboutThePacket(t *testing.T) {
	for name, lie := range map[string]func(*ring) *escrow.Packet{
		"1 of 1, its own key": func(r *ring) *escrow.Packet { return r.seal("laptop7", r.own[1], r.keys[1]) },
		"lower threshold": func(r *ring) *escrow.Packet {
			var all []escrow.Trustee
			for _, p := range r.own {
				all = append(all, p.Trustees...)
			}
			return r.seal("laptop7", must(escrow.NewPolicy(1, 1, nil, all)), r.keys...)
		},
		"foreign trustees": func(r *ring) *escrow.Packet { return corruptKeys().strangePacket },
		"swapped for another machine's": func(r *ring) *escrow.Packet {
			return r.seal("laptop8", must(escrow.NewPolicy(1, 2, nil, append(append(r.own[0].Trustees[:1:1], r.own[1].Trustees...), r.own[2].Trustees...))), r.keys...)
		},
		"with foreign trustees beside its own": func(r *ring) *escrow.Packet {
			foreign := corruptKeys().foreign
			trustees := append(r.own[1].Trustees[:1:1], escrow.Trustee{Fingerprint: foreign.Public().Fingerprint(), Name: "srv3"})
			return r.seal("laptop7", must(escrow.NewPolicy(1, 2, nil, trustees)), r.keys[1], foreign)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 2, 3)
			r.servers[1].packet = lie(r)
			id := r.ask(t)
			if r.servers[1].filed != nil || r.servers[2].filed == nil {
				t.Error("the request is for what the liar shows")
			}
			r.approveAt(0)
			r.approveAt(2)
			r.collect(t, exitDone, "one-time password", id)
		})
	}
}

// TestTooFewServersForARequest: a request that could bring nothing is not made, and
// one that too few servers took is withdrawn.
func TestTooFewServersForARequest(t *testing.T) {
	r := newRing(t, 2, 3)
	for _, c := range r.servers[1:] {
		c.packet = corruptKeys().strangePacket
	}
	r.command("bob", exitFailed, "opens with 2 of 3 trustees, and this home reaches the servers of 1", "recover", "--request", "--volume", "laptop7", "--reason", "r")
	if n := filesIn(t, r.home("bob")+"/requests"); n != "" || r.servers[0].filed != nil {
		t.Errorf("bob's home has %s", n)
	}
}

// TestOneLiesAboutAMachine: whatever one of three servers answers for a key ID, the
// machine that has it is disabled at the others, and no other is judged.
func TestOneLiesAboutAMachine(t *testing.T) {
	r := newRing(t, 2, 3)
	machine := api.Machine{}
	machine.Name, machine.KeyID = "laptop7", must(identity.Generate()).KeyID()
	machine.Boots.Threshold = 2
	for i, c := range r.servers {
		machine.Boots.Servers = append(machine.Boots.Servers, unlock.Holder{Name: fmt.Sprint("srv", i+1), KeyID: c.key.KeyID()})
	}
	other := machine
	other.KeyID, other.Enabled = must(identity.Generate()).KeyID(), true
	for name, c := range map[string]struct {
		lie  []api.Machine
		exit int
		part string
	}{
		"another machine": {[]api.Machine{other}, exitDone, "laptop7 at srv2, srv3: disabled"},
		"two":             {[]api.Machine{machine, other}, exitDone, "laptop7 at srv1, srv2, srv3: disabled"},
		"none":            {nil, exitDone, "laptop7 at srv2, srv3: disabled"},
	} {
		t.Run(name, func(t *testing.T) {
			r.servers[0].machines = c.lie
			r.servers[1].machines, r.servers[2].machines = []api.Machine{machine}, []api.Machine{machine}
			r.command("bob", c.exit, c.part, "machine", "disable", string(machine.KeyID))
		})
	}
	for _, c := range r.servers { // took it, and say nothing of it
		c.machines = []api.Machine{other}
	}
	r.command("bob", exitFailed, "NOT DISABLED: no server said", "machine", "disable", string(machine.KeyID))
	// one that holds nothing of it does not count
	two := machine
	two.Boots.Servers = machine.Boots.Servers[1:]
	enabledTwo, beside := two, machine
	enabledTwo.Enabled, beside.Boots = true, unlock.Holders{}
	two.Boots.Threshold, enabledTwo.Boots.Threshold = 1, 1
	r.servers[0].machines, r.servers[1].machines, r.servers[2].machines = []api.Machine{beside}, []api.Machine{two}, []api.Machine{enabledTwo}
	r.command("bob", exitFailed, "NOT DISABLED: 1 of the 2", "machine", "disable", string(machine.KeyID))
	r.servers[2].machines = []api.Machine{machine}
	enabled := machine
	enabled.Enabled = true
	r.servers[1].machines = []api.Machine{enabled}
	r.servers[0].machines = []api.Machine{other}
	r.command("bob", exitFailed, "NOT DISABLED: 1 of the 2", "machine", "disable", string(machine.KeyID))
}

// TestOneSaysDenied: a one-off key stays until all servers say that it is of no use.
func TestOneSaysDenied(t *testing.T) {
	r := newRing(t, 2, 3)
	id := r.ask(t)
	filed := r.servers[1].filed
	r.servers[0].lists = func(out *api.Request) { out.State = recovery.Denied }
	r.servers[1].filed, r.servers[2].filed = nil, nil // they list nothing
	r.command("bob", exitDone, "", "recover", "--list")
	if n := filesIn(t, r.home("bob")+"/requests"); n != id+".key "+id+".request" {
		t.Errorf("bob's home has %s", n)
	}
	for _, c := range r.servers[1:] {
		c.filed, c.lists = filed, r.servers[0].lists
	}
	r.command("bob", exitDone, "", "recover", "--list")
	if n := filesIn(t, r.home("bob")+"/requests"); n != "" {
		t.Errorf("bob's home still has %s", n)
	}
}
