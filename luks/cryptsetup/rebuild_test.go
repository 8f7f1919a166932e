package cryptsetup

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"mandos-escrow/luks"
)

// lost is a volume whose header is going to be lost.
type lost struct {
	dev         string
	was         *luks.Header
	key, before []byte // before is the whole volume
	r           luks.Rebuild
}

func lose(t *testing.T, typ string, options ...string) *lost {
	t.Helper()
	l := &lost{dev: volume(t, typ, options...)}
	var err error
	if l.key, err = tool.VolumeKey(t.Context(), l.dev, user); err != nil {
		t.Fatal(err)
	}
	add(t, l.dev, boot, 1)
	if typ == luks.Type2 {
		for slot, priority := range map[int]string{0: luks.Prefer, 1: luks.Ignore} {
			if err := tool.SetPriority(t.Context(), l.dev, slot, priority); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := tool.ImportToken(t.Context(), l.dev, []byte(`{"type":"some<token>","keyslots":["0","1"],"said":"\"a\" & \u00e4"}`)); err != nil {
			t.Fatal(err)
		}
	}
	l.was = header(t, l.dev)
	l.r = luks.Rebuild{
		Type: typ, UUID: l.was.UUID, Cipher: l.was.Cipher, KeyBits: l.was.KeyBits, Offset: l.was.Offset, SectorSize: l.was.SectorSize,
		Digest: l.was.Digest, Backup: l.was.Backup(),
	}
	if err := os.Truncate(l.dev, l.was.Offset+4<<20); err != nil {
		t.Fatal(err)
	}
	overwrite(t, l.dev, random(4<<20), l.was.Offset)
	if l.before, err = os.ReadFile(l.dev); err != nil {
		t.Fatal(err)
	}
	return l
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func overwrite(t *testing.T, dev string, with []byte, at int64) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(with, at); err != nil {
		t.Fatal(err)
	}
}

// rebuild writes the header anew and checks what must hold after it.
func (l *lost) rebuild(t *testing.T, r luks.Rebuild) *luks.Header {
	t.Helper()
	if err := tool.Rebuild(t.Context(), l.dev, r, l.key); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(l.dev)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(after[l.was.Offset:], l.before[l.was.Offset:]) {
		t.Fatal("the data changed")
	}
	h := header(t, l.dev)
	if len(h.Slots) != 0 || len(h.Warnings) != 0 {
		t.Errorf("keyslots %+v, warnings %q", h.Slots, h.Warnings)
	}
	if out, err := exec.Command("cryptsetup", "luksDump", l.dev).CombinedOutput(); err != nil {
		t.Errorf("luksDump: %v: %s", err, out)
	}
	if err := tool.AddKey(t.Context(), l.dev, Key{VolumeKey: l.key}, boot, h.Free()[0], true); err != nil {
		t.Fatal(err)
	}
	key, err := tool.VolumeKey(t.Context(), l.dev, boot)
	if err != nil || !bytes.Equal(key, l.key) {
		t.Errorf("the volume key is another one: %v", err)
	}
	if _, err := tool.Test(t.Context(), l.dev, user, AnySlot); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a lost passphrase: %v", err)
	}
	return h
}

