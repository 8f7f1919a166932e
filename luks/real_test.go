package luks

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const passphrase = "correct horse"

var (
	cheap2 = []string{"--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	cheap1 = []string{"--type", "luks1", "--pbkdf-force-iterations", "1000"}
	argon  = []string{"--type", "luks2", "--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1"}
)

// cryptsetup runs the real one, with the passphrase as its standard input.
func cryptsetup(t *testing.T, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("cryptsetup"); err != nil {
		t.Fatal("needs cryptsetup: apt install cryptsetup-bin")
	}
	cmd := exec.Command("cryptsetup", append([]string{"--batch-mode"}, args...)...)
	cmd.Stdin = strings.NewReader(passphrase)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustRun(t *testing.T, args ...string) string {
	t.Helper()
	out, err := cryptsetup(t, args...)
	if err != nil {
		t.Fatalf("cryptsetup %q: %v: %s", args, err, out)
	}
	return out
}

// realSize has room for the longest header.
const realSize = 160 << 20

// format makes a volume.
func format(t *testing.T, options ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "volume")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, realSize); err != nil {
		t.Fatal(err)
	}
	mustRun(t, append([]string{"luksFormat", "--key-file=-", path}, options...)...)
	return path
}

// dumped is what luksDump says, to compare.
func dumped(out, name string) string {
	for line := range strings.Lines(out) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && key == name {
			return strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "[bytes]"))
		}
	}
	return ""
}

// TestReal reads what the real cryptsetup writes, as cryptsetup itself describes it.
func TestReal(t *testing.T) {
	for _, c := range []struct {
		name    string
		options []string
		cipher  string
		bits    int
	}{
		{"luks1", cheap1, "aes-xts-plain64", 512},
		{"luks1 cbc", append(slices.Clone(cheap1), "-c", "aes-cbc-essiv:sha256", "-s", "256"), "aes-cbc-essiv:sha256", 256},
		{"luks1 cbc-plain 128", append(slices.Clone(cheap1), "-c", "aes-cbc-plain", "-s", "128"), "aes-cbc-plain", 128},
		{"luks1 offset", append(slices.Clone(cheap1), "--offset", "65536"), "aes-xts-plain64", 512},
		{"luks1 align", append(slices.Clone(cheap1), "--align-payload", "8"), "aes-xts-plain64", 512},
		{"luks2 argon2id", argon, "aes-xts-plain64", 512},
		{"luks2 argon2i", append(slices.Clone(argon), "--pbkdf", "argon2i"), "aes-xts-plain64", 512},
		{"luks2 pbkdf2", cheap2, "aes-xts-plain64", 512},
		{"luks2 256", append(slices.Clone(cheap2), "-s", "256"), "aes-xts-plain64", 256},
		{"luks2 xts-plain", append(slices.Clone(cheap2), "-c", "aes-xts-plain"), "aes-xts-plain", 512},
		{"luks2 cbc", append(slices.Clone(cheap2), "-c", "aes-cbc-essiv:sha256", "-s", "128"), "aes-cbc-essiv:sha256", 128},
		{"luks2 cbc 192", append(slices.Clone(cheap2), "-c", "aes-cbc-plain64", "-s", "192"), "aes-cbc-plain64", 192},
		{"luks2 512 sector", append(slices.Clone(cheap2), "--sector-size", "512"), "aes-xts-plain64", 512},
		{"luks2 4096 sector", append(slices.Clone(cheap2), "--sector-size", "4096"), "aes-xts-plain64", 512},
		{"luks2 label", append(slices.Clone(cheap2), "--label", "lvm root", "--subsystem", "sub"), "aes-xts-plain64", 512},
		{"luks2 offset", append(slices.Clone(cheap2), "--offset", "65536"), "aes-xts-plain64", 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := format(t, c.options...)
			h, err := ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if h.Cipher != c.cipher || h.KeyBits != c.bits || len(h.Slots) != 1 || !h.Slots[0].Bound || len(h.Warnings) != 0 {
				t.Errorf("cipher %s, %d bits, slots %+v, warnings %q", h.Cipher, h.KeyBits, h.Slots, h.Warnings)
			}
			compare(t, h, path)
			key := volumeKey(t, path, c.bits/8)
			if err := h.VerifyVolumeKey(key); err != nil {
				t.Error(err)
			}
			key[0] ^= 1
			if err := h.VerifyVolumeKey(key); err == nil {
				t.Error("a wrong volume key was taken")
			}
		})
	}
}

