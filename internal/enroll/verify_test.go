package enroll

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"mandos-escrow/escrow"
	"mandos-escrow/luks"
	"mandos-escrow/store"
)

// verified verifies the machine's one volume.
func verified(t *testing.T, m *machine, o VerifyOptions) Verified {
	t.Helper()
	o.Root, o.Tool = m.root, tool
	if o.Progress == nil {
		o.Progress = func(string, ...any) {}
	}
	results, err := Verify(t.Context(), o)
	if err != nil || len(results) != 1 {
		t.Fatalf("%+v, %v", results, err)
	}
	return results[0]
}

// headerFile copies a volume's header, or puts it back.
func headerFile(t *testing.T, what, dev, file string) {
	t.Helper()
	out, err := exec.Command("cryptsetup", what, "-q", "--header-backup-file", file, dev).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", what, err, out)
	}
}

// wipeHeader writes zeros over all that a header may take.
func wipeHeader(t *testing.T, dev string) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 16<<20), 0); err != nil {
		t.Fatal(err)
	}
}

// swap puts other bytes in a packet's place, as who has the server's store can.
func (s *site) swap(t *testing.T, id string, data []byte) {
	t.Helper()
	s.update(t, func(tx *store.Tx) error {
		e, _, err := tx.Packet(id)
		if err != nil {
			return err
		}
		gone := e
		gone.State = escrow.Purged
		if err := tx.PurgePacket(gone); err != nil {
			return err
		}
		e.Digest, e.Size = digestOf(data), len(data)
		return tx.PutPacket(e, data)
	})
}

// TestVerify: what it must notice, with what the server is told, and that none of it
// takes a secret.
func TestVerify(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, m *machine, s secrets)
		want error // nil: all is well
		says string
	}{
		{"nothing", func(*testing.T, *machine, secrets) {}, nil, ""},
		{"a keyslot changed", func(t *testing.T, m *machine, s secrets) {
			killSlot(t, m.disks[0], user, s.slots[1])
			addKey(t, m.disks[0], user, []byte("somebody else's 88213"), s.slots[1])
		}, ErrKeyslot, "recovery passphrase, is changed"},
		{"the recovery keyslot is gone", func(t *testing.T, m *machine, s secrets) {
			killSlot(t, m.disks[0], user, s.slots[1])
		}, ErrKeyslot, "recovery passphrase, is gone"},
		{"the boot keyslot is gone", func(t *testing.T, m *machine, s secrets) {
			killSlot(t, m.disks[0], user, s.slots[0])
		}, ErrKeyslot, "boot passphrase, is gone"},
		{"another volume in its place", func(t *testing.T, m *machine, _ secrets) {
			if err := os.Rename(disk(t, luks.Type2, user), m.disks[0]); err != nil {
				t.Fatal(err)
			}
		}, luks.ErrMismatch, "is volume"},
		{"another volume with its UUID", func(t *testing.T, m *machine, _ secrets) {
			if err := os.Rename(disk(t, luks.Type2, user, "--uuid", m.uuids[0]), m.disks[0]); err != nil {
				t.Fatal(err)
			}
		}, luks.ErrMismatch, "digest"},
		{"the volume is not there", func(t *testing.T, m *machine, _ secrets) {
			if err := os.Remove(m.disks[0]); err != nil {
				t.Fatal(err)
			}
		}, ErrNotThere, ""},
		{"its header was wiped", func(t *testing.T, m *machine, _ secrets) {
			wipeHeader(t, m.disks[0])
		}, ErrHeaderGone, "docs/operations.md, section 11"},
		{"the server lost the packet", func(t *testing.T, m *machine, s secrets) {
			m.site.lose(t, s.packet)
		}, ErrEscrow, "no verified packet"},
		{"the server has other bytes", func(t *testing.T, m *machine, s secrets) {
			m.site.swap(t, s.packet, []byte("other bytes"))
		}, ErrEscrow, "other bytes"},
		{"the server lost the blob", func(t *testing.T, m *machine, _ secrets) {
			m.site.update(t, func(tx *store.Tx) error {
				return tx.DeleteBlob(identityOf(t, m.boot()).Key.KeyID(), m.uuids[0])
			})
		}, ErrEscrow, "no sealed blob"},
		{"an enrolment was interrupted", func(t *testing.T, m *machine, _ secrets) {
			j := m.rotation(t)
			j.Kill = 3
			if _, killed := runKilled(t, j); !killed {
				t.Fatal("not killed")
			}
		}, ErrEscrow, "interrupted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type2)
			mustRun(t, m.job())
			s := m.check(t, true, userSlot, colleagueSlot)[0]
			if v := verified(t, m, VerifyOptions{}); !v.OK || !v.Servers[0].Told {
				t.Fatalf("before: %+v", v)
			}
			c.do(t, m, s)
			for range 2 { // the second time the log has it already
				v := verified(t, m, VerifyOptions{})
				if v.OK != (c.want == nil) || c.want != nil && !errors.Is(errors.Join(v.Errs()...), c.want) || !strings.Contains(strings.Join(v.Problems, "; "), c.says) || !v.Servers[0].Told {
					t.Errorf("%+v", v)
				}
			}
			checks, alarms := 0, 0
			for _, action := range m.audit(t) {
				switch action {
				case "packet.check":
					checks++
				case "alarm.verify":
					alarms++
				}
			}
			wrong := 0
			if c.want != nil {
				wrong = 1
			}
			if checks != 1+wrong || alarms != wrong {
				t.Errorf("the log has %d checks and %d alarms", checks, alarms)
			}
			if kept := m.record(t).Checks; len(kept) != 1 || (kept[0].Reason != "") != (c.want != nil) || kept[0].Checked.IsZero() {
				t.Errorf("the server keeps %+v", kept)
			}
		})
	}
}