// TestRebuild writes headers of all kinds anew, with and without a backup.
func TestRebuild(t *testing.T) {
	for name, c := range map[string]struct {
		typ     string
		options []string
	}{
		"luks1":               {luks.Type1, nil},
		"luks1 essiv":         {luks.Type1, []string{"--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--hash", "sha1"}},
		"luks1 plain 128":     {luks.Type1, []string{"--cipher", "aes-cbc-plain", "--key-size", "128", "--hash", "ripemd160"}},
		"luks1 shortest":      {luks.Type1, []string{"--cipher", "aes-cbc-plain64", "--key-size", "128", "--offset", "1032"}},
		"luks1 offset":        {luks.Type1, []string{"--offset", "16384", "--hash", "sha512"}},
		"luks2 512":           {luks.Type2, []string{"--sector-size", "512"}},
		"luks2 4096":          {luks.Type2, []string{"--sector-size", "4096"}},
		"luks2 2048 essiv":    {luks.Type2, []string{"--sector-size", "2048", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"}},
		"luks2 xts 256":       {luks.Type2, []string{"--key-size", "256", "--hash", "sha512"}},
		"luks2 short offset":  {luks.Type2, []string{"--offset", "8192"}},
		"luks2 far offset":    {luks.Type2, []string{"--offset", "65536"}},
		"luks2 other sizes":   {luks.Type2, []string{"--luks2-metadata-size", "64k", "--luks2-keyslots-size", "1m"}},
		"luks2 label":         {luks.Type2, []string{"--label", "a label", "--subsystem", "a subsystem"}},
		"luks2 argon2 digest": {luks.Type2, []string{"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--hash", "sha512"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lose(t, c.typ, c.options...)
			overwrite(t, l.dev, make([]byte, l.was.Offset), 0)
			h := l.rebuild(t, l.r)
			if err := luks.Match(h, l.was.Enrolled()); err != nil {
				t.Error(err)
			}
			l.sameRest(t, h)

			overwrite(t, l.dev, random(int(l.was.Offset)), 0)
			r := l.r
			r.Backup = nil
			h = l.rebuild(t, r)
			if h.Digest.Hash != l.was.Digest.Hash {
				t.Errorf("digest hash %s, was %s", h.Digest.Hash, l.was.Digest.Hash)
			}

			overwrite(t, l.dev, make([]byte, l.was.Offset), 0)
			r.Digest = luks.Digest{}
			l.rebuild(t, r)
		})
	}
}

// sameRest compares what only a backup knows.
func (l *lost) sameRest(t *testing.T, h *luks.Header) {
	t.Helper()
	if h.Label != l.was.Label || h.Subsystem != l.was.Subsystem || len(h.Image()) != len(l.was.Image()) || len(h.Tokens) != len(l.was.Tokens) {
		t.Errorf("label %q, subsystem %q, %d bytes of header, tokens %v", h.Label, h.Subsystem, len(h.Image()), h.Tokens)
	}
	for i, token := range h.Tokens {
		want := bytes.Replace(l.was.Tokens[i].JSON, []byte(`["0","1"]`), []byte("[]"), 1)
		if !bytes.Equal(token.JSON, want) || len(token.Keyslots) != 0 {
			t.Errorf("token %s, want %s", token.JSON, want)
		}
	}
	// As many keyslots fit as in the volume that was, two of which were taken.
	if got, want := len(h.Free()), len(l.was.Free())+2; got != want {
		t.Errorf("room for %d keyslots, was %d", got, want)
	}
}

// TestRebuildRefuses: nothing is written.
func TestRebuildRefuses(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		l := lose(t, header(t, dev).Type)
		other := lose(t, header(t, dev).Type)
		refuse := func(name, dev string, want error, key []byte, edit func(*luks.Rebuild)) {
			t.Helper()
			before, err := os.ReadFile(dev)
			if err != nil {
				t.Fatal(err)
			}
			r := l.r
			edit(&r)
			if err := tool.Rebuild(t.Context(), dev, r, key); err == nil || want != nil && !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
			if after, err := os.ReadFile(dev); err != nil || !bytes.Equal(before, after) {
				t.Errorf("%s: the device changed, %v", name, err)
			}
		}
		as := func(*luks.Rebuild) {}
		bare := func(r *luks.Rebuild) { r.Backup = nil }
		refuse("its header is there", l.dev, luks.ErrIntact, l.key, as)
		refuse("its header is there, no backup", l.dev, luks.ErrIntact, l.key, bare)
		if l.r.Type == luks.Type2 {
			overwrite(t, l.dev, make([]byte, 4096), 0)
			refuse("its second header is there", l.dev, luks.ErrIntact, l.key, as)
		}
		overwrite(t, l.dev, make([]byte, l.was.Offset), 0)
		refuse("another key", l.dev, luks.ErrVolumeKey, other.key, as)
		refuse("another key, no backup", l.dev, luks.ErrVolumeKey, other.key, bare)
		refuse("half a key", l.dev, luks.ErrVolumeKey, l.key[:32], func(r *luks.Rebuild) { r.Backup, r.Digest = nil, luks.Digest{} })
		for name, edit := range map[string]func(*luks.Rebuild){
			"another backup": func(r *luks.Rebuild) { r.Backup = other.r.Backup },
			"another digest": func(r *luks.Rebuild) { r.Digest = other.r.Digest },
			"another offset": func(r *luks.Rebuild) { r.Offset += 4096 },
			"another cipher": func(r *luks.Rebuild) { r.Cipher = "serpent-xts-plain64" },
			"another UUID":   func(r *luks.Rebuild) { r.UUID = other.r.UUID },
			"cut":            func(r *luks.Rebuild) { r.Backup = r.Backup[:len(r.Backup)-1] },
			"no UUID":        func(r *luks.Rebuild) { r.UUID = "--force" },
			"odd sectors":    func(r *luks.Rebuild) { r.Backup, r.SectorSize = nil, 513 },
			"odd offset":     func(r *luks.Rebuild) { r.Backup, r.Offset = nil, 513 },
		} {
			refuse(name, l.dev, luks.ErrDamaged, l.key, edit)
		}
		refuse("no type", l.dev, luks.ErrUnsupported, l.key, func(r *luks.Rebuild) { r.Type = "luks3" })
		refuse("no cipher", l.dev, luks.ErrUnsupported, l.key, func(r *luks.Rebuild) { r.Cipher = "null-ecb" })
		refuse("luksFormat has no such room", l.dev, nil, l.key, func(r *luks.Rebuild) { r.Backup, r.Offset = nil, 4096 })

		short := filepath.Join(t.TempDir(), "short")
		if err := os.WriteFile(short, make([]byte, l.was.Offset), 0o600); err != nil {
			t.Fatal(err)
		}
		refuse("too short", short, luks.ErrMismatch, l.key, as)
		refuse("too short, no backup", short, luks.ErrMismatch, l.key, bare)
		if err := tool.Rebuild(t.Context(), t.TempDir(), l.r, l.key); err == nil {
			t.Error("a folder: no error")
		}
	})
}

