package enroll

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/seal"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// each runs a test on an own machine with a volume of each type.
func each(t *testing.T, test func(t *testing.T, m *machine)) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			test(t, newMachine(t, sharedSite(t), typ))
		})
	}
}

// refused sees to it that a run fails and changes neither volume nor journal.
func (m *machine) refused(t *testing.T, j job, want error) {
	t.Helper()
	before := map[string][32]byte{}
	for _, dev := range m.disks {
		before[dev] = image(t, dev)
	}
	journal, _ := os.ReadFile(m.journalPath(0))
	results, err := run(t, j)
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("got %v, %v; want %v", results, err, want)
	}
	for dev, sum := range before {
		if image(t, dev) != sum {
			t.Errorf("%s was changed, although: %v", dev, err)
		}
	}
	if now, _ := os.ReadFile(m.journalPath(0)); !bytes.Equal(now, journal) {
		t.Errorf("the journal was changed, although: %v", err)
	}
}

func TestTwice(t *testing.T) {
	each(t, func(t *testing.T, m *machine) {
		first := mustRun(t, m.job())[0]
		before, sum := m.check(t, true, userSlot, colleagueSlot)[0], image(t, m.disks[0])
		events := len(m.audit(t))
		second := mustRun(t, m.job())[0]
		if first.Already || !second.Already {
			t.Errorf("already enrolled: %t, then %t", first.Already, second.Already)
		}
		if second.Already = false; !reflect.DeepEqual(second, first) {
			t.Errorf("%+v, then %+v", first, second)
		}
		if after := m.check(t, true, userSlot, colleagueSlot)[0]; image(t, m.disks[0]) != sum || !bytes.Equal(after.recovery, before.recovery) {
			t.Error("the second run changed the volume")
		}
		// With a wrong passphrase, or none, there is nothing to do either.
		for _, p := range [][]byte{[]byte("a wrong passphrase"), nil} {
			j := m.job()
			j.Passphrase = p
			if r := mustRun(t, j)[0]; !r.Already || image(t, m.disks[0]) != sum {
				t.Errorf("passphrase %q: %+v", p, r)
			}
		}
		if audit := m.audit(t)[events:]; slices.Contains(audit, "packet.store") || slices.Contains(audit, "packet.verify") {
			t.Errorf("audit log: %v", audit)
		}
	})
}

func TestNoBoot(t *testing.T) {
	each(t, func(t *testing.T, m *machine) {
		j := m.job()
		j.NoBoot = true
		if r := mustRun(t, j)[0]; r.BootSlot != -1 {
			t.Errorf("boot keyslot %d", r.BootSlot)
		}
		m.check(t, false, userSlot, colleagueSlot)
		if exists(m.boot()+"/"+unlock.ConfigFile) || len(m.record(t).Volumes) != 0 {
			t.Error("it is prepared for unattended boot")
		}
		if r := mustRun(t, j)[0]; !r.Already {
			t.Error("not idempotent")
		}
		mustRun(t, m.job())
		m.check(t, true, userSlot, colleagueSlot)
		client := m.client(t, 0)

		r := mustRun(t, j)[0]
		if r.Already || r.BootSlot != -1 {
			t.Errorf("%+v", r)
		}
		m.check(t, false, userSlot, colleagueSlot)
		if exists(m.boot()+"/"+unlock.ConfigFile) || len(m.record(t).Volumes) != 0 {
			t.Error("it still boots unattended")
		}
		if _, err := client.Fetch(t.Context()); !errors.Is(err, unlock.ErrRefused) {
			t.Errorf("the boot program gets %v", err)
		}
	})
}

// TestOtherKindAfterKill: what was begun for unattended boot is wanted without,
// and without the given passphrase.
func TestOtherKindAfterKill(t *testing.T) {
	for _, k := range []int{6, 8} {
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type1)
			j := m.job()
			j.Kill = k
			if _, killed := runKilled(t, j); !killed {
				t.Fatal("not killed")
			}
			j.Kill, j.NoBoot, j.Remove = 0, true, true
			mustRun(t, j)
			m.check(t, false, colleagueSlot)
			if exists(m.boot()+"/"+unlock.ConfigFile) || len(m.record(t).Volumes) != 0 {
				t.Error("it is prepared for unattended boot")
			}
		})
	}
}

