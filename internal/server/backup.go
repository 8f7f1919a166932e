package server

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"mandos-escrow/internal/config"
	"mandos-escrow/internal/identity"
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

// Limits of the files of a backup: the store, and each other.
const (
	maxBackupFile = 64 << 30
	maxBackupText = 64 << 10
)

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

// unpack writes the store of a backup to a folder; all else, which is small and
// mostly keys, it returns. They are what was sealed only if the error is nil.
func unpack(r io.Reader, dir string, passphrase []byte) (files map[string][]byte, err error) {
	plain, err := seal.PassphraseReader(r, passphrase)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	archive := tar.NewReader(plain)
	files = map[string][]byte{}
	for _, name := range backupFiles {
		header, err := archive.Next()
		if err != nil {
			return files, fmt.Errorf("%w: %w", ErrBackup, err)
		}
		limit := int64(maxBackupText)
		if name == storeFile {
			limit = maxBackupFile
		}
		if header.Name != name || header.Typeflag != tar.TypeReg || header.Size > limit {
			return files, fmt.Errorf("%w: %q where %s belongs", ErrBackup, header.Name, name)
		}
		if name == storeFile {
			err = unpackStore(archive, filepath.Join(dir, name))
		} else if files[name], err = io.ReadAll(archive); err != nil {
			err = fmt.Errorf("%w: %w", ErrBackup, err)
		}
		if err != nil {
			return files, err
		}
	}
	if _, err := archive.Next(); err != io.EOF {
		return files, fmt.Errorf("%w: it goes on after its last file", ErrBackup)
	}
	if _, err := io.Copy(io.Discard, plain); err != nil { // the end authenticates all of it
		return files, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return files, nil
}

func unpackStore(r io.Reader, path string) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	_, err = io.Copy(out, r)
	var ours *fs.PathError
	switch {
	case errors.As(err, &ours): // a full disk says nothing about the backup
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return out.Sync()
}

func wipeFiles(files map[string][]byte) {
	for _, data := range files {
		secret.Wipe(data)
	}
}

// VerifyBackup proves that a backup would restore. Its keys come to no disk.
func VerifyBackup(r io.Reader, passphrase []byte) (store.Head, error) {
	dir, err := os.MkdirTemp("", "mandos-escrow-verify-*") // mode 0700
	if err != nil {
		return store.Head{}, err
	}
	defer os.RemoveAll(dir)
	files, err := unpack(r, dir, passphrase)
	defer wipeFiles(files)
	if err != nil {
		return store.Head{}, err
	}
	return checkUnpacked(files, dir)
}

func checkUnpacked(files map[string][]byte, dir string) (store.Head, error) {
	if _, err := parseSettings(files[settingsFile]); err != nil {
		return store.Head{}, err
	}
	if _, err := identity.ParsePrivatePEM(files[filepath.Join(keysFolder, unlock.TLSPrivateKeyFile)]); err != nil {
		return store.Head{}, err
	}
	key, err := parseStoreKey(files[storeKeyFile])
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
	files, err := unpack(r, draft, passphrase)
	defer wipeFiles(files)
	if err != nil {
		return err
	}
	if _, err := checkUnpacked(files, draft); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(draft, keysFolder), 0o700); err != nil {
		return err
	}
	for name, data := range files {
		if err := config.Replace(filepath.Join(draft, name), data); err != nil {
			return err
		}
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
