package testvm

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestRemoveLeftovers(t *testing.T) {
	now := time.Now()
	dir, elsewhere := t.TempDir(), t.TempDir()
	inside := filepath.Join(elsewhere, "kept")
	old, young := filepath.Join(dir, "run-old"), filepath.Join(dir, "run-young")
	err := errors.Join(
		os.WriteFile(inside, nil, 0o600),
		os.Symlink(elsewhere, filepath.Join(dir, "run-link")),
		os.WriteFile(filepath.Join(dir, "run-file"), nil, 0o600),
		os.MkdirAll(filepath.Join(old, "sub"), 0o700),
		os.Mkdir(young, 0o700),
		os.Mkdir(filepath.Join(dir, "other-old"), 0o700),
	)
	for _, name := range []string{old, elsewhere, filepath.Join(dir, "run-file"), filepath.Join(dir, "other-old")} {
		err = errors.Join(err, os.Chtimes(name, time.Time{}, now.Add(-2*leftoverAge)))
	}
	if err != nil {
		t.Fatal(err)
	}
	left := func() (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
		return names
	}
	pattern, before := filepath.Join(dir, "run-*"), now.Add(-leftoverAge)

	all := []string{"other-old", "run-file", "run-link", "run-old", "run-young"}
	removeLeftovers(pattern, os.Geteuid()+1, before)
	if got := left(); !slices.Equal(got, all) {
		t.Errorf("another user's: left %v, want %v", got, all)
	}
	removeLeftovers(pattern, os.Geteuid(), before)
	want := []string{"other-old", "run-file", "run-link", "run-young"}
	if got := left(); !slices.Equal(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
	if _, err := os.Stat(inside); err != nil {
		t.Errorf("followed a link: %v", err)
	}
}
