package bootimage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"mandos-escrow/initrd"
	"mandos-escrow/internal/config"
	"mandos-escrow/internal/record"
)

// Change is what Install did. It is not settled before Commit: a run that is
// killed before leaves it to the next, which takes it up, and back if it fails.
type Change struct {
	Written []string // in the system, sorted
	s       *System
	record  installed
	undo    []func() error
}

// settled reports whether there was nothing to do.
func (c *Change) settled() bool { return len(c.undo) == 0 }

// Commit makes the change stay.
func (c *Change) Commit() error {
	if c.settled() {
		return nil
	}
	c.undo = nil
	return c.s.writeRecord(c.record, committed)
}

// Undo takes the change back, as far as it can, and reports what it could not:
// what was there before is there again. After Commit it does nothing.
func (c *Change) Undo() error {
	var errs []error
	for _, undo := range slices.Backward(c.undo) {
		errs = append(errs, undo())
	}
	c.undo, c.Written = nil, nil
	return errors.Join(errs...)
}

// Install writes the files for this system's images, and the boot program, below
// the root. What a package put there, and what has the same bytes, is left as it
// is; anything else that was not written by an earlier Install is ErrOther, and
// nothing is changed. Killed at any point and run again, it ends the same way. On
// an error all that this run wrote is taken back.
func (s *System) Install(ctx context.Context) (*Change, error) {
	c := &Change{s: s}
	wanted, err := s.wanted(ctx)
	if err == nil {
		err = s.install(ctx, c, wanted)
	}
	if err != nil {
		return nil, fmt.Errorf("install the files of the boot image: %w", errors.Join(err, c.Undo()))
	}
	return c, nil
}

func (s *System) install(ctx context.Context, c *Change, wanted map[string][]byte) error {
	before, state, err := s.readRecord()
	if err != nil {
		return err
	}
	c.record = before.clone()
	intent := before.clone()
	var names []string
	for _, name := range sorted(slices.Collect(maps.Keys(wanted))) {
		write, err := s.toWrite(ctx, name, wanted[name], before)
		if err != nil {
			return err
		}
		if write {
			names = append(names, name)
			intent.add(name, wanted[name])
			c.record[name] = nil
			c.record.add(name, wanted[name])
		}
	}
	switch {
	case len(names) == 0 && state != prepared:
		return nil
	case state == committed:
		c.undo = append(c.undo, func() error { return s.writeRecord(before, committed) })
	default: // the first time, or it was never finished: all of it goes back
		state = prepared
		c.undo = append(c.undo, func() error { _, err := s.Remove(ctx); return err })
	}
	// On disk before the first file: whoever is killed in between knows its own.
	if err := s.writeRecord(intent, state); err != nil {
		return err
	}
	for _, name := range names {
		undo, err := s.place(name, wanted[name])
		c.undo = append(c.undo, undo...)
		if err != nil {
			return err
		}
		c.Written = append(c.Written, "/"+name)
	}
	return nil
}

