package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/unlock"
)

const strangerUUID = "01234567-89ab-cdef-0123-456789abcdef"

func TestExitCodes(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(t *testing.T, f *fixture)
		args    []string
		code    int
		stderr  string // must be in it
	}{
		"released":           {nil, []string{"--print", "--once"}, exitDone, ""},
		"without --once":     {nil, []string{"--print"}, exitDone, ""},
		"volume named":       {func(t *testing.T, f *fixture) { f.addVolume(t) }, []string{"--print", "--once", "--volume", strangerUUID}, exitDone, "warning: volume not found"},
		"--once, no --print": {nil, []string{"--once"}, exitUsage, "--print"},
		"volume, no --print": {nil, []string{"--volume", strangerUUID}, exitUsage, "--print"},
		"print and check":    {nil, []string{"--print", "--check-mapped"}, exitUsage, "--check-mapped"},
		"unknown flag":       {nil, []string{"--print", "--frobnicate"}, exitUsage, "frobnicate"},
		"argument":           {nil, []string{"--print", "disk"}, exitUsage, `"disk"`},
		"several volumes":    {func(t *testing.T, f *fixture) { f.addVolume(t) }, []string{"--print", "--once"}, exitUsage, strangerUUID},
		"another volume":     {nil, []string{"--print", "--once", "--volume", strangerUUID}, exitUsage, "not enrolled"},
		"no configuration":   {func(t *testing.T, f *fixture) { f.remove(t, unlock.ConfigFile) }, []string{"--print", "--once"}, exitFailed, unlock.ConfigFile},
		"no key":             {func(t *testing.T, f *fixture) { f.remove(t, unlock.PrivateKeyFile) }, []string{"--print", "--once"}, exitFailed, unlock.PrivateKeyFile},
		"configuration cut":  {func(t *testing.T, f *fixture) { f.write(t, unlock.ConfigFile, []byte("mandos-escrow-unlock: 1\n")) }, []string{"--print"}, exitIntegrity, "machine-key-id"},
		"another's TLS key": {func(t *testing.T, f *fixture) {
			pem, err := newKey(t).PrivatePEM()
			if err != nil {
				t.Fatal(err)
			}
			f.write(t, unlock.TLSPrivateKeyFile, pem)
		}, []string{"--print"}, exitIntegrity, unlock.TLSPrivateKeyFile},
		"damaged key":           {func(t *testing.T, f *fixture) { f.write(t, unlock.PrivateKeyFile, []byte("x")) }, []string{"--print"}, exitIntegrity, unlock.PrivateKeyFile},
		"blob not ours":         {func(_ *testing.T, f *fixture) { f.store.give([]byte("not a blob")) }, []string{"--print", "--once"}, exitIntegrity, "not a sealed blob"},
		"blob of other volume":  {func(t *testing.T, f *fixture) { f.store.give(f.blob(t, strangerUUID)) }, []string{"--print", "--once"}, exitIntegrity, "none of volume"},
		"disabled":              {func(_ *testing.T, f *fixture) { f.store.enable(false) }, []string{"--print", "--once"}, exitRefused, "server srv1: refused"},
		"server down":           {func(t *testing.T, f *fixture) { f.config.Servers[0].Addresses = []string{"127.0.0.1:1"}; f.save(t) }, []string{"--print", "--once"}, exitFailed, "connection refused"},
		"server with other key": {func(t *testing.T, f *fixture) { f.config.Servers[0].KeyID = newKey(t).KeyID(); f.save(t) }, []string{"--print", "--once"}, exitFailed, "another key than the pinned one"},
		"volume formatted anew": {func(t *testing.T, f *fixture) { format(t, f.disk) }, []string{"--print"}, exitMismatch, "not the volume that was enrolled"},
		"not LUKS any more":     {func(t *testing.T, f *fixture) { f.write(t, "disk.img", make([]byte, 1<<20)) }, []string{"--print"}, exitMismatch, "not a LUKS volume"},
		"other volume key":      {func(t *testing.T, f *fixture) { f.config.Volumes[0].Digest = strings.Repeat("00", 32); f.save(t) }, []string{"--print"}, exitMismatch, "digest"},
		"other data offset":     {func(t *testing.T, f *fixture) { f.config.Volumes[0].Offset++; f.save(t) }, []string{"--print"}, exitMismatch, "offset"},
		"exchanged meanwhile": {func(t *testing.T, f *fixture) {
			f.store.set(func(s *store) { s.during = func() { format(t, f.disk) } })
		}, []string{"--print", "--once"}, exitMismatch, "not the volume"},
		"volume nowhere": {func(t *testing.T, f *fixture) { f.remove(t, "disk.img") }, []string{"--print", "--once"}, exitDone, "warning: volume not found"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			if c.prepare != nil {
				c.prepare(t, f)
			}
			code, stdout, stderr := program(t, append([]string{"--config", f.dir}, c.args...)...)
			if code != c.code || !strings.Contains(stderr, c.stderr) {
				t.Errorf("exit code %d, want %d; stderr %q, want %q", code, c.code, stderr, c.stderr)
			}
			want := ""
			if c.code == exitDone {
				want = f.passphrase
			}
			if stdout != want {
				t.Errorf("stdout %q", stdout)
			}
			if strings.Contains(stderr, f.passphrase) || c.code == exitDone && c.stderr == "" && stderr != "" {
				t.Errorf("stderr %q", stderr)
			}
		})
	}
}

