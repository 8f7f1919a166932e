package bootimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/config"
)

// Apply installs the files, has all images made anew, and looks into them; where
// all that stands already, it makes none. On an error images and files are as
// before it.
func (s *System) Apply(ctx context.Context) ([]Image, error) {
	change, err := s.Install(ctx)
	if err != nil {
		return nil, err
	}
	if change.settled() {
		images, err := s.Inspect(ctx)
		if err == nil && len(images) > 0 && !slices.ContainsFunc(images, func(i Image) bool { return i.Err != nil }) {
			return images, nil
		}
	}
	for _, file := range change.Written {
		s.Progress("installed %s", s.path(file))
	}
	images, err := s.Rebuild(ctx)
	if err == nil {
		err = change.Commit()
	}
	if err != nil {
		if undone := change.Undo(); undone != nil {
			return nil, fmt.Errorf("%w; and the files that were installed for it could not all be taken back: %w", err, undone)
		}
		return nil, err
	}
	return images, nil
}

// Rebuild has the images of all kernels made anew from what is installed and
// enrolled now, and looks into them. Where they cannot be made, or do not hold
// what they must, or others can read them, all images are put back as they were,
// and the error is ErrRebuild; ErrRoom when that was clear before. Kernels without
// an image are named, but no failure.
func (s *System) Rebuild(ctx context.Context) ([]Image, error) {
	lock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := s.recover(ctx, lock); err != nil {
		return nil, err
	}
	images, err := s.Images()
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		if image.Path == "" {
			s.Progress("warning: %v", image.Err)
		}
	}
	images = slices.DeleteFunc(images, func(i Image) bool { return i.Path == "" })
	if len(images) == 0 {
		s.Progress("there is no boot image yet: the one that the next kernel package makes will hold the boot program")
		return nil, nil
	}
	if err := s.checkRoom(images); err != nil {
		return nil, err
	}
	for _, image := range images {
		if err := s.keep(image); err != nil {
			return nil, errors.Join(fmt.Errorf("keep a copy of %s: %w", image.Path, err), s.dropKept())
		}
	}
	made, err := s.make(ctx, images, lock)
	if err != nil {
		return nil, s.putBack(images, err)
	}
	return made, s.dropKept()
}

// make makes the images, and looks into them.
func (s *System) make(ctx context.Context, images []Image, lock *os.File) ([]Image, error) {
	build := s.updateInitramfs
	if s.Kind == Dracut {
		build = s.dracut
	}
	if err := build(ctx, images, lock); err != nil {
		return nil, err
	}
	var wrong []error
	for i := range images {
		info, err := os.Stat(s.path(images[i].Path))
		if err != nil {
			return nil, err
		}
		images[i].Mode, images[i].Size = info.Mode().Perm(), info.Size()
		if err := s.inspect(ctx, &images[i], lock); err != nil {
			return nil, err
		}
		if images[i].Err == nil {
			continue
		}
		if same, err := sameFile(s.path(images[i].Path), s.kept(images[i].Path)); err != nil {
			return nil, err
		} else if same {
			wrong = append(wrong, fmt.Errorf("%s %w: no new one was made, although no error was reported (update_initramfs=no in /etc/initramfs-tools/update-initramfs.conf? /boot mounted read-only?)", images[i].Path, ErrContents))
			continue
		}
		wrong = append(wrong, images[i].Err)
	}
	return images, errors.Join(wrong...)
}

// updateInitramfs writes each image beside the old one, and renames it. It makes
// none, without an error, where update-initramfs.conf says no or /boot is mounted
// read-only: that is seen afterwards.
func (s *System) updateInitramfs(ctx context.Context, _ []Image, lock *os.File) error {
	return s.build(ctx, Command{Path: "/usr/sbin/update-initramfs", Args: []string{"-u", "-k", "all"}, Hold: lock})
}

// dracut is given a name beside each image, which is then renamed: to its default
// place (--regenerate-all) it copies over the old image, keeps that one's mode,
// and removes it when the copy fails.
func (s *System) dracut(ctx context.Context, images []Image, lock *os.File) error {
	for _, image := range images {
		draft := image.Path + ".mandos-escrow"
		if err := config.Remove(s.path(draft)); err != nil {
			return err
		}
		err := s.build(ctx, Command{Path: "/usr/bin/dracut", Args: []string{"--force", "--kver", image.Kernel, draft}, Hold: lock})
		if err == nil {
			err = rename(s.path(draft), s.path(image.Path))
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("dracut made no image, although it reported no error: %w", err)
			}
		}
		if err != nil {
			os.Remove(s.path(draft))
			return err
		}
	}
	return nil
}

func (s *System) build(ctx context.Context, c Command) error {
	s.Progress("making the boot image: %s %s", c.Path, strings.Join(c.Args, " "))
	out := &lines{say: s.Progress}
	c.Out = out
	err := s.run(ctx, c)
	out.flush()
	return err
}

