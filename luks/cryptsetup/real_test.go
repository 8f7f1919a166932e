package cryptsetup

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/luks"
)

var (
	tool = Tool{}
	user = []byte("the user's passphrase")
	boot = []byte("boot passphrase, random in real life")
)

// each runs a test on a LUKS1 and a LUKS2 volume that user opens in slot 0.
func each(t *testing.T, test func(t *testing.T, dev string)) {
	for _, typ := range []string{luks.Type1, luks.Type2} {
		t.Run(typ, func(t *testing.T) { t.Parallel(); test(t, volume(t, typ)) })
	}
}

func volume(t *testing.T, typ string, options ...string) string {
	t.Helper()
	if _, err := exec.LookPath("cryptsetup"); err != nil {
		t.Fatal("needs cryptsetup: apt install cryptsetup-bin")
	}
	dev := filepath.Join(t.TempDir(), "volume")
	if err := os.WriteFile(dev, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dev, 64<<20); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"luksFormat", "-q", "--type", typ, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file=-", dev}, options...)
	cmd := exec.Command("cryptsetup", args...)
	cmd.Stdin = bytes.NewReader(user)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dev
}

func header(t *testing.T, dev string) *luks.Header {
	t.Helper()
	h, err := luks.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func add(t *testing.T, dev string, passphrase []byte, slot int) {
	t.Helper()
	if err := tool.AddKey(t.Context(), dev, Key{Passphrase: user}, passphrase, slot, true); err != nil {
		t.Fatal(err)
	}
}

func TestVolumeKey(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		key, err := tool.VolumeKey(t.Context(), dev, user)
		if err != nil {
			t.Fatal(err)
		}
		if len(key) != 64 || header(t, dev).VerifyVolumeKey(key) != nil {
			t.Errorf("got %d bytes", len(key))
		}
		if _, err := tool.VolumeKey(t.Context(), dev, []byte("wrong")); !errors.Is(err, ErrPassphrase) {
			t.Errorf("wrong passphrase: %v", err)
		}
	})
}

// TestVolumeKeyOfAny: of keys of any length, with hashes that are seldom seen, from a volume, from its header alone, and from a
// LUKS2 volume of whose header only the secondary copy is left. A passphrase of an unbound keyslot gives no key.
func TestVolumeKeyOfAny(t *testing.T) {
	for _, c := range []struct {
		typ, cipher, bits, hash string
	}{
		{luks.Type1, "aes-cbc-plain", "128", "sm3"},
		{luks.Type1, "aes-cbc-benbi", "192", "SHA512-224"},
		{luks.Type1, "aes-xts-essiv:sha256", "512", "whirlpool"},
		{luks.Type2, "aes-cbc-essiv:sha256", "128", "sm3"},
		{luks.Type2, "aes-cbc-plain64", "192", "rmd160"},
		{luks.Type2, "aes-xts-plain", "256", "sha512-256"},
	} {
		t.Run(c.typ+" "+c.cipher+" "+c.hash, func(t *testing.T) {
			t.Parallel()
			dev := volume(t, c.typ, "--cipher", c.cipher, "--key-size", c.bits, "--hash", c.hash)
			folder := filepath.Dir(dev)
			backup, other := filepath.Join(folder, "backup"), filepath.Join(folder, "other")
			if out, err := exec.Command("cryptsetup", "-q", "luksHeaderBackup", "--header-backup-file", backup, dev).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			h := header(t, dev)
			key, err := tool.VolumeKey(t.Context(), dev, user)
			if err != nil || h.VerifyVolumeKey(key) != nil || len(key)*8 != h.KeyBits {
				t.Fatalf("%d bytes, %v", len(key), err)
			}
			if alone, err := tool.VolumeKey(t.Context(), backup, user); err != nil || !bytes.Equal(alone, key) {
				t.Errorf("of the header alone: %v", err)
			}
			if c.typ == luks.Type1 {
				return
			}
			if err := os.WriteFile(other, boot, 0o600); err != nil {
				t.Fatal(err)
			}
			add := exec.Command("cryptsetup", "-q", "luksAddKey", "--unbound", "--key-size", "256", "--key-slot", "9", "--pbkdf", "pbkdf2",
				"--pbkdf-force-iterations", "1000", dev, other)
			if out, err := add.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if wrong, err := tool.VolumeKey(t.Context(), dev, boot); err == nil {
				t.Errorf("an unbound keyslot gave a key of %d bytes", len(wrong))
			}
			f, err := os.OpenFile(dev, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt(make([]byte, 4096), 0)
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			if h = header(t, dev); len(h.Warnings) != 1 {
				t.Errorf("warnings %q", h.Warnings)
			}
			if again, err := tool.VolumeKey(t.Context(), dev, user); err != nil || !bytes.Equal(again, key) {
				t.Errorf("by the secondary copy: %v", err)
			}
			if h = header(t, dev); len(h.Warnings) != 0 {
				t.Errorf("cryptsetup has not mended the primary copy: %q", h.Warnings)
			}
		})
	}
}

func TestTest(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		add(t, dev, boot, 3)
		for _, c := range []struct {
			passphrase []byte
			slot, want int
			err        error
		}{
			{user, AnySlot, 0, nil},
			{user, 0, 0, nil},
			{boot, AnySlot, 3, nil},
			{boot, 3, 3, nil},
			{user, 3, 0, ErrPassphrase},
			{boot, 0, 0, ErrPassphrase},
			{user, 1, 0, ErrSlot},
			{[]byte("wrong"), AnySlot, 0, ErrPassphrase},
			{append(bytes.Clone(user), '\n'), AnySlot, 0, ErrPassphrase},
		} {
			got, err := tool.Test(t.Context(), dev, c.passphrase, c.slot)
			if got != c.want || !errors.Is(err, c.err) {
				t.Errorf("%q in slot %d: %d, %v; want %d, %v", c.passphrase, c.slot, got, err, c.want, c.err)
			}
		}
	})
}

