package enroll

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
	"mandos-escrow/internal/secret"
	"mandos-escrow/unlock"
)

// maxName is how long a server lets a machine's name be, in bytes.
const maxName = 100

func (e *enrolment) namePath() string { return e.path(RunningFolder, "name") }

// setName takes the name of the first enrolment: packets carry it, so another
// one would make people look for a machine that nobody knows.
func (e *enrolment) setName() error {
	kept, err := os.ReadFile(e.namePath())
	switch e.name = e.Name; {
	case err == nil && e.name != "" && e.name+"\n" != string(kept):
		return fmt.Errorf("%w: this machine enrolled as %s, and its packets carry that name; leave --name out, and rename it at the server with `mandos-escrow machine set`", ErrName, strings.TrimSuffix(string(kept), "\n"))
	case err == nil:
		e.name = strings.TrimSuffix(string(kept), "\n")
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case e.name == "":
		e.name = hostname(e.Root)
	}
	err = record.Printable(e.name)
	if err == nil && len(e.name) > maxName {
		err = fmt.Errorf("longer than %d bytes", maxName)
	}
	if err != nil {
		return fmt.Errorf("machine name %q: %w; give another with --name", e.name, err)
	}
	return nil
}

func (e *enrolment) keepName() error {
	if _, err := os.Lstat(e.namePath()); err == nil {
		return nil
	}
	return config.Replace(e.namePath(), []byte(e.name+"\n"))
}

// hostname prefers the name that the new system will have: in %post the kernel
// still has the installer's.
func hostname(root string) string {
	if text, err := os.ReadFile(filepath.Join(root, "etc/hostname")); err == nil {
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				return line
			}
		}
	}
	if name, err := os.Hostname(); err == nil && name != "" {
		return name
	}
	return "unnamed"
}

// patience is how long the lock is waited for before that is said.
const patience = time.Second

// lock makes the folders and takes their lock.
func (e *enrolment) lock(ctx context.Context) (*os.File, error) {
	for _, dir := range []string{BootFolder, RunningFolder} {
		if err := os.MkdirAll(e.path(filepath.Dir(dir)), 0o755); err != nil {
			return nil, err
		}
		if err := os.Mkdir(e.path(dir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return e.takeLock(ctx)
}

const lockFile = "lock"

// takeLock waits while another enrolment runs, or a cryptsetup that outlived one.
func (e *enrolment) takeLock(ctx context.Context) (*os.File, error) {
	path := e.path(RunningFolder, lockFile)
	type result struct {
		file *os.File
		err  error
	}
	taken := make(chan result) // nobody can call flock(2) off, so another goroutine waits in it
	go func() {
		file, err := config.Lock(path)
		select {
		case taken <- result{file, err}:
		case <-ctx.Done():
			if err == nil {
				file.Close()
			}
		}
	}()
	slow := time.NewTimer(patience)
	defer slow.Stop()
	for {
		select {
		case r := <-taken:
			return r.file, r.err
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for %s: %w", path, ctx.Err())
		case <-slow.C:
			e.Progress("waiting for another enrolment of this machine to end")
		}
	}
}

// sweep removes the drafts of files (config.Replace) that a killed run left:
// an identity that nobody has, or passphrases that no keyslot has.
func (e *enrolment) sweep() error {
	for _, dir := range []string{BootFolder, RunningFolder} {
		entries, err := os.ReadDir(e.path(dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, entry := range entries {
			name := entry.Name()
			if name[0] != '.' || strings.Trim(filepath.Ext(name), ".0123456789") != "" {
				continue
			}
			if err := os.Remove(e.path(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// identify reads or makes the identities and the machine-id.
func (e *enrolment) identify() (err error) {
	if e.idHash, err = machineID(e.path("etc/machine-id")); err != nil {
		return err
	}
	for folder, used := range map[string]string{BootFolder: unlock.ConfigFile, RunningFolder: filepath.Base(e.policyPath())} {
		if _, err := os.Lstat(e.path(folder, used)); err != nil {
			continue
		}
		// it was enrolled with: a new one in its place would open nothing
		if _, err := config.LoadIdentity(e.path(folder)); err != nil {
			return fmt.Errorf("the identity in %s is not whole: %w; restore its files, or move both folders away to become another machine", e.path(folder), err)
		}
	}
	now := e.Now()
	if e.boot, err = config.MakeIdentity(e.path(BootFolder), e.name+" boot", now); err != nil {
		return err
	}
	e.running, err = config.MakeIdentity(e.path(RunningFolder), e.name+" running", now)
	e.Checkpoint("identities")
	return err
}

// machineID returns the hash of machine-id(5), and makes one where none is.
func machineID(path string) (string, error) {
	text, err := os.ReadFile(path)
	id := strings.TrimSpace(string(text))
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && (id == "" || id == "uninitialized"):
		id = secret.ID()
		if err := writeMachineID(path, id); err != nil {
			return "", err
		}
	case err != nil:
		return "", err
	}
	return HashMachineID(id), nil
}

// HashMachineID is what a packet says of machine-id(5), which itself should not leave a machine.
func HashMachineID(id string) string {
	sum := sha256.Sum256([]byte("mandos-escrow machine-id " + id))
	return hex.EncodeToString(sum[:])
}

// writeMachineID gives the file its mode before its name: everybody reads it.
func writeMachineID(path, id string) error {
	draft := path + ".mandos-escrow"
	if err := config.Replace(draft, []byte(id+"\n")); err != nil {
		return err
	}
	if err := os.Chmod(draft, 0o444); err != nil {
		return err
	}
	if err := os.Rename(draft, path); err != nil {
		return err
	}
	return config.SyncFolder(filepath.Dir(path))
}