// toWrite reports whether a file has to be written.
func (s *System) toWrite(ctx context.Context, name string, data []byte, ours installed) (bool, error) {
	if s.packaged(ctx, name) {
		return false, nil
	}
	info, err := os.Lstat(s.path(name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, err
	case !info.Mode().IsRegular():
		return false, fmt.Errorf("%s %w (it is no regular file)", s.path(name), ErrOther)
	}
	there, err := s.read(name)
	switch {
	case err != nil:
		return false, err
	case bytes.Equal(there, data):
		return info.Mode().Perm() != modeOf(name, data) && ours.has(name, there), nil
	case ours.has(name, there):
		return true, nil
	}
	return false, fmt.Errorf("%s %w: move it away, or remove it, and run this again", s.path(name), ErrOther)
}

// wanted are the files to be there, by their names below the root.
func (s *System) wanted(ctx context.Context) (map[string][]byte, error) {
	files, err := s.files()
	if err != nil {
		return nil, err
	}
	if s.packaged(ctx, initrd.Program) {
		return files, nil
	}
	var looked []string
	for _, from := range s.programs() {
		data, err := os.ReadFile(from)
		switch {
		case err == nil:
			files[initrd.Program] = data
			return files, nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
		looked = append(looked, from)
	}
	return nil, fmt.Errorf("the boot program mandos-escrow-unlock is not at %s: install mandos-escrow-client, or put it at the first of these", strings.Join(looked, " or "))
}

// files are those of package initrd for this kind of system.
func (s *System) files() (map[string][]byte, error) {
	files := map[string][]byte{}
	err := fs.WalkDir(initrd.Files, string(s.Kind), func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := initrd.Files.ReadFile(name)
		files[path.Join(initrd.Folders[string(s.Kind)], strings.TrimPrefix(name, string(s.Kind)+"/"))] = data
		return err
	})
	return files, err
}

// Program finds the boot program that a system's images hold, or would hold: in
// its place below the root, or else beside the running executable.
func Program(root string) (string, error) {
	from := (&System{Root: root}).programs()
	slices.Reverse(from[:2]) // what is installed counts
	for _, file := range from {
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() {
			return file, nil
		}
	}
	return "", fmt.Errorf("the boot program mandos-escrow-unlock is not at %s: install mandos-escrow-client", strings.Join(from, " or "))
}

// programs are where the boot program may be found.
func (s *System) programs() []string {
	if s.Program != "" {
		return []string{s.Program}
	}
	var from []string
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	from = append(from, filepath.Join(filepath.Dir(self), filepath.Base(initrd.Program)))
	from = append(from, s.path(initrd.Program))
	if running := "/" + initrd.Program; !slices.Contains(from, running) {
		from = append(from, running)
	}
	return from
}

// ownFolder matches folders that hold nothing but files of ours.
var ownFolder = regexp.MustCompile(`(^|/)\d*mandos-escrow$`)

// modeOf: programs begin with #!, or are the one that is built.
func modeOf(name string, data []byte) fs.FileMode {
	if name == initrd.Program || bytes.HasPrefix(data, []byte("#!")) {
		return 0o755
	}
	return 0o644
}

// place writes one file, and returns how that is undone, also beside an error.
func (s *System) place(name string, data []byte) (undo []func() error, err error) {
	file := s.path(name)
	made, err := makeFolders(filepath.Dir(file))
	for _, dir := range made {
		undo = append(undo, func() error { return os.Remove(dir) })
	}
	if err != nil {
		return undo, err
	}
	old, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		undo = append(undo, func() error { return config.Remove(file) })
	case err != nil:
		return undo, err
	default:
		undo = append(undo, func() error { return replace(file, old, modeOf(name, old)) })
	}
	return undo, replace(file, data, modeOf(name, data))
}

// replace writes a whole file of root's in place of what was there. Its draft has
// a fixed name: the next run uses it again.
func replace(file string, data []byte, mode fs.FileMode) error {
	draft := draftOf(file)
	if err := os.Remove(draft); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && os.Geteuid() == 0 {
		err = f.Chown(0, 0) // a folder may give its group to what is made in it
	}
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(draft, file)
	}
	if err != nil {
		os.Remove(draft)
		return fmt.Errorf("write %s: %w", file, err)
	}
	return config.SyncFolder(filepath.Dir(file))
}

func draftOf(file string) string {
	return filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".mandos-escrow")
}

// makeFolders makes a folder and those above it, and returns those that it made,
// the outermost first, also beside an error.
func makeFolders(dir string) (made []string, err error) {
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if made, err = makeFolders(filepath.Dir(dir)); err != nil {
		return made, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return made, err
	}
	return append(made, dir), os.Chmod(dir, 0o755) // whatever the umask is
}

