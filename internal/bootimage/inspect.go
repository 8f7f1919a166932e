package bootimage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/secret"
	"mandos-escrow/unlock"
)

// Inspect looks into the images of all kernels. What is wrong with an image is in
// its Err; an error is returned when it could not be looked at all.
func (s *System) Inspect(ctx context.Context) ([]Image, error) {
	images, err := s.Images()
	if err != nil || len(images) == 0 {
		return nil, err
	}
	lock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	for i := range images {
		if images[i].Path != "" {
			if err := s.inspect(ctx, &images[i], lock); err != nil {
				return nil, err
			}
		}
	}
	return images, nil
}

// lock keeps two runs from each other; a program of the system that outlived the
// run before still holds it.
func (s *System) lock() (*os.File, error) {
	lock, err := config.Lock(s.path(config.RunningFolder, "images.lock"))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("nothing is enrolled below %s: %w", s.Root, err)
	}
	return lock, err
}

// inspect finds out what is wrong with one image.
func (s *System) inspect(ctx context.Context, image *Image, lock *os.File) error {
	image.Faults = nil
	fault := func(format string, args ...any) {
		image.Faults = append(image.Faults, fmt.Errorf("%s: %w", image.Path, fmt.Errorf(format, args...)))
	}
	// Without an enrolment an image holds nothing of ours, and may be everybody's: UMASK goes with our files.
	if s.enrolled() && image.Mode&0o077 != 0 {
		fault("%w (mode %04o); chmod 600 it, or, where it lies on FAT, mount that with the option umask=0077", ErrReadable, image.Mode)
	}
	if err := s.lookInto(ctx, image, lock, fault); err != nil {
		return err
	}
	image.Err = errors.Join(image.Faults...)
	return nil
}

func (s *System) lookInto(ctx context.Context, image *Image, lock *os.File, fault func(string, ...any)) error {
	dir, err := s.workFolder(image)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tree, err := s.unpack(ctx, image, dir, lock)
	switch {
	case err != nil && ctx.Err() != nil:
		return err
	case err != nil:
		fault("%w: it cannot be taken apart: %w", ErrContents, err)
		return nil
	}
	defer tree.Close()
	found, err := s.compare(tree)
	if err != nil {
		return fmt.Errorf("look into %s: %w", image.Path, err)
	}
	for _, f := range found {
		fault("%w", f)
	}
	return nil
}

// Sizes of what an image unpacks to, for the choice of a folder.
const (
	unpackedRatio = 8        // of a whole image to its size
	unpackedOurs  = 64 << 20 // of our files alone, in bytes
)

// workFolder makes a folder of root's for the keys that an image holds: in
// memory, or else on the encrypted root, where the same keys lie anyway. It has
// one name, so that the next run removes what a killed one left.
func (s *System) workFolder(image *Image) (string, error) {
	const name = "mandos-escrow-image"
	inMemory, onDisk := s.path("run", name), s.path(config.RunningFolder, name)
	for _, dir := range []string{inMemory, onDisk} {
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
	}
	need := image.Size * unpackedRatio
	if s.Kind == Dracut {
		need = unpackedOurs
	}
	var st unix.Statfs_t
	dir := onDisk
	if unix.Statfs(s.path("run"), &st) == nil && st.Type == unix.TMPFS_MAGIC && int64(st.Bavail)*st.Bsize > need {
		dir = inMemory
	}
	return dir, os.Mkdir(dir, 0o700)
}

// unpack takes an image apart with the system's own program, and returns what
// the kernel would unpack: initramfs-tools' program puts archives that only hold
// microcode into folders beside it. dracut's gives out files by pattern, for
// which * is also a slash.
func (s *System) unpack(ctx context.Context, image *Image, dir string, lock *os.File) (*os.Root, error) {
	var said bytes.Buffer
	out := &lines{say: func(_ string, line ...any) {
		if said.Len() < maxLine {
			fmt.Fprintf(&said, "; %s", line...)
		}
	}}
	parts := filepath.Join(dir, "image")
	if err := os.Mkdir(parts, 0o700); err != nil {
		return nil, err
	}
	c := Command{
		Path: "/usr/bin/unmkinitramfs", Args: []string{image.Path, s.inside(parts)},
		Env: []string{"TMPDIR=" + s.inside(dir)}, Out: out, Hold: lock,
	}
	if s.Kind == Dracut {
		c.Path, c.Args, c.Dir = "/usr/bin/lsinitrd", []string{"--unpack", image.Path, "*mandos-escrow*"}, s.inside(parts)
	}
	if err := s.run(ctx, c); err != nil {
		out.flush()
		return nil, fmt.Errorf("%w%s", err, said.Bytes())
	}
	if info, err := os.Lstat(filepath.Join(parts, "main")); err == nil && info.IsDir() {
		parts = filepath.Join(parts, "main")
	}
	return os.OpenRoot(parts)
}

func (s *System) enrolled() bool { return s.exists(path.Join(config.BootFolder, unlock.ConfigFile)) }

// compare returns what is wrong with an unpacked image. On a machine that is not
// enrolled any more an image may hold nothing of ours.
func (s *System) compare(tree *os.Root) (faults []error, err error) {
	enrolled := s.enrolled()
	if enrolled {
		program, err := s.read(initrd.Program)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", ErrNoProgram, err)
		}
		if err != nil {
			return nil, err
		}
		if isWithout(tree) {
			found, err := s.forbidden(tree, enrolled)
			return append([]error{fmt.Errorf("%w: %w", ErrContents, ErrWithout)}, found...), err
		}
		faults = append(faults, lacks(tree, program, sameProgram, initrd.Program)...)
		found, err := s.compareConfig(tree)
		if err != nil {
			return nil, err
		}
		faults = append(faults, found...)
		if found, err = s.compareScripts(tree); err != nil {
			return nil, err
		}
		faults = append(faults, found...)
	}
	found, err := s.forbidden(tree, enrolled)
	return append(faults, found...), err
}

