package initrd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fifo is one that is there, and its askpass.
func fifo(t *testing.T) (askpass, int) {
	t.Helper()
	a := askpass{fifo: filepath.Join(t.TempDir(), "passfifo")}
	if err := unix.Mkfifo(a.fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(a.fifo, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return a, fd
}

// TestConsoleWins: askpass ends with what somebody typed, and what we wrote
// never reaches the next one.
func TestConsoleWins(t *testing.T) {
	a, fd := fifo(t)
	calls := 0
	err := a.answer([]byte("secret"), func() bool { calls++; return calls == 1 })
	if !errors.Is(err, errGone) {
		t.Errorf("%v", err)
	}
	if n, err := unread(fd); n != 0 || err != nil {
		t.Errorf("%d bytes are left, %v", n, err)
	}
}

// TestNobodyReads: askpass lives and does not read.
func TestNobodyReads(t *testing.T) {
	a, fd := fifo(t)
	if err := a.answer([]byte("secret"), func() bool { return true }); !errors.Is(err, errBusy) {
		t.Errorf("%v", err)
	}
	if n, err := unread(fd); n != 0 || err != nil {
		t.Errorf("%d bytes are left, %v", n, err)
	}
}

// TestSomebodyElseWrites, such as cryptroot-unlock over SSH: nothing is mixed
// into it.
func TestSomebodyElseWrites(t *testing.T) {
	a, fd := fifo(t)
	if err := a.write([]byte("typed elsewhere")); err != nil {
		t.Fatal(err)
	}
	if err := a.answer([]byte("secret"), func() bool { return true }); !errors.Is(err, errBusy) {
		t.Errorf("%v", err)
	}
	buf := make([]byte, 100)
	if n, err := unix.Read(fd, buf); err != nil || string(buf[:n]) != "typed elsewhere" {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

func TestNoFIFO(t *testing.T) {
	dir := t.TempDir()
	a := askpass{fifo: filepath.Join(dir, "passfifo")}
	if err := a.answer([]byte("secret"), func() bool { return true }); !errors.Is(err, errGone) {
		t.Errorf("none: %v", err)
	}
	if err := os.WriteFile(a.fifo, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.answer([]byte("secret"), func() bool { return true }); err == nil || errors.Is(err, errGone) {
		t.Errorf("a file: %v", err)
	}
	if data, err := os.ReadFile(a.fifo); err != nil || len(data) != 0 {
		t.Errorf("%q was written, %v", data, err)
	}
	other, _ := fifo(t)
	link := askpass{fifo: filepath.Join(dir, "link")}
	if err := os.Symlink(other.fifo, link.fifo); err != nil {
		t.Fatal(err)
	}
	if err := link.answer([]byte("secret"), func() bool { return true }); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link: %v", err)
	}
}

// TestProcesses are those that are not taken for askpass, and one that is.
func TestProcesses(t *testing.T) {
	m := newMachine(t)
	a := m.askpass("100", "/dev/vda3")
	defer a.ends()
	program, pipe := m.root.path("lib/cryptsetup/askpass"), m.root.path("lib/cryptsetup/passfifo")
	const environ = "CRYPTTAB_SOURCE=/dev/vda3\x00"
	m.process("101", "/bin/sh", pipe, environ)
	m.process("102", program, "/dev/console", environ)
	m.process("103", program+" (deleted)", pipe, environ)
	m.process("self", program, pipe, environ)
	s := askpass{proc: m.root.path("proc"), program: program, fifo: pipe}
	found := s.pending()
	if len(found) != 1 || found[0].id != "askpass 100 4711" || found[0].device != "/dev/vda3" {
		t.Fatalf("%+v", found)
	}
	for name, change := range map[string]struct{ file, text string }{
		"no device":       {"environ", "CRYPTTAB_NAME=x\x00"},
		"long":            {"environ", strings.Repeat("x", maxEnviron) + "\x00" + environ},
		"no birth":        {"stat", "100 (x) S 1"},
		"no name in stat": {"stat", ""},
	} {
		m.write("proc/100/environ", environ)
		m.write("proc/100/stat", "100 (x) S 1 1 1 0 -1 0 1 0 0 0 0 0 0 0 20 0 1 0 4711 1\n")
		if len(s.pending()) != 1 {
			t.Fatal("not found again")
		}
		m.write("proc/100/"+change.file, change.text)
		if found := s.pending(); len(found) != 0 {
			t.Errorf("%s: %+v", name, found)
		}
	}
}
