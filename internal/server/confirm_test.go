package server

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/internal/api"
	"mandos-escrow/internal/identity"
	"mandos-escrow/store"
)

var backupPassphrase = []byte("a passphrase of the backup 7719")

// makeBackup does what `backup create` does.
func (s *site) makeBackup() []byte {
	s.t.Helper()
	snapshot := must(os.CreateTemp(s.t.TempDir(), "snapshot"))
	defer snapshot.Close()
	if err := s.control.Stream(s.t.Context(), "/v1/backup", snapshot); err != nil {
		s.t.Fatal(err)
	}
	var out bytes.Buffer
	if err := WriteBackup(&out, s.dir, snapshot, backupPassphrase, s.now()); err != nil {
		s.t.Fatal(err)
	}
	return out.Bytes()
}

// moveBack stops the server, puts another folder in the place of its own, and
// starts it again.
func (s *site) moveBack(fill func(dir string) error) {
	s.t.Helper()
	s.stop()
	if err := errors.Join(os.Rename(s.dir, s.dir+".away"), fill(s.dir)); err != nil {
		s.t.Fatal(err)
	}
	s.start()
}

// restoreTo puts a backup in the server's place.
func (s *site) restoreFrom(backup []byte) {
	s.t.Helper()
	s.moveBack(func(dir string) error { return RestoreBackup(bytes.NewReader(backup), dir, backupPassphrase, s.now()) })
}

// servesNothing proves that only a local person gets through, and only to what
// is needed before the confirmation.
func (s *site) servesNothing(h *host, p *person) {
	s.t.Helper()
	if reply, _ := s.boot(h); reply.Released {
		s.t.Error("a machine booted")
	}
	wantCode(s.t, "a machine", h.Call(s.t.Context(), "GET", "/v1/self", nil, nil), api.CodeUnconfirmed)
	for _, rt := range routes {
		method, path, _ := strings.Cut(rt.pattern, " ")
		path = strings.NewReplacer("{id}", h.packetID(), "{uuid}", siteVolume).Replace(path)
		wantCode(s.t, "an administrator, "+rt.pattern, p.Call(s.t.Context(), method, path, struct{}{}, nil), api.CodeUnconfirmed)
		if rt.pattern == "POST /v1/confirm" || rt.pattern == "GET /v1/backup" {
			continue
		}
		err := s.control.Call(s.t.Context(), method, path, bodyOf(rt.pattern), nil)
		if refused := api.CodeOf(err) == api.CodeUnconfirmed; refused == rt.unconfirmed {
			s.t.Errorf("locally, %s: %v", rt.pattern, err)
		}
	}
	var backup strings.Builder
	if err := s.control.Stream(s.t.Context(), "/v1/backup", &backup); err != nil || backup.Len() == 0 {
		s.t.Errorf("a backup: %d bytes, %v", backup.Len(), err)
	}
}

// The routes that answer locally before a confirmation: what a person needs to
// decide, and no more.
func TestUnconfirmedRoutes(t *testing.T) {
	want := "GET /v1/audit, GET /v1/backup, GET /v1/machines, GET /v1/packets, GET /v1/packets/{id}, GET /v1/status, POST /v1/confirm, POST /v1/machines"
	have := map[string]bool{}
	for _, rt := range routes {
		if rt.unconfirmed {
			have[rt.pattern] = true
		}
	}
	for pattern := range strings.SplitSeq(want, ", ") {
		if !have[pattern] {
			t.Errorf("%s does not answer", pattern)
		}
		delete(have, pattern)
	}
	if len(have) > 0 {
		t.Errorf("too many: %v", have)
	}
}

