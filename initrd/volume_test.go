package initrd

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestFindsTheVolume looks in folders that stand for /dev and /sys.
func TestFindsTheVolume(t *testing.T) {
	pool := t.TempDir()
	enrolled := format(t, filepath.Join(pool, "ours"))
	format(t, filepath.Join(pool, "other"))
	twin := enrolled // the UUID, but another volume key
	twin.Digest = "00" + twin.Digest[2:]
	if err := os.WriteFile(filepath.Join(pool, "empty"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path, byUUID string            // what lies there, or empty
		block        map[string]string // what lies at each block device
		want, twin   error
	}{
		"nowhere":                           {"", "", nil, ErrNotFound, ErrNotFound},
		"at its path":                       {"ours", "", nil, nil, ErrMismatch},
		"by UUID":                           {"", "ours", nil, nil, ErrMismatch},
		"by UUID, another at its path":      {"other", "ours", nil, nil, ErrMismatch},
		"by UUID, but another":              {"", "other", nil, ErrMismatch, ErrMismatch},
		"another at its path, else nowhere": {"other", "", nil, ErrMismatch, ErrMismatch},
		"nothing at its path, else nowhere": {"empty", "", nil, ErrMismatch, ErrMismatch},
		"among block devices":               {"", "", map[string]string{"sda": "empty", "sdb": "other", "sdc": "ours"}, nil, ErrMismatch},
		"a name with a slash":               {"", "", map[string]string{"cciss!c0d0": "ours"}, nil, ErrMismatch},
		"not among block devices":           {"", "", map[string]string{"sda": "empty", "sdb": "other", "sdz": ""}, ErrNotFound, ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			d := devices{root, filepath.Join(root, "block"), filepath.Join(root, "dev")}
			volume := enrolled
			volume.Path = filepath.Join(root, "disk")
			link := func(target, path string) {
				if target == "" {
					return
				}
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(filepath.Join(pool, target), path)); err != nil {
					t.Fatal(err)
				}
			}
			link(c.path, volume.Path)
			link(c.byUUID, filepath.Join(d.disk, "by-uuid", volume.UUID))
			for device, target := range c.block {
				link("empty", filepath.Join(d.block, device))
				link(target, filepath.Join(d.dev, filepath.FromSlash(map[bool]string{true: "cciss/c0d0", false: device}[device == "cciss!c0d0"])))
			}
			if err := d.check(volume); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			other := twin
			other.Path = volume.Path
			if err := d.check(other); !errors.Is(err, c.twin) {
				t.Errorf("with another volume key: %v, want %v", err, c.twin)
			}
		})
	}
}
