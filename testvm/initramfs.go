package testvm

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
)

// Initramfs says what goes into a machine's initramfs.
type Initramfs struct {
	Kernel *Kernel
	Init   string // static program that becomes /init
	Unlock string // static boot program, /bin/mandos-escrow-unlock
	Config string // folder that becomes /etc/mandos-escrow

	Modules []string // more kernel modules than every guest needs
}

// Write packs the initramfs into a new file, readable by its owner alone: like
// a real one, it holds the machine's boot identity.
func (i *Initramfs) Write(ctx context.Context, file string) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("testvm: initramfs: %w", err)
	}
	defer func() { _ = f.Close() }()
	buf := bufio.NewWriter(f)
	a := &archive{w: buf}
	for _, dir := range []string{"bin", "dev", "etc", "modules", "proc", "root", "run", "sys"} {
		a.add(dir, fs.ModeDir|0o755, nil)
	}
	if err := i.fill(ctx, a); err != nil {
		return err
	}
	a.close()
	if a.err != nil {
		return fmt.Errorf("testvm: initramfs: %w", a.err)
	}
	if err := buf.Flush(); err != nil {
		return fmt.Errorf("testvm: initramfs: %w", err)
	}
	return f.Close()
}

// fill adds the programs, the configuration and the modules; the guest loads
// modules in the order of their numbered names.
func (i *Initramfs) fill(ctx context.Context, a *archive) error {
	for name, file := range map[string]string{"init": i.Init, "bin/mandos-escrow-unlock": i.Unlock} {
		data, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("testvm: initramfs: %w", err)
		}
		a.add(name, 0o755, data)
	}
	if err := a.addTree("etc/mandos-escrow", i.Config); err != nil {
		return fmt.Errorf("testvm: initramfs: %w", err)
	}
	modules, err := i.Kernel.Resolve(slices.Concat(guestModules, i.Modules))
	if err != nil {
		return err
	}
	for n, file := range modules {
		data, err := i.Kernel.readModule(ctx, file)
		if err != nil {
			return err
		}
		a.add(fmt.Sprintf("modules/%03d-%s.ko", n, moduleName(file)), 0o644, data)
	}
	return nil
}

// archive writes a cpio archive in the "newc" format
// (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).
// All files belong to root. The first error is kept in err.
type archive struct {
	w     io.Writer
	inode int
	err   error
}

// add writes one folder, file or symbolic link (its data is the target).
func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	if a.err != nil {
		return
	}
	bits := map[fs.FileMode]uint32{fs.ModeDir: 0o040000, fs.ModeSymlink: 0o120000, 0: 0o100000}[mode.Type()]
	if bits == 0 {
		a.err = fmt.Errorf("%s: cannot pack a %s", name, mode.Type())
		return
	}
	a.inode++
	fields := [13]int{a.inode, int(bits | uint32(mode.Perm())), 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0}
	header := "070701"
	for _, field := range fields {
		header += fmt.Sprintf("%08x", field)
	}
	a.pad([]byte(header + name + "\x00"))
	a.pad(data)
}

// pad writes data and fills up to a multiple of four bytes.
func (a *archive) pad(data []byte) {
	if a.err == nil {
		_, a.err = a.w.Write(append(data[:len(data):len(data)], make([]byte, -len(data)&3)...))
	}
}

// addTree adds the folder dir with all below it under the name root.
func (a *archive) addTree(root, dir string) error {
	return filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		var data []byte
		switch info.Mode().Type() {
		case 0:
			data, err = os.ReadFile(file)
		case fs.ModeSymlink:
			var target string
			target, err = os.Readlink(file)
			data = []byte(target)
		}
		if err != nil {
			return err
		}
		a.add(path.Join(root, filepath.ToSlash(rel)), info.Mode(), data)
		return a.err
	})
}

// close writes the entry that ends an archive.
func (a *archive) close() {
	a.add("TRAILER!!!", 0, nil)
}
