// Package config is what stands in files: inputs that a person names, outputs
// that nobody else may read, an administrator's home, a server's settings.
//
// It decides nothing and talks to nobody. It imports only the leaves record,
// seal, secret and identity, and of the rooms what it keeps the records of:
// escrow, recovery and unlock.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrExists: an output file is there already; it is never overwritten.
var ErrExists = errors.New("exists already and is never overwritten: name another file or remove it first")

// maxInput bounds what is read from a file that a person names.
const maxInput = 4 << 20

// ReadInput reads a file, or standard input for "-". warn is called when
// others than the owner can read the file.
func ReadInput(path string, stdin io.Reader, warn func(string)) ([]byte, error) {
	in := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 && warn != nil {
			warn(fmt.Sprintf("%s can be read by others (mode %04o); chmod 600 %s", path, info.Mode().Perm(), path))
		}
		in = f
	}
	buf := make([]byte, 0, 4096)
	for {
		if len(buf) == cap(buf) {
			grown := make([]byte, len(buf), 2*cap(buf))
			copy(grown, buf)
			clear(buf)
			buf = grown
		}
		n, err := in.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case err == io.EOF:
			return buf, nil
		case err != nil:
			clear(buf)
			return nil, fmt.Errorf("read %s: %w", path, err)
		case len(buf) > maxInput:
			clear(buf)
			return nil, fmt.Errorf("read %s: longer than %d bytes", path, maxInput)
		}
	}
}

// TrimNewline cuts one newline (or CR LF) from the end.
func TrimNewline(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
		if n := len(b); n > 0 && b[n-1] == '\r' {
			b = b[:n-1]
		}
	}
	return b
}

// Output is a new file that becomes visible only with Commit: until then it
// stands under a temporary name, so a failure leaves nothing behind.
type Output struct {
	file *os.File
	path string
}

// NewOutput starts an output file, mode 0600. A path that exists, also as a
// link that leads nowhere, is refused.
func NewOutput(path string) (*Output, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("write %s: %w", path, ErrExists)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return &Output{file, path}, nil
}

// Write adds bytes.
func (o *Output) Write(b []byte) (int, error) { return o.file.Write(b) }

// Commit puts the file on disk under its name. If that name came into being
// meanwhile, it is left alone and an error returned (rename2(2), NOREPLACE).
func (o *Output) Commit() error {
	err := o.file.Sync()
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, o.file.Name(), unix.AT_FDCWD, o.path, unix.RENAME_NOREPLACE)
	}
	if errors.Is(err, unix.EINVAL) { // a file system without NOREPLACE: link(2) refuses an existing name too
		err = os.Link(o.file.Name(), o.path)
	}
	if errors.Is(err, fs.ErrExist) {
		err = ErrExists
	}
	if err != nil {
		o.Discard()
		return fmt.Errorf("write %s: %w", o.path, err)
	}
	os.Remove(o.file.Name()) // after link(2); renamed, it is gone already
	o.file.Close()
	return SyncFolder(filepath.Dir(o.path))
}

// Discard leaves nothing behind. After Commit it does nothing.
func (o *Output) Discard() {
	if o.file.Close() == nil {
		os.Remove(o.file.Name())
	}
}

// Replace writes a file of our own, in place of what was there, so that a
// crash leaves the old or the new one whole.
func Replace(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if closed := tmp.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return SyncFolder(filepath.Dir(path))
}

// ReplaceWiped is Replace, and then puts zeros in the place of what was there.
func ReplaceWiped(path string, data []byte) error {
	old, err := openToWipe(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := Replace(path, data); err != nil {
		if old != nil {
			old.Close()
		}
		return err
	}
	wipeFile(old) // no name leads to it any more
	return nil
}

// overwrite puts zeros in the place of a file's bytes. Best effort: many file
// systems and disks keep the old ones somewhere until they are used again.
func overwrite(path string) {
	if f, err := openToWipe(path); err == nil {
		wipeFile(f)
	}
}

func openToWipe(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0) // not truncated, which would give its blocks away
}

func wipeFile(f *os.File) {
	if f == nil {
		return
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil {
		_, _ = f.Write(make([]byte, info.Size()))
		_ = f.Sync()
	}
}

// Remove removes a file of our own, if it is there.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncFolder(filepath.Dir(path))
}

// RemoveWiped is Remove, after putting zeros in the place of what was there.
func RemoveWiped(path string) error {
	overwrite(path)
	return Remove(path)
}

// SyncFolder puts the names in a folder on disk.
func SyncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}

// Lock takes the lock of a folder, and waits for it while another process
// holds it. It lasts until the returned file is closed. A lock whose file was
// removed while it was waited for locks nothing: then the new one is taken.
func Lock(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := flock(f); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		held, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if named, err := os.Lstat(path); err == nil && os.SameFile(held, named) {
			return f, nil
		}
		f.Close()
	}
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
