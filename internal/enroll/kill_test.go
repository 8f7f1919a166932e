package enroll

import (
	"encoding/base64"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"mandos-escrow/luks"
)

func forms(s []byte) map[string][]byte {
	// Base64 of a secret inside a longer text has one of three spellings; what
	// is whole in all of them is enough to find it.
	out := map[string][]byte{"it is": s, "hex": hexOf(s)}
	for shift := range 3 {
		padded := base64.StdEncoding.EncodeToString(append(make([]byte, shift), s...))
		out["base64, shifted by "+string(rune('0'+shift))] = []byte(padded[4 : len(padded)-4])
	}
	return out
}

// checkpoints of an enrolment, at each of which it is killed.
var checkpoints = map[string]int{luks.Type1: 9, luks.Type2: 11}

// TestKilledAnywhere: killed at any checkpoint and run again with the same
// one-use token, an enrolment succeeds.
func TestKilledAnywhere(t *testing.T) {
	for _, typ := range types {
		for k := 1; k <= checkpoints[typ]+1; k++ {
			t.Run(name(typ, k), func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, sharedSite(t), typ)
				j := m.job()
				j.Kill = k
				steps, killed := runKilled(t, j)
				if !killed {
					if len(steps) != checkpoints[typ] {
						t.Errorf("%d checkpoints: %s", len(steps), strings.Join(steps, ", "))
					}
					return
				}
				key, err := tool.VolumeKey(t.Context(), m.disks[0], user)
				if err != nil {
					t.Fatal(err)
				}
				spill(t, map[string][]byte{"user's passphrase": user, "volume key": key}, []string{m.root})
				j.Kill = 0
				r := mustRun(t, j)
				if r[0].Already != (k == checkpoints[typ]) {
					t.Errorf("already enrolled: %t", r[0].Already)
				}
				m.check(t, true, userSlot, colleagueSlot)
			})
		}
	}
}

func name(typ string, ks ...int) string {
	parts := []string{typ}
	for _, k := range ks {
		parts = append(parts, string(rune('a'+k-1)))
	}
	return strings.Join(parts, "-")
}

// TestKilledBetween kills at any time, not only between steps.
func TestKilledBetween(t *testing.T) {
	for i, typ := range slices.Repeat(types, 3) {
		t.Run(name(typ, i+1), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), typ)
			cmd, _ := spawn(t, m.job())
			time.Sleep(time.Duration(20+rand.N(600)) * time.Millisecond)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			mustRun(t, m.job())
			m.check(t, true, userSlot, colleagueSlot)
		})
	}
}

// TestDrafts: files that a killed run was writing do not stay; others do.
func TestDrafts(t *testing.T) {
	t.Parallel()
	m := newMachine(t, sharedSite(t), luks.Type1)
	mustRun(t, m.job())
	for path, stays := range map[string]bool{
		filepath.Join(m.running(), ".volume-"+m.uuids[0]+".journal.123456789"): false,
		filepath.Join(m.boot(), ".seckey.txt.42"):                              false,
		filepath.Join(m.boot(), ".vimrc"):                                      true,
		filepath.Join(m.boot(), ".unlock.conf.swp"):                            true,
	} {
		if err := os.WriteFile(path, []byte("draft"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustRun(t, m.job())
		if exists(path) != stays {
			t.Errorf("%s is there: %t", path, !stays)
		}
	}
}

// TestKilledTwice: the run that takes up an interrupted one is killed too.
func TestKilledTwice(t *testing.T) {
	for _, c := range []struct {
		typ  string
		k, j int
	}{
		{luks.Type1, 5, 4},
		{luks.Type1, 7, 3},
		{luks.Type1, 8, 4},
		{luks.Type2, 8, 4},
		{luks.Type2, 8, 5},
		{luks.Type2, 9, 7},
		{luks.Type2, 10, 4},
	} {
		t.Run(name(c.typ, c.k, c.j), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), c.typ)
			j := m.job()
			for _, j.Kill = range []int{c.k, c.j} {
				if steps, killed := runKilled(t, j); !killed {
					t.Fatalf("not killed: %s", strings.Join(steps, ", "))
				}
			}
			j.Kill = 0
			mustRun(t, j)
			m.check(t, true, userSlot, colleagueSlot)
		})
	}
}