func TestRemovePassphrase(t *testing.T) {
	each(t, func(t *testing.T, m *machine) {
		dev := m.disks[0]
		addKey(t, dev, user, user, 4) // twice
		others := []int{colleagueSlot}
		if header(t, dev).Type == luks.Type2 { // and once where cryptsetup looks only when told to
			addKey(t, dev, user, user, 6)
			if err := tool.SetPriority(t.Context(), dev, 6, luks.Ignore); err != nil {
				t.Fatal(err)
			}
		}
		j := m.job()
		j.Remove = true
		o, err := j.options()
		if err != nil {
			t.Fatal(err)
		}
		o.Checkpoint = func(step string) {
			if left := opens(t, dev, user, cryptsetup.AnySlot); left != (step != "removed the passphrase" && step != "journal committed") {
				// The first of the keyslots that is removed leaves the second.
				if step != "removed the passphrase" {
					t.Errorf("at %q the passphrase opens: %t", step, left)
				}
			}
		}
		if _, err := Run(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		s := m.check(t, true, others...)[0]
		if r := mustRun(t, j)[0]; !r.Already {
			t.Error("not idempotent, once the passphrase is gone")
		}
		// A passphrase that came later goes too, with new keyslots of ours.
		addKey(t, dev, s.recovery, user, userSlot)
		j.Token = m.site.token(t)
		mustRun(t, j)
		m.check(t, true, others...)
	})
}

// TestRemoveOurOwn: the recovery passphrase is given as the one to remove.
func TestRemoveOurOwn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	j := m.job()
	mustRun(t, j)
	before := m.check(t, true, userSlot, colleagueSlot)[0]
	j.Passphrase, j.Remove = before.recovery, true
	mustRun(t, j)
	after := m.check(t, true, userSlot, colleagueSlot)[0]
	if bytes.Equal(before.recovery, after.recovery) || opens(t, m.disks[0], before.recovery, cryptsetup.AnySlot) {
		t.Error("it still opens the volume")
	}
}

// TestExactPassphrase: a newline at the end may be part of the passphrase.
func TestExactPassphrase(t *testing.T) {
	for name, c := range map[string]struct {
		slot, file []byte
		want       error
	}{
		"newline is part":     {[]byte("with a newline\n"), []byte("with a newline\n"), nil},
		"newline of the file": {[]byte("without a newline"), []byte("without a newline\n"), nil},
		"of Windows":          {[]byte("without a newline"), []byte("without a newline\r\n"), nil},
		"one of two":          {[]byte("with a newline\n"), []byte("with a newline\n\n"), nil},
		"two of two":          {[]byte("without a newline"), []byte("without a newline\n\n"), cryptsetup.ErrPassphrase},
		"missing":             {[]byte("with a newline\n"), []byte("with a newline"), cryptsetup.ErrPassphrase},
		"binary":              {[]byte("\x00\xff\n\x00 binary \x00"), []byte("\x00\xff\n\x00 binary \x00"), nil},
		"cut at NUL":          {[]byte("binary\x00and more"), []byte("binary"), cryptsetup.ErrPassphrase},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type1)
			addKey(t, m.disks[0], user, c.slot, 1)
			killSlot(t, m.disks[0], c.slot, userSlot)
			j := m.job()
			j.Passphrase, j.Remove = c.file, true
			if c.want != nil {
				m.refused(t, j, c.want)
				return
			}
			mustRun(t, j)
			m.check(t, true, colleagueSlot)
		})
	}
}

func TestAnyKeyslot(t *testing.T) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t))
			dev := disk(t, typ, user, "--key-slot", "5")
			m.disks, m.uuids = []string{dev}, []string{header(t, dev).UUID}
			mustRun(t, m.job())
			m.check(t, true, 5)
		})
	}
}