// TestRebuildReadOnly: a device that takes no byte, whoever writes.
func TestRebuildReadOnly(t *testing.T) {
	l := lose(t, luks.Type2)
	fd, err := unix.MemfdCreate("read-only", unix.MFD_ALLOW_SEALING|unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "read-only")
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
		t.Fatal(err)
	}
	dev := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	bare := l.r
	bare.Backup = nil
	for name, r := range map[string]luks.Rebuild{"backup": l.r, "no backup": bare} {
		if err := tool.Rebuild(t.Context(), dev, r, l.key); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestRebuildKilled: after a death at any moment the same call goes through.
func TestRebuildKilled(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		l := lose(t, header(t, dev).Type)
		bare := l.r
		bare.Backup = nil
		for name, c := range map[string]struct {
			r      luks.Rebuild
			script string
		}{
			"before":            {l.r, "kill -9 $$"},
			"first sector":      {l.r, `for dev; do :; done; dd if=/dev/fd/3 of="$dev" bs=512 count=1 conv=notrunc 2>/dev/null; kill -9 $$`},
			"within luksFormat": {bare, `for dev; do :; done; dd if=/dev/zero of="$dev" bs=4096 count=9 conv=notrunc 2>/dev/null; kill -9 $$`},
		} {
			overwrite(t, l.dev, random(int(l.was.Offset)), 0)
			if err := (Tool{Path: script(t, c.script)}).Rebuild(t.Context(), l.dev, c.r, l.key); err == nil {
				t.Fatalf("%s: no error", name)
			}
			l.rebuild(t, c.r)
		}
		// Only here a keyslot is left that nobody opens; the volume key opens the volume all the same.
		overwrite(t, l.dev, make([]byte, l.was.Offset), 0)
		dies := Tool{Path: script(t, `[ "$1" != luksKillSlot ] || kill -9 $$; exec cryptsetup "$@"`)}
		if err := dies.Rebuild(t.Context(), l.dev, bare, l.key); err == nil {
			t.Fatal("no error")
		}
		if err := tool.Rebuild(t.Context(), l.dev, bare, l.key); !errors.Is(err, luks.ErrIntact) {
			t.Errorf("again: %v", err)
		}
		if err := tool.AddKey(t.Context(), l.dev, Key{VolumeKey: l.key}, boot, 1, true); err != nil {
			t.Error(err)
		}
		if !reflect.DeepEqual(header(t, l.dev).Free()[:2], []int{2, 3}) {
			t.Errorf("keyslots %+v", header(t, l.dev).Slots)
		}
	})
}
