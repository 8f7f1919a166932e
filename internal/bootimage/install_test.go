package bootimage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"mandos-escrow/initrd"
)

const hook = "usr/share/initramfs-tools/hooks/mandos-escrow"

func mustInstall(t *testing.T, f *fake) *Change {
	t.Helper()
	c, err := f.Install(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestInstall(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		before := f.tree(t)
		c := mustInstall(t, f)
		files, err := f.files()
		if err != nil || len(files) < 3 {
			t.Fatalf("%d files, %v", len(files), err)
		}
		files[initrd.Program] = []byte("the boot program")
		var names []string
		for name, data := range files {
			names = append(names, "/"+name)
			info, err := os.Lstat(f.path(name))
			if err != nil {
				t.Fatal(err)
			}
			want := fs.FileMode(0o644)
			if name == initrd.Program || bytes.HasPrefix(data, []byte("#!")) {
				want = 0o755
			}
			there, err := f.read(name)
			if err != nil || !bytes.Equal(there, data) || info.Mode() != want {
				t.Errorf("%s: mode %s, %v", name, info.Mode(), err)
			}
			if owner := info.Sys().(*syscall.Stat_t); int(owner.Uid) != os.Geteuid() {
				t.Errorf("%s: owner %d", name, owner.Uid)
			}
		}
		if !slices.Equal(c.Written, sorted(names)) {
			t.Errorf("written %q", c.Written)
		}
		if info, err := os.Stat(f.path("usr/lib/mandos-escrow")); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("%v, %v", info, err)
		}
		if err := c.Undo(); err != nil {
			t.Error(err)
		}
		f.unchanged(t, before)

		if err := mustInstall(t, f).Commit(); err != nil {
			t.Fatal(err)
		}
		if c := mustInstall(t, f); len(c.Written) != 0 {
			t.Errorf("written again: %q", c.Written)
		} else if err := c.Undo(); err != nil || !f.exists(initrd.Program) {
			t.Errorf("nothing to undo: %v", err)
		}
		installed, err := f.Installed()
		if err != nil || !slices.Equal(installed, names) {
			t.Errorf("%q, %v", installed, err)
		}
		removed, err := f.Remove(t.Context())
		if err != nil || !slices.Equal(removed, names) {
			t.Errorf("%q, %v", removed, err)
		}
		f.unchanged(t, before)
	})
}

// TestInstallKilled kills at every file: the next run ends the same, and takes
// all of it back when its images cannot be made.
func TestInstallKilled(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		before := f.tree(t)
		whole := mustInstall(t, f)
		written, record := whole.Written, whole.record
		for n := range written {
			if err := whole.Undo(); err != nil {
				t.Fatal(err)
			}
			if err := f.writeRecord(record, prepared); err != nil {
				t.Fatal(err)
			}
			for _, name := range written[:n] {
				if _, err := f.place(strings.TrimPrefix(name, "/"), mustWanted(t, f)[name[1:]]); err != nil {
					t.Fatal(err)
				}
			}
			whole = mustInstall(t, f)
			if len(whole.Written) != len(written)-n {
				t.Errorf("killed at %d: %q", n, whole.Written)
			}
			if err := whole.Undo(); err != nil {
				t.Error(err)
			}
			f.unchanged(t, before)
		}
	})
}

func mustWanted(t *testing.T, f *fake) map[string][]byte {
	t.Helper()
	files, err := f.wanted(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestUpgrade: a newer program replaces what we wrote, and comes back if that
// fails.
func TestUpgrade(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		f.mustApply(t)
		before := f.tree(t)
		if err := os.WriteFile(f.Program, []byte("a newer boot program"), 0o600); err != nil {
			t.Fatal(err)
		}
		f.goesWrong(t, "fails-at-2")
		_, err := f.Apply(t.Context())
		is(t, err, ErrRebuild)
		f.unchanged(t, before)
		f.goesWrong(t, "")
		f.mustApply(t)
		if data, err := f.read(initrd.Program); err != nil || string(data) != "a newer boot program" {
			t.Errorf("%s, %v", data, err)
		}
	})
}