func TestFull(t *testing.T) {
	each(t, func(t *testing.T, m *machine) {
		dev := m.disks[0]
		for free := header(t, dev).Free(); len(free) > 1; free = header(t, dev).Free() {
			addKey(t, dev, user, fmt.Appendf(nil, "another passphrase %d", free[0]), free[0])
		}
		m.refused(t, m.job(), ErrFull)
		last := header(t, dev).Free()[0]
		j := m.job()
		j.NoBoot = true
		addKey(t, dev, user, []byte("the last passphrase"), last)
		m.refused(t, j, ErrFull)
		if m.asked(t) {
			t.Error("the server was asked")
		}
		killSlot(t, dev, user, last)
		mustRun(t, j) // escrow alone needs one
		var others []int
		ours := m.journal(t, 0).recovery.number
		for _, s := range header(t, dev).Slots {
			if s.Number != ours {
				others = append(others, s.Number)
			}
		}
		m.check(t, false, others...)
		if r := mustRun(t, j)[0]; !r.Already {
			t.Error("a full header is in the way of an enrolment that stands")
		}
	})
}

func TestWrongPassphrase(t *testing.T) {
	each(t, func(t *testing.T, m *machine) {
		j := m.job()
		j.Passphrase = []byte("wrong")
		m.refused(t, j, cryptsetup.ErrPassphrase)
		j.Passphrase = nil
		m.refused(t, j, nil)
		for _, path := range []string{m.root + "/etc/machine-id", m.boot() + "/" + unlock.TLSPrivateKeyFile} {
			if exists(path) {
				t.Errorf("%s was made", path)
			}
		}
		// Two volumes, of which one has another passphrase: neither is changed.
		m.disks = append(m.disks, disk(t, luks.Type1, []byte("of the other")))
		m.uuids = append(m.uuids, header(t, m.disks[1]).UUID)
		j = m.job()
		m.refused(t, j, cryptsetup.ErrPassphrase)
	})
}

func TestNoVolume(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	j := m.job()
	j.Devices = []string{m.root + "/missing"}
	m.refused(t, j, os.ErrNotExist)
	j.Devices = []string{m.root + "/data"}
	if err := os.WriteFile(j.Devices[0], make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	m.refused(t, j, luks.ErrNotLUKS)
	j.Devices = []string{m.disks[0], m.disks[0]}
	m.refused(t, j, nil)
	if exists(m.running()) {
		t.Error("a folder was made")
	}
}

func TestForeignJournals(t *testing.T) {
	t.Parallel()
	site := sharedSite(t)
	m, other := newMachine(t, site, luks.Type1), newMachine(t, site, luks.Type1)
	for _, m := range []*machine{m, other} {
		j := m.job()
		j.Kill = 6 // after the recovery keyslot was added
		if _, killed := runKilled(t, j); !killed {
			t.Fatal("not killed")
		}
	}
	good, err := os.ReadFile(m.journalPath(0))
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(other.journalPath(0))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(good), "\n")
	sealedOf := func(text []byte) string {
		_, sealed, _ := strings.Cut(string(text), "sealed: ")
		return sealed
	}
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"empty":                  {"", record.ErrFormat},
		"cut":                    {string(good[:len(good)/2]), record.ErrFormat},
		"the state is missing":   {strings.Join(slices.Delete(slices.Clone(lines), 3, 4), ""), record.ErrFormat},
		"another state":          {strings.Replace(string(good), "state: prepared", "state: committed", 1), record.ErrFormat},
		"of another volume":      {string(foreign), record.ErrFormat},
		"secrets of another":     {strings.Replace(string(good), sealedOf(good), sealedOf(foreign), 1), seal.ErrRecipient},
		"changed secrets":        {string(good[:len(good)-40]) + flip(good[len(good)-40:]), seal.ErrIntegrity},
		"no recovery keyslot":    {cutLines(lines, "recovery-"), record.ErrFormat},
		"secrets of two, one is": {cutLines(lines, "boot-"), record.ErrFormat},
	} {
		if err := os.WriteFile(m.journalPath(0), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) { m.refused(t, m.job(), c.want) })
	}
	if err := os.WriteFile(m.journalPath(0), good, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m.job())
	m.check(t, true, userSlot, colleagueSlot)
}

// flip changes the first character.
func flip(text []byte) string {
	if text[0] == 'A' {
		return "B" + string(text[1:])
	}
	return "A" + string(text[1:])
}

func cutLines(lines []string, prefix string) string {
	return strings.Join(slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.HasPrefix(l, prefix) }), "")
}

