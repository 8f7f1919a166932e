package initrd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/secret"
)

// askpass finds the questions of cryptsetup-initramfs: a process of its program
// askpass, which reads the console and a FIFO at once, and takes what it gets
// first. Its environment says for which device it asks.
type askpass struct {
	proc    string
	program string
	fifo    string
}

// Limits of what other processes show.
const (
	maxEnviron = 64 << 10
	maxStat    = 4 << 10
	maxAnswer  = 4 << 10 // of what askpass reads at once
)

const (
	readTime  = 2 * time.Second // that an answer may lie in the FIFO; askpass reads it at once
	readSteps = 5 * time.Millisecond
)

// pending returns one question at most. There is one FIFO: of two who read from
// it, nobody could say who gets the answer.
func (a askpass) pending() []question {
	if _, err := os.Stat(a.program); err != nil {
		return nil
	}
	dir, err := os.Open(a.proc)
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	program, fifo := resolved(a.program), resolved(a.fifo)
	var found []question
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || !a.reads(pid, program, fifo) {
			continue
		}
		found = append(found, a.question(pid, program, fifo))
	}
	if len(found) != 1 || found[0].id == "" || found[0].device == "" {
		return nil
	}
	return found
}

// reads tells whether a process is an askpass that has the FIFO open.
func (a askpass) reads(pid int, program, fifo string) bool {
	dir := filepath.Join(a.proc, strconv.Itoa(pid))
	if exe, err := os.Readlink(filepath.Join(dir, "exe")); err != nil || exe != program {
		return false
	}
	descriptors, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return false
	}
	for _, d := range descriptors {
		if target, err := os.Readlink(filepath.Join(dir, "fd", d.Name())); err == nil && target == fifo {
			return true
		}
	}
	return false
}

func (a askpass) question(pid int, program, fifo string) question {
	dir := filepath.Join(a.proc, strconv.Itoa(pid))
	environ, err := readLimited(filepath.Join(dir, "environ"), maxEnviron)
	if err != nil {
		return question{}
	}
	q := question{id: a.birth(pid)}
	for _, variable := range bytes.Split(environ, []byte{0}) {
		if value, ok := strings.CutPrefix(string(variable), "CRYPTTAB_SOURCE="); ok {
			q.device = value
		}
	}
	q.answer = func(passphrase []byte) error {
		return a.answer(passphrase, func() bool { return a.reads(pid, program, fifo) && a.birth(pid) == q.id })
	}
	return q
}

// birth names a process for good: its number may be another's later. It is
// proc(5) stat, field 22; field 2 is a name in parentheses, which may hold any.
func (a askpass) birth(pid int) string {
	stat, err := readLimited(filepath.Join(a.proc, strconv.Itoa(pid), "stat"), maxStat)
	if err != nil {
		return ""
	}
	after := stat[bytes.LastIndexByte(stat, ')')+1:]
	fields := strings.Fields(string(after))
	const start = 22 - 3 // after the name comes field 3
	if len(fields) <= start {
		return ""
	}
	return fmt.Sprintf("askpass %d %s", pid, fields[start])
}

// answer writes into the FIFO and waits until askpass has read it. asks tells
// whether it still does. We keep the FIFO open for reading: so what was not
// read is found, and taken back, before the next askpass could read it.
func (a askpass) answer(passphrase []byte, asks func() bool) error {
	own, err := a.open(unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(own)
	if n, err := unread(own); err != nil || n != 0 {
		return errors.Join(errBusy, err)
	}
	if !asks() {
		return errGone
	}
	if err := a.write(passphrase); err != nil {
		return err
	}
	for waited := time.Duration(0); ; waited += readSteps {
		alive := asks()
		switch n, err := unread(own); {
		case err != nil:
			return err
		case n == 0:
			return nil
		case !alive:
			takeBack(own)
			return errGone
		case waited >= readTime:
			takeBack(own)
			return fmt.Errorf("%w: askpass does not read", errBusy)
		}
		time.Sleep(readSteps)
	}
}

// open opens the FIFO, and nothing else that may lie there.
func (a askpass) open(mode int) (int, error) {
	fd, err := unix.Open(a.fifo, mode|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) {
		return -1, errGone
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", a.fifo, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is not a FIFO", a.fifo)
	}
	return fd, nil
}

// write writes the passphrase and closes, which ends it: askpass reads up to
// the end of the file.
func (a askpass) write(passphrase []byte) error {
	fd, err := a.open(unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if n, err := unix.Write(fd, passphrase); err != nil || n != len(passphrase) {
		return fmt.Errorf("write to %s: %d bytes: %w", a.fifo, n, errors.Join(err, io.ErrShortWrite))
	}
	return nil
}

func unread(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TIOCINQ) } // FIONREAD by its other name

func takeBack(fd int) {
	buf := make([]byte, maxAnswer)
	defer secret.Wipe(buf)
	_, _ = unix.Read(fd, buf) // whatever is there goes
}

// readLimited reads at most limit bytes of a file.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