// TestExactBytes: what is a newline or a NUL for others is a byte of the passphrase here.
func TestExactBytes(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		for i, p := range []string{"line\nline\n", "line\nline", "a\x00b", "a\x00", "\n", strings.Repeat("\x00\xff", 256), strings.Repeat("k", 4096)} {
			slot := i + 1
			add(t, dev, []byte(p), slot)
			if got, err := tool.Test(t.Context(), dev, []byte(p), AnySlot); got != slot || err != nil {
				t.Errorf("%.20q: slot %d, %v; want %d", p, got, err, slot)
			}
			if _, err := tool.Test(t.Context(), dev, []byte(p[:len(p)-1]+"?"), slot); !errors.Is(err, ErrPassphrase) {
				t.Errorf("%.20q, changed: %v", p, err)
			}
		}
	})
}

func TestAddKey(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		key, err := tool.VolumeKey(t.Context(), dev, user)
		if err != nil {
			t.Fatal(err)
		}
		before := header(t, dev)
		for _, c := range []struct {
			name string
			key  Key
			new  []byte
			slot int
			err  error
		}{
			{"wrong passphrase", Key{Passphrase: boot}, boot, 1, ErrPassphrase},
			{"wrong volume key", Key{VolumeKey: bytes.Repeat([]byte{1}, 64)}, boot, 1, luks.ErrVolumeKey},
			{"short volume key", Key{VolumeKey: key[:32]}, boot, 1, luks.ErrVolumeKey},
			{"slot in use", Key{Passphrase: user}, boot, 0, ErrSlot},
			{"slot 32", Key{Passphrase: user}, boot, 32, ErrSlot},
			{"any slot", Key{Passphrase: user}, boot, AnySlot, ErrSlot},
		} {
			if err := tool.AddKey(t.Context(), dev, c.key, c.new, c.slot, true); !errors.Is(err, c.err) {
				t.Errorf("%s: %v, want %v", c.name, err, c.err)
			}
		}
		for name, k := range map[string]Key{"no key": {}, "both keys": {Passphrase: user, VolumeKey: key}} {
			if err := tool.AddKey(t.Context(), dev, k, boot, 1, true); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		if err := tool.AddKey(t.Context(), dev, Key{Passphrase: user}, nil, 1, true); err == nil {
			t.Error("an empty passphrase was added")
		}
		if got := header(t, dev); !bytes.Equal(got.Backup(), before.Backup()) {
			t.Error("a refused call changed the header")
		}
		if err := tool.AddKey(t.Context(), dev, Key{VolumeKey: key}, boot, 6, true); err != nil {
			t.Fatal(err)
		}
		s, _ := header(t, dev).Slot(6)
		if got, err := tool.Test(t.Context(), dev, boot, 6); got != 6 || err != nil || s.KDF.Type != "pbkdf2" || s.KDF.Iterations != 1000 {
			t.Errorf("slot %d, %v, kdf %+v", got, err, s.KDF)
		}
	})
}

// TestAddKeyDefault leaves the KDF to cryptsetup; the wrapper only makes it cheap, for the test's sake.
func TestAddKeyDefault(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		cost := "--pbkdf-force-iterations 2000"
		if header(t, dev).Type == luks.Type2 {
			cost = "--pbkdf-force-iterations 4 --pbkdf-memory 64"
		}
		quick := Tool{Path: script(t, `verb=$1; shift; exec cryptsetup "$verb" `+cost+` "$@"`)}
		if err := quick.AddKey(t.Context(), dev, Key{Passphrase: user}, boot, 1, false); err != nil {
			t.Fatal(err)
		}
		h := header(t, dev)
		want := luks.KDF{Type: "pbkdf2", Iterations: 2000}
		if h.Type == luks.Type2 {
			want = luks.KDF{Type: "argon2id", Time: 4, Memory: 64}
		}
		s, _ := h.Slot(1)
		if got := s.KDF; got.Type != want.Type || got.Iterations != want.Iterations || got.Time != want.Time || got.Memory != want.Memory {
			t.Errorf("kdf %+v, want %+v", got, want)
		}
	})
}

