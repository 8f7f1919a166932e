package cryptsetup

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mandos-escrow/luks"
)

func TestVersion(t *testing.T) {
	if v, err := tool.Version(t.Context()); err != nil || !strings.HasPrefix(v, "2.") {
		t.Errorf("%q, %v", v, err)
	}
	for _, c := range []struct {
		says string
		want string
		err  error
	}{
		{"cryptsetup 2.6.1 flags: UDEV", "2.6.1", nil},
		{"cryptsetup 2.10.0-rc1", "2.10.0-rc1", nil},
		{"cryptsetup 3.0", "3.0", nil},
		{"cryptsetup 2.5.9", "", ErrVersion},
		{"cryptsetup 1.7.3", "", ErrVersion},
	} {
		v, err := Tool{Path: script(t, "echo '"+c.says+"'")}.Version(t.Context())
		if v != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: %q, %v; want %q, %v", c.says, v, err, c.want, c.err)
		}
	}
	for _, says := range []string{"", "cryptsetup", "cryptsetup two", "cryptsetup 2.x", "grep 2.6.1"} {
		if v, err := (Tool{Path: script(t, "echo '"+says+"'")}).Version(t.Context()); err == nil {
			t.Errorf("%q was taken for version %s", says, v)
		}
	}
}

func TestMissing(t *testing.T) {
	_, err := Tool{Path: filepath.Join(t.TempDir(), "none")}.Version(t.Context())
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "install cryptsetup") {
		t.Errorf("got %v", err)
	}
}

// TestNoSecretInSight runs every command through a wrapper that notes its arguments and environment.
func TestNoSecretInSight(t *testing.T) {
	seen := filepath.Join(t.TempDir(), "seen")
	real, err := exec.LookPath("cryptsetup")
	if err != nil {
		t.Fatal("needs cryptsetup: apt install cryptsetup-bin")
	}
	wrapped := Tool{Path: script(t, `{ tr '\0' '\n' </proc/$$/cmdline; tr '\0' '\n' </proc/$$/environ; } >>`+seen+"\nexec "+real+` "$@"`)}
	t.Setenv("SECRET_OF_THE_PARENT", string(user))
	dev := volume(t, luks.Type2)
	ctx := t.Context()
	key, err := wrapped.VolumeKey(ctx, dev, user)
	if err != nil {
		t.Fatal(err)
	}
	third := []byte("a third passphrase")
	_, err = wrapped.Test(ctx, dev, user, AnySlot)
	for _, err := range []error{
		err,
		wrapped.AddKey(ctx, dev, Key{Passphrase: user}, boot, 1, true),
		wrapped.AddKey(ctx, dev, Key{VolumeKey: key}, third, 2, true),
		wrapped.KillSlot(ctx, dev, 0, Key{Passphrase: boot}),
		wrapped.KillSlot(ctx, dev, 1, Key{VolumeKey: key}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(seen)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(text, []byte("LC_ALL=C\n")); n != 7 {
		t.Errorf("%d commands seen, want 7:\n%s", n, text)
	}
	for _, secret := range [][]byte{user, boot, third, key} {
		for _, form := range []string{string(secret), hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret)} {
			if bytes.Contains(text, []byte(form)) {
				t.Errorf("%q is in sight", form)
			}
		}
	}
}

// TestErrors: what cryptsetup says is quoted, its secrets are not.
func TestErrors(t *testing.T) {
	dev := volume(t, luks.Type1)
	noisy := Tool{Path: script(t, `printf 'bad \033[2J thing\nand more\n' >&2; echo secret; exit 4`)}
	_, err := noisy.VolumeKey(t.Context(), dev, user)
	if err == nil || !strings.Contains(err.Error(), `exit status 4: "bad \x1b[2J thing; and more"`) || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
	flood := Tool{Path: script(t, `head -c 200000 /dev/zero >&2; head -c 200000 /dev/zero`)}
	if _, err := flood.VolumeKey(t.Context(), dev, user); err == nil || len(err.Error()) > 20000 {
		t.Errorf("flood: an error of %d bytes", len(err.Error()))
	}
	if _, err := tool.Test(t.Context(), dev, make([]byte, maxSecret+1), AnySlot); err == nil {
		t.Error("a passphrase that no pipe holds was taken")
	}
	if _, err := tool.Test(t.Context(), dev, make([]byte, maxSecret), AnySlot); !errors.Is(err, ErrPassphrase) {
		t.Errorf("the longest passphrase: %v", err)
	}
	if _, err := tool.Test(t.Context(), dev, nil, AnySlot); err == nil {
		t.Error("an empty passphrase was taken")
	}
}

// TestLyingTool: success is believed only when the header shows it.
func TestLyingTool(t *testing.T) {
	dev := volume(t, luks.Type2)
	lying := Tool{Path: script(t, "echo 'Key slot 0 unlocked.'")}
	ctx := t.Context()
	add(t, dev, boot, 1)
	_, tokenErr := lying.ImportToken(ctx, dev, []byte("{}"))
	for name, err := range map[string]error{
		"add":      lying.AddKey(ctx, dev, Key{Passphrase: user}, boot, 2, true),
		"kill":     lying.KillSlot(ctx, dev, 1, Key{Passphrase: user}),
		"priority": lying.SetPriority(ctx, dev, 1, luks.Prefer),
		"token":    tokenErr,
	} {
		if err == nil || !strings.Contains(err.Error(), "does not show the change") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := lying.Test(ctx, dev, user, 1); !errors.Is(err, ErrSlot) {
		t.Errorf("another slot opened: %v", err)
	}
	mute := Tool{Path: script(t, "true")}
	if _, err := mute.Test(ctx, dev, user, AnySlot); err == nil {
		t.Error("silence was taken for success")
	}
}

func TestParseDump(t *testing.T) {
	good := "UUID: x\nMK bits:       \t144\nMK dump:\t00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f \n\t\t10 11 \n"
	key, err := parseDump([]byte(good), 18)
	if err != nil || hex.EncodeToString(key) != "000102030405060708090a0b0c0d0e0f1011" {
		t.Errorf("%x, %v", key, err)
	}
	for name, c := range map[string]struct {
		text string
		want int
	}{
		"nothing":   {"", 18},
		"no dump":   {"MK bits: 144\n", 18},
		"too short": {good, 32},
		"too long":  {good, 16},
		"no hex":    {strings.Replace(good, "0a", "0g", 1), 18},
		"more text": {good + "done\n", 18},
	} {
		if key, err := parseDump([]byte(c.text), c.want); err == nil {
			t.Errorf("%s: %x, %v", name, key, err)
		}
	}
}

// TestHold: a lock outlives its parent for as long as the child runs.
func TestHold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	lock, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	// The child leaves a child of its own that lives on, as an orphaned cryptsetup would, until its input ends.
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	held := Tool{Path: script(t, "cat "+fifo+" >/dev/null 2>&1 &\necho cryptsetup 2.6.1"), Hold: lock}
	if _, err := held.Version(t.Context()); err != nil {
		t.Fatal(err)
	}
	lock.Close()
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := syscall.Flock(int(other.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); !errors.Is(err, syscall.EWOULDBLOCK) {
		t.Errorf("lock while the child runs: %v", err)
	}
	end, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	end.Close()
	if err := syscall.Flock(int(other.Fd()), syscall.LOCK_EX); err != nil {
		t.Errorf("lock after it: %v", err)
	}
}
