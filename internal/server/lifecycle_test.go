package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/api"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// wait makes a machine whose boot waits for an administrator, and lets it.
func (s *site) wait(name string) (*host, <-chan []byte) {
	s.t.Helper()
	h := s.enroll(name, siteVolume)
	no, delay := false, unlock.Duration(5*time.Minute)
	s.change(h, api.Change{Set: &api.MachineSettings{ApprovedByDefault: &no, ApprovalDelay: &delay}})
	conn := must(bootConn(s.address, s.key, h.boot))
	got := make(chan []byte, 1)
	go func() {
		data, _ := bootReply(conn)
		got <- data
	}()
	for deadline := time.Now().Add(5 * time.Second); !strings.Contains(strings.Join(s.actions(string(h.boot.KeyID())), " "), "boot.wait"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatal("the boot does not wait")
		}
	}
	return h, got
}

func TestStopWhileABootWaits(t *testing.T) {
	s := newSite(t)
	h, got := s.wait("laptop7")
	begun := time.Now()
	s.stop()
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("to stop took %s", took)
	}
	if data := <-got; len(data) != 0 {
		t.Errorf("the boot was told %q: a server that stops is no refusal", data)
	}
	if _, err := os.Lstat(Socket(s.dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket stays: %v", err)
	}
	s.start()
	if actions := s.actions(string(h.boot.KeyID())); strings.Contains(strings.Join(actions, " "), "boot.refuse") {
		t.Errorf("audit: %v", actions)
	}
}

func TestApproveAndDenyABootThatWaits(t *testing.T) {
	for _, approve := range []bool{true, false} {
		s := newSite(t)
		h, got := s.wait("laptop7")
		s.change(h, api.Change{Approve: &approve})
		if reply := must(unlock.ParseReply(<-got)); reply.Released != approve {
			t.Errorf("approved %t, released %t", approve, reply.Released)
		}
	}
}

func TestDisableABootThatWaits(t *testing.T) {
	for name, change := range map[string]api.Change{"disabled": {Enable: new(bool)}, "removed": {Remove: true}} {
		s := newSite(t)
		h, got := s.wait("laptop7")
		s.change(h, change)
		if reply := must(unlock.ParseReply(<-got)); reply.Released {
			t.Errorf("%s: released", name)
		}
	}
}

func TestSecondServerOnTheSameState(t *testing.T) {
	s := newSite(t)
	if _, err := OpenState(s.dir); !errors.Is(err, store.ErrInUse) || !strings.Contains(err.Error(), "a server is running on it") {
		t.Errorf("%v", err)
	}
	master, private := siteMaster()
	settings := Settings{Name: "x", Listen: []string{":1"}, Addresses: []string{"127.0.0.1:1"}}
	if err := Init(s.dir, settings, Master{master.Public(), private}, time.Now()); !errors.Is(err, ErrState) {
		t.Errorf("init: %v", err)
	}
	s.local("GET", "/v1/status", nil, nil)
}

func TestPortInUse(t *testing.T) {
	s := newSite(t)
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	dir := filepath.Join(t.TempDir(), "other")
	newState(t, dir)
	state := must(OpenState(dir))
	defer state.Close()
	state.Settings.Listen = []string{s.address}
	err := New(state, slog.New(slog.DiscardHandler), time.Now).Run(t.Context())
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), s.address) {
		t.Errorf("%v", err)
	}
	if _, err := os.Lstat(Socket(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a control socket stands: %v", err)
	}
}

func TestControlSocket(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), strings.Repeat("a-long-name/", 12), "srv") // longer than sun_path has room
	s := &site{t: t, dir: dir, people: map[string]*person{}}
	s.address = newState(t, dir)
	// a dead socket of a server that was killed
	l := must(listenControl(dir))
	l.Close()
	if len(Socket(dir)) <= 108 {
		t.Fatal("the path is short")
	}
	s.start()
	defer s.stop()
	info := must(os.Lstat(Socket(dir)))
	if info.Mode().Type() != os.ModeSocket || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %s", info.Mode())
	}
	var st api.Status
	s.local("GET", "/v1/status", nil, &st)
	if st.Name != "srv" || st.KeyID != s.key {
		t.Errorf("%+v", st)
	}
	s.invite("anna", "viewer")
	events := s.audit()
	if actor := events[len(events)-1].Actor; actor != LocalActor() {
		t.Errorf("the audit log names %q", actor)
	}
}

// Files of a state folder are their owner's alone, whatever the umask.
func TestStateIsPrivate(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	s := newSite(t)
	for _, name := range []string{".", keysFolder, storeKeyFile, storeFile, settingsFile, lockFile, keysFolder + "/" + unlock.TLSPrivateKeyFile} {
		if info := must(os.Stat(filepath.Join(s.dir, name))); info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %s", name, info.Mode())
		}
	}
}

