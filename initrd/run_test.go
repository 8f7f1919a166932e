package initrd

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/unlock"
)

// TestAskpass: the root, and then a data volume for which no server is asked
// again.
func TestAskpass(t *testing.T) {
	m := newMachine(t)
	done := m.boot(t.Context())
	for i, v := range m.config.Volumes {
		a := m.askpass([]string{"100", "200"}[i], m.disk(i))
		if got := a.reads(); got != passphrase(v.UUID) {
			t.Fatalf("volume %d: %q", i, got)
		}
		m.open(v.UUID, v.UUID)
	}
	m.ends(done)
	m.became(unlock.Opened, unlock.Opened)
	m.noSecret()
	if n := m.server.count(); n != 1 {
		t.Errorf("the server was asked %d times", n)
	}
}

// TestSystemd is the same with systemd's questions.
func TestSystemd(t *testing.T) {
	m := newMachine(t)
	done := m.boot(t.Context())
	for i, v := range m.config.Volumes {
		q := m.systemd("cryptsetup:" + m.disk(i))
		if got := q.reads(); got != "+"+passphrase(v.UUID) {
			t.Fatalf("volume %d: %q", i, got)
		}
		m.open(v.UUID, v.UUID)
	}
	m.ends(done)
	m.became(unlock.Opened, unlock.Opened)
	m.noSecret()
}

func TestNamesOfDevices(t *testing.T) {
	m := newMachine(t)
	uuid := m.config.Volumes[0].UUID
	if err := os.Symlink("../../vda", m.root.path("dev/disk/by-uuid", uuid)); err != nil {
		t.Fatal(err)
	}
	for pid, device := range map[string]string{
		"100": "UUID=" + uuid,
		"101": "UUID=" + strings.ToUpper(uuid),
		"102": m.root.path("dev/disk/by-uuid", uuid),
	} {
		ctx, cancel := context.WithCancel(t.Context())
		done := m.boot(ctx)
		if got := m.askpass(pid, device).reads(); got != passphrase(uuid) {
			t.Errorf("%s: %q", device, got)
		}
		cancel()
		m.ends(done)
	}
}

// TestSomebodyTypes: the question is answered at the prompt while a server
// makes up its mind.
func TestSomebodyTypes(t *testing.T) {
	for name, ask := range map[string]func(*machine) interface{ ends() }{
		"askpass": func(m *machine) interface{ ends() } { return m.askpass("100", m.disk(0)) },
		"systemd": func(m *machine) interface{ ends() } { return m.systemd("cryptsetup:" + m.disk(0)) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			q := ask(m)
			m.server.released = func() {
				q.ends()
				m.open("root", m.config.Volumes[0].UUID)
			}
			done := m.boot(t.Context())
			m.until("typed", func() bool {
				return m.server.count() != 0 && m.report().Volumes[0].Outcome == unlock.Answered
			})
			m.open("data", m.config.Volumes[1].UUID)
			m.ends(done)
			m.became(unlock.Answered, unlock.Answered)
			m.noSecret()
		})
	}
}

