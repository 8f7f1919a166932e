// Package cryptsetup runs cryptsetup, the only program that changes LUKS volumes here and that gives their volume keys out. It
// is the boundary: nothing else starts it. It is not a parser of headers: those it reads through package luks, before each
// command and after each change. It imports package luks and the standard library.
//
// Secrets reach cryptsetup through pipes that it opens as /dev/fd/N, never through arguments, environment or files, and are
// passed as exact bytes: a key file is read whole, so newlines and NULs are part of a passphrase. A pipe is filled before
// cryptsetup starts: however this process ends, cryptsetup never sees half a passphrase.
//
// Callers hold the lock that keeps two of us from changing one volume. Reference: cryptsetup 2.6.1 and its man pages.
package cryptsetup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// Errors that callers decide on; also those of package luks.
var (
	ErrMissing    = errors.New("cryptsetup: not found")
	ErrVersion    = errors.New("cryptsetup: version is too old")
	ErrPassphrase = errors.New("cryptsetup: passphrase opens no such keyslot")
	ErrFull       = errors.New("cryptsetup: no room for another keyslot")
	ErrSlot       = errors.New("cryptsetup: wrong keyslot")
	ErrLastSlot   = errors.New("cryptsetup: refused to remove the last keyslot")
	ErrOwnSlot    = errors.New("cryptsetup: refused to remove the keyslot that the given passphrase opens")
)

// Version 2.6 is the first with --new-key-slot.
const minMajor, minMinor = 2, 6

// Tool runs cryptsetup.
type Tool struct {
	// Path of the program; empty: cryptsetup, searched in PATH, /usr/sbin and /sbin.
	Path string
	// Hold, if set, is inherited by every child: a lock on it stays held while a child still runs after its parent was killed.
	Hold *os.File
}

// Key is what unlocks a volume: exactly one of the two.
type Key struct {
	Passphrase []byte
	VolumeKey  []byte
}

// Version returns cryptsetup's version, as in 2.6.1. Errors: ErrMissing, ErrVersion.
func (t Tool) Version(ctx context.Context) (string, error) {
	out, err := t.run(ctx, "--version", nil, "--version")
	if err != nil {
		return "", err
	}
	f := strings.Fields(string(out))
	if len(f) < 2 || f[0] != "cryptsetup" {
		return "", fmt.Errorf("cryptsetup: --version says %.80q", out)
	}
	parts := strings.SplitN(f[1], ".", 3)
	if len(parts) < 2 {
		return "", fmt.Errorf("cryptsetup: version %q", f[1])
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	if err1 != nil || err2 != nil {
		return "", fmt.Errorf("cryptsetup: version %q", f[1])
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return "", fmt.Errorf("%w: it is %s, needs %d.%d: install a newer cryptsetup", ErrVersion, f[1], minMajor, minMinor)
	}
	return f[1], nil
}

// path finds the program. sbin is not in the PATH of every user who may open a disk image.
func (t Tool) path() (string, error) {
	if t.Path != "" {
		return t.Path, nil
	}
	for _, name := range []string{"cryptsetup", "/usr/sbin/cryptsetup", "/sbin/cryptsetup"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: install cryptsetup (Debian: apt install cryptsetup-bin)", ErrMissing)
}

// failed turns how a command ended into an error. cryptsetup(8): exit code 2 is a wrong passphrase or volume key.
func failed(ctx context.Context, op string, err error, stderr []byte) error {
	if ctx.Err() != nil {
		return fmt.Errorf("cryptsetup: %s: %w", op, context.Cause(ctx))
	}
	said := strings.ReplaceAll(string(bytes.TrimSpace(stderr)), "\n", "; ")
	var exit *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w: install cryptsetup (Debian: apt install cryptsetup-bin)", ErrMissing, err)
	case !errors.As(err, &exit):
		return fmt.Errorf("cryptsetup: %s: %w", op, err)
	case exit.ExitCode() == 2:
		return fmt.Errorf("%w: %s: %q", ErrPassphrase, op, said)
	}
	return fmt.Errorf("cryptsetup: %s: %w: %q", op, err, said)
}