func TestInit(t *testing.T) {
	master, private := siteMaster()
	good := Settings{Name: "srv", Listen: []string{":7625"}, Addresses: []string{"srv.example.org:7625"}}
	for name, change := range map[string]func(*Settings){
		"no name":          func(s *Settings) { s.Name = "" },
		"control in name":  func(s *Settings) { s.Name = "a\x1bb" },
		"long name":        func(s *Settings) { s.Name = strings.Repeat("x", api.MaxName+1) },
		"no listen":        func(s *Settings) { s.Listen = nil },
		"no address":       func(s *Settings) { s.Addresses = nil },
		"no port":          func(s *Settings) { s.Addresses = []string{"srv"} },
		"port 0":           func(s *Settings) { s.Addresses = []string{"srv:0"} },
		"nine addresses":   func(s *Settings) { s.Addresses = strings.Fields(strings.Repeat("a:1 ", 9)) },
		"17 listen":        func(s *Settings) { s.Listen = strings.Fields(strings.Repeat(":1 ", 17)) },
		"control in host":  func(s *Settings) { s.Addresses = []string{"a\nb:1"} },
		"listen, no colon": func(s *Settings) { s.Listen = []string{"7625"} },
	} {
		dir, settings := filepath.Join(t.TempDir(), "srv"), good
		change(&settings)
		if err := Init(dir, settings, Master{master.Public(), private}, time.Now()); err == nil {
			t.Errorf("%s: made", name)
		}
		if _, err := OpenState(dir); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "letter"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Init(dir, good, Master{master.Public(), private}, time.Now()); !errors.Is(err, ErrState) || names(t, dir) != "letter lock" {
		t.Errorf("somebody's folder: %v, %s", err, names(t, dir))
	}
}

// An Init that was cut off is made anew; a store that was in use, whose
// settings are gone, is never thrown away.
func TestInitAfterALoss(t *testing.T) {
	master, private := siteMaster()
	settings := Settings{Name: "srv", Listen: []string{":7625"}, Addresses: []string{"srv.example.org:7625"}}
	again := func(dir string) error { return Init(dir, settings, Master{master.Public(), private}, time.Now()) }
	dir := filepath.Join(t.TempDir(), "cut off")
	newState(t, dir)
	made := []string{settingsFile, storeFile, storeKeyFile} // in the reverse order of their making
	for n := range made {
		for _, name := range made[:n+1] {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := again(dir); err != nil {
			t.Errorf("without %v: %v", made[:n+1], err)
		}
	}
	s := newSite(t)
	h := s.enroll("laptop7", siteVolume)
	backup := s.makeBackup()
	s.stop()
	conf := filepath.Join(s.dir, settingsFile)
	kept := must(os.ReadFile(conf))
	key := must(os.ReadFile(filepath.Join(s.dir, storeKeyFile)))
	for _, lost := range []string{settingsFile, storeKeyFile} {
		if err := os.Remove(filepath.Join(s.dir, lost)); err != nil {
			t.Fatal(err)
		}
		if err := again(s.dir); !errors.Is(err, ErrState) {
			t.Errorf("init without %s: %v", lost, err)
		}
		if err := RestoreBackup(strings.NewReader(string(backup)), s.dir, backupPassphrase, time.Now()); !errors.Is(err, ErrState) {
			t.Errorf("restore without %s: %v", lost, err)
		}
	}
	if err := errors.Join(os.WriteFile(conf, kept, 0o600), os.WriteFile(filepath.Join(s.dir, storeKeyFile), key, 0o600)); err != nil {
		t.Fatal(err)
	}
	s.start()
	if reply, _ := s.boot(h); !reply.Released {
		t.Error("something was lost")
	}
	// a restore that was cut off before its last file may be run again
	fresh := filepath.Join(t.TempDir(), "fresh")
	for range 2 {
		if err := RestoreBackup(strings.NewReader(string(backup)), fresh, backupPassphrase, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(fresh, settingsFile)); err != nil {
			t.Fatal(err)
		}
	}
}

// The service manager is told when the server is ready, and when it stops.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn := must(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}))
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	s := newSite(t)
	s.stop()
	var got string
	for range 2 {
		buf := make([]byte, 100)
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err := conn.Read(buf)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		got += string(buf[:n]) + " "
	}
	if got != "READY=1 STOPPING=1 " {
		t.Errorf("%q", got)
	}
}

// A command that finds no running server serves itself.
func TestInProcess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "srv")
	newState(t, dir)
	state := must(OpenState(dir))
	defer state.Close()
	s := New(state, slog.New(slog.DiscardHandler), time.Now)
	c := api.InProcess(s.Handler(true, nil2actor))
	var st api.Status
	if err := c.Call(context.Background(), "GET", "/v1/status", nil, &st); err != nil || st.Epoch != 1 || st.Name != "srv" {
		t.Errorf("%+v, %v", st, err)
	}
	wantCode(t, "nowhere", c.Call(context.Background(), "GET", "/v1/nowhere", nil, nil), api.CodeRefused)
}