// TestWrongPassphrase: who got our answer asks again, and gets no other.
func TestWrongPassphrase(t *testing.T) {
	m := newMachine(t)
	done := m.boot(t.Context())
	if got := m.systemd("cryptsetup:" + m.disk(0)).reads(); got == "" {
		t.Fatal("no answer")
	}
	again := m.systemd("cryptsetup:" + m.disk(0))
	m.saysSoon("does not take the boot passphrase any more")
	other := m.systemd("cryptsetup:" + m.disk(1))
	if got := other.reads(); got != "+"+passphrase(m.config.Volumes[1].UUID) {
		t.Errorf("the other volume: %q", got)
	}
	if got := again.now(); got != "" {
		t.Errorf("sent again: %q", got)
	}
	again.ends()
	m.open("data", m.config.Volumes[1].UUID)
	m.open("root", m.config.Volumes[0].UUID) // by a person
	m.ends(done)
	m.became(unlock.Rejected, unlock.Opened)
	if n := strings.Count(m.console(), "does not take"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

// TestStrangers: volumes that are not enrolled, and what is no volume, are left
// alone without a word.
func TestStrangers(t *testing.T) {
	m := newMachine(t)
	format(t, m.root.path("dev/vdx"))
	m.write("dev/empty", strings.Repeat("\x00", 1<<20))
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	var asked []*asking
	for _, device := range []string{m.root.path("dev/vdx"), m.root.path("dev/empty"), m.root.path("dev/nothing"), "UUID=../../etc/passwd"} {
		asked = append(asked, m.systemd("cryptsetup:"+device))
	}
	asked = append(asked, m.systemd("machined:password"), m.systemd(""))
	typed := m.askpass("100", m.root.path("dev/vdx"))
	released := false
	m.server.released = func() { released = true }
	m.server.machine.Enabled = false
	last := m.systemd("cryptsetup:" + m.disk(0)) // considered after the others
	m.saysSoon("server srv1: refused")
	last.ends()
	for _, a := range asked {
		if got := a.now(); got != "" {
			t.Errorf("%s: %q", a.file, got)
		}
	}
	if got := typed.now(); got != "" || released {
		t.Errorf("askpass: %q, released: %t", got, released)
	}
	cancel()
	m.ends(done)
	m.became(unlock.Unanswered, unlock.Unanswered)
	if m.console() != "server srv1: refused" {
		t.Errorf("it says %q", m.console())
	}
}

// TestMismatch: what pretends to be an enrolled volume is not answered, is said
// aloud, and hinders no other.
func TestMismatch(t *testing.T) {
	for name, change := range map[string]func(m *machine, v unlock.Volume){
		"formatted anew": func(m *machine, v unlock.Volume) {
			format(t, m.disk(0), "--type", "luks2", "--pbkdf", "pbkdf2", "--uuid", v.UUID)
		},
		"null cipher": func(m *machine, v unlock.Volume) {
			format(t, m.disk(0), "--type", "luks1", "--uuid", v.UUID)
			patch(t, m.disk(0), 8, "cipher_null\x00")
		},
		"nothing under its name": func(m *machine, _ unlock.Volume) {
			m.config.Volumes[0].Path = m.disk(0)
			m.save()
			m.write("dev/vda", strings.Repeat("\x00", 1<<20))
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			v := m.config.Volumes[0]
			change(m, v)
			done := m.boot(t.Context())
			q := m.systemd("cryptsetup:" + m.disk(0))
			m.saysSoon("NOT ANSWERED: " + m.disk(0) + " asks for volume " + v.UUID)
			if n := m.server.count(); n != 0 {
				t.Errorf("a server was asked %d times", n)
			}
			other := m.systemd("cryptsetup:" + m.disk(1))
			if got := other.reads(); got != "+"+passphrase(m.config.Volumes[1].UUID) {
				t.Errorf("the other volume: %q", got)
			}
			if got := q.now(); got != "" {
				t.Errorf("answered: %q", got)
			}
			m.open("root", v.UUID) // by a person
			m.open("data", m.config.Volumes[1].UUID)
			m.ends(done)
			m.became(unlock.Mismatched, unlock.Opened)
		})
	}
}

// TestExchangedMeanwhile: the header is another one when the answer is there.
func TestExchangedMeanwhile(t *testing.T) {
	m := newMachine(t)
	v := m.config.Volumes[0]
	m.server.released = func() { format(t, m.disk(0), "--type", "luks2", "--pbkdf", "pbkdf2", "--uuid", v.UUID) }
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	q := m.systemd("cryptsetup:" + m.disk(0))
	m.saysSoon("NOT ANSWERED")
	if got := q.now(); got != "" {
		t.Errorf("answered: %q", got)
	}
	cancel()
	m.ends(done)
	m.became(unlock.Mismatched, unlock.Unanswered)
}

// TestExchangedForAnother: a sound volume, but another one.
func TestExchangedForAnother(t *testing.T) {
	m := newMachine(t)
	m.server.released = func() { format(t, m.disk(0)) }
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	q := m.systemd("cryptsetup:" + m.disk(0))
	m.saysSoon("NOT ANSWERED")
	if got := q.now(); got != "" {
		t.Errorf("answered: %q", got)
	}
	cancel()
	m.ends(done)
}

// TestTwins: of two disks with one UUID the one counts that is asked for,
// wherever the UUID's link leads.
func TestTwins(t *testing.T) {
	m := newMachine(t)
	v := m.config.Volumes[0]
	twin := m.root.path("dev/twin")
	format(t, twin, "--type", "luks2", "--pbkdf", "pbkdf2", "--uuid", v.UUID)
	if err := os.Symlink("../../twin", m.root.path("dev/disk/by-uuid", v.UUID)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	foreign := m.systemd("cryptsetup:" + twin)
	m.saysSoon("NOT ANSWERED: " + twin)
	if got := m.systemd("cryptsetup:" + m.disk(0)).reads(); got != "+"+passphrase(v.UUID) {
		t.Errorf("the enrolled disk: %q", got)
	}
	if got := foreign.now(); got != "" {
		t.Errorf("the twin: %q", got)
	}
	cancel()
	m.ends(done)
}

// TestTwoAskAtOnce: there is one FIFO, so only one who asks can be answered.
func TestTwoAskAtOnce(t *testing.T) {
	m := newMachine(t)
	first := m.askpass("100", m.disk(0))
	second := m.askpass("200", m.disk(0))
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	uuid := m.config.Volumes[1].UUID
	if got := m.systemd("cryptsetup:" + m.disk(1)).reads(); got != "+"+passphrase(uuid) { // the passphrases are there
		t.Errorf("systemd: %q", got)
	}
	if one, two := first.now(), second.now(); one != "" || two != "" {
		t.Errorf("answered: %q, %q", one, two)
	}
	second.ends()
	if got := first.reads(); got != passphrase(m.config.Volumes[0].UUID) {
		t.Errorf("%q", got)
	}
	cancel()
	m.ends(done)
}

func TestRefusedAndTyped(t *testing.T) {
	m := newMachine(t)
	m.server.machine.Enabled = false
	done := m.boot(t.Context())
	q := m.systemd("cryptsetup:" + m.disk(0))
	m.saysSoon("server srv1: refused")
	q.ends()
	for _, v := range m.config.Volumes {
		m.open(v.UUID, v.UUID)
	}
	m.ends(done)
	m.became(unlock.Answered, unlock.Answered)
	if got := m.report().Volumes[0].Reason; got != "srv1: refused" {
		t.Errorf("reason %q", got)
	}
}

func TestEndsWhenTold(t *testing.T) {
	m := newMachine(t)
	m.server.machine.Enabled = false
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	m.systemd("cryptsetup:" + m.disk(0))
	m.saysSoon("server srv1: refused")
	cancel()
	m.ends(done)
	m.became(unlock.Unanswered, unlock.Unanswered)
	r := m.report()
	if r.Volumes[0].Reason != "srv1: refused" || r.Volumes[1].Reason != "nobody asked for it" {
		t.Errorf("%+v", r)
	}
}

// TestNothingToDo: the network is not touched when all is open, or when the
// kernel command line says so.
func TestNothingToDo(t *testing.T) {
	for name, prepare := range map[string]func(*machine){
		"off": func(m *machine) { m.write("proc/cmdline", "quiet mandos-escrow=off\n") },
		"open": func(m *machine) {
			for _, v := range m.config.Volumes {
				m.open(v.UUID, v.UUID)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			prepare(m)
			if err := Run(t.Context(), m.options()); err != nil || m.network.up {
				t.Errorf("%v, network up: %t", err, m.network.up)
			}
		})
	}
}

// TestConnect: an address of the kernel command line, where the enrolled one is
// dead; and the network words get to the network.
func TestConnect(t *testing.T) {
	m := newMachine(t)
	m.config.Servers[0].Addresses = []string{"127.0.0.1:1"}
	m.save()
	m.write("proc/cmdline", "mandos-escrow=connect:"+m.server.address+" ip=dhcp mandos-escrow=nonsense\n")
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	if got := m.systemd("cryptsetup:" + m.disk(0)).reads(); got != "+"+passphrase(m.config.Volumes[0].UUID) {
		t.Errorf("%q", got)
	}
	m.saysSoon("mandos-escrow=nonsense")
	cancel()
	m.ends(done)
	if o := m.network.options; len(o.Words) != 1 || o.Words[0] != "ip=dhcp" || o.Connect != m.server.address || o.File != m.root.path("etc/mandos-escrow/network") {
		t.Errorf("%+v", o)
	}
}

// TestBadConfiguration: an error, a report, and no network.
func TestBadConfiguration(t *testing.T) {
	for name, c := range map[string]struct {
		break_ func(*machine)
		want   error
		text   string
	}{
		"none":     {func(m *machine) { os.Remove(m.root.path("etc/mandos-escrow/unlock.conf")) }, os.ErrNotExist, "unlock.conf"},
		"cut":      {func(m *machine) { m.write("etc/mandos-escrow/unlock.conf", "mandos-escrow-unlock: 1\n") }, unlock.ErrConfig, "machine-key-id"},
		"no key":   {func(m *machine) { os.Remove(m.root.path("etc/mandos-escrow/seckey.txt")) }, os.ErrNotExist, "seckey.txt"},
		"bad keys": {func(m *machine) { m.write("etc/mandos-escrow/tls-privkey.pem", "x") }, unlock.ErrConfig, "tls-privkey.pem"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			c.break_(m)
			err := Run(t.Context(), m.options())
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n") || m.network.up {
				t.Errorf("%v, network up: %t", err, m.network.up)
			}
			if r := m.report(); !strings.Contains(r.Fault, c.text) || len(r.Volumes) != 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestReleaseFile(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	m.systemd("cryptsetup:" + m.disk(0)).reads()
	cancel()
	m.ends(done)
	data, err := os.ReadFile(m.root.path(RunFolder, ReleaseFile))
	if err != nil {
		t.Fatal(err)
	}
	r, err := ParseRelease(data)
	if nonce, _ := hex.DecodeString(r.Nonces[m.config.Servers[0].KeyID]); err != nil || r.BootID != bootID || len(nonce) != 16 {
		t.Errorf("%+v, %v", r, err)
	}
}

// fakeSource says which questions are open.
type fakeSource func() []question

func (s fakeSource) pending() []question { return s() }

// fakeBoot is a boot without a machine around it. Time is the
// bubble's.
func fakeBoot(t *testing.T, m *machine, s fakeSource) *boot {
	t.Helper()
	b := newBoot(m.config.Volumes, m.options())
	b.sources = []source{s}
	return b
}

// TestNobodyWaits: servers are not asked any more once the volume is open that
// was asked for, even if others are not.
func TestNobodyWaits(t *testing.T) {
	m := newMachine(t)
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		const typed, opened = 10 * time.Second, 14 * time.Second // between them it is tried
		b := fakeBoot(t, m, func() []question {
			if time.Since(start) >= typed {
				return nil
			}
			return []question{{id: "1", device: m.disk(0)}}
		})
		b.mapped = func() ([]mapping, error) {
			if time.Since(start) < opened {
				return nil, nil
			}
			return []mapping{{volume: strings.ReplaceAll(m.config.Volumes[0].UUID, "-", "")}}, nil
		}
		ended := make(chan time.Duration, 1)
		b.fetch = func(ctx context.Context, _ []string) (*unlock.Result, error) {
			<-ctx.Done()
			ended <- time.Since(start)
			return nil, ctx.Err()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		b.run(ctx)
		if d := <-ended; d < opened || d > opened+2*interval {
			t.Errorf("asked until %s", d)
		}
	})
}

// TestDeviceComesLate: a device that cannot be read is tried again.
func TestDeviceComesLate(t *testing.T) {
	m := newMachine(t)
	late := m.root.path("dev/late")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		got := ""
		b := fakeBoot(t, m, func() []question {
			return []question{{id: "1", device: late, answer: func(p []byte) error { got = string(p); cancel(); return nil }}}
		})
		b.fetch = func(context.Context, []string) (*unlock.Result, error) {
			return &unlock.Result{Passphrases: map[string][]byte{m.config.Volumes[0].UUID: []byte("late")}}, nil
		}
		time.AfterFunc(time.Minute, func() {
			if err := os.Symlink("vda", late); err != nil {
				t.Error(err)
			}
		})
		start := time.Now()
		b.run(ctx)
		if d := time.Since(start); got != "late" || d < time.Minute || d > time.Minute+retryRead+3*interval {
			t.Errorf("%q after %s", got, d)
		}
	})
}

// TestBusy: who cannot take an answer now gets it later; who says something
// strange gets none.
func TestBusy(t *testing.T) {
	m := newMachine(t)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		tries, strange := 0, 0
		b := fakeBoot(t, m, func() []question {
			return []question{
				{id: "1", device: m.disk(0), answer: func([]byte) error { strange++; return unix.EIO }},
				{id: "2", device: m.disk(0), answer: func([]byte) error {
					if tries++; tries < 5 {
						return errBusy
					}
					cancel()
					return nil
				}},
			}
		})
		result := []byte("once")
		b.fetch = func(context.Context, []string) (*unlock.Result, error) {
			return &unlock.Result{Passphrases: map[string][]byte{m.config.Volumes[0].UUID: result}}, nil
		}
		b.run(ctx)
		if tries != 5 || strange != 1 || string(result) != "\x00\x00\x00\x00" {
			t.Errorf("%d tries, %d strange ones, left %q", tries, strange, result)
		}
	})
}

