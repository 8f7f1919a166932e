package cryptsetup

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mandos-escrow/luks"
)

func TestCheckMapping(t *testing.T) {
	mapperFolder = t.TempDir()
	t.Cleanup(func() { mapperFolder = "/dev/mapper" })
	if err := os.WriteFile(filepath.Join(mapperFolder, "taken"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"rescued", "a.b-c_1+2", strings.Repeat("x", 127)} {
		if err := CheckMapping(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "control", "taken", "a/b", "-a", "..", "a b", "ä", strings.Repeat("x", 128)} {
		if err := CheckMapping(name); !errors.Is(err, ErrMapping) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestOpen asks a program in cryptsetup's place, because opening takes root and device-mapper.
func TestOpen(t *testing.T) {
	each(t, func(t *testing.T, dev string) {
		key, err := tool.VolumeKey(t.Context(), dev, user)
		if err != nil {
			t.Fatal(err)
		}
		seen := filepath.Join(t.TempDir(), "seen")
		noting := Tool{Path: script(t, `printf '%s\n' "$@" >`+seen+`; cat /dev/fd/3 >`+seen+`.key`)}
		for _, c := range []struct {
			key  Key
			want []byte
			flag string
		}{{Key{VolumeKey: key}, key, "--volume-key-file"}, {Key{Passphrase: user}, user, "--key-file"}} {
			if err := noting.Open(t.Context(), dev, c.key, "rescued"); err != nil {
				t.Fatal(err)
			}
			args, err1 := os.ReadFile(seen)
			got, err2 := os.ReadFile(seen + ".key")
			text := string(args)
			if err := errors.Join(err1, err2); err != nil || !bytes.Equal(got, c.want) ||
				!strings.HasPrefix(text, "open\n") || !strings.Contains(text, c.flag+"\n/dev/fd/3\n") || !strings.HasSuffix(text, "\n--\n"+dev+"\nrescued\n") {
				t.Errorf("%v: called with %q", err, text)
			}
		}
		key[0] ^= 1
		if err := noting.Open(t.Context(), dev, Key{VolumeKey: key}, "rescued"); !errors.Is(err, luks.ErrVolumeKey) {
			t.Errorf("wrong volume key: %v", err)
		}
		if err := noting.Open(t.Context(), dev, Key{Passphrase: user}, "a/b"); !errors.Is(err, ErrMapping) {
			t.Errorf("no name: %v", err)
		}
	})
}

func TestOpenWithoutMapper(t *testing.T) {
	dev := volume(t, luks.Type2)
	t.Cleanup(func() { miscDevices = "/proc/misc" })
	for name, c := range map[string]struct {
		misc, script string
		want         error
		not          error
	}{
		"no device-mapper": {"237 loop-control\n", "exit 1", ErrNoMapper, ErrPassphrase},
		"wrong passphrase": {"237 loop-control\n", "exit 2", ErrPassphrase, ErrNoMapper},
		"another failure":  {"236 device-mapper\n", "exit 1", nil, ErrNoMapper},
	} {
		miscDevices = filepath.Join(t.TempDir(), "misc")
		if err := os.WriteFile(miscDevices, []byte(c.misc), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Tool{Path: script(t, c.script)}.Open(t.Context(), dev, Key{Passphrase: user}, "rescued")
		if err == nil || c.want != nil && !errors.Is(err, c.want) || errors.Is(err, c.not) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
