package dmcrypt

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	luksgo "github.com/anatol/luks.go"

	"mandos-escrow/luks"
)

// volume makes a volume that "first" opens in slot 0 and "second" in slot 1.
func volume(t *testing.T, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "volume")
	for name, text := range map[string]string{"volume": "", "first": "first", "second": "second"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(path, 32<<20); err != nil {
		t.Fatal(err)
	}
	run(t, append([]string{"luksFormat", "--key-file", dir + "/first", path}, options...)...)
	run(t, "luksAddKey", "--key-file", dir+"/first", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", path, dir+"/second")
	return path
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("cryptsetup"); err != nil {
		t.Fatal("needs cryptsetup: apt install cryptsetup-bin")
	}
	if out, err := exec.Command("cryptsetup", append([]string{"--batch-mode"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup %q: %v: %s", args, err, out)
	}
}

var (
	type1 = []string{"--type", "luks1", "--pbkdf-force-iterations", "1000"}
	type2 = []string{
		"--type", "luks2", "--pbkdf", "argon2id", "--pbkdf-force-iterations", "4",
		"--pbkdf-memory", "32", "--pbkdf-parallel", "1", "--sector-size", "4096",
	}
)

// unseal opens a volume as Map does, without mapping it, and returns the keyslots it tried.
func unseal(path, passphrase string) (v *luksgo.Volume, tried []int, err error) {
	err = open(path, func(d luksgo.Device, slot int) (err error) {
		tried = append(tried, slot)
		v, err = d.UnsealVolume(slot, []byte(passphrase))
		return err
	})
	return v, tried, err
}

func TestOpen(t *testing.T) {
	for name, options := range map[string][]string{"luks1": type1, "luks2": type2} {
		t.Run(name, func(t *testing.T) {
			path := volume(t, options...)
			h, err := luks.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for passphrase, want := range map[string][]int{"first": {0}, "second": {0, 1}} {
				v, tried, err := unseal(path, passphrase)
				if err != nil {
					t.Fatal(err)
				}
				if v.UUID != h.UUID || v.StorageOffset != uint64(h.Offset) || v.StorageEncryption != h.Cipher ||
					v.StorageSectorSize != uint64(h.SectorSize) || v.BackingDevice != path || !slices.Equal(tried, want) {
					t.Errorf("%s: opened %+v, tried %v", passphrase, v, tried)
				}
			}
			if _, tried, err := unseal(path, "third"); !errors.Is(err, ErrPassphrase) || len(tried) != 2 {
				t.Errorf("wrong passphrase: tried %v, %v", tried, err)
			}
		})
	}
}

func TestPriority(t *testing.T) {
	path := volume(t, type2...)
	run(t, "config", "--priority", "prefer", "--key-slot", "1", path)
	if _, tried, err := unseal(path, "second"); err != nil || !slices.Equal(tried, []int{1}) {
		t.Errorf("preferred: tried %v, %v", tried, err)
	}
	run(t, "config", "--priority", "ignore", "--key-slot", "0", path)
	if _, tried, err := unseal(path, "first"); !errors.Is(err, ErrPassphrase) || !slices.Equal(tried, []int{1}) {
		t.Errorf("ignored: tried %v, %v", tried, err)
	}
}

// TestOtherCopy: luks.go reads the primary copy only; it is given the one that was checked.
func TestOtherCopy(t *testing.T) {
	path := volume(t, type2...)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("torn"), 5000); err != nil {
		t.Fatal(err)
	}
	if _, _, err := unseal(path, "second"); err != nil {
		t.Error(err)
	}
}

func TestMapRefuses(t *testing.T) {
	path := volume(t, type1...)
	for _, name := range []string{"", "../x", "a/b", "-x", ".", "a b", strings.Repeat("x", 128)} {
		if err := Map(path, []byte("first"), name); err == nil || !strings.Contains(err.Error(), "name of a mapping") {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if err := Map(path, []byte("third"), "name"); !errors.Is(err, ErrPassphrase) {
		t.Errorf("wrong passphrase: %v", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("cipher_null\x00"), 8); err != nil {
		t.Fatal(err)
	}
	if err := Map(path, []byte("first"), "name"); !errors.Is(err, luks.ErrUnsupported) {
		t.Errorf("null cipher: %v", err)
	}
}

func TestUnsupportedByLuksGo(t *testing.T) {
	path := volume(t, append(slices.Clone(type1), "--cipher", "aes-cbc-essiv:sha256")...)
	if _, _, err := unseal(path, "first"); err == nil || errors.Is(err, ErrPassphrase) {
		t.Errorf("cbc: %v", err)
	}
}