// rename makes a whole file root's alone, and puts it in the place of another.
func rename(from, to string) error {
	f, err := os.OpenFile(from, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Chmod(0o600); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return config.SyncFolder(filepath.Dir(to))
}

// slack is what is wanted beside an image, in bytes.
const slack = 1 << 20

// checkRoom refuses before anything is written. One image at a time is written
// beside the old one; copies of all go to the encrypted root.
func (s *System) checkRoom(images []Image) error {
	need, copies := map[string]int64{}, int64(slack)
	program := int64(0)
	if info, err := os.Stat(s.path(initrd.Program)); err == nil {
		program = info.Size()
	}
	for _, image := range images {
		dir := filepath.Dir(image.Path)
		need[dir] = max(need[dir], image.Size+program+slack)
		copies += image.Size
	}
	for dir, n := range need {
		free, err := s.free(s.path(dir))
		if err != nil {
			return err
		}
		if free < n {
			return fmt.Errorf("%w in %s: a new image of %s needs about %s beside the old one, and %s are free; nothing was changed. Remove kernels that are not booted any more (apt-get autoremove --purge, dnf remove --oldinstallonly)%s, then run this again",
				ErrRoom, dir, s.Root, megabytes(n), megabytes(free), s.removable(dir))
		}
	}
	free, err := s.free(s.path(config.RunningFolder))
	if err == nil && free < copies {
		err = fmt.Errorf("%w in /%s for copies of the images, which are kept until the new ones are proved: %s are needed, and %s are free; nothing was changed", ErrRoom, config.RunningFolder, megabytes(copies), megabytes(free))
	}
	return err
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// removable names what lies in a folder beside the images and looks like one.
func (s *System) removable(dir string) string {
	entries, err := os.ReadDir(s.path(dir))
	if err != nil {
		return ""
	}
	var found []string
	for _, entry := range entries {
		info, err := entry.Info()
		if err == nil && info.Mode().IsRegular() && strings.HasPrefix(entry.Name(), "init") {
			found = append(found, fmt.Sprintf("%s %s", entry.Name(), megabytes(info.Size())))
		}
	}
	if len(found) == 0 {
		return ""
	}
	return "; there are " + strings.Join(found, ", ")
}

// Copies of the images, as they were before, lie on the encrypted root: there is
// room, /boot needs none, and nobody else reads them. A copy that stands was made
// whole.

func (s *System) kept(image string) string {
	return s.path(config.RunningFolder, "images", image)
}

func (s *System) keep(image Image) error {
	if err := os.MkdirAll(filepath.Dir(s.kept(image.Path)), 0o700); err != nil {
		return err
	}
	return copyFile(s.path(image.Path), s.kept(image.Path))
}

func (s *System) dropKept() error { return os.RemoveAll(s.kept("")) }

// copyFile copies bytes and mode, by way of a draft.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	draft := draftOf(to)
	out, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Chmod(info.Mode().Perm())
	}
	if err == nil {
		err = out.Sync()
	}
	if closed := out.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(draft, to)
	}
	if err != nil {
		os.Remove(draft)
		return err
	}
	return config.SyncFolder(filepath.Dir(to))
}

// putBack makes all images what they were, and returns the error to report.
func (s *System) putBack(images []Image, why error) error {
	var failed []error
	for _, image := range images {
		if err := s.restore(image.Path); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w; its copy is %s", image.Path, err, s.kept(image.Path)))
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("%w: %w. THE OLD IMAGE COULD NOT BE PUT BACK, do that before you reboot: %w", ErrRebuild, why, errors.Join(failed...))
	}
	again := "update-initramfs -u -k all"
	if s.Kind == Dracut {
		again = "dracut --force --regenerate-all"
	}
	return errors.Join(fmt.Errorf("%w: %w. The old images are in their places, unchanged: the machine boots as before, by its prompt. See why `%s` fails, then run this again", ErrRebuild, why, again), s.dropKept())
}

// restore puts the copy of an image back, unless the image is still the same.
func (s *System) restore(image string) error {
	same, err := sameFile(s.path(image), s.kept(image))
	if same || err != nil {
		return err
	}
	if err := copyFile(s.kept(image), s.path(image)); err == nil {
		return nil
	}
	// No room for both: what is there is worth nothing.
	if err := os.Remove(s.path(image)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return copyFile(s.kept(image), s.path(image))
}

// sameFile compares bytes and modes. A file that is not there is not the same.
func sameFile(file, copied string) (bool, error) {
	a, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := os.Open(copied)
	if err != nil {
		return false, err
	}
	defer b.Close()
	infoA, err := a.Stat()
	if err != nil {
		return false, err
	}
	infoB, err := b.Stat()
	if err != nil || infoA.Size() != infoB.Size() || infoA.Mode() != infoB.Mode() {
		return false, err
	}
	return sameBytes(a, b)
}

func sameBytes(a, b io.Reader) (bool, error) {
	left, right := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(a, left)
		m, err2 := io.ReadFull(b, right)
		switch {
		case n != m || string(left[:n]) != string(right[:m]):
			return false, nil
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return true, nil
		case err != nil:
			return false, err
		case err2 != nil:
			return false, err2
		}
	}
}

// recover takes up what a killed run left: an image that is missing, or cannot be
// taken apart, is put back. One that is whole may be newer than its copy.
func (s *System) recover(ctx context.Context, lock *os.File) error {
	var possible []string
	for _, kernel := range s.kernels() {
		possible = append(possible, s.imagesOf(kernel)...)
	}
	err := filepath.WalkDir(s.kept(""), func(file string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || strings.HasPrefix(entry.Name(), ".") {
			return err
		}
		image, err := filepath.Rel(s.kept(""), file)
		if err != nil || !slices.Contains(possible, image) { // its kernel was removed
			return err
		}
		os.Remove(s.path(image) + ".mandos-escrow") // dracut's draft
		if whole, err := s.whole(ctx, "/"+image, lock); whole || err != nil {
			return err
		}
		s.Progress("/%s was left damaged by a run that was interrupted: it is put back", image)
		return s.restore(image)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.dropKept()
}

// whole reports whether an image is there and can be taken apart.
func (s *System) whole(ctx context.Context, image string, lock *os.File) (bool, error) {
	info, err := os.Stat(s.path(image))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	found := &Image{Path: image, Size: info.Size()}
	dir, err := s.workFolder(found)
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	tree, err := s.unpack(ctx, found, dir, lock)
	if err != nil {
		return false, ctx.Err()
	}
	return true, tree.Close()
}