// A machine that was disabled after the backup is enabled in it: nothing is
// given to it before a person has looked, and nothing after they disabled it.
func TestRestoredBackupServesNothing(t *testing.T) {
	s := newSite(t)
	h, kept, p := s.enroll("laptop7", siteVolume), s.enroll("laptop8", "1f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"), s.person("adam", "admin")
	backup := s.makeBackup()
	no := false
	s.change(h, api.Change{Enable: &no})
	s.restoreFrom(backup)
	s.servesNothing(h, p)
	s.restart()
	s.servesNothing(h, p)
	s.change(h, api.Change{Enable: &no}) // as the message of restore says: first disable, then confirm
	if reply, _ := s.boot(kept); reply.Released {
		t.Error("a machine booted before the confirmation")
	}
	s.local("POST", "/v1/confirm", nil, nil)
	wantCode(t, "twice", s.control.Call(t.Context(), "POST", "/v1/confirm", nil, nil), api.CodeConflict)
	if reply, _ := s.boot(h); reply.Released {
		t.Error("a machine that was disabled before the confirmation booted")
	}
	if reply, _ := s.boot(kept); !reply.Released {
		t.Error("a machine did not boot after the confirmation")
	}
	var st api.Status
	if err := p.Call(t.Context(), "GET", "/v1/status", nil, &st); err != nil || st.Epoch != 2 || st.Unconfirmed != "" {
		t.Errorf("%+v, %v", st, err)
	}
	if got := strings.Join(s.actions(""), " "); !strings.Contains(got, "backup.restore") || !strings.Contains(got, "server.confirm") {
		t.Errorf("audit: %s", got)
	}
}

// copyState copies a stopped server's folder: an older disk image, restored
// behind the program's back.
func copyState(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(to, lockFile))
}

// A caller with a newer head stops a server that was set back, whoever they
// are, over restarts, until a person confirms; then all of them go on.
func TestCallerWithNewerHeadStopsTheServer(t *testing.T) {
	for _, who := range []string{"administrator", "machine", "administrator of after the copy"} {
		t.Run(who, func(t *testing.T) {
			s := newSite(t)
			h, p := s.enroll("laptop7", siteVolume), s.person("adam", "admin")
			path := filepath.Join(t.TempDir(), "head")
			s.stop()
			old := filepath.Join(t.TempDir(), "old")
			copyState(t, s.dir, old)
			s.start()
			key := map[string]*identity.Key{"administrator": p.key, "machine": h.running}[who]
			if key == nil {
				key = s.person("late", "admin").key
			}
			witness := s.dial(key, api.NewWitness(path, s.key))
			method, route := "GET", "/v1/status"
			if who == "machine" {
				route = "/v1/self"
			}
			no := false
			s.change(h, api.Change{Enable: &no})
			if err := witness.Call(t.Context(), method, route, nil, nil); err != nil {
				t.Fatal(err)
			}
			s.moveBack(func(dir string) error { copyState(t, old, dir); return nil })
			if reply, _ := s.boot(h); !reply.Released { // nobody has told the server yet
				t.Error("an unknowing server does not serve")
			}
			if err := witness.Call(t.Context(), method, route, nil, nil); err == nil {
				t.Error("a server that was set back served a witness")
			}
			s.servesNothing(h, p)
			s.restart()
			s.servesNothing(h, p)
			s.local("POST", "/v1/confirm", nil, nil)
			if reply, _ := s.boot(h); !reply.Released {
				t.Error("no boot after the confirmation")
			}
			err := witness.Call(t.Context(), method, route, nil, nil)
			if who == "administrator of after the copy" {
				wantCode(t, "who is not known any more", err, api.CodeRefused)
			} else if err != nil {
				t.Errorf("after the confirmation: %v", err)
			}
			if got := strings.Join(s.actions(""), " "); strings.Count(got, "alarm.setback") != 1 {
				t.Errorf("audit: %s", got)
			}
		})
	}
}

// confirm leads past every epoch that was ever shown, also to a server that
// was restored and so is unconfirmed already.
func TestConfirmLeadsPastShownEpochs(t *testing.T) {
	s := newSite(t)
	p := s.person("adam", "admin")
	witness := s.dial(p.key, api.NewWitness(filepath.Join(t.TempDir(), "head"), s.key))
	backup := s.makeBackup()
	for n := range 3 {
		s.restoreFrom(backup)
		wantCode(t, "unconfirmed", witness.Call(t.Context(), "GET", "/v1/status", nil, nil), api.CodeUnconfirmed)
		s.local("POST", "/v1/confirm", nil, nil)
		var st api.Status
		if err := witness.Call(t.Context(), "GET", "/v1/status", nil, &st); err != nil || st.Epoch != uint64(n+2) {
			t.Fatalf("after restore %d: epoch %d, %v", n+1, st.Epoch, err)
		}
		if err := os.RemoveAll(s.dir + ".away"); err != nil {
			t.Fatal(err)
		}
	}
}

