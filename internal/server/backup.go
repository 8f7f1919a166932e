package server

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/seal"
	"mandos-escrow/internal/secret"
	"mandos-escrow/store"
	"mandos-escrow/unlock"
)

// ErrBackup: not a backup, a damaged one, or the wrong passphrase of one; they
// cannot be told apart.
var ErrBackup = errors.New("not a whole backup, or another passphrase")

// backupFiles are what a backup holds, in this order; the settings come last,
// as in a state folder.
var backupFiles = []string{
	filepath.Join(keysFolder, unlock.TLSPrivateKeyFile),
	filepath.Join(keysFolder, unlock.TLSPublicKeyFile),
	storeKeyFile,
	storeFile,
	settingsFile,
}

// restored is why a restored server serves nothing at first.
const restored = "it was restored from a backup"

// maxBackupFile bounds one file of a backup: 64 GiB.
const maxBackupFile = 64 << 30

// WriteBackup writes a state folder as a tar archive under a passphrase. The
// store comes from a snapshot of it.
func WriteBackup(w io.Writer, dir string, snapshot *os.File, passphrase []byte, now time.Time) error {
	sealed, err := seal.PassphraseWriter(w, passphrase, now)
	if err != nil {
		return err
	}
	archive := tar.NewWriter(sealed)
	for _, name := range backupFiles {
		if err := addFile(archive, dir, name, snapshot, now); err != nil {
			return fmt.Errorf("backup %s: %w", name, err)
		}
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return sealed.Close()
}

func addFile(archive *tar.Writer, dir, name string, snapshot *os.File, now time.Time) error {
	file := snapshot
	if name != storeFile {
		var err error
		if file, err = os.Open(filepath.Join(dir, name)); err != nil {
			return err
		}
		defer file.Close()
	}
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: now, Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err = io.Copy(archive, file)
	return err
}

// extract writes a backup's files to an empty folder. They are what was sealed
// only if it returns nil.
func extract(r io.Reader, dir string, passphrase []byte) error {
	plain, err := seal.PassphraseReader(r, passphrase)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBackup, err)
	}
	archive := tar.NewReader(plain)
	if err := os.Mkdir(filepath.Join(dir, keysFolder), 0o700); err != nil {
		return err
	}
	for _, name := range backupFiles {
		header, err := archive.Next()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrBackup, err)
		}
		if header.Name != name || header.Typeflag != tar.TypeReg || header.Size > maxBackupFile {
			return fmt.Errorf("%w: %q where %s belongs", ErrBackup, header.Name, name)
		}
		if err := extractFile(archive, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if _, err := archive.Next(); err != io.EOF {
		return fmt.Errorf("%w: it goes on after its last file", ErrBackup)
	}
	if _, err := io.Copy(io.Discard, plain); err != nil { // the end authenticates all of it
		return fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return nil
}

func extractFile(r io.Reader, path string) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, r); err != nil {
		return fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return out.Sync()
}

// VerifyBackup proves that a backup would restore.
func VerifyBackup(r io.Reader, passphrase []byte) (store.Head, error) {
	dir, err := os.MkdirTemp("", "mandos-escrow-verify-*") // mode 0700
	if err != nil {
		return store.Head{}, err
	}
	defer os.RemoveAll(dir)
	return extractChecked(r, dir, passphrase)
}

func extractChecked(r io.Reader, dir string, passphrase []byte) (store.Head, error) {
	if err := extract(r, dir, passphrase); err != nil {
		return store.Head{}, err
	}
	if _, err := readSettings(dir); err != nil {
		return store.Head{}, err
	}
	if _, err := config.LoadKey(filepath.Join(dir, keysFolder)); err != nil {
		return store.Head{}, err
	}
	key, err := loadStoreKey(dir)
	if err != nil {
		return store.Head{}, err
	}
	defer secret.Wipe(key)
	return store.CheckSnapshot(filepath.Join(dir, storeFile), key)
}

// RestoreBackup makes a state folder from a backup: checked whole beside it
// first, then moved, marked as unconfirmed.
func RestoreBackup(r io.Reader, dir string, passphrase []byte, now time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := config.Lock(filepath.Join(dir, lockFile))
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := clearUnfinished(dir); err != nil {
		return err
	}
	draft, err := os.MkdirTemp(dir, draftPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(draft)
	if _, err := extractChecked(r, draft, passphrase); err != nil {
		return err
	}
	if err := markRestored(draft, now); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(dir, keysFolder)); err != nil {
		return err
	}
	for _, name := range []string{keysFolder, storeFile, settingsFile} {
		if err := os.Rename(filepath.Join(draft, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return config.SyncFolder(dir)
}

func markRestored(dir string, now time.Time) error {
	state, err := OpenState(dir)
	if err != nil {
		return err
	}
	defer state.Close()
	return state.Store.Update(func(tx *store.Tx) error {
		return errors.Join(
			store.Unconfirmed.Put(tx, restored),
			tx.Audit(store.Event{Time: now, Actor: LocalActor(), Action: "backup.restore"}),
		)
	})
}