func patch(t *testing.T, disk string, at int64, text string) {
	t.Helper()
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte(text), at); errors.Join(err, f.Close()) != nil {
		t.Fatal(err)
	}
}

// TestPatchIsNull: the header that TestMismatch makes is what it says.
func TestPatchIsNull(t *testing.T) {
	disk := t.TempDir() + "/disk"
	format(t, disk, "--type", "luks1")
	patch(t, disk, 8, "cipher_null\x00")
	out, err := exec.Command("cryptsetup", "luksDump", disk).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "cipher_null") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestNamesChange: device names are given anew at each boot, so that an enrolled
// volume may lie where another one did, or where somebody else's does now.
func TestNamesChange(t *testing.T) {
	m := newMachine(t)
	for i := range m.config.Volumes {
		m.config.Volumes[i].Path = m.disk(i)
	}
	m.save()
	foreign := m.root.path("dev/foreign")
	format(t, foreign)
	for _, move := range [][2]string{{m.disk(0), m.root.path("dev/vdc")}, {m.disk(1), m.disk(0)}, {foreign, m.disk(1)}} {
		if err := os.Rename(move[0], move[1]); err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"vdc", "vda"} {
		if err := os.Symlink("../../"+name, m.root.path("dev/disk/by-uuid", m.config.Volumes[i].UUID)); err != nil {
			t.Fatal(err)
		}
	}
	done := m.boot(t.Context())
	stranger := m.systemd("cryptsetup:" + m.disk(1))
	for i, device := range []string{"dev/vdc", "dev/vda"} {
		uuid := m.config.Volumes[i].UUID
		if got := m.systemd("cryptsetup:" + m.root.path(device)).reads(); got != "+"+passphrase(uuid) {
			t.Fatalf("%s: %q", device, got)
		}
		m.open(uuid, uuid)
	}
	m.ends(done)
	m.became(unlock.Opened, unlock.Opened)
	if got := stranger.now(); got != "" || strings.Contains(m.console(), "NOT ANSWERED") {
		t.Errorf("somebody else's volume: %q; console:\n%s", got, m.console())
	}
}

// TestNoBlobOfOne: a server that has no blob of one volume, as after an enrolment
// that was killed, holds up no other, whoever asks first.
func TestNoBlobOfOne(t *testing.T) {
	m := newMachine(t)
	m.server.blobs = m.server.blobs[:1]
	ctx, cancel := context.WithCancel(t.Context())
	done := m.boot(ctx)
	lost := m.systemd("cryptsetup:" + m.disk(1))
	if got := m.systemd("cryptsetup:" + m.disk(0)).reads(); got != "+"+passphrase(m.config.Volumes[0].UUID) {
		t.Errorf("the other volume: %q", got)
	}
	m.open("root", m.config.Volumes[0].UUID)
	m.saysSoon("has none of volume " + m.config.Volumes[1].UUID)
	if got := lost.now(); got != "" {
		t.Errorf("%q", got)
	}
	if n := m.server.count(); n > 3 {
		t.Errorf("the server was asked %d times", n)
	}
	cancel()
	m.ends(done)
	m.became(unlock.Opened, unlock.Unanswered)
	m.noSecret()
}
