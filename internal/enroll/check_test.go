package enroll

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

// program is a shell script in place of the boot program.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mandos-escrow-unlock")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestFetch: what the boot program says and how it ends.
func TestFetch(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, script string
		want         error
		says         string
	}{
		{"refused", "echo refused by all >&2; exit 7", unlock.ErrRefused, "refused by all"},
		{"damaged", "echo one >&2; echo two >&2; exit 5", unlock.ErrConfig, "one; two"},
		{"another volume", "exit 4", luks.ErrMismatch, ""},
		{"no server", "echo nobody there >&2; exit 1", nil, "nobody there"},
		{"fails after it printed", "printf secret; exit 1", nil, "exit status 1"},
		{"nothing", "exit 0", nil, "no passphrase"},
		{"too much", "head -c 5000 /dev/zero", nil, "more than a passphrase"},
	} {
		passphrase, err := CheckOptions{Root: "/root", Program: program(t, c.script)}.fetch(t.Context(), "uuid")
		if err == nil || passphrase != nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	got, err := CheckOptions{Root: "/root", Program: program(t, `echo "$@"; env`)}.fetch(t.Context(), "uuid")
	if err != nil || !bytes.HasPrefix(got, []byte("--config /root/etc/mandos-escrow --print --once --volume uuid\n")) || bytes.Contains(got, []byte("HOME=")) {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := (CheckOptions{Program: t.TempDir() + "/missing"}).fetch(t.Context(), "uuid"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
}

// TestCheckBoot: what is fetched has to open the very keyslot that is ours.
func TestCheckBoot(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), types...)
	o := CheckOptions{Root: m.root, Tool: tool, Program: program(t, "cat ${0%/*}/$6")}
	if _, err := CheckBoot(t.Context(), o); err == nil || !strings.Contains(err.Error(), "no volume is enrolled") {
		t.Errorf("nothing enrolled: %v", err)
	}
	mustRun(t, m.job())
	secrets := m.check(t, true, userSlot, colleagueSlot)
	fetched := func(i int, passphrase []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(filepath.Dir(o.Program), m.uuids[i]), passphrase, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	holds := func(want ...bool) {
		t.Helper()
		checks, err := CheckBoot(t.Context(), o)
		if err != nil || len(checks) != len(want) {
			t.Fatalf("%+v, %v", checks, err)
		}
		for i, c := range checks {
			if c.OK != want[i] || c.OK != (c.Err == nil) || strings.Contains(c.Detail, string(secrets[0].boot)) {
				t.Errorf("check %d: %+v", i, c)
			}
		}
	}
	fetched(0, secrets[0].boot)
	fetched(1, secrets[1].boot)
	holds(true, true, true, true)
	fetched(0, user) // opens the volume, by another keyslot
	holds(true, false, true, true)
	fetched(0, secrets[1].boot)
	holds(true, false, true, true)
	fetched(0, secrets[0].boot)
	if err := os.Rename(m.disks[1], m.disks[1]+".moved"); err != nil {
		t.Fatal(err)
	}
	holds(true, true, true, false)
	if err := os.Rename(m.disks[1]+".moved", m.disks[1]); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(m.journalPath(0)); err != nil {
		t.Fatal(err)
	}
	holds(true, false, true, true)
}
