package enroll

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/api"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

var next = []byte("the passphrase that comes next 5530")

// leave is the job that takes a machine back.
func (m *machine) leave() job { return job{Unenroll: true, Root: m.root} }

func unenroll(t *testing.T, j job) (Unenrolled, error) {
	t.Helper()
	return Unenroll(t.Context(), j.unenrolling())
}

func mustUnenroll(t *testing.T, j job) Unenrolled {
	t.Helper()
	r, err := unenroll(t, j)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// enrolled is a machine of which every secret is known.
func enrolled(t *testing.T, s *site, types ...string) (*machine, identity.KeyID, []secrets) {
	t.Helper()
	m := newMachine(t, s, types...)
	mustRun(t, m.job())
	if err := os.WriteFile(filepath.Join(m.root, "image"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return m, identityOf(t, m.boot()).Key.KeyID(), m.check(t, true, userSlot, colleagueSlot)
}

// gone sees to it that nothing of ours is left on the machine, that the given
// keyslots of others are, and that the server gives it nothing.
func (m *machine) gone(t *testing.T, id identity.KeyID, told bool, before []secrets, others ...int) {
	t.Helper()
	for _, path := range []string{m.boot(), m.running(), filepath.Join(m.root, "image")} {
		if exists(path) {
			t.Errorf("%s is left", path)
		}
	}
	for i, dev := range m.disks {
		h := header(t, dev)
		var active []int
		for _, s := range h.Slots {
			active = append(active, s.Number)
		}
		if !slices.Equal(active, others) {
			t.Errorf("keyslots %v are active, want %v", active, others)
		}
		for _, token := range h.Tokens {
			if token.Type == TokenType {
				t.Errorf("token %s is left", token.JSON)
			}
		}
		if h.Type == luks.Type2 && slices.Contains(others, colleagueSlot) && len(h.Tokens) != 1 {
			t.Errorf("tokens %v", h.Tokens)
		}
		for what, passphrase := range map[string][]byte{"boot": before[i].boot, "recovery": before[i].recovery} {
			if opens(t, dev, passphrase, cryptsetup.AnySlot) {
				t.Errorf("the %s passphrase still opens %s", what, dev)
			}
		}
		if n := len(m.site.entries(t, id, m.uuids[i])[escrow.Verified]); n != 1 {
			t.Errorf("the server has %d packets of volume %d", n, i)
		}
	}
	m.atServer(t, id, told)
}

func (m *machine) atServer(t *testing.T, id identity.KeyID, told bool) {
	t.Helper()
	err := m.site.state.Store.View(func(tx *store.Tx) error {
		r, err := tx.Machine(id)
		if err != nil {
			return err
		}
		if r.Enabled == told || r.Unenrolled.IsZero() == told || (len(r.Volumes) == 0) != told {
			t.Errorf("told %t, and the server has %+v", told, r)
		}
		for _, uuid := range m.uuids {
			if _, err := tx.Blob(id, uuid); errors.Is(err, store.ErrNotFound) != told {
				t.Errorf("told %t, blob: %v", told, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestUnenroll: without any passphrase where somebody else's keyslot stays, and
// with it. A second run finds nothing.
func TestUnenroll(t *testing.T) {
	for _, typ := range types {
		for how, passphrase := range map[string][]byte{"alone": nil, "passphrase": user, "newline": append(slices.Clone(user), '\n')} {
			t.Run(typ+"-"+how, func(t *testing.T) {
				t.Parallel()
				m, id, before := enrolled(t, sharedSite(t), typ)
				j := m.leave()
				j.Passphrase = passphrase
				r := mustUnenroll(t, j)
				m.gone(t, id, true, before, userSlot, colleagueSlot)
				if r.Already || r.Machine != "laptop" || r.KeyID != id || len(r.Kept) != 0 ||
					len(r.Servers) != 1 || !r.Servers[0].Told || r.Servers[0].Unknown || r.Servers[0].Packets != 1 {
					t.Errorf("%+v", r)
				}
				v := r.Volumes[0]
				slices.Sort(v.Removed)
				if slices.Sort(before[0].slots); !slices.Equal(v.Removed, before[0].slots) || v.NewSlot != -1 || v.Doubtful != nil {
					t.Errorf("%+v", v)
				}
				if again := mustUnenroll(t, j); !again.Already {
					t.Errorf("again: %+v", again)
				}
			})
		}
	}
}

// TestUnenrollThenEnroll: a machine that left enrolls as a new one, and nobody
// is alarmed.
func TestUnenrollThenEnroll(t *testing.T) {
	t.Parallel()
	m, id, _ := enrolled(t, sharedSite(t), luks.Type2)
	mustUnenroll(t, m.leave())
	m.token = m.site.token(t)
	mustRun(t, m.job())
	m.check(t, true, userSlot, colleagueSlot)
	if again := identityOf(t, m.boot()).Key.KeyID(); again == id {
		t.Error("it is the same machine")
	}
	if actions := m.audit(t); slices.Contains(actions, "alarm.fork") {
		t.Errorf("audit: %v", actions)
	}
}

// onlyOurs removes every keyslot that is not ours.
func (m *machine) onlyOurs(t *testing.T, before []secrets) {
	t.Helper()
	for i, dev := range m.disks {
		killSlot(t, dev, before[i].recovery, userSlot)
		killSlot(t, dev, before[i].recovery, colleagueSlot)
	}
}

// TestLastWayIn: where nothing but ours opens the volume, nothing happens
// without a new passphrase, and nothing is removed before that is proved.
func TestLastWayIn(t *testing.T) {
	for _, typ := range types {
		for _, how := range []string{"boot passphrase", "recovery passphrase"} {
			t.Run(typ+"-"+how, func(t *testing.T) {
				t.Parallel()
				m, id, before := enrolled(t, sharedSite(t), typ)
				m.onlyOurs(t, before)
				j := m.leave()
				if how == "recovery passphrase" {
					j.Passphrase = before[0].recovery
				}
				disk := image(t, m.disks[0])
				if _, err := unenroll(t, j); !errors.Is(err, ErrLastWay) || image(t, m.disks[0]) != disk {
					t.Fatalf("got %v", err)
				}
				m.atServer(t, id, false)
				j.New, j.Cryptsetup = next, quick(t)
				r := mustUnenroll(t, j)
				if !opens(t, m.disks[0], next, r.Volumes[0].NewSlot) {
					t.Error("the new passphrase does not open the volume")
				}
				m.gone(t, id, true, before, r.Volumes[0].NewSlot)
			})
		}
	}
}

// TestLastWayInRefused: what may not be taken for a way in, and what cannot
// make one.
func TestLastWayInRefused(t *testing.T) {
	t.Parallel()
	m, id, before := enrolled(t, sharedSite(t), luks.Type2)
	m.onlyOurs(t, before)
	dev := m.disks[0]
	disk := image(t, dev)
	j := m.leave()
	j.New, j.Cryptsetup = next, quick(t)
	for name, change := range map[string]func(*job){
		"off line, nobody gives the boot passphrase": func(j *job) { j.Offline = true },
		"a wrong passphrase":                         func(j *job) { j.Passphrase = []byte("wrong") },
		"a machine that is disabled": func(*job) {
			m.site.local(t, "POST", "/v1/machines", api.Change{Machines: []string{string(id)}, Enable: new(bool)}, nil)
		},
	} {
		refused := j
		change(&refused)
		if _, err := unenroll(t, refused); err == nil || image(t, dev) != disk {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// our own keyslot, damaged, is not somebody's way in
	boot, err := luks.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	slot, _ := boot.Slot(m.journal(t, 0).boot.number)
	spoil(t, dev, slot.Offset+100)
	disk = image(t, dev)
	if _, err := unenroll(t, m.leave()); !errors.Is(err, ErrLastWay) || image(t, dev) != disk {
		t.Errorf("a damaged keyslot: %v", err)
	}
	j.Passphrase = before[0].recovery
	r := mustUnenroll(t, j)
	if d := r.Volumes[0].Doubtful; len(d) != 1 || d[0].Slot != slot.Number {
		t.Errorf("left %+v", d)
	}
	m.site.local(t, "GET", "/v1/machines", nil, nil)
	if !opens(t, dev, next, r.Volumes[0].NewSlot) || opens(t, dev, before[0].recovery, cryptsetup.AnySlot) {
		t.Errorf("%+v", r)
	}
	for _, token := range header(t, dev).Tokens {
		if token.Type == TokenType {
			t.Errorf("token %s is left", token.JSON)
		}
	}
}

// TestSlotsOfASystemBefore: the keyslots of an enrolment whose journal is gone, as
// after the system was installed anew, are nobody's way in.
func TestSlotsOfASystemBefore(t *testing.T) {
	t.Parallel()
	m, _, _ := enrolled(t, sharedSite(t), luks.Type2)
	for _, folder := range []string{m.boot(), m.running()} {
		if err := os.RemoveAll(folder); err != nil {
			t.Fatal(err)
		}
	}
	m.token = m.site.token(t)
	j := m.job()
	j.Remove = true
	mustRun(t, j)
	dev := m.disks[0]
	killSlot(t, dev, m.fetch(t, 0), colleagueSlot)
	state, err := Inspect(m.root)
	if err != nil || len(state.Volumes) != 1 || len(state.Volumes[0].Others) != 0 {
		t.Errorf("%+v, %v", state, err)
	}
	disk := image(t, dev)
	if _, err := unenroll(t, m.leave()); !errors.Is(err, ErrLastWay) || image(t, dev) != disk {
		t.Fatalf("got %v", err)
	}
	out := m.leave()
	out.New, out.Cryptsetup = next, quick(t)
	r := mustUnenroll(t, out)
	if !opens(t, dev, next, r.Volumes[0].NewSlot) {
		t.Errorf("%+v", r)
	}
}

func spoil(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// TestSomebodyElsesSlot: a keyslot that was ours and has another passphrase by
// now is named and left alone; its new owner opens it afterwards.
func TestSomebodyElsesSlot(t *testing.T) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			m, id, before := enrolled(t, sharedSite(t), typ)
			theirs := m.journal(t, 0).boot.number
			killSlot(t, m.disks[0], user, theirs)
			addKey(t, m.disks[0], user, next, theirs)
			r := mustUnenroll(t, m.leave())
			if d := r.Volumes[0].Doubtful; len(d) != 1 || d[0].Slot != theirs || d[0].Why == "" {
				t.Errorf("left %+v", d)
			}
			others := []int{userSlot, theirs, colleagueSlot}
			slices.Sort(others)
			m.gone(t, id, true, before, others...)
			if !opens(t, m.disks[0], next, theirs) {
				t.Error("their passphrase opens no more")
			}
		})
	}
}

// TestOffline: without the server nothing happens, unless that is meant; the
// server then still has everything.
func TestOffline(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m, id, before := enrolled(t, s, luks.Type2)
	s.stop()
	disk := image(t, m.disks[0])
	if _, err := unenroll(t, m.leave()); !errors.Is(err, api.ErrUnreachable) || image(t, m.disks[0]) != disk {
		t.Fatalf("got %v", err)
	}
	j := m.leave()
	j.Offline = true
	r := mustUnenroll(t, j)
	if len(r.Servers) != 1 || r.Servers[0].Told || r.Servers[0].Name != "srv1" {
		t.Errorf("%+v", r.Servers)
	}
	s.start(t)
	m.gone(t, id, false, before, userSlot, colleagueSlot)
}

// TestUnenrollUnknown: a server that removed the machine has nothing to be told.
func TestUnenrollUnknown(t *testing.T) {
	t.Parallel()
	m, id, _ := enrolled(t, sharedSite(t), luks.Type1)
	m.site.local(t, "POST", "/v1/machines", api.Change{Machines: []string{string(id)}, Remove: true}, nil)
	if r := mustUnenroll(t, m.leave()); !r.Servers[0].Told || !r.Servers[0].Unknown {
		t.Errorf("%+v", r.Servers)
	}
}

// TestUnenrollNoBoot: a volume that is only escrowed is found where its journal
// says, and its server too.
func TestUnenrollNoBoot(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	j := m.job()
	j.NoBoot = true
	mustRun(t, j)
	id, before := identityOf(t, m.boot()).Key.KeyID(), m.check(t, false, userSlot, colleagueSlot)
	before[0].boot = before[0].recovery
	mustUnenroll(t, m.leave())
	m.site.local(t, "GET", "/v1/machines", nil, nil)
	if len(header(t, m.disks[0]).Slots) != 2 || exists(m.boot()) || exists(m.running()) {
		t.Error("something is left")
	}
	if r := m.state(t, id); r.Unenrolled.IsZero() {
		t.Errorf("%+v", r)
	}
}

func (m *machine) state(t *testing.T, id identity.KeyID) (r unlock.Machine) {
	t.Helper()
	err := m.site.state.Store.View(func(tx *store.Tx) (err error) {
		r, err = tx.Machine(id)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestVolumeElsewhere: a volume that moved is named, given up, or stops it all.
func TestVolumeElsewhere(t *testing.T) {
	t.Parallel()
	m, id, before := enrolled(t, sharedSite(t), luks.Type1, luks.Type2)
	moved := m.disks[1] + ".moved"
	if err := os.Rename(m.disks[1], moved); err != nil {
		t.Fatal(err)
	}
	first := image(t, m.disks[0])
	j := m.leave()
	for name, change := range map[string]func(*job){
		"not there":             func(*job) {},
		"another volume forgot": func(j *job) { j.Forget = []string{m.uuids[0]} },
		"an unknown one forgot": func(j *job) { j.Forget = []string{m.uuids[1], "nosuch"} },
		"a device of nobody": func(j *job) {
			j.Forget, j.Locate = []string{m.uuids[1]}, []string{disk(t, luks.Type1, user)}
		},
	} {
		refused := j
		change(&refused)
		if _, err := unenroll(t, refused); err == nil || image(t, m.disks[0]) != first {
			t.Errorf("%s: got %v", name, err)
		}
	}
	m.atServer(t, id, false)
	j.Locate = []string{moved}
	mustUnenroll(t, j)
	m.disks[1] = moved
	m.gone(t, id, true, before, userSlot, colleagueSlot)

	lost, _, _ := enrolled(t, sharedSite(t), luks.Type1, luks.Type2)
	if err := os.Remove(lost.disks[1]); err != nil {
		t.Fatal(err)
	}
	j = lost.leave()
	j.Forget = lost.uuids[1:]
	r := mustUnenroll(t, j)
	if len(r.Volumes) != 2 || !r.Volumes[0].Given && !r.Volumes[1].Given || len(header(t, lost.disks[0]).Slots) != 2 || exists(lost.running()) {
		t.Errorf("%+v", r)
	}
}

// TestEnrollAfterHalf: who changes their mind after an interrupted unenrolment is
// told that the machine stays disabled.
func TestEnrollAfterHalf(t *testing.T) {
	t.Parallel()
	m, id, _ := enrolled(t, sharedSite(t), luks.Type2)
	j := m.leave()
	j.Kill = 1 // the servers were told
	if steps, killed := runKilled(t, j); !killed || steps[0] != "told the servers" {
		t.Fatalf("%v, %t", steps, killed)
	}
	o, err := m.job().options()
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	o.Progress = func(format string, args ...any) { said = append(said, sprint(format, args)) }
	if _, err := Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if r := m.state(t, id); r.Enabled || r.DisabledBecause != unlock.SelfUnenrolled {
		t.Errorf("%+v", r)
	}
	want := "srv1 has this machine disabled (" + unlock.SelfUnenrolled + ")"
	if text := strings.Join(said, "\n"); strings.Count(text, want) != 1 || !strings.Contains(text, "machine enable "+string(id)) {
		t.Errorf("it says %s", text)
	}
}

// TestStrangeRoot: a root with signs in its name that mean something in patterns.
func TestStrangeRoot(t *testing.T) {
	t.Parallel()
	m, id, before := enrolled(t, sharedSite(t), luks.Type2)
	strange := filepath.Join(t.TempDir(), "new [1]*")
	if err := os.Rename(m.root, strange); err != nil {
		t.Fatal(err)
	}
	m.root = strange
	if state, err := Inspect(m.root); err != nil || len(state.Volumes) != 1 {
		t.Errorf("%+v, %v", state, err)
	}
	mustUnenroll(t, m.leave())
	m.gone(t, id, true, before, userSlot, colleagueSlot)
}

// TestFilesOfOthers: what an administrator put beside our files stays.
func TestFilesOfOthers(t *testing.T) {
	t.Parallel()
	m, _, _ := enrolled(t, sharedSite(t), luks.Type1)
	hooks := filepath.Join(m.boot(), "network-hooks.d")
	if err := os.Mkdir(hooks, 0o700); err != nil {
		t.Fatal(err)
	}
	o := m.leave().unenrolling()
	o.Image = nil
	r, err := Unenroll(t.Context(), o)
	if err != nil || !slices.Equal(r.Kept, []string{hooks}) || !exists(hooks) || exists(m.boot()+"/"+unlock.ConfigFile) || exists(m.running()) {
		t.Errorf("%+v, %v", r, err)
	}
	if again := mustUnenroll(t, m.leave()); !again.Already {
		t.Errorf("%+v", again)
	}
}

// TestNeverEnrolled: nothing is made in order to take nothing back.
func TestNeverEnrolled(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if r := mustUnenroll(t, job{Unenroll: true, Root: root}); !r.Already {
		t.Errorf("%+v", r)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
	if _, err := unenroll(t, job{Unenroll: true, Root: root + "/missing"}); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

// TestImageFails: the boot image cannot be made anew; a later run ends it.
func TestImageFails(t *testing.T) {
	t.Parallel()
	m, id, before := enrolled(t, sharedSite(t), luks.Type2)
	o := m.leave().unenrolling()
	broken := errors.New("no space in /boot")
	o.Image = func(context.Context) error { return broken }
	if _, err := Unenroll(t.Context(), o); !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
	mustUnenroll(t, m.leave())
	m.gone(t, id, true, before, userSlot, colleagueSlot)
}

// TestUnenrollInterrupted: an enrolment that was killed is taken back, not only a finished one.
func TestUnenrollInterrupted(t *testing.T) {
	for _, typ := range types {
		for k := 1; k <= checkpoints[typ]; k += 2 {
			t.Run(name(typ, k), func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, sharedSite(t), typ)
				j := m.job()
				j.Kill = k
				if _, killed := runKilled(t, j); !killed {
					t.Fatal("not killed")
				}
				mustUnenroll(t, m.leave())
				h := header(t, m.disks[0])
				if len(h.Slots) != 2 || exists(m.boot()) || exists(m.running()) || slices.ContainsFunc(h.Tokens, func(t luks.Token) bool { return t.Type == TokenType }) {
					t.Errorf("left: %d keyslots, tokens %v", len(h.Slots), h.Tokens)
				}
			})
		}
	}
}

// TestUnenrollKilledAnywhere: killed at any checkpoint of the keyslots, and at
// every fourth of the files, and run again, it comes to its end, with a way in at
// every moment. The machine is put back for each.
func TestUnenrollKilledAnywhere(t *testing.T) {
	for _, typ := range types {
		for _, only := range []bool{false, true} {
			how := map[bool]string{false: "others", true: "only-ours"}[only]
			t.Run(typ+"-"+how, func(t *testing.T) {
				t.Parallel()
				m, id, before := enrolled(t, sharedSite(t), typ)
				j, way := m.leave(), user
				j.Cryptsetup = quick(t)
				if only {
					m.onlyOurs(t, before)
					j.Passphrase, j.New, way = before[0].recovery, next, next
				}
				restore := m.snapshot(t)
				steps, _ := runKilled(t, j)
				for k, step := range steps {
					if step == "removed a file" && k%4 != 0 {
						continue
					}
					restore()
					j.Kill = k + 1
					if reached, killed := runKilled(t, j); !killed || len(reached) != k+1 {
						t.Fatalf("killed %t after %v", killed, reached)
					}
					if !opens(t, m.disks[0], way, cryptsetup.AnySlot) && !opens(t, m.disks[0], before[0].recovery, cryptsetup.AnySlot) {
						t.Fatalf("after %s nobody gets in", step)
					}
					again := j
					if again.Kill = 0; !opens(t, m.disks[0], before[0].recovery, cryptsetup.AnySlot) {
						again.Passphrase = nil
					}
					mustUnenroll(t, again)
					others := []int{userSlot, colleagueSlot}
					if only {
						if others = others[:1]; !opens(t, m.disks[0], next, userSlot) {
							t.Errorf("after %s the new passphrase does not open", step)
						}
					}
					m.gone(t, id, true, before, others...)
				}
				if last := steps[len(steps)-1]; last != "removed a file" || !slices.Contains(steps, "boot image") || slices.Contains(steps, "added the new passphrase") != only {
					t.Errorf("checkpoints %v", steps)
				}
			})
		}
	}
}

// quick is a cryptsetup that stretches no passphrase.
func quick(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "quick")
	script := "#!/bin/sh\ncase \"$*\" in *--pbkdf*) ;; luksAddKey*) shift; set -- luksAddKey --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \"$@\";; esac\nexec cryptsetup \"$@\"\n"
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// snapshot keeps a machine's files and volumes, and returns what puts them back.
func (m *machine) snapshot(t *testing.T) (restore func()) {
	t.Helper()
	saved := t.TempDir()
	cp := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
	}
	cp(m.root+"/.", filepath.Join(saved, "root"))
	cp(m.disks[0], filepath.Join(saved, "disk"))
	return func() {
		t.Helper()
		cp(filepath.Join(saved, "root")+"/.", m.root)
		cp(filepath.Join(saved, "disk"), m.disks[0])
	}
}

// TestUnenrollServerKnowsFirst: at the moment at which the first keyslot goes,
// the server gives nothing any more, and every volume has another way in.
func TestUnenrollServerKnowsFirst(t *testing.T) {
	t.Parallel()
	m, id, _ := enrolled(t, sharedSite(t), luks.Type1, luks.Type2)
	o := m.leave().unenrolling()
	var steps []string
	o.Checkpoint = func(step string) {
		if steps = append(steps, step); step == "removed a keyslot" {
			m.atServer(t, id, true)
		}
	}
	if _, err := Unenroll(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if slices.Index(steps, "told the servers") != 0 || slices.Index(steps, "boot image") < slices.Index(steps, "removed a file") {
		t.Errorf("%v", steps)
	}
}

// TestUnenrollWithoutIdentity: who lost the running identity can tell nobody,
// and must say that this is meant.
func TestUnenrollWithoutIdentity(t *testing.T) {
	t.Parallel()
	m, id, before := enrolled(t, sharedSite(t), luks.Type1)
	if err := config.Remove(m.running() + "/" + unlock.TLSPrivateKeyFile); err != nil {
		t.Fatal(err)
	}
	disk := image(t, m.disks[0])
	if _, err := unenroll(t, m.leave()); !errors.Is(err, fs.ErrNotExist) || image(t, m.disks[0]) != disk {
		t.Errorf("got %v", err)
	}
	j := m.leave()
	j.Offline = true
	mustUnenroll(t, j)
	m.gone(t, id, false, before, userSlot, colleagueSlot)
}
