package testvm

import (
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// leftoverAge is beyond the longest run: what changed later may be in use.
const leftoverAge = time.Hour

// removeLeftovers removes the folders that killed runs left: those that match
// pattern (filepath.Match), belong to the user and have not changed since
// before. Where others may write, a link or another user's folder can have such
// a name; it is left alone. A failure costs space, and the next run tries again.
func removeLeftovers(pattern string, user int, before time.Time) {
	names, _ := filepath.Glob(pattern)
	for _, name := range names {
		info, err := os.Lstat(name)
		if err != nil || !info.IsDir() || !info.ModTime().Before(before) {
			continue
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && int(stat.Uid) == user {
			_ = os.RemoveAll(name)
		}
	}
}
