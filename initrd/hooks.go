package initrd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// hookLimit is how long one network hook may run.
const hookLimit = 30 * time.Second

// hookDelay is Mandos's default of DELAY, in seconds: links wait that long for the hooks.
const hookDelay = "2.5"

// hookName says whether Mandos takes a file of that name for a hook; others, such as an editor's backups, are left alone.
func hookName(name string) bool {
	return strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-") == ""
}

// hooks are the programs of a network-hooks.d folder. They get what Mandos's network hooks get (mandos-client(8mandos), NETWORK HOOKS).
type hooks struct {
	dir     string
	device  string // links that the command line names, with commas between; empty: all
	connect string // HOST:PORT that the command line names; empty: none
	limit   time.Duration
	report  func(format string, a ...any)
}

// run starts each hook with start or stop as its argument, in the order of their names, one after another. One that fails, or does not end in
// time, is reported, and the next one is started.
func (h *hooks) run(ctx context.Context, mode string) {
	entries, err := os.ReadDir(h.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.report("network hooks: %v", err)
	}
	for _, entry := range entries {
		path := filepath.Join(h.dir, entry.Name())
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 || !hookName(entry.Name()) {
			continue
		}
		if err := h.runOne(ctx, path, mode); err != nil {
			h.report("network hook %s %s: %v", entry.Name(), mode, err)
		}
	}
}

// runOne runs a program in a process group of its own, which is killed at the deadline. What a hook leaves running when it ends, such as a
// daemon for Wi-Fi, goes on until the hook stops it.
func (h *hooks) runOne(ctx context.Context, path, mode string) error {
	ctx, cancel := context.WithTimeout(ctx, h.limit)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("not started: %w", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	process, err := os.StartProcess(path, []string{path, mode}, &os.ProcAttr{
		Dir: "/",
		Env: h.environment(mode),
		// Standard output may be where a passphrase goes.
		Files: []*os.File{null, os.Stderr, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return err
	}
	// Until it has been waited for, nobody else can have its number.
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-process.Pid, syscall.SIGKILL) })
	state, err := process.Wait()
	switch {
	case !stop() && ctx.Err() != nil:
		return errors.New("killed: it did not end in time")
	case err != nil:
		return err
	case !state.Success():
		return errors.New(state.String())
	}
	return nil
}

func (h *hooks) environment(mode string) []string {
	env := append(os.Environ(), "MANDOSNETHOOKDIR="+h.dir, "DEVICE="+h.device, "MODE="+mode, "VERBOSITY=0", "DELAY="+hookDelay)
	if h.connect != "" {
		env = append(env, "CONNECT="+h.connect)
	}
	return env
}
