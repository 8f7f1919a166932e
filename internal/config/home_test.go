package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mandos-escrow/escrow"
	"mandos-escrow/internal/identity"
	"mandos-escrow/internal/seal"
	"mandos-escrow/recovery"
	"mandos-escrow/unlock"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func newHome(t *testing.T) (Home, *identity.Key) {
	t.Helper()
	home := Home{filepath.Join(t.TempDir(), "home")}
	return home, must(home.Make())
}

func membership(name string, key byte, trustee string) Membership {
	policy := must(escrow.NewPolicy(1, 1, nil, []escrow.Trustee{{Fingerprint: strings.Repeat(trustee, 40), Name: "master"}}))
	id := identity.KeyID(strings.Repeat("0"+string('0'+key), 32))
	return Membership{unlock.Server{Name: name, KeyID: id, Addresses: []string{"192.0.2.1:7625"}}, "alice", policy}
}

func TestHomeIsItsOwnersAlone(t *testing.T) {
	home, key := newHome(t)
	mustDo(t, home.Join(membership("srv", 1, "A")))
	mustDo(t, home.KeepRequest("abcd", []byte("signed"), []byte("one-off")))
	mustDo(t, filepath.WalkDir(home.Dir, func(path string, d fs.DirEntry, err error) error {
		info := must(d.Info())
		if want := map[bool]os.FileMode{true: 0o700, false: 0o600}[d.IsDir()]; info.Mode().Perm() != want {
			t.Errorf("%s has mode %o", path, info.Mode().Perm())
		}
		return err
	}))
	if again := must(home.Make()); again.KeyID() != key.KeyID() {
		t.Error("a second identity was made")
	}
	if again := must(home.Key()); again.KeyID() != key.KeyID() {
		t.Error("another identity was read")
	}
}

func TestNoHome(t *testing.T) {
	home := Home{filepath.Join(t.TempDir(), "none")}
	if _, err := home.Key(); !errors.Is(err, ErrHome) || !strings.Contains(err.Error(), "admin login") {
		t.Error(err)
	}
	if m, err := home.Memberships(); err != nil || len(m) != 0 {
		t.Errorf("%v, %v", m, err)
	}
	if _, err := home.FindRequest("abcd"); !errors.Is(err, ErrNoRequest) {
		t.Error(err)
	}
	if _, err := os.Lstat(home.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("looking made a folder")
	}
}

func TestDamagedIdentity(t *testing.T) {
	home, _ := newHome(t)
	path := filepath.Join(home.Dir, unlock.TLSPrivateKeyFile)
	whole := content(t, path)
	for _, text := range []string{"", whole[:40], whole + whole, strings.Replace(whole, "PRIVATE KEY", "PUBLIC KEY", 2)} {
		write(t, path, text, 0o600)
		if _, err := home.Make(); !errors.Is(err, identity.ErrKey) || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", text, err)
		}
		if content(t, path) != text {
			t.Error("a damaged key was replaced")
		}
	}
}

func TestMemberships(t *testing.T) {
	home, _ := newHome(t)
	b, a := membership("b", 1, "A"), membership("a", 2, "B")
	mustDo(t, errors.Join(home.Join(b), home.Join(a), home.Join(b)))
	got := must(home.Memberships())
	if len(got) != 2 || got[0].Server.Name != "a" || got[1].Server.KeyID != b.Server.KeyID || got[1].Policy.Digest() != b.Policy.Digest() || got[1].Name != "alice" {
		t.Errorf("%+v", got)
	}
}

// What is pinned stays pinned, whatever comes later, also when the file that
// holds it is damaged.
func TestPinnedPolicyStays(t *testing.T) {
	home, _ := newHome(t)
	first, other := membership("srv", 1, "A"), membership("srv", 1, "B")
	mustDo(t, home.Join(first))
	if err := home.Join(other); !errors.Is(err, ErrHome) || !strings.Contains(err.Error(), "another policy") {
		t.Error(err)
	}
	if got := must(home.Memberships()); got[0].Policy.Digest() != first.Policy.Digest() {
		t.Error("the pin was replaced")
	}
	path := home.serverFile(first.Server.KeyID)
	whole := content(t, path)
	for cut := range whole {
		write(t, path, whole[:cut], 0o600)
		if err := home.Join(other); err == nil || content(t, path) != whole[:cut] {
			t.Fatalf("cut to %d: %v", cut, err)
		}
		if _, err := home.Memberships(); err == nil {
			t.Fatalf("cut to %d: read", cut)
		}
	}
}

func TestFindRequest(t *testing.T) {
	home, _ := newHome(t)
	for _, id := range []string{"aabb11", "aabb22", "cc"} {
		mustDo(t, home.KeepRequest(id, []byte("signed "+id), []byte("one-off")))
	}
	for word, want := range map[string]string{"aabb11": "aabb11", "aabb2": "aabb22", "AABB1": "aabb11", "c": "cc"} {
		if id, err := home.FindRequest(word); err != nil || id != want {
			t.Errorf("%q: %q, %v", word, id, err)
		}
	}
	for word, part := range map[string]string{"aabb": "aabb11\n  aabb22", "": "has none", "d": "has none", "../x": "has none"} {
		if id, err := home.FindRequest(word); !errors.Is(err, ErrNoRequest) || !strings.Contains(err.Error(), part) {
			t.Errorf("%q: %q, %v", word, id, err)
		}
	}
	signed, oneOff, err := home.Request("cc")
	if err != nil || string(signed) != "signed cc" || string(oneOff) != "one-off" {
		t.Errorf("%q, %q, %v", signed, oneOff, err)
	}
}