// TestSlotOfSomebodyElse: after the kill somebody removed our keyslots, and
// has their own under those numbers.
func TestSlotOfSomebodyElse(t *testing.T) {
	for _, k := range []int{4, 6, 8} { // before ours, with both, committed at the server
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type1)
			j := m.job()
			j.Kill = k
			if _, killed := runKilled(t, j); !killed {
				t.Fatal("not killed")
			}
			dev, begun := m.disks[0], m.journal(t, 0)
			for _, s := range begun.planned() {
				if _, active := header(t, dev).Slot(s.number); active {
					killSlot(t, dev, user, s.number)
				}
			}
			taken := begun.boot.number
			theirs := []byte("somebody else's passphrase")
			addKey(t, dev, user, theirs, taken)
			j.Kill = 0
			mustRun(t, j)
			m.check(t, true, userSlot, colleagueSlot, taken)
			if !opens(t, dev, theirs, taken) {
				t.Error("their passphrase opens no more")
			}
		})
	}
}

// TestChangedSlots: an enrolment stands in the journal, but not on the volume.
func TestChangedSlots(t *testing.T) {
	for _, which := range []string{"boot", "recovery"} {
		t.Run(which, func(t *testing.T) {
			each(t, func(t *testing.T, m *machine) {
				mustRun(t, m.job())
				before, dev := m.journal(t, 0), m.disks[0]
				changed := before.boot.number
				if which == "recovery" {
					changed = before.recovery.number
				}
				killSlot(t, dev, user, changed)
				j := m.job()
				j.Passphrase = []byte("wrong")
				m.refused(t, j, cryptsetup.ErrPassphrase)
				theirs := []byte("somebody else's passphrase")
				addKey(t, dev, user, theirs, changed)
				mustRun(t, m.job())
				m.check(t, true, userSlot, colleagueSlot, changed)
				if !opens(t, dev, theirs, changed) {
					t.Error("their passphrase opens no more")
				}
			})
		})
	}
}

// TestTokensOfAnotherSystem: another installation on the same disk marks its
// keyslots as we do; its marks stay.
func TestTokensOfAnotherSystem(t *testing.T) {
	t.Parallel()
	site := sharedSite(t)
	m, other := newMachine(t, site, luks.Type2), newMachine(t, site)
	other.disks, other.uuids = m.disks, m.uuids
	mustRun(t, other.job())
	theirs := other.journal(t, 0)
	j := m.job()
	j.Kill = 8
	if _, killed := runKilled(t, j); !killed {
		t.Fatal("not killed")
	}
	j.Kill = 0
	mustRun(t, j)
	marked := 0
	for _, token := range header(t, m.disks[0]).Tokens {
		if strings.Contains(string(token.JSON), theirs.packet) {
			marked += len(token.Keyslots)
		}
	}
	if marked != 2 {
		t.Errorf("%d keyslots of the other system are marked", marked)
	}
	if r := mustRun(t, other.job())[0]; !r.Already {
		t.Error("the other system's enrolment does not stand any more")
	}
}

// TestLabel: any disk can have any label. What our reader takes is escrowed,
// in one spelling; the rest is refused with nothing changed.
func TestLabel(t *testing.T) {
	for name, c := range map[string]struct {
		label, want string
		err         error
	}{
		"plain":   {"system", "system", nil},
		"blanks":  {" x ", `" x "`, nil},
		"control": {"evil\x1b[2J\nlabel", "", luks.ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type2)
			cryptsetupRun(t, nil, "config", "--label", c.label, m.disks[0])
			if c.err != nil {
				m.refused(t, m.job(), c.err)
				return
			}
			mustRun(t, m.job())
			m.check(t, true, userSlot, colleagueSlot)
			entries := m.site.entries(t, identityOf(t, m.boot()).Key.KeyID(), m.uuids[0])
			if got := entries[escrow.Verified][0].Volume.Label; got != c.want {
				t.Errorf("label %q, want %q", got, c.want)
			}
		})
	}
}

// TestStrangePath: what unlock.conf cannot hold is refused before anything is
// changed.
func TestStrangePath(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	strange := m.root + "/disk\nvolume-digest: 00"
	if err := os.Rename(m.disks[0], strange); err != nil {
		t.Fatal(err)
	}
	m.disks[0] = strange
	m.refused(t, m.job(), nil)
	if m.asked(t) {
		t.Error("the server was asked")
	}
}
