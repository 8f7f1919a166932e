package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/recovery"
)

// newCorruptRescue has a volume that the recovery passphrase of the packet opens,
// and a rescue invite for it.
func newCorruptRescue(t *testing.T) *corrupt {
	t.Helper()
	c := newCorrupt(t)
	c.write("recovery", corruptRecovery)
	c.write("new.pass", "a new passphrase, longer")
	c.write("disk.img", "")
	disk := filepath.Join(c.dir, "disk.img")
	if err := os.Truncate(disk, 32<<20); err != nil {
		t.Fatal(err)
	}
	format := exec.Command("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--key-slot", "1", "--uuid", corruptVolume, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		disk, filepath.Join(c.dir, "recovery"))
	format.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := format.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	here := must(config.Home{Dir: c.home("bob")}.Memberships())[0].Server
	invite := api.RescueInvite{Volume: corruptVolume, Servers: []api.RescueServer{{Server: here, PolicyDigest: corruptKeys().policy.Digest(), Secret: make([]byte, 16)}}}
	c.write("invite", must(invite.Text()))
	return c
}

// rescue runs the command of the rescue system once.
func (c *corrupt) rescue(exit int, part string) string {
	c.t.Helper()
	return c.command("usb", exit, part, "recover", "--request", "--invite", filepath.Join(c.dir, "invite"), "--device", filepath.Join(c.dir, "disk.img"),
		"--reason", "forgot it", "--new-passphrase-file", filepath.Join(c.dir, "new.pass"), "--no-wait", "--json")
}

// approved makes the rescue ask, and alice approve.
func (c *corrupt) rescueApproved() {
	c.t.Helper()
	var asked api.Request
	if err := json.Unmarshal([]byte(c.rescue(exitNotApproved, "not approved yet")), &asked); err != nil {
		c.t.Fatal(err)
	}
	c.approve(exitDone, "approved: 1 of 1", asked.ID, asked.Words, "master.pass")
	c.lists = func(r *api.Request) { r.State = recovery.Approved }
}

func TestHonestServerTowardsARescue(t *testing.T) {
	c := newCorruptRescue(t)
	c.rescueApproved()
	c.rescue(exitDone, "this rescue is over")
	if left := filesIn(t, c.home("usb")); left != "" {
		t.Errorf("the rescue left %s", left)
	}
}

// What a corrupt server gives a rescue changes nothing on the volume.
func TestCorruptServerTowardsARescue(t *testing.T) {
	k := corruptKeys()
	for name, x := range map[string]struct {
		asked  func(*corrupt) // before it asks: it does not get so far
		change func(*corrupt) // after the approval
		exit   int
		part   string
	}{
		"another policy": {asked: func(c *corrupt) {
			c.login = func(r *api.LoginReply) { r.Policy.Policy = string(k.otherPolicy.Bytes()) }
		}, exit: exitRefused, part: "another policy"},
		"no policy": {asked: func(c *corrupt) {
			c.login = func(r *api.LoginReply) { r.Policy.Policy = "" }
		}, exit: exitIntegrity, part: "policy"},
		"taken for an administrator": {asked: func(c *corrupt) {
			c.login = func(r *api.LoginReply) { r.Role = "admin" }
		}, exit: exitRefused, part: "not for a rescue"},
		"taken for a rescue of another volume": {asked: func(c *corrupt) {
			c.login = func(r *api.LoginReply) { r.Name = strings.Replace(r.Name, "0f1e", "1f1e", 1) }
		}, exit: exitRefused, part: "not for a rescue"},
		"a packet under another policy": {asked: func(c *corrupt) { c.packet = k.strangePacket }, exit: exitRefused, part: "another policy"},
		"a packet of another volume": {asked: func(c *corrupt) {
			p := *c.packet
			p.HeaderBytes = bytes.Replace(p.HeaderBytes, []byte("volume-uuid: 0f1e"), []byte("volume-uuid: 1f1e"), 1)
			c.packet = &p
		}, exit: exitRefused, part: "the server answered with volume"},

		"the packet of another machine": {change: func(c *corrupt) {
			c.released = func(r *api.Release) { r.Packet = k.raw[k.otherPacket] }
		}, exit: exitIntegrity, part: "another packet"},
		"a packet under another policy, released": {change: func(c *corrupt) {
			c.released = func(r *api.Release) { r.Packet = k.raw[k.strangePacket] }
		}, exit: exitIntegrity, part: "another packet"},
		"a swapped request": {change: func(c *corrupt) {
			c.released = func(r *api.Release) {
				r.Request = c.forge(func(r *recovery.Request) { r.Reason = "another one" }, k.thief)
			}
		}, exit: exitIntegrity, part: "another request"},
		"a share for another request": {change: func(c *corrupt) {
			c.released = func(r *api.Release) {
				request := must(recovery.ParseRequest(c.forge(func(r *recovery.Request) { r.Recipient = k.foreign.Public() }, k.thief)))
				share := must(escrow.OpenShare(c.packet.Payloads[0].Shares[0], k.master, c.packet, escrow.ForPassphrase))
				r.Approvals[0].Share = must(recovery.Reseal(share, request, [32]byte{1}, request.Created))
			}
		}, exit: exitIntegrity, part: "another one"},
		"a flipped byte of a share": {change: func(c *corrupt) {
			c.released = func(r *api.Release) {
				r.Approvals = slices.Clone(r.Approvals)
				r.Approvals[0].Share = bytes.Clone(r.Approvals[0].Share)
				r.Approvals[0].Share[99] ^= 1
			}
		}, exit: exitIntegrity, part: "share"},
		"no share": {change: func(c *corrupt) {
			c.released = func(r *api.Release) { r.Approvals = nil }
		}, exit: exitIntegrity, part: "none is there"},
		"a denial with a deceiving text": {change: func(c *corrupt) {
			c.lists = func(r *api.Request) { r.State, r.Note, r.DecidedBy = recovery.Denied, "no\x1b[2Jway", "alice" }
		}, exit: exitRefused, part: `"no\x1b[2Jway"`},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCorruptRescue(t)
			before := must(os.ReadFile(filepath.Join(c.dir, "disk.img")))
			if x.asked != nil {
				x.asked(c)
				c.rescue(x.exit, x.part)
				if c.filed != nil {
					t.Error("a request was filed")
				}
				if left := filesIn(t, c.home("usb")); left != "" {
					t.Errorf("the rescue left %s", left)
				}
			} else {
				c.rescueApproved()
				x.change(c)
				c.rescue(x.exit, x.part)
			}
			if !bytes.Equal(before, must(os.ReadFile(filepath.Join(c.dir, "disk.img")))) {
				t.Error("the volume was changed")
			}
		})
	}
}

// Root that came by su has the environment of somebody else.
func TestMemoryFolder(t *testing.T) {
	mine := t.TempDir()
	link := filepath.Join(mine, "link")
	if err := os.Symlink(mine, link); err != nil {
		t.Fatal(err)
	}
	uid := os.Geteuid()
	for _, c := range []struct {
		runtime string
		uid     int
		want    string
	}{
		{mine, uid, mine},
		{mine, uid + 1, "/dev/shm"},
		{link, uid + 1, "/dev/shm"},
		{"", 0, "/run"},
		{"", 1000, "/dev/shm"},
		{filepath.Join(mine, "nosuch"), 0, "/run"},
	} {
		if got := memoryFolder(c.runtime, c.uid); got != c.want {
			t.Errorf("%q of %d: %s", c.runtime, c.uid, got)
		}
	}
	if got := memoryFolder(link, uid); got == link {
		t.Error("a link is followed")
	}
}