// isWithout reports whether an image has nothing that could be told file by file.
func isWithout(tree *os.Root) bool {
	for _, name := range []string{initrd.Program, config.BootFolder} {
		if _, err := tree.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

// lacks compares the first of the names that is there with what it should be.
func lacks(tree *os.Root, want []byte, same func(a, b []byte) bool, names ...string) []error {
	for _, name := range names {
		data, err := tree.ReadFile(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return []error{fmt.Errorf("%w: /%s: %w", ErrContents, name, err)}
		case !same(data, want):
			secret.Wipe(data)
			return []error{fmt.Errorf("%w: its /%s is not the one that is installed", ErrContents, name)}
		}
		secret.Wipe(data)
		return nil
	}
	return []error{fmt.Errorf("%w: /%s is missing", ErrContents, names[0])}
}

// compareConfig compares the boot identity and what lies beside it, both ways.
func (s *System) compareConfig(tree *os.Root) (faults []error, err error) {
	outside := os.DirFS(s.path(config.BootFolder))
	for _, name := range []string{unlock.ConfigFile, unlock.TLSPrivateKeyFile, unlock.TLSPublicKeyFile, unlock.PrivateKeyFile, unlock.PublicKeyFile} {
		if _, err := fs.Stat(outside, name); err != nil {
			return nil, fmt.Errorf("the boot identity is not whole: %w", err)
		}
	}
	err = eachFile(outside, func(name string) error {
		data, err := fs.ReadFile(outside, name)
		if err == nil {
			faults = append(faults, lacks(tree, data, bytes.Equal, path.Join(config.BootFolder, name))...)
		}
		secret.Wipe(data)
		return err
	})
	if err != nil {
		return nil, err
	}
	inside, err := fs.Sub(tree.FS(), config.BootFolder)
	if err != nil {
		return nil, err
	}
	err = eachFile(inside, func(name string) error {
		if _, err := fs.Stat(outside, name); errors.Is(err, fs.ErrNotExist) {
			faults = append(faults, fmt.Errorf("%w: its /%s is not there outside of it any more", ErrContents, path.Join(config.BootFolder, name)))
		}
		return nil
	})
	return faults, err
}

// eachFile calls f for every regular file but drafts (config.Replace).
func eachFile(folder fs.FS, f func(name string) error) error {
	err := fs.WalkDir(folder, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || strings.HasPrefix(entry.Name(), ".") {
			return err
		}
		return f(name)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // an empty folder
	}
	return err
}

// compareScripts looks for what starts the boot program.
func (s *System) compareScripts(tree *os.Root) (faults []error, err error) {
	files, err := s.files()
	if err != nil {
		return nil, err
	}
	for name := range files {
		script, isScript := strings.CutPrefix(name, "usr/share/initramfs-tools/scripts/")
		isUnit := path.Ext(name) == ".service"
		if !isScript && !isUnit {
			continue
		}
		want, err := s.read(name)
		if err != nil {
			return nil, err
		}
		if isScript {
			faults = append(faults, lacks(tree, want, bytes.Equal, "scripts/"+script)...)
			continue
		}
		unit := path.Base(name)
		faults = append(faults, lacks(tree, want, bytes.Equal, "usr/lib/systemd/system/"+unit, "lib/systemd/system/"+unit)...)
		if !isWanted(tree, unit) {
			faults = append(faults, fmt.Errorf("%w: nothing starts its %s", ErrContents, unit))
		}
	}
	return faults, nil
}

// isWanted reports whether another unit pulls this one in (systemd.unit(5)).
func isWanted(tree *os.Root, unit string) bool {
	for _, dir := range []string{"etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"} {
		for _, how := range []string{"wants", "requires"} {
			if found, err := fs.Glob(tree.FS(), path.Join(dir, "*."+how, unit)); err == nil && len(found) > 0 {
				return true
			}
		}
	}
	return false
}

// forbidden looks for what must not be in an image: the running identity, under
// whatever name, a server's folder, and without an enrolment a boot identity.
func (s *System) forbidden(tree *os.Root, enrolled bool) (faults []error, err error) {
	dirs := []string{config.RunningFolder, "var/lib/mandos-escrow"}
	if !enrolled {
		dirs = append(dirs, config.BootFolder)
	}
	for _, dir := range dirs {
		if _, err := tree.Lstat(dir); err == nil {
			faults = append(faults, fmt.Errorf("%w: /%s", ErrForbidden, dir))
		}
	}
	keys := map[int64][]byte{}
	for _, name := range []string{unlock.TLSPrivateKeyFile, unlock.PrivateKeyFile} {
		data, err := s.read(path.Join(config.RunningFolder, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		defer secret.Wipe(data)
		keys[int64(len(data))] = data
	}
	err = fs.WalkDir(tree.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if key := keys[info.Size()]; len(key) > 0 {
			data, err := tree.ReadFile(name)
			if err != nil {
				return err
			}
			defer secret.Wipe(data)
			if bytes.Equal(data, key) {
				faults = append(faults, fmt.Errorf("%w: /%s is a key of the running identity", ErrForbidden, name))
			}
		}
		return nil
	})
	return faults, err
}
