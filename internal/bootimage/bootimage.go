// Package bootimage puts the boot program into the boot images of a system: it
// finds out who makes them, installs the files of package initrd, has the images
// made anew, and looks into them afterwards. Whatever fails, the images are as
// they were, byte for byte, and no file is half installed.
//
// It writes no image itself: that do the system's own programs, in a chroot where
// the system is not the running one. It knows nothing of servers and volumes. It
// may import initrd, internal/config and the leaves.
package bootimage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// Errors that callers decide on.
var (
	// ErrUnknown: nothing that is known here makes this system's boot images.
	ErrUnknown = errors.New("the boot image of this system is not made by a program that is known here")
	// ErrOther: another file stands where one of ours belongs; it was left alone.
	ErrOther = errors.New("is there already, and is not ours")
	// ErrRoom: no room for what has to be written; nothing was changed.
	ErrRoom = errors.New("not enough room")
	// ErrRebuild: the images could not be made, and are as they were.
	ErrRebuild = errors.New("the boot image was not made anew")

	// What is wrong with an image.

	// ErrNoImage: a kernel without an image that could be found.
	ErrNoImage = errors.New("no boot image was found")
	// ErrNoProgram: there is nothing to compare the images with.
	ErrNoProgram = errors.New("the boot program is not installed")
	// ErrWithout: the image knows nothing of us, so it also gives nothing away.
	ErrWithout = errors.New("neither the boot program nor the boot identity is in it: it was made without mandos-escrow-client, or before the machine was enrolled")
	// ErrReadable: others than root can read the image, and so the boot identity.
	ErrReadable = errors.New("others than root can read it")
	// ErrContents: the image lacks what it must hold, or holds something else.
	ErrContents = errors.New("does not hold what it must")
	// ErrForbidden: the image holds what may not leave the encrypted root.
	ErrForbidden = errors.New("holds what must not be in it")
)

// Kind is the program that makes the images.
type Kind string

// Kinds; also names of folders in package initrd.
const (
	InitramfsTools Kind = "initramfs-tools"
	Dracut         Kind = "dracut"
)

// System is one installed system whose boot images can be made.
type System struct {
	Kind Kind
	Root string // "/" for the running system
	// Program is the boot program to install. Empty: the file beside the running
	// executable, or in its place below / or the root.
	Program string
	// Progress tells what is done, and passes on what the system's programs say.
	Progress func(format string, args ...any)
	// Run starts a program of the system. Nil: in a chroot. Tests have another.
	Run func(ctx context.Context, root string, c Command) error
	// Free returns the bytes that are free below a folder. Nil: as statfs(2) says.
	Free func(dir string) (int64, error)
}

// Detect finds out who makes the images of the system below root.
//
// Where both are installed, initramfs-tools is in charge if update-initramfs is
// its own: that is what kernel packages and others call. dracut's packages put a
// program of their own in that place, or none; dracut-core alone, which other
// packages pull in as a tool, makes no image. An error is ErrUnknown, and says
// what was looked for.
func Detect(root string) (*System, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	s := &System{Root: root, Progress: func(string, ...any) {}}
	updates, err := s.read("usr/sbin/update-initramfs")
	if err == nil && s.exists("usr/sbin/mkinitramfs") && ownUpdater.Match(updates) {
		s.Kind = InitramfsTools
		return s, nil
	}
	if !s.exists("usr/bin/dracut") {
		return nil, fmt.Errorf("%w: below %s there is neither /usr/sbin/update-initramfs with /usr/sbin/mkinitramfs (initramfs-tools) nor /usr/bin/dracut%s; %s",
			ErrUnknown, root, s.others(), byHand)
	}
	if why := s.withoutSystemd(); why != "" {
		return nil, fmt.Errorf("%w: dracut makes images here without systemd (%s), whose questions are the ones that are answered; %s", ErrUnknown, why, byHand)
	}
	s.Kind = Dracut
	return s, nil
}

const byHand = "operations.md (in docs, or in /usr/share/doc/mandos-escrow), section 8, says what the image must hold and run, to be done by hand"

// ownUpdater tells initramfs-tools' update-initramfs, which calls mkinitramfs,
// from what dracut puts in its place.
var ownUpdater = regexp.MustCompile(`(?m)^[^#\n]*\bmkinitramfs\b`)

// others names what was found instead.
func (s *System) others() string {
	var found []string
	for name, path := range map[string]string{
		"mkinitcpio": "usr/bin/mkinitcpio", "booster": "usr/bin/booster", "mkosi-initrd": "usr/bin/mkosi-initrd", "dracut-core": "usr/lib/dracut/dracut-init.sh",
	} {
		if s.exists(path) {
			found = append(found, name)
		}
	}
	if len(found) == 0 {
		return ""
	}
	return " (there is " + strings.Join(sorted(found), ", ") + ", for which there are no files)"
}

// omitted finds a module of dracut that a configuration leaves out. The files
// are shell, so this is a guess: what the image really holds is looked at later.
var omitted = regexp.MustCompile(`(?m)^\s*omit_dracutmodules\+?=.*[\s"'](systemd|systemd-initrd|crypt)[\s"']`)

// withoutSystemd says why systemd would not be in dracut's images, or "".
func (s *System) withoutSystemd() string {
	if !s.exists("usr/lib/systemd/systemd") && !s.exists("lib/systemd/systemd") {
		return "systemd is not installed"
	}
	if len(s.glob("usr/lib/dracut/modules.d/*systemd-initrd")) == 0 {
		return "dracut's module systemd-initrd is missing"
	}
	for _, pattern := range []string{"etc/dracut.conf", "etc/dracut.conf.d/*.conf", "usr/lib/dracut/dracut.conf.d/*.conf"} {
		for _, file := range s.glob(pattern) {
			text, err := s.read(file)
			if m := omitted.FindSubmatch(text); err == nil && m != nil {
				return fmt.Sprintf("/%s omits %s", file, m[1])
			}
		}
	}
	return ""
}

func (s *System) path(parts ...string) string {
	return filepath.Join(append([]string{s.Root}, parts...)...)
}

// inside is a path as it is named in the system itself.
func (s *System) inside(path string) string {
	rel, err := filepath.Rel(s.Root, path)
	if err != nil {
		return path
	}
	return "/" + rel
}

// glob returns what matches below the root, whose own name is no pattern.
func (s *System) glob(pattern string) []string {
	names, err := fs.Glob(os.DirFS(s.Root), pattern)
	if err != nil {
		return nil // the patterns are right
	}
	return names
}

func (s *System) exists(name string) bool {
	_, err := os.Stat(s.path(name))
	return err == nil
}

func (s *System) read(name string) ([]byte, error) { return os.ReadFile(s.path(name)) }

// free counts what is kept for root, too: the programs that write run as root.
func (s *System) free(dir string) (int64, error) {
	if s.Free != nil {
		return s.Free(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("look for room in %s: %w", dir, err)
	}
	return int64(st.Bfree) * st.Bsize, nil
}
