package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// names lists a folder, temporary files too.
func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
}

func content(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestOutput(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	out, err := NewOutput(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := out.Write([]byte("se")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Error("it is there before it is whole")
	}
	if _, err := out.Write([]byte("cret")); err != nil {
		t.Fatal(err)
	}
	if err := out.Commit(); err != nil {
		t.Fatal(err)
	}
	out.Discard()
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != 0o600 || content(t, path) != "secret" || names(t, dir) != "out" {
		t.Errorf("%v, %v: %s", info, err, names(t, dir))
	}
}

func TestDiscardLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	out, err := NewOutput(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := out.Write([]byte("secret")); err != nil {
		t.Fatal(err)
	}
	out.Discard()
	if n := names(t, dir); n != "" {
		t.Errorf("left: %s", n)
	}
}

// What stands at the path already, whatever it is, stays as it is.
func TestOutputsAreNeverOverwritten(t *testing.T) {
	for name, put := range map[string]func(t *testing.T, dir, path string){
		"file":       func(t *testing.T, _, path string) { write(t, path, "old", 0o644) },
		"empty file": func(t *testing.T, _, path string) { write(t, path, "", 0o644) },
		"folder":     func(t *testing.T, _, path string) { mustDo(t, os.Mkdir(path, 0o755)) },
		"link": func(t *testing.T, dir, path string) {
			write(t, dir+"/target", "old", 0o644)
			mustDo(t, os.Symlink("target", path))
		},
		"broken link": func(t *testing.T, _, path string) { mustDo(t, os.Symlink("nowhere", path)) },
		"link itself": func(t *testing.T, _, path string) { mustDo(t, os.Symlink("out", path)) },
		"FIFO":        func(t *testing.T, _, path string) { mustDo(t, unix.Mkfifo(path, 0o600)) },
		"device":      func(t *testing.T, _, path string) { mustDo(t, os.Symlink("/dev/null", path)) },
	} {
		t.Run(name+" before", func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "out")
			put(t, dir, path)
			before := names(t, dir)
			if err := writeNew(path, []byte("new")); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), path) {
				t.Error(err)
			}
			if after := names(t, dir); after != before {
				t.Errorf("now %s", after)
			}
		})
		t.Run(name+" meanwhile", func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "out")
			out, err := NewOutput(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = out.Write([]byte("new"))
			mustDo(t, err)
			put(t, dir, path)
			if err := out.Commit(); !errors.Is(err, ErrExists) {
				t.Error(err)
			}
			if left := strings.Contains(names(t, dir), ".out."); left {
				t.Errorf("left %s", names(t, dir))
			}
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && content(t, path) == "new" {
				t.Error("overwritten")
			}
		})
	}
}

func mustDo(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestOutputInNoFolder(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "no", "out"), "/proc/out"} {
		if err := writeNew(path, []byte("x")); err == nil || errors.Is(err, ErrExists) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestFullDisk runs itself as a child that may write files of 64 KiB only.
func TestFullDisk(t *testing.T) {
	if dir := os.Getenv("CONFIG_TEST_FULL"); dir != "" {
		fullDisk(t, dir)
		return
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "kept"), "old", 0o600)
	self, err := os.Executable()
	mustDo(t, err)
	child := exec.Command(self, "-test.run=^TestFullDisk$", "-test.count=1")
	child.Env = append(os.Environ(), "CONFIG_TEST_FULL="+dir)
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if n := names(t, dir); n != "kept" || content(t, filepath.Join(dir, "kept")) != "old" {
		t.Errorf("left %s", n)
	}
}

func fullDisk(t *testing.T, dir string) {
	limit := unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}
	mustDo(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &limit)) // the runtime ignores SIGXFSZ
	data := make([]byte, 1<<20)
	if err := writeNew(filepath.Join(dir, "new"), data); !errors.Is(err, unix.EFBIG) {
		t.Errorf("a new file: %v", err)
	}
	if err := Replace(filepath.Join(dir, "kept"), data); !errors.Is(err, unix.EFBIG) {
		t.Errorf("a file of our own: %v", err)
	}
}

func TestReplace(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := t.TempDir()
	path, target := filepath.Join(dir, "own"), filepath.Join(dir, "target")
	write(t, target, "not ours", 0o600)
	mustDo(t, os.Symlink("target", path))
	for _, text := range []string{"one", "two"} {
		mustDo(t, Replace(path, []byte(text)))
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != 0o600 || content(t, path) != text {
			t.Errorf("%v, %v", info, err)
		}
	}
	if content(t, target) != "not ours" || names(t, dir) != "own target" {
		t.Errorf("wrote through the link, or left something: %s", names(t, dir))
	}
	mustDo(t, Remove(path))
	mustDo(t, Remove(path))
	if names(t, dir) != "target" {
		t.Errorf("left %s", names(t, dir))
	}
}