// TestCheckMapped on a host that has none of our volumes open: only what is
// wrong with the configuration counts, and no key is needed.
func TestCheckMapped(t *testing.T) {
	f := newFixture(t)
	f.remove(t, unlock.PrivateKeyFile)
	if code, out, diag := program(t, "--config", f.dir, "--check-mapped"); code != exitDone || out != "" || diag != "" {
		t.Errorf("%d, %q, %q", code, out, diag)
	}
	f.write(t, unlock.ConfigFile, []byte("mandos-escrow-unlock: 1\n"))
	if code, _, diag := program(t, "--config", f.dir, "--check-mapped"); code != exitIntegrity || !strings.Contains(diag, "machine-key-id") {
		t.Errorf("%d, %q", code, diag)
	}
	f.remove(t, unlock.ConfigFile)
	if code, _, diag := program(t, "--config", f.dir, "--check-mapped"); code != exitFailed || !strings.Contains(diag, unlock.ConfigFile) {
		t.Errorf("%d, %q", code, diag)
	}
}

// addVolume enrolls a second one that is nowhere.
func (f *fixture) addVolume(t *testing.T) {
	second := f.config.Volumes[0]
	second.UUID, second.Path = strangerUUID, ""
	f.config.Volumes = append(f.config.Volumes, second)
	f.store.give(f.blob(t, f.config.Volumes[0].UUID), f.blob(t, strangerUUID))
	f.save(t)
}

func (f *fixture) remove(t *testing.T, name string) {
	if err := os.Remove(filepath.Join(f.dir, name)); err != nil {
		t.Fatal(err)
	}
}

func TestHelpAndVersion(t *testing.T) {
	if code, out, diag := program(t, "--help"); code != exitDone || out != usage || diag != "" {
		t.Errorf("--help: %d, %q, %q", code, out, diag)
	}
	if code, out, _ := program(t, "--version"); code != exitDone || !strings.HasPrefix(out, "mandos-escrow-unlock ") {
		t.Errorf("--version: %d, %q", code, out)
	}
}

// TestTriesForEver: refused again and again it says so once, and ends when the
// machine is enabled.
func TestTriesForEver(t *testing.T) {
	f := newFixture(t)
	f.store.enable(false)
	time.AfterFunc(4*time.Second, func() { f.store.enable(true) })
	code, stdout, stderr := program(t, "--config", f.dir, "--print")
	if code != exitDone || stdout != f.passphrase {
		t.Errorf("%d, %q", code, stdout)
	}
	if stderr != "mandos-escrow-unlock: server srv1: refused\n" {
		t.Errorf("stderr %q", stderr)
	}
}

func TestReporterKeepsQuiet(t *testing.T) {
	var out bytes.Buffer
	report := reporter(func(format string, a ...any) { out.WriteString(a[0].(string) + ": " + a[1].(string) + "\n") })
	one, two := unlock.Server{Name: "one", KeyID: "1"}, unlock.Server{Name: "two", KeyID: "2"}
	for range 3 {
		report(one, unlock.ErrRefused)
		report(two, os.ErrDeadlineExceeded)
	}
	report(one, os.ErrDeadlineExceeded)
	report(one, unlock.ErrRefused)
	if want := "one: refused\ntwo: i/o timeout\none: i/o timeout\none: refused\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}