// Remove takes back what Install recorded, and returns what it removed. What a
// package owns by now, and what somebody changed since, is left.
func (s *System) Remove(ctx context.Context) (removed []string, err error) {
	ours, _, err := s.readRecord()
	if err != nil {
		return nil, err
	}
	for _, name := range sorted(slices.Collect(maps.Keys(ours))) {
		if err := os.Remove(draftOf(s.path(name))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, err
		}
		there, err := s.read(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return removed, err
		case s.packaged(ctx, name):
			s.Progress("%s belongs to a package now: left where it is", s.path(name))
			continue
		case !ours.has(name, there):
			s.Progress("%s was changed since it was installed: left where it is", s.path(name))
			continue
		}
		if err := config.Remove(s.path(name)); err != nil {
			return removed, fmt.Errorf("take back what was installed: %w", err)
		}
		removed = append(removed, "/"+name)
		// Folders that hold nothing else are ours.
		for dir := path.Dir(name); ownFolder.MatchString(dir); dir = path.Dir(dir) {
			if os.Remove(s.path(dir)) != nil {
				break
			}
		}
	}
	return removed, s.writeRecord(nil, committed)
}

// Installed returns what is recorded to be installed by us, in the system.
func (s *System) Installed() ([]string, error) {
	ours, _, err := s.readRecord()
	names := sorted(slices.Collect(maps.Keys(ours)))
	for i := range names {
		names[i] = "/" + names[i]
	}
	return names, err
}

// packaged reports whether a package owns a file.
func (s *System) packaged(ctx context.Context, name string) bool {
	for _, list := range s.glob("var/lib/dpkg/info/mandos-escrow*.list") {
		text, err := s.read(list)
		if err == nil && slices.Contains(strings.Split(string(text), "\n"), "/"+name) {
			return true
		}
	}
	if !s.exists("usr/bin/rpm") || !s.exists(name) {
		return false
	}
	return s.run(ctx, Command{Path: "/usr/bin/rpm", Args: []string{"-qf", "--quiet", "/" + name}}) == nil
}

// installed is the record: the digests of what we wrote, or were about to write,
// by the names of the files below the root.
type installed map[string][][]byte

func (i installed) clone() installed {
	c := installed{}
	for name, digests := range i {
		c[name] = slices.Clone(digests)
	}
	return c
}

func (i installed) add(name string, data []byte) {
	if !i.has(name, data) {
		sum := sha256.Sum256(data)
		i[name] = append(i[name], sum[:])
	}
}

func (i installed) has(name string, data []byte) bool {
	sum := sha256.Sum256(data)
	return slices.ContainsFunc(i[name], func(d []byte) bool { return bytes.Equal(d, sum[:]) })
}

// States of the record.
const (
	prepared  = "prepared" // no image with these files was made yet
	committed = "committed"
)

const (
	recordKind = "mandos-escrow-installed"
	maxRecord  = 64 << 10
	maxDigests = 100
)

func (s *System) recordPath() string { return s.path(config.RunningFolder, "installed") }

// readRecord returns nothing, and no state, where none is.
func (s *System) readRecord() (ours installed, state string, err error) {
	data, err := os.ReadFile(s.recordPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	ours = installed{}
	in := record.Parse(data, recordKind, 1, maxRecord)
	if state = in.Text("state"); state != prepared && state != committed {
		in.Fail("state", "is not one of them")
	}
	for in.Next("file") {
		name := in.Text("file")
		if !filepath.IsLocal(name) {
			in.Fail("file", "is not a path below the root")
		}
		for _, text := range in.Repeated("sha256", maxDigests) {
			digest, err := hex.DecodeString(text)
			if err != nil {
				in.Fail("sha256", "is not hex")
			}
			ours[name] = append(ours[name], digest)
		}
	}
	if err := in.End(); err != nil {
		return nil, "", fmt.Errorf("%s: %w; it tells our files from others: move it away, and remove those by hand", s.recordPath(), err)
	}
	return ours, state, nil
}

func (s *System) writeRecord(ours installed, state string) error {
	if len(ours) == 0 {
		if !s.exists(config.RunningFolder) {
			return nil
		}
		return config.Remove(s.recordPath())
	}
	w := record.New(recordKind, 1).Text("state", state)
	for _, name := range sorted(slices.Collect(maps.Keys(ours))) {
		w.Text("file", name)
		for _, digest := range ours[name] {
			w.Hex("sha256", digest)
		}
	}
	data, err := w.Bytes()
	if err != nil {
		return err
	}
	return config.Replace(s.recordPath(), data)
}

func sorted(names []string) []string {
	slices.Sort(names)
	return names
}