// TestAddKeyErased brings a volume back that has no keyslot left.
func TestAddKeyErased(t *testing.T) {
	dev := volume(t, luks.Type2)
	key, err := tool.VolumeKey(t.Context(), dev, user)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cryptsetup", "-q", "luksErase", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := tool.AddKey(t.Context(), dev, Key{VolumeKey: key}, boot, 0, true); err != nil {
		t.Fatal(err)
	}
	if got, err := tool.Test(t.Context(), dev, boot, AnySlot); got != 0 || err != nil {
		t.Errorf("slot %d, %v", got, err)
	}
}

func TestFull(t *testing.T) {
	for typ, options := range map[string][]string{luks.Type1: nil, luks.Type2: {"--luks2-keyslots-size", "1m"}} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			dev := volume(t, typ, options...)
			free := header(t, dev).Free()
			for _, slot := range free {
				add(t, dev, boot, slot)
			}
			if err := tool.AddKey(t.Context(), dev, Key{Passphrase: user}, boot, len(free)+1, true); !errors.Is(err, ErrFull) {
				t.Errorf("after %d: %v", len(free), err)
			}
		})
	}
}

func TestKillSlot(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		ctx := t.Context()
		key, err := tool.VolumeKey(ctx, dev, user)
		if err != nil {
			t.Fatal(err)
		}
		refuse := func(name string, slot int, k Key, want error) {
			t.Helper()
			before := header(t, dev)
			if err := tool.KillSlot(ctx, dev, slot, k); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
			if !bytes.Equal(header(t, dev).Backup(), before.Backup()) {
				t.Errorf("%s: the header changed", name)
			}
		}
		refuse("last by passphrase", 0, Key{Passphrase: user}, ErrLastSlot)
		refuse("last by volume key", 0, Key{VolumeKey: key}, ErrLastSlot)
		add(t, dev, boot, 2)
		refuse("own", 2, Key{Passphrase: boot}, ErrOwnSlot)
		refuse("not active", 5, Key{Passphrase: boot}, ErrSlot)
		refuse("wrong passphrase", 0, Key{Passphrase: []byte("wrong")}, ErrPassphrase)
		refuse("wrong volume key", 0, Key{VolumeKey: bytes.Repeat([]byte{1}, 64)}, luks.ErrVolumeKey)
		if err := tool.KillSlot(ctx, dev, 0, Key{Passphrase: boot}); err != nil {
			t.Fatal(err)
		}
		if _, err := tool.Test(ctx, dev, user, AnySlot); !errors.Is(err, ErrPassphrase) {
			t.Errorf("removed passphrase: %v", err)
		}
		if err := tool.AddKey(ctx, dev, Key{Passphrase: boot}, user, 1, true); err != nil {
			t.Fatal(err)
		}
		if err := tool.KillSlot(ctx, dev, 2, Key{VolumeKey: key}); err != nil {
			t.Fatal(err)
		}
		if h := header(t, dev); len(h.Slots) != 1 || h.Slots[0].Number != 1 {
			t.Errorf("keyslots %+v", h.Slots)
		}
	})
}

// TestKillSlotBeside: no passphrase is needed, and another keyslot is.
func TestKillSlotBeside(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		ctx := t.Context()
		add(t, dev, boot, 2)
		before := header(t, dev)
		for name, c := range map[string]struct {
			slot, keep int
			want       error
		}{
			"itself":          {2, 2, ErrLastSlot},
			"not active":      {5, 0, ErrSlot},
			"nothing remains": {2, 5, ErrSlot},
			"no keyslot":      {2, -1, ErrSlot},
		} {
			if err := tool.KillSlotBeside(ctx, dev, c.slot, c.keep); !errors.Is(err, c.want) || !bytes.Equal(header(t, dev).Backup(), before.Backup()) {
				t.Errorf("%s: %v, want %v", name, err, c.want)
			}
		}
		if err := tool.KillSlotBeside(ctx, dev, 2, 0); err != nil {
			t.Fatal(err)
		}
		if h := header(t, dev); len(h.Slots) != 1 || h.Slots[0].Number != 0 {
			t.Errorf("keyslots %+v", h.Slots)
		}
	})
}

