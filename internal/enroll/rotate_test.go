package enroll

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/luks"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// bootVariable makes the test binary a boot program that prints a passphrase.
const bootVariable = "MANDOS_ESCROW_TEST_BOOT"

// bootChild does what `mandos-escrow-unlock --config DIR --print --once --volume UUID` does.
func bootChild() int {
	dir, uuid := os.Args[2], os.Args[len(os.Args)-1]
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			panic(err)
		}
		return data
	}
	conf, err := unlock.ParseConfig(read(unlock.ConfigFile))
	if err != nil {
		panic(err)
	}
	keys, err := conf.ParseKeys(read(unlock.TLSPrivateKeyFile), read(unlock.PrivateKeyFile))
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	result, err := (&unlock.Client{Config: conf, Keys: keys, Volumes: []string{uuid}}).Fetch(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if errors.Is(err, unlock.ErrRefused) {
			return 7
		}
		return 1
	}
	os.Stdout.Write(result.Passphrases[uuid]) // who reads it misses what is not written
	return 0
}

func bootProgram(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return program(t, bootVariable+"=1 exec "+self+" \"$@\"")
}

func (m *machine) rotation(t *testing.T) job {
	return job{Rotate: true, Root: m.root, Program: bootProgram(t)}
}

func rotate(t *testing.T, j job) ([]Rotated, error) {
	t.Helper()
	o, err := j.rotating()
	if err != nil {
		t.Fatal(err)
	}
	return Rotate(t.Context(), o)
}

func mustRotate(t *testing.T, j job) []Rotated {
	t.Helper()
	results, err := rotate(t, j)
	if err != nil {
		t.Fatal(err)
	}
	return results
}

// reveal records that a payload was released.
func (s *site) reveal(t *testing.T, packet, payload string) {
	t.Helper()
	s.update(t, func(tx *store.Tx) error {
		e, err := tx.Entry(packet)
		if err != nil {
			return err
		}
		return tx.PutEntry(e.Reveal(payload, time.Now()))
	})
}

// TestRotate: by the machine itself and with a passphrase, without a token; the
// passphrases of before open nothing.
func TestRotate(t *testing.T) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), typ, typ)
			mustRun(t, m.job())
			for _, how := range []string{"fetched", "given"} {
				before := m.check(t, true, userSlot, colleagueSlot)
				j := m.rotation(t)
				if how == "given" {
					j.Program, j.Passphrase = "", user
				}
				results := mustRotate(t, j)
				after := m.check(t, true, userSlot, colleagueSlot)
				for i, r := range results {
					at := slices.Index(m.uuids, r.UUID)
					if !r.Rotated || r.Packet != after[at].packet || len(results) != 2 {
						t.Errorf("%s %d: %+v", how, i, r)
					}
				}
				for i := range after {
					if opens(t, m.disks[i], before[i].recovery, -1) || opens(t, m.disks[i], before[i].boot, -1) || after[i].packet == before[i].packet {
						t.Errorf("%s: what was before still opens it", how)
					}
					if e := m.site.entries(t, identityOf(t, m.boot()).Key.KeyID(), m.uuids[i])[escrow.Obsolete]; !slices.ContainsFunc(e, func(e escrow.Entry) bool {
						return e.ID == before[i].packet && e.SupersededBy == after[i].packet
					}) {
						t.Errorf("%s: the packet before is not superseded", how)
					}
				}
			}
			if slices.ContainsFunc(m.audit(t), func(a string) bool { return strings.HasPrefix(a, "alarm.") }) {
				t.Errorf("an alarm: %v", m.audit(t))
			}
		})
	}
}

// TestRotateEscrowOnly: without unattended boot nothing can be fetched.
func TestRotateEscrowOnly(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	j := m.job()
	j.NoBoot = true
	mustRun(t, j)
	r := m.rotation(t)
	if _, err := rotate(t, r); err == nil || !strings.Contains(err.Error(), "--passphrase-file") {
		t.Errorf("%v", err)
	}
	before := m.check(t, false, userSlot, colleagueSlot)[0]
	r.Passphrase = user
	mustRotate(t, r)
	if after := m.check(t, false, userSlot, colleagueSlot)[0]; after.packet == before.packet {
		t.Error("not rotated")
	}
}

// TestRotateKilled: killed at every checkpoint and run again, by the machine itself.
func TestRotateKilled(t *testing.T) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), typ)
			mustRun(t, m.job())
			j := m.rotation(t)
			reached := map[string]bool{}
			for j.Kill = 1; ; j.Kill++ {
				steps, killed := runKilled(t, j)
				for _, s := range steps {
					reached[s] = true
				}
				again := j
				again.Kill = 0
				mustRotate(t, again)
				m.check(t, true, userSlot, colleagueSlot)
				if !killed {
					break
				}
			}
			if !reached["dropped an old slot"] || !reached["committed at the server"] || !reached["journal committed"] {
				t.Errorf("reached %v", reached)
			}
		})
	}
}

