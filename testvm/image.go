package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Sizes in bytes. cryptsetup takes twice the room of the header off the end
// of the image, and leaves the file system as it is.
const (
	rootSize   = 64 << 20
	headerRoom = 32 << 20
)

// Root says what an encrypted root file system holds.
type Root struct {
	LUKS       int    // header version, 1 or 2
	Init       string // static program that becomes /sbin/init
	Marker     string // content of /etc/testvm-marker, which that program prints
	Passphrase []byte // the only passphrase; its keyslot costs next to nothing
}

// Write makes the image in a new file: an ext4 file system, encrypted in
// place, so that the clear text never had to be mounted and no device-mapper
// is needed. The sector size is 512 bytes because LUKS1 has no other.
func (r *Root) Write(ctx context.Context, file string) error {
	if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("testvm: root image: %s: %w", file, os.ErrExist)
	}
	tree, err := os.MkdirTemp(filepath.Dir(file), "tree-")
	if err != nil {
		return fmt.Errorf("testvm: root image: %w", err)
	}
	defer func() { _ = os.RemoveAll(tree) }()
	if err := r.populate(tree); err != nil {
		return fmt.Errorf("testvm: root image: %w", err)
	}
	if _, err := run(ctx, "", nil, "mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", tree,
		file, fmt.Sprintf("%dk", rootSize>>10)); err != nil {
		return err
	}
	if err := os.Chmod(file, 0o600); err != nil {
		return fmt.Errorf("testvm: root image: %w", err)
	}
	if err := os.Truncate(file, rootSize+headerRoom); err != nil {
		return fmt.Errorf("testvm: root image: %w", err)
	}
	return r.encrypt(ctx, file)
}

// populate lays out the file system's content in tree.
func (r *Root) populate(tree string) error {
	for _, dir := range []string{"dev", "etc", "proc", "run", "sbin", "sys"} {
		if err := os.Mkdir(filepath.Join(tree, dir), 0o755); err != nil {
			return err
		}
	}
	program, err := os.ReadFile(r.Init)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tree, "sbin", "init"), program, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(tree, "etc", "testvm-marker"), []byte(r.Marker), 0o644)
}

// encrypt turns the file system in file into a LUKS volume. cryptsetup cannot
// make a LUKS1 volume out of a file that holds data, but it can turn a LUKS2
// header into a LUKS1 one.
func (r *Root) encrypt(ctx context.Context, file string) error {
	if _, err := run(ctx, "", r.Passphrase, "cryptsetup", "reencrypt", "--encrypt", "-q", "--type", "luks2",
		"--reduce-device-size", fmt.Sprint(headerRoom), "--sector-size", "512",
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", file); err != nil {
		return err
	}
	switch r.LUKS {
	case 1:
		_, err := run(ctx, "", nil, "cryptsetup", "convert", "-q", "--type", "luks1", file)
		return err
	case 2:
		return nil
	}
	return fmt.Errorf("testvm: root image: no LUKS version %d", r.LUKS)
}