// An id may come from a server: it must not lead out of the home.
func TestRequestFilesStayInTheHome(t *testing.T) {
	home, _ := newHome(t)
	outside := filepath.Join(filepath.Dir(home.Dir), "x.key")
	write(t, outside, "not ours", 0o600)
	for _, id := range []string{"../../x", "..", ".", "", "/etc/passwd", "../x"} {
		mustDo(t, home.ForgetRequest(id))
	}
	if content(t, outside) != "not ours" {
		t.Error("a file outside was touched")
	}
}

func TestForgetRequest(t *testing.T) {
	home, _ := newHome(t)
	mustDo(t, home.KeepRequest("aa", []byte("signed"), []byte("the one-off key")))
	mustDo(t, home.KeepRelease("aa", []byte("release")))
	if got := must(home.Release("aa")); string(got) != "release" {
		t.Errorf("%q", got)
	}
	held := must(os.Open(home.requestFile("aa", "key"))) // shows what its blocks have
	defer held.Close()
	mustDo(t, home.ForgetUncollected("aa"))
	if _, err := home.FindRequest("aa"); err != nil {
		t.Errorf("a release that was not delivered is gone: %v", err)
	}
	mustDo(t, home.ForgetRequest("aa"))
	left := make([]byte, 15)
	if n, _ := held.ReadAt(left, 0); n != 15 || string(left) != strings.Repeat("\x00", 15) {
		t.Errorf("the key's blocks have %q", left[:n])
	}
	if n := names(t, filepath.Join(home.Dir, requestsFolder)); n != "" {
		t.Errorf("left %s", n)
	}
	mustDo(t, home.ForgetRequest("aa"))
	if _, err := home.Release("aa"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestForgetOver(t *testing.T) {
	home, key := newHome(t)
	oneOff := must(seal.Generate("one-off", now))
	keep := func(id string, expires time.Time) {
		t.Helper()
		r := recovery.Request{
			ID: id, PacketID: id, Payload: escrow.ForPassphrase, VolumeUUID: "u", Machine: "m", Requester: "bob", RequesterID: key.KeyID(),
			Reason: "r", Created: now, Expires: expires, Recipient: oneOff.Public(),
		}
		mustDo(t, home.KeepRequest(id, must(r.Sign(key)), []byte("one-off")))
	}
	over, open, collected := strings.Repeat("0a", 16), strings.Repeat("0b", 16), strings.Repeat("0c", 16)
	keep(over, now.Add(time.Hour))
	keep(open, now.Add(time.Hour+1*time.Second))
	keep(collected, now.Add(time.Hour))
	mustDo(t, home.KeepRelease(collected, []byte("release")))
	mustDo(t, home.ForgetOver(now.Add(time.Hour)))
	for id, there := range map[string]bool{over: false, open: true, collected: true} {
		if _, err := home.FindRequest(id); (err == nil) != there {
			t.Errorf("%s: %v", id, err)
		}
		if _, err := os.Lstat(home.requestFile(id, "key")); (err == nil) != there {
			t.Errorf("key of %s: %v", id, err)
		}
	}
}

// An identity that was interrupted while it was made is made whole; one that
// is whole stays.
func TestMakeIdentity(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "id")
	whole := must(MakeIdentity(dir, "laptop7", now))
	again := must(MakeIdentity(dir, "laptop7", now))
	if again.Key.KeyID() != whole.Key.KeyID() || again.Seal.Public().Fingerprint() != whole.Seal.Public().Fingerprint() {
		t.Error("a second identity was made")
	}
	for _, name := range []string{unlock.TLSPrivateKeyFile, unlock.TLSPublicKeyFile, unlock.PrivateKeyFile, unlock.PublicKeyFile} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	mustDo(t, os.Remove(filepath.Join(dir, unlock.TLSPrivateKeyFile)))
	if _, err := LoadIdentity(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half an identity: %v", err)
	}
	if made := must(MakeIdentity(dir, "laptop7", now)); made.Key.KeyID() == whole.Key.KeyID() {
		t.Error("the key that is gone came back")
	}
}

func TestForgetLeftovers(t *testing.T) {
	home := Home{filepath.Join(t.TempDir(), "a [folder]")}
	if _, err := home.Make(); err != nil {
		t.Fatal(err)
	}
	mustDo(t, home.KeepRequest("aabb", []byte("not a request"), []byte("one-off")))
	orphan, draft := home.requestFile("ccdd", "key"), home.requestFile(".ccdd", "key.123")
	for _, path := range []string{orphan, draft} {
		mustDo(t, os.WriteFile(path, []byte("one-off"), 0o600))
	}
	mustDo(t, home.ForgetOver(time.Now()))
	if _, err := os.Lstat(orphan); err != nil {
		t.Errorf("a key that is being written was deleted: %v", err)
	}
	mustDo(t, home.ForgetOver(time.Now().Add(time.Hour)))
	for _, path := range []string{orphan, draft} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if id, err := home.FindRequest("aabb"); err != nil || id != "aabb" {
		t.Errorf("the request is gone: %q, %v", id, err)
	}
}

// A home that served is gone, keys and all, and nothing beside it.
func TestDestroy(t *testing.T) {
	dir := t.TempDir()
	home := Home{Dir: filepath.Join(dir, "rescue")}
	if _, err := home.Make(); err != nil {
		t.Fatal(err)
	}
	if err := home.KeepRequest("0a", []byte("request"), []byte("key")); err != nil {
		t.Fatal(err)
	}
	if ids, err := home.Requests(); err != nil || len(ids) != 1 || ids[0] != "0a" {
		t.Errorf("%v, %v", ids, err)
	}
	for range 2 {
		if err := home.Destroy(); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("%v, %v", left, err)
		}
	}
}