// A head of another server, a forged or a damaged one proves nothing.
func TestHeadsThatProveNothing(t *testing.T) {
	s := newSite(t)
	h, other := s.enroll("laptop7", siteVolume), must(identity.Generate())
	mine := must(store.Head{Epoch: 9, Seq: 999, Hash: store.Hash{1}}.Sign(s.server.key))
	for name, signed := range map[string][]byte{
		"another server's": must(store.Head{Epoch: 9, Seq: 999, Hash: store.Hash{1}}.Sign(other)),
		"a forged one":     bytes.Replace(mine, []byte("epoch: 9"), []byte("epoch: 8"), 1),
		"a cut one":        mine[:len(mine)/2],
		"a past one":       must(store.Head{Epoch: 0, Seq: 1, Hash: store.Hash{9}}.Sign(s.server.key)),
	} {
		path := filepath.Join(t.TempDir(), "head")
		if err := os.WriteFile(path, signed, 0o600); err != nil {
			t.Fatal(err)
		}
		_ = s.dial(h.running, api.NewWitness(path, s.key)).Call(t.Context(), "GET", "/v1/self", nil, nil)
		if reply, _ := s.boot(h); !reply.Released {
			t.Fatalf("%s stopped the server", name)
		}
	}
}

func TestDamagedBackups(t *testing.T) {
	s := newSite(t)
	backup := s.makeBackup()
	if head, err := VerifyBackup(bytes.NewReader(backup), backupPassphrase); err != nil || head.Seq == 0 {
		t.Fatalf("%+v, %v", head, err)
	}
	try := func(what string, data, passphrase []byte) {
		t.Helper()
		if _, err := VerifyBackup(bytes.NewReader(data), passphrase); !errors.Is(err, ErrBackup) {
			t.Errorf("%s: %v", what, err)
		}
	}
	try("another passphrase", backup, []byte("another passphrase"))
	try("empty", nil, backupPassphrase)
	for n := range 6 {
		at := len(backup) * (2*n + 1) / 12
		changed := bytes.Clone(backup)
		changed[at] ^= 1
		try(fmt.Sprintf("byte %d of %d flipped", at, len(backup)), changed, backupPassphrase)
		try(fmt.Sprintf("cut to %d of %d", at, len(backup)), backup[:at], backupPassphrase)
	}
	dir := filepath.Join(t.TempDir(), "new")
	if err := RestoreBackup(bytes.NewReader(backup[:len(backup)-1]), dir, backupPassphrase, time.Now()); !errors.Is(err, ErrBackup) {
		t.Errorf("restore: %v", err)
	}
	if _, err := OpenState(dir); !errors.Is(err, ErrState) {
		t.Errorf("half a backup became a server: %v", err)
	}
	if left := names(t, dir); left != lockFile {
		t.Errorf("left %s", left)
	}
	if err := RestoreBackup(bytes.NewReader(backup), s.dir, backupPassphrase, time.Now()); !errors.Is(err, ErrState) {
		t.Errorf("over a server: %v", err)
	}
	if err := RestoreBackup(bytes.NewReader(backup), dir, backupPassphrase, time.Now()); err != nil {
		t.Errorf("again, with the whole backup: %v", err)
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	for _, e := range must(os.ReadDir(dir)) {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

// A backup is sealed: neither the store's key nor the server's is in it.
func TestBackupShowsNoKey(t *testing.T) {
	s := newSite(t)
	backup := s.makeBackup()
	for _, name := range backupFiles {
		if name == storeFile {
			continue
		}
		if data := must(os.ReadFile(filepath.Join(s.dir, name))); bytes.Contains(backup, data) {
			t.Errorf("%s stands in the backup", name)
		}
	}
}