// TestKillSlotUnbound: a keyslot of another key is no reason to call ours not the last.
func TestKillSlotUnbound(t *testing.T) {
	dev := volume(t, luks.Type2)
	next := filepath.Join(t.TempDir(), "next")
	if err := os.WriteFile(next, boot, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("cryptsetup", "-q", "luksAddKey", "--unbound", "--key-size", "256", "--key-slot", "1",
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", dev, next).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := tool.KillSlot(t.Context(), dev, 0, Key{Passphrase: user}); !errors.Is(err, ErrLastSlot) {
		t.Errorf("got %v", err)
	}
	if err := tool.KillSlotBeside(t.Context(), dev, 0, 1); !errors.Is(err, ErrSlot) {
		t.Errorf("beside it: %v", err)
	}
	if slot, err := tool.Test(t.Context(), dev, boot, AnySlot); err == nil {
		t.Errorf("a passphrase of an unbound keyslot opened %d", slot)
	}
}

func TestTokensAndPriority(t *testing.T) {
	ctx := context.Background()
	dev := volume(t, luks.Type2)
	add(t, dev, boot, 1)
	text := []byte(`{"type":"mandos-escrow","keyslots":["1"],"role":"boot"}`)
	for want := range 2 {
		if id, err := tool.ImportToken(ctx, dev, text); id != want || err != nil {
			t.Fatalf("token %d, %v; want %d", id, err, want)
		}
	}
	if got, err := tool.ExportToken(ctx, dev, 1); err != nil || !bytes.Equal(bytes.TrimSpace(got), text) {
		t.Errorf("exported %s, %v", got, err)
	}
	if err := tool.RemoveToken(ctx, dev, 0); err != nil {
		t.Fatal(err)
	}
	if err := tool.RemoveToken(ctx, dev, 0); err == nil || errors.Is(err, ErrPassphrase) {
		t.Errorf("removed a token that is not there: %v", err)
	}
	if h := header(t, dev); len(h.Tokens) != 1 || h.Tokens[0].ID != 1 {
		t.Errorf("tokens %+v", h.Tokens)
	}
	if id, err := tool.ImportToken(ctx, dev, text); id != 0 || err != nil {
		t.Errorf("token %d, %v; want 0 again", id, err)
	}
	if err := tool.SetPriority(ctx, dev, 1, luks.Prefer); err != nil {
		t.Fatal(err)
	}
	if s, _ := header(t, dev).Slot(1); s.Priority != luks.Prefer {
		t.Errorf("priority %s", s.Priority)
	}
	if err := tool.SetPriority(ctx, dev, 9, luks.Prefer); err == nil {
		t.Error("priority of a keyslot that is not there")
	}
	if _, err := tool.ImportToken(ctx, dev, []byte("{}")); err == nil {
		t.Error("a token without a type was imported")
	}
}

func TestOnlyLUKS2(t *testing.T) {
	dev := volume(t, luks.Type1)
	if err := tool.SetPriority(t.Context(), dev, 0, luks.Prefer); !errors.Is(err, luks.ErrUnsupported) {
		t.Errorf("priority: %v", err)
	}
	if _, err := tool.ImportToken(t.Context(), dev, []byte(`{"type":"x","keyslots":[]}`)); !errors.Is(err, luks.ErrUnsupported) {
		t.Errorf("token: %v", err)
	}
}

func TestDeadline(t *testing.T) {
	dev := volume(t, luks.Type1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	slow := Tool{Path: script(t, "exec sleep 60")}
	begun := time.Now()
	if _, err := slow.Test(ctx, dev, user, AnySlot); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("took %v", took)
	}
}

func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cryptsetup")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKeyringToken: plain cryptsetup open tries tokens first, and so reports success for any passphrase when a keyring token
// opens the volume. (Where the kernel has no keyring for us the attack does not exist, and the test holds all the same.)
func TestKeyringToken(t *testing.T) {
	dev := volume(t, luks.Type2)
	id, err := unix.AddKey("user", "mandos-escrow-test", user, unix.KEY_SPEC_SESSION_KEYRING)
	if err == nil {
		defer func() { _, _ = unix.KeyctlInt(unix.KEYCTL_REVOKE, id, 0, 0, 0) }()
	}
	token := []byte(`{"type":"luks2-keyring","keyslots":["0"],"key_description":"mandos-escrow-test"}`)
	if _, err := tool.ImportToken(t.Context(), dev, token); err != nil {
		t.Fatal(err)
	}
	if slot, err := tool.Test(t.Context(), dev, []byte("wrong"), AnySlot); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a wrong passphrase opened keyslot %d, %v", slot, err)
	}
	if err := tool.AddKey(t.Context(), dev, Key{Passphrase: []byte("wrong")}, boot, 1, true); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a keyslot was added with a wrong passphrase: %v", err)
	}
	if _, err := tool.VolumeKey(t.Context(), dev, []byte("wrong")); !errors.Is(err, ErrPassphrase) {
		t.Errorf("the volume key came out with a wrong passphrase: %v", err)
	}
}
