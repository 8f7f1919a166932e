package enroll

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
	"mandos-escrow/luks"
	"mandos-escrow/luks/cryptsetup"
	"mandos-escrow/unlock"
)

// CheckOptions say what is to be checked.
type CheckOptions struct {
	Root    string
	Program string // the boot program
	Tool    cryptsetup.Tool
}

// Check is what became of one check. A failed one has an error.
type Check struct {
	What    string `json:"check"`   // what was checked
	Subject string `json:"subject"` // the volume or the image
	Detail  string `json:"detail"`  // how it went
	OK      bool   `json:"ok"`
	Err     error  `json:"-"`
}

// Outcome makes a Check.
func Outcome(what, subject, detail string, err error) Check {
	c := Check{What: what, Subject: subject, Detail: detail, OK: err == nil, Err: err}
	if err != nil {
		c.Detail = strings.ReplaceAll(err.Error(), "\n", "; ") // of errors.Join
	}
	return c
}

// CheckBoot does for every volume that boots unattended what the next boot does:
// the boot program itself fetches and opens the blob, and what it prints has to
// open the boot keyslot. To the server this is a boot. An error is returned when
// there is nothing to check; what does not hold is in the checks.
func CheckBoot(ctx context.Context, o CheckOptions) ([]Check, error) {
	e := &enrolment{Options: Options{Root: o.Root, Tool: o.Tool}}
	conf, err := e.readBootConfig()
	if err != nil {
		return nil, err
	}
	if len(conf.Volumes) == 0 {
		return nil, fmt.Errorf("no volume is enrolled for unattended boot: there is no %s", e.configPath())
	}
	var checks []Check
	for _, v := range conf.Volumes {
		start := time.Now()
		passphrase, err := o.fetch(ctx, v.UUID)
		took := time.Since(start).Round(10 * time.Millisecond)
		checks = append(checks, Outcome("fetch", v.UUID, fmt.Sprintf("the boot passphrase was fetched and decrypted in %s", took), err))
		if err == nil {
			slot, err := e.opensBootSlot(ctx, v, passphrase)
			checks = append(checks, Outcome("open", v.UUID, fmt.Sprintf("it opens keyslot %d", slot), err))
		}
		secret.Wipe(passphrase)
		if ctx.Err() != nil {
			return checks, ctx.Err()
		}
	}
	return checks, nil
}

// opensBootSlot proves that the passphrase opens the very keyslot that is ours.
func (e *enrolment) opensBootSlot(ctx context.Context, v unlock.Volume, passphrase []byte) (int, error) {
	j, err := e.readJournal(v.UUID)
	if err != nil {
		return 0, err
	}
	if j == nil || !j.boots() {
		return 0, fmt.Errorf("%s does not say which keyslot is ours", e.journalPath(v.UUID))
	}
	if !j.committed {
		return 0, errors.New("its enrolment was interrupted: run `mandos-escrow enroll` again")
	}
	device, err := deviceOf(v)
	if err != nil {
		return 0, err
	}
	_, err = e.Tool.Test(ctx, device, passphrase, j.boot.number)
	if errors.Is(err, cryptsetup.ErrPassphrase) { // not the passphrase that a person gave
		err = fmt.Errorf("what was fetched does not open keyslot %d, which is ours: run `mandos-escrow enroll` again, with a new token: %s", j.boot.number, err.Error())
	}
	return j.boot.number, err
}

// deviceOf finds a volume where it was enrolled, or else under its UUID.
func deviceOf(v unlock.Volume) (string, error) {
	var tried []string
	for _, path := range []string{v.Path, filepath.Join("/dev/disk/by-uuid", v.UUID)} {
		h, err := luks.ReadFile(path)
		if err == nil && h.UUID == v.UUID {
			return path, nil
		}
		if err == nil {
			err = fmt.Errorf("%w: it is volume %s", luks.ErrMismatch, h.UUID)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("%s: %w", path, err)
		}
		tried = append(tried, fmt.Sprintf("%s: %v", path, err))
	}
	return "", fmt.Errorf("volume %s was not found: %s", v.UUID, strings.Join(tried, "; "))
}

const (
	maxPassphrase = 1024 // what is read of the boot program's output, in bytes
	maxSaid       = 2000 // and of what it says
)

// childErrors are what the boot program's exit codes mean.
var childErrors = map[int]error{4: luks.ErrMismatch, 5: unlock.ErrConfig, 7: unlock.ErrRefused}

// fetch runs the boot program as a boot does, once. The caller wipes what it
// returns.
func (o CheckOptions) fetch(ctx context.Context, uuid string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, o.Program, "--config", filepath.Join(o.Root, config.BootFolder), "--print", "--once", "--volume", uuid)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	said := &strings.Builder{}
	cmd.Stderr = said
	r, w, err := os.Pipe() // read into one buffer: of the passphrase there are no copies
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd.Stdout = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start the boot program: %w", err)
	}
	buf := make([]byte, maxPassphrase)
	n, readErr := io.ReadFull(r, buf)
	r.Close()
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case readErr == nil:
		err = fmt.Errorf("%s printed more than a passphrase", o.Program)
	case errors.As(err, &exit) && childErrors[exit.ExitCode()] != nil:
		err = fmt.Errorf("%w: %s says: %s", childErrors[exit.ExitCode()], o.Program, brief(said.String()))
	case err != nil:
		err = fmt.Errorf("%s: %w: %s", o.Program, err, brief(said.String()))
	case n == 0:
		err = fmt.Errorf("%s printed no passphrase", o.Program)
	default:
		return buf[:n], nil
	}
	secret.Wipe(buf)
	return nil, err
}

// brief is what a program said, on one line.
func brief(text string) string {
	text = strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")
	return text[:min(len(text), maxSaid)]
}