// TestOthers: what others put there is neither overwritten nor removed.
func TestOthers(t *testing.T) {
	f := newFake(t, InitramfsTools)
	before := f.tree(t)
	f.write(t, hook, "#!/bin/sh\n# somebody else's")
	with := f.tree(t)
	_, err := f.Install(t.Context())
	is(t, err, ErrOther, f.path(hook), "move it away")
	f.unchanged(t, with)

	// a link, whatever it leads to
	if err := os.Remove(f.path(hook)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", f.path(hook)); err != nil {
		t.Fatal(err)
	}
	_, err = f.Install(t.Context())
	is(t, err, ErrOther, f.path(hook))
	if err := os.Remove(f.path(hook)); err != nil {
		t.Fatal(err)
	}
	f.unchanged(t, before)

	// the same bytes: left, and not ours
	f.write(t, hook, string(mustWanted(t, f)[hook]))
	if c := mustInstall(t, f); slices.Contains(c.Written, "/"+hook) {
		t.Error("it was written")
	} else if err := c.Commit(); err != nil {
		t.Fatal(err)
	}

	// ours, but changed since: stays; and what a package owns by now
	const changed, packaged = "usr/share/initramfs-tools/scripts/init-bottom/mandos-escrow", "usr/share/initramfs-tools/conf-hooks.d/mandos-escrow"
	f.write(t, changed, "#!/bin/sh\n# changed")
	f.write(t, "var/lib/dpkg/info/mandos-escrow-client.list", "/.\n/usr\n/"+packaged+"\n")
	if _, err := f.Install(t.Context()); err == nil {
		t.Error("what was changed since was overwritten")
	} else {
		is(t, err, ErrOther, changed)
	}
	if _, err := f.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{hook, changed, packaged} {
		if !f.exists(name) {
			t.Errorf("%s was removed", name)
		}
	}
	if f.exists(initrd.Program) || !strings.Contains(f.said.String(), "was changed since") || !strings.Contains(f.said.String(), "belongs to a package") {
		t.Errorf("said %s", f.said.Bytes())
	}
}

// TestPackaged: where a package put the files, nothing is written.
func TestPackaged(t *testing.T) {
	f := newFake(t, InitramfsTools)
	list := ""
	for name, data := range mustWanted(t, f) {
		f.write(t, name, string(data)+"# of another version\n")
		list += "/" + name + "\n"
	}
	f.write(t, "var/lib/dpkg/info/mandos-escrow-client.list", list)
	before := f.tree(t)
	if c := mustInstall(t, f); len(c.Written) != 0 {
		t.Errorf("written: %q", c.Written)
	}
	f.unchanged(t, before)
	f.mustApply(t)

	// by rpm, which is asked
	f = newFake(t, Dracut)
	f.write(t, "usr/bin/rpm", "#!/bin/sh\n[ \"$1 $2\" = '-qf --quiet' ] && [ \"$3\" = /"+initrd.Program+" ]\n")
	if err := os.Chmod(f.path("usr/bin/rpm"), 0o755); err != nil {
		t.Fatal(err)
	}
	f.write(t, initrd.Program, "of a package")
	if c := mustInstall(t, f); slices.Contains(c.Written, "/"+initrd.Program) || len(c.Written) == 0 {
		t.Errorf("written: %q", c.Written)
	}
}

func TestNoProgram(t *testing.T) {
	f := newFake(t, InitramfsTools)
	before := f.tree(t)
	f.Program += "-missing"
	_, err := f.Install(t.Context())
	is(t, err, nil, f.Program, "mandos-escrow-unlock")
	f.unchanged(t, before)
	f.Program = ""
	if places := f.programs(); len(places) != 3 || places[1] != f.path(initrd.Program) || places[2] != "/"+initrd.Program {
		t.Errorf("%q", places)
	}
}

// TestDamagedRecord: without the record nobody knows whose the files are.
func TestDamagedRecord(t *testing.T) {
	f := newFake(t, Dracut)
	f.mustApply(t)
	for _, text := range []string{"x", "mandos-escrow-installed: 1\nstate: some\n", "mandos-escrow-installed: 1\nstate: committed\nfile: ../../etc/passwd\nsha256: 00\n"} {
		f.write(t, "var/lib/mandos-escrow-agent/installed", text)
		before := f.tree(t)
		if _, err := f.Remove(t.Context()); err == nil || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("got %v", err)
		}
		if _, err := f.Install(t.Context()); err == nil {
			t.Error("installed")
		}
		f.unchanged(t, before)
	}
}

