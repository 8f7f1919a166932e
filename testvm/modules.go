package testvm

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// guestModules is what a guest needs beyond what is built into the kernel:
// virtio disk, network and random numbers, and dm-crypt with AES-XTS. The
// generic xts template asks for ecb by name, which modules.dep does not say.
var guestModules = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "dm_crypt", "ecb", "xts", "aesni_intel"}

// Resolve returns the files to load for the named modules, relative to the
// modules folder, in an order in which each comes after what it depends on. A
// module that is built into the kernel needs none; an unknown one is an error.
func (k *Kernel) Resolve(names []string) ([]string, error) {
	dep, err := os.ReadFile(filepath.Join(k.Modules, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("testvm: modules: %w", err)
	}
	builtin, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("testvm: modules: %w", err)
	}
	return resolveModules(string(dep), string(builtin), names)
}

// resolveModules is Resolve on the texts of modules.dep and modules.builtin
// (modules.dep(5)).
func resolveModules(dep, builtin string, names []string) ([]string, error) {
	files, needs, inKernel := map[string]string{}, map[string][]string{}, map[string]bool{}
	for line := range strings.Lines(dep) {
		if file, rest, ok := strings.Cut(line, ":"); ok {
			files[moduleName(file)] = file
			needs[file] = strings.Fields(rest)
		}
	}
	for _, file := range strings.Fields(builtin) {
		inKernel[moduleName(file)] = true
	}
	var order []string
	seen := map[string]bool{}
	var add func(file string)
	add = func(file string) {
		if seen[file] {
			return
		}
		seen[file] = true
		for _, need := range needs[file] {
			add(need)
		}
		order = append(order, file)
	}
	for _, name := range names {
		switch file, ok := files[moduleName(name)]; {
		case ok:
			add(file)
		case !inKernel[moduleName(name)]:
			return nil, fmt.Errorf("testvm: this kernel has no module %s", name)
		}
	}
	return order, nil
}

// moduleName is the name of the module in file; the kernel takes - for _.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModule returns a module as the kernel loads it: distributions compress
// the file, and not every kernel can undo that itself.
func (k *Kernel) readModule(ctx context.Context, file string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(k.Modules, file))
	if err != nil {
		return nil, fmt.Errorf("testvm: modules: %w", err)
	}
	switch path.Ext(file) {
	case ".xz":
		return run(ctx, "", data, "xz", "-dc")
	case ".zst":
		return run(ctx, "", data, "zstd", "-dc")
	case ".gz":
		z, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("testvm: module %s: %w", file, err)
		}
		return io.ReadAll(z)
	}
	return data, nil
}
