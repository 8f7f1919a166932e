package enroll

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/config"
	"mandos-escrow/luks"
)

func TestMachineID(t *testing.T) {
	t.Parallel()
	const id = "00112233445566778899aabbccddeeff"
	for name, c := range map[string]struct {
		text string
		kept bool
	}{
		"absent":        {"", false},
		"empty":         {"\n", false},
		"uninitialized": {"uninitialized\n", false},
		"there":         {id + "\n", true},
		"no newline":    {id, true},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "machine-id")
			if c.text != "" {
				if err := os.WriteFile(path, []byte(c.text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			first, err := machineID(path)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if kept := string(text) == c.text; kept != c.kept || len(strings.TrimSpace(string(text))) != 32 {
				t.Errorf("machine-id %q", text)
			}
			if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o444 != 0o444 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			if second, err := machineID(path); err != nil || second != first || strings.Contains(first, strings.TrimSpace(string(text))) {
				t.Errorf("%s, then %s, %v", first, second, err)
			}
			if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
}

// TestMachineIDReadOnly: one that cannot be read or made stops everything.
func TestMachineIDReadOnly(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	if err := os.Mkdir(m.root+"/etc/machine-id", 0o755); err != nil {
		t.Fatal(err)
	}
	m.refused(t, m.job(), nil)
	if m.asked(t) {
		t.Error("the server was asked")
	}
	// There and readable is enough, also in a file that nobody may write.
	if err := os.Remove(m.root + "/etc/machine-id"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.root+"/etc/machine-id", []byte("00112233445566778899aabbccddeeff\n"), 0o444); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m.job())
	m.check(t, true, userSlot, colleagueSlot)
}

func TestHostname(t *testing.T) {
	t.Parallel()
	kernel, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"newhost\n":                  "newhost",
		"# a comment\n\n newhost \n": "newhost",
		"":                           kernel,
		"# nothing\n":                kernel,
	} {
		root := t.TempDir()
		if err := os.Mkdir(root+"/etc", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(root+"/etc/hostname", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := hostname(root); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	m := newMachine(t, sharedSite(t), luks.Type1)
	if err := os.WriteFile(m.root+"/etc/hostname", []byte("of-the-new-system\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	j := m.job()
	j.Name = ""
	mustRun(t, j)
	if got := m.record(t).Name; got != "of-the-new-system" {
		t.Errorf("enrolled as %q", got)
	}
	if err := os.WriteFile(m.root+"/etc/hostname", []byte("evil\x1b[2J\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	mustRun(t, j) // the name of the first enrolment stays
	if got := m.record(t).Name; got != "of-the-new-system" {
		t.Errorf("enrolled again as %q", got)
	}
	j.Name = "payroll-server"
	m.refused(t, j, ErrName)
	other := newMachine(t, sharedSite(t), luks.Type1)
	if err := os.WriteFile(other.root+"/etc/hostname", []byte("evil\x1b[2J\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	j = other.job()
	j.Name = ""
	other.refused(t, j, nil)
}

func TestModes(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	for _, dir := range []string{m.boot(), m.running()} {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err == nil && info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s has mode %v", path, info.Mode())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if exists(m.boot()+"/lock") || !exists(m.running()+"/lock") {
		t.Error("the lock does not lie with the running identity")
	}
}

// TestWaitEnds: waiting for another enrolment can be broken off.
func TestWaitEnds(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	if err := os.MkdirAll(m.running(), 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := config.Lock(m.running() + "/lock")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	o, err := m.job().options()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	o.Progress = func(string, ...any) { cancel() }
	if _, err := Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestCancelled: Ctrl-C at a checkpoint is like a kill.
func TestCancelled(t *testing.T) {
	t.Parallel()
	for _, k := range []int{2, 5, 7} {
		m := newMachine(t, sharedSite(t), luks.Type1)
		o, err := m.job().options()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		o.Checkpoint = func(string) {
			if n++; n == k {
				cancel()
			}
		}
		if _, err := Run(ctx, o); !errors.Is(err, context.Canceled) {
			t.Errorf("at %d: %v", k, err)
		}
		mustRun(t, m.job())
		m.check(t, true, userSlot, colleagueSlot)
	}
}

// TestBrokenCryptsetup: a keyslot that cannot be tried for another reason than
// its passphrase is not taken for somebody else's.
func TestBrokenCryptsetup(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	j := m.job()
	j.Kill = 6
	if _, killed := runKilled(t, j); !killed {
		t.Fatal("not killed")
	}
	j.Kill, j.Cryptsetup = 0, filepath.Join(t.TempDir(), "broken")
	script := "#!/bin/sh\ncase \"$*\" in *--key-slot*) echo busy >&2; exit 5;; esac\nexec cryptsetup \"$@\"\n"
	if err := os.WriteFile(j.Cryptsetup, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	before := image(t, m.disks[0])
	if _, err := run(t, j); !errors.As(err, &exit) || image(t, m.disks[0]) != before {
		t.Errorf("got %v", err)
	}
	j.Cryptsetup = ""
	mustRun(t, j)
	m.check(t, true, userSlot, colleagueSlot)
}

// TestNothingLiesAbout: neither during an enrolment nor afterwards does a
// secret stand in the server's store, its log, or the machine's files.
func TestNothingLiesAbout(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m := newMachine(t, s, luks.Type1, luks.Type2)
	o, err := m.job().options()
	if err != nil {
		t.Fatal(err)
	}
	o.RemovePassphrase = true
	var seen [][]byte
	o.Checkpoint = func(string) { // what is found out at the end must not have stood there before
		for i := range m.disks {
			if journal, err := os.ReadFile(m.journalPath(i)); err == nil {
				seen = append(seen, journal)
			}
		}
	}
	var said strings.Builder
	o.Progress = func(format string, args ...any) { said.WriteString(sprint(format, args)) }
	if _, err := Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	secrets := map[string][]byte{"user's passphrase": user, "colleague's passphrase": colleague}
	for i, v := range m.check(t, true, colleagueSlot) {
		at := string(rune('0' + i))
		secrets["boot "+at], secrets["recovery "+at], secrets["volume key "+at] = v.boot, v.recovery, v.volumeKey
		groups := strings.ReplaceAll(string(v.recovery), "-", "")
		secrets["recovery digits "+at] = []byte(groups)
	}
	if len(seen) < 12 {
		t.Errorf("%d journals seen", len(seen))
	}
	id := identityOf(t, m.boot()).Key.KeyID()
	if n := len(s.entries(t, id, m.uuids[0])[escrow.Verified]); n != 1 {
		t.Errorf("%d packets", n)
	}
	s.stop()
	spill(t, secrets, []string{s.dir, m.root}, append(seen, s.log.bytes(), []byte(said.String()))...)
}