// TestVerifyOldHeader: a header backup from before a rotation brings keyslots back
// whose passphrases are known to others.
func TestVerifyOldHeader(t *testing.T) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), typ)
			mustRun(t, m.job())
			file := m.disks[0] + ".header"
			headerFile(t, "luksHeaderBackup", m.disks[0], file)
			mustRotate(t, m.rotation(t))
			if v := verified(t, m, VerifyOptions{}); !v.OK {
				t.Fatalf("%+v", v)
			}
			headerFile(t, "luksHeaderRestore", m.disks[0], file)
			if v := verified(t, m, VerifyOptions{}); v.OK || !errors.Is(errors.Join(v.Errs()...), ErrKeyslot) {
				t.Errorf("%+v", v)
			}
		})
	}
}

// TestVerifyDue: a released recovery passphrase is no failure, and is said.
func TestVerifyDue(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	m.site.reveal(t, m.journal(t, 0).packet, escrow.ForPassphrase)
	if v := verified(t, m, VerifyOptions{}); !v.OK || len(v.Due) != 1 || !strings.Contains(v.Due[0], "rotate") {
		t.Errorf("%+v", v)
	}
	mustRotate(t, m.rotation(t))
	if v := verified(t, m, VerifyOptions{Prove: true, Program: bootProgram(t)}); !v.OK || len(v.Due) != 0 || !v.Proved {
		t.Errorf("%+v", v)
	}
	if v := verified(t, m, VerifyOptions{Prove: true, Program: program(t, "printf other")}); v.OK || v.Proved || !errors.Is(errors.Join(v.Errs()...), ErrKeyslot) {
		t.Errorf("%+v", v)
	}
}

// TestVerifyOldJournal: what a journal of before did not keep is learned once.
func TestVerifyOldJournal(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	mustRun(t, m.job())
	j := m.journal(t, 0)
	want, e := *j, &enrolment{Options: Options{Root: m.root}}
	j.digest, j.pins = "", nil
	if err := e.writeJournal(j); err != nil {
		t.Fatal(err)
	}
	var said []string
	progress := func(format string, args ...any) { said = append(said, sprint(format, args)) }
	for range 2 {
		if v := verified(t, m, VerifyOptions{Progress: progress}); !v.OK {
			t.Errorf("%+v", v)
		}
	}
	if got := m.journal(t, 0); got.digest != want.digest || got.pins == nil || *got.pins != *want.pins {
		t.Errorf("%+v", got)
	}
	if len(said) != 1 || !strings.Contains(said[0], want.digest) {
		t.Errorf("said %q", said)
	}
}

// TestVerifySeveral: one server that lies and one that is away are named, and the
// others are told.
func TestVerifySeveral(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	mustRun(t, r.job())
	packet := r.journal(t, 0).packet
	r.sites[1].swap(t, packet, []byte("other bytes"))
	v := verified(t, r.machine, VerifyOptions{})
	if v.OK || v.Servers[0].Problem != "" || v.Servers[1].Problem == "" || v.Servers[2].Problem != "" || !strings.Contains(v.Problems[0], "srv2") {
		t.Errorf("%+v", v)
	}
	if !slices.Contains(auditOf(t, r.sites[0]), "alarm.verify") || !slices.Contains(auditOf(t, r.sites[2]), "alarm.verify") {
		t.Error("the other servers do not know of it")
	}
	r.sites[2].stop()
	v = verified(t, r.machine, VerifyOptions{})
	if v.OK || v.Servers[2].Told || !v.Servers[0].Told || !strings.Contains(v.Servers[2].Problem, "srv3") && v.Servers[2].Problem == "" {
		t.Errorf("%+v", v)
	}
	// what a journal does not know is not learned from servers that disagree
	j := r.journal(t, 0)
	j.digest = ""
	e := &enrolment{Options: Options{Root: r.root}}
	if err := e.writeJournal(j); err != nil {
		t.Fatal(err)
	}
	verified(t, r.machine, VerifyOptions{})
	if got := r.journal(t, 0); got.digest != "" {
		t.Errorf("learned %s", got.digest)
	}
}
