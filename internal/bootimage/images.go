package bootimage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// Image is the boot image of one kernel, as it was found.
type Image struct {
	Kernel string      // its version
	Path   string      // in the system; empty: none was found
	Mode   fs.FileMode // its permission bits
	Size   int64       // in bytes
	// Faults are what is wrong with it: ErrNoImage, ErrReadable, ErrContents,
	// ErrForbidden. Without one the machine boots unattended from it.
	Faults []error
	Err    error // all of them, or nil
}

// Images finds all kernels of the system and their images, and looks into none.
// An image that belongs to no kernel, such as a rescue system or a copy that
// somebody kept, is not the system's.
func (s *System) Images() ([]Image, error) {
	var images []Image
	for _, kernel := range s.kernels() {
		found := false
		for _, name := range s.imagesOf(kernel) {
			info, err := os.Stat(s.path(name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("look for boot images: %w", err)
			}
			found = true
			images = append(images, Image{Kernel: kernel, Path: "/" + name, Mode: info.Mode().Perm(), Size: info.Size()})
		}
		if !found {
			missing := fmt.Errorf("kernel %s: %w: it boots no encrypted root", kernel, ErrNoImage)
			images = append(images, Image{Kernel: kernel, Faults: []error{missing}, Err: missing})
		}
	}
	return images, nil
}

// kernels are the versions of all kernels that can be booted. Modules without a
// kernel are what is left of one that was removed.
func (s *System) kernels() []string {
	var versions []string
	for _, pattern := range []string{"boot/vmlinuz-*", "boot/vmlinux-*", "lib/modules/*/vmlinuz", "boot/*/*/linux", "boot/efi/*/*/linux", "efi/*/*/linux"} {
		for _, file := range s.glob(pattern) {
			version := path.Base(path.Dir(file))
			if name, isFile := strings.CutPrefix(path.Base(file), "vmlinu"); isFile && len(name) > 2 {
				version = name[2:] // z- or x-
			}
			// Fedora's rescue kernel has the version 0-rescue-..., and no modules.
			if !slices.Contains(versions, version) && s.exists(path.Join("lib/modules", version)) {
				versions = append(versions, version)
			}
		}
	}
	return sorted(versions)
}

// imagesOf are the places where an image of a kernel may be, below the root.
func (s *System) imagesOf(kernel string) []string {
	names := []string{"boot/initrd.img-" + kernel}
	if s.Kind == InitramfsTools {
		return names
	}
	// dracut(8) and kernel-install(8), also under the names of other distributions.
	names = append(names, "boot/initramfs-"+kernel+".img", "lib/modules/"+kernel+"/initrd", "lib/modules/"+kernel+"/initramfs.img")
	for _, dir := range []string{"boot", "boot/efi", "efi"} {
		for _, id := range []string{s.machineID(), "Default"} {
			if id != "" {
				names = append(names, path.Join(dir, id, kernel, "initrd"))
			}
		}
	}
	return names
}

func (s *System) machineID() string {
	text, err := s.read("etc/machine-id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