func TestDetect(t *testing.T) {
	f := newFake(t, InitramfsTools) // has dracut, too
	wrapper := "#!/bin/sh\n# for what calls update-initramfs instead of mkinitramfs\nexec dracut --force\n"
	f.write(t, "usr/sbin/update-initramfs", wrapper)
	if s, err := Detect(f.Root); err != nil || s.Kind != Dracut {
		t.Errorf("dracut's update-initramfs: %+v, %v", s, err)
	}
	for name, text := range map[string]string{
		"etc/dracut.conf":                      "omit_dracutmodules+=\" lvm systemd \"\n",
		"etc/dracut.conf.d/10-x.conf":          "  omit_dracutmodules=\" systemd-initrd \"\n",
		"usr/lib/dracut/dracut.conf.d/10.conf": "omit_dracutmodules+=' crypt '\n",
	} {
		f.write(t, name, text)
		_, err := Detect(f.Root)
		is(t, err, ErrUnknown, "/"+name+" omits", "section 8")
		f.write(t, name, "# omit_dracutmodules+=\" systemd \"\nomit_dracutmodules+=\" systemd-networkd \"\n")
		if _, err := Detect(f.Root); err != nil {
			t.Error(err)
		}
	}
	if err := os.Remove(f.path("usr/lib/systemd/systemd")); err != nil {
		t.Fatal(err)
	}
	_, err := Detect(f.Root)
	is(t, err, ErrUnknown, "systemd is not installed")
	if err := os.RemoveAll(f.path("usr")); err != nil {
		t.Fatal(err)
	}
	_, err = Detect(f.Root)
	is(t, err, ErrUnknown, "update-initramfs", "dracut", "section 8")
	f.write(t, "usr/bin/mkinitcpio", "")
	_, err = Detect(f.Root)
	is(t, err, ErrUnknown, "there is mkinitcpio")
}

// TestSameProgram: dracut strips what it installs. What is loaded counts.
func TestSameProgram(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	var end, text uint64
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			end = max(end, p.Off+p.Filesz)
			if p.Flags&elf.PF_X != 0 {
				text = p.Off + p.Filesz/2
			}
		}
	}
	stripped := slices.Clone(whole[:end])
	table := binary.LittleEndian.Uint64(whole[40:])
	size := uint64(binary.LittleEndian.Uint16(whole[58:])) * uint64(binary.LittleEndian.Uint16(whole[60:]))
	clear(stripped[min(table, end):min(table+size, end)])
	clear(stripped[40:48])
	clear(stripped[58:64])
	if !sameProgram(whole, whole) || !sameProgram(stripped, whole) {
		t.Error("not the same when stripped")
	}
	other := slices.Clone(stripped)
	other[text] ^= 1
	entry := slices.Clone(stripped)
	entry[24] ^= 1
	hidden := hide(t, stripped, text)
	for name, b := range map[string][]byte{
		"changed": other, "changed under a table of sections": hidden, "another entry": entry, "cut off": stripped[:end-1],
		"no program": []byte("#!/bin/sh"), "empty": nil,
	} {
		if sameProgram(b, whole) {
			t.Errorf("%s: the same", name)
		}
	}
	if sameProgram([]byte("a"), []byte("b")) {
		t.Error("two files that are no programs are the same")
	}
}

// hide changes a byte of a program, and lays a table of two sections over it, each
// of them empty.
func hide(t *testing.T, program []byte, at uint64) []byte {
	t.Helper()
	b := slices.Clone(program)
	const section, size = 64, 4 * 64
	start := at - size
	clear(b[start : start+section])
	clear(b[start+size : start+size+section])
	b[start+section] ^= 1
	binary.LittleEndian.PutUint64(b[40:], start)
	binary.LittleEndian.PutUint16(b[58:], size)
	binary.LittleEndian.PutUint16(b[60:], 2)
	binary.LittleEndian.PutUint16(b[62:], 0)
	if _, err := elf.NewFile(bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestMounted: in a bare folder no program is started.
func TestMounted(t *testing.T) {
	root := t.TempDir()
	err := runInRoot(t.Context(), root, Command{Path: "/bin/sh"})
	is(t, err, fs.ErrNotExist, "mount --bind", root)
	if err := mounted("/"); err != nil {
		t.Error(err)
	}
}

// TestRunHere: in the running system there is no chroot; the environment is
// cleaned, both outputs arrive.
func TestRunHere(t *testing.T) {
	t.Setenv("DPKG_MAINTSCRIPT_PACKAGE", "x")
	f := newFake(t, Dracut)
	out := &lines{say: f.Progress}
	dir := t.TempDir()
	err := runInRoot(t.Context(), "/", Command{
		Path: "/bin/sh", Args: []string{"-c", "echo $1; pwd >&2; env", "sh", "an argument"}, Dir: dir, Env: []string{"TMPDIR=/x"}, Out: out,
	})
	out.flush()
	if err != nil {
		t.Fatal(err)
	}
	said := strings.Split(strings.TrimSpace(f.said.String()), "\n")
	for _, want := range []string{"an argument", filepath.Clean(dir), "LC_ALL=C", "TMPDIR=/x", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"} {
		if !slices.Contains(said, want) {
			t.Errorf("no %q in %q", want, said)
		}
	}
	for _, line := range said {
		if strings.HasPrefix(line, "DPKG") {
			t.Error(line)
		}
	}
	err = runInRoot(t.Context(), "/", Command{Path: "/bin/false", Args: []string{"x"}})
	is(t, err, nil, "/bin/false x")
}