func TestReadInput(t *testing.T) {
	dir := t.TempDir()
	long := bytes.Repeat([]byte("x"), maxInput)
	for _, c := range []struct {
		name, text string
		mode       os.FileMode
		warned     bool
	}{
		{"mine", "a secret\n", 0o600, false},
		{"read-only", "a secret", 0o400, false},
		{"group", "a secret", 0o640, true},
		{"others", "a secret", 0o604, true},
		{"others may write", "a secret", 0o602, true},
		{"empty", "", 0o600, false},
		{"longest", string(long), 0o600, false},
	} {
		path := filepath.Join(dir, c.name)
		write(t, path, c.text, c.mode)
		var warning string
		data, err := ReadInput(path, nil, func(text string) { warning += text })
		if err != nil || string(data) != c.text || (warning != "") != c.warned {
			t.Errorf("%s: %d bytes, %v, %q", c.name, len(data), err, warning)
		}
		if c.warned && (!strings.Contains(warning, path) || strings.Contains(warning, "a secret")) {
			t.Errorf("%s: %q", c.name, warning)
		}
		if _, err := ReadInput(path, nil, nil); err != nil {
			t.Errorf("%s, nobody to warn: %v", c.name, err)
		}
	}
	write(t, filepath.Join(dir, "too long"), string(long)+"xx", 0o600)
	for _, path := range []string{filepath.Join(dir, "too long"), dir, filepath.Join(dir, "nothing"), "/dev/zero"} {
		if data, err := ReadInput(path, nil, nil); err == nil || data != nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %d bytes, %v", path, len(data), err)
		}
	}
	if data, err := ReadInput("-", strings.NewReader("from a pipe"), nil); err != nil || string(data) != "from a pipe" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestTrimNewline(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "a": "a", "a\n": "a", "a\r\n": "a", "a\n\n": "a\n", "a\r": "a\r", "\n": "", "\r\n": "", " a \n": " a ", "a\nb\n": "a\nb",
	} {
		if got := string(TrimNewline([]byte(text))); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := Lock(path)
	mustDo(t, err)
	got := make(chan error)
	go func() {
		second, err := Lock(path)
		if err == nil {
			second.Close()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("two hold it: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	first.Close()
	mustDo(t, <-got)
	link := path + ".link"
	mustDo(t, os.Symlink(path, link))
	if f, err := Lock(link); err == nil {
		f.Close()
		t.Error("followed a link")
	}
}

func TestReplaceWiped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := ReplaceWiped(path, []byte("first")); err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := ReplaceWiped(path, []byte("second")); err != nil {
		t.Fatal(err)
	}
	if now, err := os.ReadFile(path); err != nil || string(now) != "second" {
		t.Errorf("now: %q, %v", now, err)
	}
	if before, err := io.ReadAll(old); err != nil || string(before) != "\x00\x00\x00\x00\x00" {
		t.Errorf("what was there: %q, %v", before, err)
	}
}

// writeNew takes an Output all its way.
func writeNew(path string, data []byte) error {
	out, err := NewOutput(path)
	if err != nil {
		return err
	}
	defer out.Discard()
	if _, err := out.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return out.Commit()
}

// TestLockRemoved: a lock whose file was removed while it was waited for is no
// lock any more.
func TestLockRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := Lock(path)
	mustDo(t, err)
	got := make(chan *os.File)
	go func() {
		second, err := Lock(path)
		if err != nil {
			t.Error(err)
		}
		got <- second
	}()
	for !waited(t, path) {
		time.Sleep(time.Millisecond)
	}
	mustDo(t, os.Remove(path))
	first.Close()
	second := <-got
	defer second.Close()
	held, err := second.Stat()
	mustDo(t, err)
	named, err := os.Stat(path)
	mustDo(t, err)
	if !os.SameFile(held, named) {
		t.Error("the lock is on a file that has no name")
	}
}

// waited reports whether somebody waits for a lock on the file: /proc/locks has
// such lines with an arrow.
func waited(t *testing.T, path string) bool {
	t.Helper()
	info, err := os.Stat(path)
	mustDo(t, err)
	inode := fmt.Sprintf(":%d ", info.Sys().(*syscall.Stat_t).Ino)
	text, err := os.ReadFile("/proc/locks")
	mustDo(t, err)
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "->") && strings.Contains(line, inode) {
			return true
		}
	}
	return false
}

func TestRemoveWiped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	mustDo(t, os.WriteFile(path, []byte("secret"), 0o600))
	old, err := os.Open(path)
	mustDo(t, err)
	defer old.Close()
	for range 2 { // what is not there is removed already
		mustDo(t, RemoveWiped(path))
	}
	if data, err := io.ReadAll(old); err != nil || string(data) != "\x00\x00\x00\x00\x00\x00" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}