// TestRotateRefused: a disabled machine fetches nothing, and nothing is changed.
func TestRotateRefused(t *testing.T) {
	t.Parallel()
	m := newMachine(t, newSite(t), luks.Type2)
	mustRun(t, m.job())
	s := m.record(t)
	m.site.update(t, func(tx *store.Tx) error {
		s.Enabled = false
		return tx.PutMachine(s)
	})
	before := image(t, m.disks[0])
	if _, err := rotate(t, m.rotation(t)); !errors.Is(err, unlock.ErrRefused) {
		t.Errorf("%v", err)
	}
	if image(t, m.disks[0]) != before {
		t.Error("the volume was changed")
	}
}

// TestRotateDue: only what was released or interrupted; nothing to do is no error.
func TestRotateDue(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2, luks.Type1)
	mustRun(t, m.job())
	before := m.check(t, true, userSlot, colleagueSlot)
	j := m.rotation(t)
	j.Due = true
	for _, r := range mustRotate(t, j) {
		if r.Rotated || r.Why != "" {
			t.Errorf("nothing is due: %+v", r)
		}
	}
	m.site.reveal(t, before[1].packet, escrow.ForVolumeKey) // which no rotation helps
	m.site.reveal(t, before[0].packet, escrow.ForPassphrase)
	for _, r := range mustRotate(t, j) {
		if r.Rotated != (r.UUID == m.uuids[0]) {
			t.Errorf("%+v", r)
		}
	}
	after := m.check(t, true, userSlot, colleagueSlot)
	if after[0].packet == before[0].packet || after[1].packet != before[1].packet {
		t.Error("another one was rotated")
	}
	j.Kill = 6
	j.Due = false
	if steps, killed := runKilled(t, j); !killed {
		t.Fatalf("reached %v", steps)
	}
	j.Kill, j.Due = 0, true
	rotated := 0
	for _, r := range mustRotate(t, j) {
		if r.Rotated {
			rotated++
		}
	}
	if rotated != 1 {
		t.Errorf("%d were finished", rotated)
	}
	m.check(t, true, userSlot, colleagueSlot)
}

// TestRotateExpired: what somebody said to be known to others is due as well; that
// the volume key is known stays true of the next packet.
func TestRotateExpired(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	mustRun(t, m.job())
	before := m.check(t, true, userSlot, colleagueSlot)[0]
	m.site.update(t, func(tx *store.Tx) error {
		e, err := tx.Entry(before.packet)
		if err != nil {
			return err
		}
		if e, err = e.Expire(time.Now()); err != nil {
			return err
		}
		return tx.PutEntry(e)
	})
	if v := verified(t, m, VerifyOptions{}); !v.OK || len(v.Due) != 2 {
		t.Errorf("%+v", v)
	}
	j := m.rotation(t)
	j.Due = true
	if r := mustRotate(t, j)[0]; !r.Rotated || r.Why == "" {
		t.Errorf("%+v", r)
	}
	if r := mustRotate(t, j)[0]; r.Rotated {
		t.Errorf("rotated again: %+v", r)
	}
	m.check(t, true, userSlot, colleagueSlot)
	if v := verified(t, m, VerifyOptions{}); !v.OK || len(v.Due) != 1 || v.Due[0] != "the volume key may be known to others: encrypt the volume anew" {
		t.Errorf("%+v", v)
	}
}

// TestRotateNothingKept: a machine that enrolled before keys were kept needs a token
// once, and only one of its servers.
func TestRotateNothingKept(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	mustRun(t, m.job())
	kept := filepath.Join(m.running(), "trustees")
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	before := image(t, m.disks[0])
	j := m.rotation(t)
	if _, err := rotate(t, j); !errors.Is(err, ErrNotKept) || image(t, m.disks[0]) != before {
		t.Errorf("%v", err)
	}
	j.Token = newSite(t).token(t)
	if _, err := rotate(t, j); !errors.Is(err, ErrOther) || image(t, m.disks[0]) != before {
		t.Errorf("a token of another server: %v", err)
	}
	j.Token = m.site.token(t)
	mustRotate(t, j)
	j.Token = ""
	mustRotate(t, j)
	m.check(t, true, userSlot, colleagueSlot)
}