// TestTwoVolumes: killed anywhere between two volumes.
func TestTwoVolumes(t *testing.T) {
	t.Parallel()
	for k := 3; k < 2+9+7; k += 3 {
		t.Run(name("both", k), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type1, luks.Type2)
			j := m.job()
			j.Kill = k
			if steps, killed := runKilled(t, j); !killed {
				t.Fatalf("not killed: %s", strings.Join(steps, ", "))
			}
			j.Kill = 0
			mustRun(t, j)
			m.check(t, true, userSlot, colleagueSlot)
		})
	}
}

// TestKilledAgain kills enrolments of a machine that is enrolled already: with
// --remove-passphrase, on LUKS2 at every checkpoint, on LUKS1 at every third,
// and after its server lost the packet at every fifth. The one machine goes on from run to run.
func TestKilledAgain(t *testing.T) {
	for _, typ := range types {
		for _, how := range []string{"remove", "lost"} {
			t.Run(typ+"-"+how, func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, sharedSite(t), typ)
				j := m.job()
				mustRun(t, j)
				before := m.check(t, true, userSlot, colleagueSlot)[0]
				j.Remove = how == "remove"
				others := []int{userSlot, colleagueSlot}
				if j.Remove {
					others = others[1:]
				}
				reached := map[string]bool{}
				step := map[string]int{"luks2-remove": 1, "luks1-remove": 3, "luks1-lost": 5, "luks2-lost": 5}[typ+"-"+how]
				for j.Kill = step; ; j.Kill += step {
					if how == "lost" {
						m.site.lose(t, before.packet)
					}
					steps, killed := runKilled(t, j)
					for _, s := range steps {
						reached[s] = true
					}
					again := j
					again.Kill = 0
					mustRun(t, again)
					before = m.check(t, true, others...)[0]
					if !killed {
						break
					}
					if j.Remove {
						addKey(t, m.disks[0], before.recovery, user, userSlot)
					}
				}
				if reached["removed the passphrase"] != j.Remove || !reached["dropped an old slot"] || len(reached) < checkpoints[typ]-1 {
					t.Errorf("reached %v", reached)
				}
			})
		}
	}
}

// TestKilledBesideCryptsetup: the next run waits for a cryptsetup that outlived
// the killed one, and takes up what it did.
func TestKilledBesideCryptsetup(t *testing.T) {
	for _, typ := range types {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), typ)
			dir := t.TempDir()
			started, release := filepath.Join(dir, "started"), filepath.Join(dir, "release")
			script := "#!/bin/sh\nif [ \"$1\" = luksAddKey ]; then\n: >" + started +
				"\nwhile [ ! -e " + release + " ]; do sleep 0.02; done\nfi\nexec cryptsetup \"$@\"\n"
			j := m.job()
			j.Cryptsetup = filepath.Join(dir, "slow")
			if err := os.WriteFile(j.Cryptsetup, []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
			cmd, _ := spawn(t, j)
			wait(t, "luksAddKey", func() bool { return exists(started) })
			defer os.WriteFile(release, nil, 0o600) //nolint:errcheck // so that it ends also when the test fails
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // killed
			j.Cryptsetup = ""
			o, err := j.options()
			if err != nil {
				t.Fatal(err)
			}
			waits := make(chan string, 1)
			o.Progress = func(format string, _ ...any) {
				if strings.HasPrefix(format, "waiting") {
					waits <- format
				}
			}
			ended := make(chan error, 1)
			go func() {
				_, err := Run(t.Context(), o)
				ended <- err
			}()
			select {
			case <-waits:
			case err := <-ended:
				t.Fatalf("did not wait: %v", err)
			}
			if n := len(header(t, m.disks[0]).Slots); n != 2 {
				t.Errorf("%d keyslots before cryptsetup did anything", n)
			}
			if err := os.WriteFile(release, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			m.check(t, true, userSlot, colleagueSlot)
		})
	}
}

// TestKilledThenLost: the passphrase was removed, the run killed before it
// noted that, and the server then lost what it had. Nothing but the journal
// can get that volume enrolled.
func TestKilledThenLost(t *testing.T) {
	for _, noBoot := range []bool{false, true} {
		t.Run(map[bool]string{false: "boot", true: "no-boot"}[noBoot], func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, sharedSite(t), luks.Type1)
			j := m.job()
			j.Remove, j.Kill = true, checkpoints[luks.Type1]
			steps, killed := runKilled(t, j)
			if !killed || !slices.Contains(steps, "removed the passphrase") {
				t.Fatalf("reached %v", steps)
			}
			packet := m.journal(t, 0).packet
			m.site.lose(t, packet)
			j.Kill, j.NoBoot = 0, noBoot
			mustRun(t, j)
			m.check(t, !noBoot, colleagueSlot)
		})
	}
}
