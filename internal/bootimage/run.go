package bootimage

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command is one call of a program of the system.
type Command struct {
	Path string // in the system
	Args []string
	Dir  string    // in the system; empty: /
	Env  []string  // beside the cleaned environment
	Out  io.Writer // its standard output and standard error
	Hold *os.File  // inherited: a lock on it is held as long as the program runs
}

const killAfter = 30 * time.Second

// runInRoot runs a program in a chroot, unless the root is the running system.
// It is in a process group of its own: an interrupt from the terminal ends it by
// SIGTERM, with all that it started, and only once.
func runInRoot(ctx context.Context, root string, c Command) error {
	if err := mounted(root); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, c.Path, c.Args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if filepath.Clean(root) != "/" {
		cmd.SysProcAttr.Chroot = root
	}
	cmd.Dir = "/" + strings.TrimPrefix(c.Dir, "/")
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}, c.Env...)
	cmd.Stdout, cmd.Stderr = c.Out, c.Out
	if c.Hold != nil {
		cmd.ExtraFiles = []*os.File{c.Hold}
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
	cmd.WaitDelay = killAfter
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("%s: %w", strings.Join(append([]string{c.Path}, c.Args...), " "), err)
	}
	return nil
}

// mounted refuses a root in which the programs would make an image for nothing.
func mounted(root string) error {
	for _, path := range []string{"proc/self", "dev/null"} {
		if _, err := os.Stat(filepath.Join(root, path)); err != nil {
			return fmt.Errorf("%s needs /proc, /sys and /dev to make an image: mount --bind each of them below it: %w", root, err)
		}
	}
	return nil
}

func (s *System) run(ctx context.Context, c Command) error {
	if s.Run != nil {
		return s.Run(ctx, s.Root, c)
	}
	return runInRoot(ctx, s.Root, c)
}

// lines passes text on, a line at a time.
type lines struct {
	say  func(format string, args ...any)
	rest []byte
}

func (l *lines) Write(p []byte) (int, error) {
	for _, b := range p {
		if b == '\n' {
			l.flush()
		} else if len(l.rest) < maxLine {
			l.rest = append(l.rest, b)
		}
	}
	return len(p), nil
}

// maxLine bounds a line of a program's output, in bytes.
const maxLine = 1000

func (l *lines) flush() {
	if len(l.rest) > 0 {
		l.say("%s", l.rest)
	}
	l.rest = l.rest[:0]
}