// TestRotateForeignKey: a key that is not of the pinned policy seals nothing.
func TestRotateForeignKey(t *testing.T) {
	t.Parallel()
	m, other := newMachine(t, sharedSite(t), luks.Type2), newMachine(t, newSite(t), luks.Type2)
	mustRun(t, m.job())
	mustRun(t, other.job())
	foreign, err := os.ReadFile(filepath.Join(other.running(), "trustees"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.running(), "trustees"), foreign, 0o600); err != nil {
		t.Fatal(err)
	}
	before := image(t, m.disks[0])
	if _, err := rotate(t, m.rotation(t)); !errors.Is(err, ErrPolicy) || image(t, m.disks[0]) != before {
		t.Errorf("%v", err)
	}
}

// TestRotateReencrypted: another volume key is taken only on the word of who has a
// passphrase.
func TestRotateReencrypted(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type2)
	mustRun(t, m.job())
	first := m.check(t, true, userSlot, colleagueSlot)[0]
	m.site.reveal(t, first.packet, escrow.ForVolumeKey)
	if v := verified(t, m, VerifyOptions{}); !v.OK || len(v.Due) != 1 || !strings.Contains(v.Due[0], "anew") {
		t.Errorf("%+v", v)
	}
	cryptsetupRun(t, user, "reencrypt", "-q", "--key-file=-", "--key-slot", "0", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--force-offline-reencrypt", m.disks[0])
	if err := header(t, m.disks[0]).VerifyVolumeKey(first.volumeKey); err == nil {
		t.Fatal("it has the volume key that it had")
	}
	if v := verified(t, m, VerifyOptions{}); v.OK || !errors.Is(errors.Join(v.Errs()...), luks.ErrMismatch) {
		t.Errorf("%+v", v)
	}
	before := image(t, m.disks[0])
	j := m.rotation(t)
	for name, change := range map[string]func(*job){
		"nothing said":    func(*job) {},
		"a passphrase":    func(j *job) { j.Passphrase = user },
		"only the flag":   func(j *job) { j.Reencrypted = true },
		"only what's due": func(j *job) { j.Due = true },
	} {
		wrong := j
		change(&wrong)
		if _, err := rotate(t, wrong); !errors.Is(err, luks.ErrMismatch) || image(t, m.disks[0]) != before {
			t.Errorf("%s: %v", name, err)
		}
	}
	j.Passphrase, j.Reencrypted = user, true
	for j.Kill = 3; ; j.Kill += 4 { // killed here and there, and once not at all
		_, killed := runKilled(t, j)
		if !killed {
			break
		}
	}
	others := m.others(t)
	after := m.check(t, true, others...)[0]
	if bytes.Equal(after.volumeKey, first.volumeKey) || after.packet == first.packet || !slices.Contains(others, userSlotOf(t, m)) {
		t.Errorf("keyslots of others: %v", others)
	}
	if v := verified(t, m, VerifyOptions{Prove: true, Program: j.Program}); !v.OK || len(v.Due) != 0 || !v.Proved {
		t.Errorf("%+v", v)
	}
}

// others are the active keyslots that are not in the journal.
func (m *machine) others(t *testing.T) (all []int) {
	t.Helper()
	j := m.journal(t, 0)
	for _, s := range header(t, m.disks[0]).Slots {
		if !j.has(s.Number) {
			all = append(all, s.Number)
		}
	}
	return all
}

func userSlotOf(t *testing.T, m *machine) int {
	t.Helper()
	number, err := tool.Test(t.Context(), m.disks[0], user, -1)
	if err != nil {
		t.Fatal(err)
	}
	return number
}

// TestRotateSeveral: 2 of 3, and one that does not answer gets its part later.
func TestRotateSeveral(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type2)
	mustRun(t, r.job())
	r.sites[2].stop()
	j := r.rotation(t)
	results := mustRotate(t, j)
	if !slices.Equal(results[0].Behind, []string{"srv3"}) {
		t.Errorf("%+v", results)
	}
	r.check(t, []int{0, 1}, userSlot, colleagueSlot)
	r.sites[2].start(t)
	j.Due = true
	again := mustRotate(t, j)
	if again[0].Rotated || again[0].Packet != results[0].Packet || len(again[0].Behind) != 0 {
		t.Errorf("%+v", again)
	}
	r.check(t, []int{0, 1, 2}, userSlot, colleagueSlot)
	mustRotate(t, r.rotation(t))
	r.check(t, []int{0, 1, 2}, userSlot, colleagueSlot)
}

// TestRotateSeveralKilled: 2 of 3, killed at every fourth checkpoint.
func TestRotateSeveralKilled(t *testing.T) {
	t.Parallel()
	r := newRing(t, 2, 3, luks.Type1)
	mustRun(t, r.job())
	j := r.rotation(t)
	for j.Kill = 2; ; j.Kill += 4 {
		_, killed := runKilled(t, j)
		again := j
		again.Kill = 0
		mustRotate(t, again)
		r.check(t, []int{0, 1, 2}, userSlot, colleagueSlot)
		if !killed {
			break
		}
	}
}