// TestRealHashes: every hash that cryptsetup takes, by the names that people give it, in both formats; and the modes of ciphers
// that any kernel has. What it makes and we refuse, is refused for its name.
func TestRealHashes(t *testing.T) {
	type row struct{ hash, cipher, bits string }
	modes := []row{
		{"", "aes-xts-plain", "256"},
		{"", "aes-xts-essiv:sha256", "512"},
		{"", "aes-cbc-benbi", "256"},
		{"", "aes-cbc-plain64", "128"},
		{"", "aes-cbc-essiv:sha256", "192"},
		{"", "aes-cbc-plain", "256"},
	}
	var rows []row
	for i, name := range slices.Concat(slices.Sorted(maps.Keys(hashSizes)), slices.Sorted(maps.Keys(otherNames)), []string{"SHA512", "SM3", "BLAKE2b512"}) {
		r := modes[i%len(modes)]
		r.hash = name
		rows = append(rows, r)
	}
	for i, r := range rows {
		for _, typ := range [][]string{cheap1, cheap2} {
			if i >= len(hashSizes) && (i%2 == 0) != (typ[1] == Type1) { // another name in one format only
				continue
			}
			t.Run(typ[1]+" "+r.hash, func(t *testing.T) {
				t.Parallel()
				path := format(t, append(slices.Clone(typ), "--hash", r.hash, "--cipher", r.cipher, "--key-size", r.bits)...)
				h, err := ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				want := r.hash
				if typ[1] == Type1 { // there it writes them in lower case
					want = strings.ToLower(want)
				}
				if h.Digest.Hash != want || h.Slots[0].AFHash != want || h.Cipher != r.cipher || fmt.Sprint(h.KeyBits) != r.bits {
					t.Errorf("hashes %q and %q, cipher %s, %d bits", h.Digest.Hash, h.Slots[0].AFHash, h.Cipher, h.KeyBits)
				}
				if err := h.VerifyVolumeKey(volumeKey(t, path, h.KeyBits/8)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	for _, r := range []row{
		{"md5", "aes-xts-plain64", "512"},
		{"md4", "aes-xts-plain64", "512"},
		{"sha256", "aes-ecb", "256"},
		{"sha256", "aes-cbc-null", "256"},
		{"sha256", "aes-xts-null", "512"},
		{"sha256", "aes-ctr-plain64", "256"},
		{"sha256", "aes-cbc-essiv:md5", "256"},
		{"sha256", "aes-xts-benbi", "512"},
		{"sha256", "aes-xts-plain64be", "512"},
		{"sha256", "aes-cbc-eboiv", "256"},
	} {
		t.Run("refused "+r.hash+" "+r.cipher, func(t *testing.T) {
			t.Parallel()
			path := format(t, append(slices.Clone(cheap2), "--hash", r.hash, "--cipher", r.cipher, "--key-size", r.bits)...)
			if _, err := ReadFile(path); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "not one of those allowed") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestRealSizes: every size of the metadata, with sizes of the keyslots area from the least to the most. The volume is read by
// its secondary copy as well, wherever that stands: after the primary was wiped, and after a bit of its JSON was turned.
func TestRealSizes(t *testing.T) {
	areas := []string{"0", "252k", "260k", "1m", "5m", "16m", "17m", "32m", "128m"} // 0: what is left before the data
	for i, size := range headerSizes {
		t.Run(fmt.Sprintf("%dk %s", size>>10, areas[i]), func(t *testing.T) {
			t.Parallel()
			path := format(t, append(slices.Clone(cheap2), "--luks2-metadata-size", fmt.Sprintf("%dk", size>>10), "--luks2-keyslots-size", areas[i])...)
			h, err := ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if h.areas.start != 2*size || len(h.Warnings) != 0 {
				t.Errorf("keyslots begin at %d, warnings %q", h.areas.start, h.Warnings)
			}
			compare(t, h, path)
			key := volumeKey(t, path, 64)
			if err := h.VerifyVolumeKey(key); err != nil {
				t.Error(err)
			}
			backup := filepath.Join(t.TempDir(), "backup")
			mustRun(t, "luksHeaderBackup", "--header-backup-file", backup, path)
			if alone, err := ReadHeaderFile(backup); err != nil || !alone.Alone || Match(alone, h.Enrolled()) != nil {
				t.Errorf("backup: %v", err)
			}
			for name, damage := range map[string]func(f *os.File) error{
				"wiped":  func(f *os.File) error { _, err := f.WriteAt(make([]byte, size), 0); return err },
				"turned": func(f *os.File) error { _, err := f.WriteAt([]byte{'{' ^ 1}, binSize); return err },
			} {
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(damage(f), f.Close()); err != nil {
					t.Fatal(err)
				}
				again, err := ReadFile(path)
				if err != nil || len(again.Warnings) != 1 || !bytes.Equal(again.backup[binUsed:], h.backup[binUsed:]) {
					t.Fatalf("%s: %v", name, err)
				}
				if again := volumeKey(t, path, 64); !bytes.Equal(again, key) { // which has it mended
					t.Errorf("%s: another volume key", name)
				}
			}
		})
	}
}

func compare(t *testing.T, h *Header, path string) {
	t.Helper()
	dump := mustRun(t, "luksDump", path)
	if got := dumped(dump, "UUID"); got != h.UUID {
		t.Errorf("uuid %s, cryptsetup says %s", h.UUID, got)
	}
	want := map[string]string{"offset": fmt.Sprint(h.Offset), "sector": fmt.Sprintf("%d", h.SectorSize)}
	if h.Type == Type1 {
		want = map[string]string{"Payload offset": fmt.Sprint(h.Offset / 512), "MK bits": fmt.Sprint(h.KeyBits)}
	} else if h.Label != "" {
		want["Label"], want["Subsystem"] = h.Label, h.Subsystem
	}
	for name, value := range want {
		if got := dumped(dump, name); got != value {
			t.Errorf("%s: read %s, cryptsetup says %s", name, value, got)
		}
	}
}

func volumeKey(t *testing.T, path string, size int) []byte {
	t.Helper()
	out := mustRun(t, "luksDump", "--dump-volume-key", "--key-file=-", path)
	_, digits, _ := strings.Cut(out, "MK dump:")
	var key []byte
	for _, f := range strings.Fields(digits)[:size] {
		var b byte
		if _, err := fmt.Sscanf(f, "%02x", &b); err != nil {
			t.Fatal(err)
		}
		key = append(key, b)
	}
	return key
}

// TestRealFull adds keyslots until cryptsetup finds no room: Free must have told how many.
func TestRealFull(t *testing.T) {
	for name, options := range map[string][]string{
		"luks1":            cheap1,
		"luks2 small area": append(slices.Clone(cheap2), "--luks2-keyslots-size", "1040384"), // 4 of 258048 and a bit
		"luks2 256 bits":   append(slices.Clone(cheap2), "--luks2-keyslots-size", "512k", "-s", "256"),
	} {
		add := []string{"luksAddKey", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file=-"}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := format(t, options...)
			next := filepath.Join(t.TempDir(), "next")
			if err := os.WriteFile(next, []byte("next"), 0o600); err != nil {
				t.Fatal(err)
			}
			h, err := ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			free := h.Free()
			added := 0
			for {
				if out, err := cryptsetup(t, append(slices.Clone(add), path, next)...); err != nil {
					t.Logf("full after %d: %s", added, out)
					break
				}
				added++
			}
			if added != len(free) || added == 0 {
				t.Errorf("added %d, Free promised %v", added, free)
			}
			mustRun(t, "luksKillSlot", "--key-file=-", path, "2")
			if h, err = ReadFile(path); err != nil || !slices.Equal(h.Free(), []int{2}) {
				t.Fatalf("free %v, %v, want 2", h.Free(), err)
			}
			mustRun(t, append(slices.Clone(add), path, next)...)
		})
	}
}

// TestRealOdd reads volumes that went through more than luksFormat.
func TestRealOdd(t *testing.T) {
	read := func(t *testing.T, path string) *Header {
		t.Helper()
		h, err := ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	t.Run("converted", func(t *testing.T) {
		path := format(t, cheap1...)
		key := volumeKey(t, path, 64)
		mustRun(t, "convert", "--type", "luks2", path)
		h := read(t, path)
		if h.Type != Type2 || len(h.Digest.Value) != digest1Size || h.VerifyVolumeKey(key) != nil {
			t.Errorf("type %s, digest of %d bytes, key: %v", h.Type, len(h.Digest.Value), h.VerifyVolumeKey(key))
		}
	})
	t.Run("unbound", func(t *testing.T) {
		path := format(t, cheap2...)
		next := filepath.Join(t.TempDir(), "next")
		if err := os.WriteFile(next, []byte("next"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustRun(t, append([]string{"luksAddKey", "--unbound", "--key-size", "384", "--key-slot", "4", path, next}, cheap2[2:]...)...)
		h := read(t, path)
		if s, ok := h.Slot(4); !ok || s.Bound || s.KeyBits != 384 || h.KeyBits != 512 {
			t.Errorf("keyslots %+v, key of %d bits", h.Slots, h.KeyBits)
		}
	})
	t.Run("erased", func(t *testing.T) {
		path := format(t, cheap2...)
		was := read(t, path).Enrolled()
		mustRun(t, "luksErase", path)
		h := read(t, path)
		if len(h.Slots) != 0 || Match(h, was) != nil {
			t.Errorf("keyslots %+v, %v", h.Slots, Match(h, was))
		}
	})
	t.Run("reencryption", func(t *testing.T) {
		path := format(t, cheap2...)
		mustRun(t, append([]string{"reencrypt", "--init-only", "--force-offline-reencrypt", "--key-file=-", path}, cheap2[2:]...)...)
		if _, err := ReadFile(path); err == nil || !strings.Contains(err.Error(), "online-reencrypt") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("detached", func(t *testing.T) {
		dir := t.TempDir()
		for _, typ := range [][]string{cheap1, cheap2} {
			header := filepath.Join(dir, typ[1])
			data := format(t, append(slices.Clone(typ), "--header", header)...)
			if _, err := ReadFile(header); err == nil || !strings.Contains(err.Error(), "detached") && !strings.Contains(err.Error(), "beyond") {
				t.Errorf("%s header: %v", typ[1], err)
			}
			if _, err := ReadFile(data); err == nil {
				t.Errorf("%s data was taken for a volume", typ[1])
			}
		}
	})
	t.Run("rebuilt", func(t *testing.T) {
		// What Backup holds, a new keyslot and the volume key make an openable volume of wiped headers.
		path := format(t, cheap2...)
		h := read(t, path)
		key := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(key, volumeKey(t, path, 64), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(make([]byte, h.Offset), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(h.Image(), 0); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "open", "--test-passphrase", "--volume-key-file", key, path)
		if again := read(t, path); Match(again, h.Enrolled()) != nil {
			t.Error("rebuilt volume is another one")
		}
	})
}

// TestRealHeaderFile: what luksHeaderBackup writes is read where it is wanted, and only there; less than it is nothing.
func TestRealHeaderFile(t *testing.T) {
	for _, options := range [][]string{cheap1, cheap2} {
		path := format(t, options...)
		want, err := ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		backup := filepath.Join(t.TempDir(), "header")
		mustRun(t, "luksHeaderBackup", path, "--header-backup-file", backup)
		h, err := ReadHeaderFile(backup)
		if err != nil || !h.Alone || h.Enrolled() != want.Enrolled() {
			t.Errorf("%s: %v, %+v", want.Type, err, h)
		}
		if whole, err := ReadHeaderFile(path); err != nil || whole.Alone {
			t.Errorf("%s: a volume: %v, alone %t", want.Type, err, whole.Alone)
		}
		if _, err := ReadFile(backup); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: taken for a volume: %v", want.Type, err)
		}
		if err := os.Chmod(backup, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(backup, want.room.end-1); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadHeaderFile(backup); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: cut: %v", want.Type, err)
		}
	}
}
