package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// metaPackages name the kernels tried, best first: Debian's cloud kernel has
// ext4 built in and boots fastest without hardware help; Ubuntu's is the
// kernel for virtual machines.
var metaPackages = []string{"linux-image-cloud-amd64", "linux-image-virtual"}

// kernelPackage matches the versioned packages that a kernel is made of.
var kernelPackage = regexp.MustCompile(`^linux-(image|modules)-[0-9]`)

// Kernel is a distribution's kernel, unpacked from its packages.
type Kernel struct {
	Release string // as uname -r prints it
	Image   string // path of vmlinuz
	Modules string // path of the folder that holds modules.dep
}

// FindKernel returns the kernel that apt would install here. It is downloaded
// and unpacked into cache unless it is there already; nothing is installed. A
// download that was cut off is never used: a folder gets its final name only
// when it is whole.
func FindKernel(ctx context.Context, cache string) (*Kernel, error) {
	packages, version, err := candidate(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, packages[0]+"_"+strings.ReplaceAll(version, ":", "%3a"))
	if _, err := os.Stat(dir); err == nil {
		return openKernel(dir)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("testvm: kernel cache: %w", err)
	}
	removeLeftovers(filepath.Join(cache, "part-*"), os.Geteuid(), time.Now().Add(-leftoverAge))
	part, err := os.MkdirTemp(cache, "part-")
	if err != nil {
		return nil, fmt.Errorf("testvm: kernel cache: %w", err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	if err := unpackKernel(ctx, part, packages); err != nil {
		return nil, err
	}
	// Losing the race to another run is as good as winning it.
	if err := os.Rename(part, dir); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("testvm: kernel cache: %w", err)
	}
	return openKernel(dir)
}

// candidate returns the versioned packages of the first kernel that apt knows,
// the image first, and the image's version.
func candidate(ctx context.Context) (packages []string, version string, err error) {
	for _, meta := range metaPackages {
		var fields map[string]string
		if fields, err = showPackage(ctx, meta); err != nil {
			continue
		}
		packages = kernelDepends(fields["Depends"])
		for i := 0; i < len(packages); i++ {
			if fields, err = showPackage(ctx, packages[i]); err != nil {
				return nil, "", err
			}
			if i == 0 {
				version = fields["Version"]
			}
			packages = append(packages, kernelDepends(fields["Depends"])...)
		}
		if len(packages) > 0 {
			return packages, version, nil
		}
		err = fmt.Errorf("testvm: package %s names no kernel", meta)
	}
	return nil, "", fmt.Errorf("testvm: no kernel package known; run `apt-get update` as root: %w", err)
}

// showPackage returns the one-line fields of the version of a package that apt
// would install.
func showPackage(ctx context.Context, name string) (map[string]string, error) {
	out, err := run(ctx, "", nil, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return nil, err
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if key, value, ok := strings.Cut(line, ": "); ok && !strings.HasPrefix(line, " ") {
			fields[key] = strings.TrimSpace(value)
		}
	}
	return fields, nil
}

// kernelDepends picks the kernel packages out of a Depends field (Debian
// Policy 7.1).
func kernelDepends(depends string) []string {
	var names []string
	for item := range strings.SplitSeq(depends, ",") {
		if name, _, _ := strings.Cut(strings.TrimSpace(item), " "); kernelPackage.MatchString(name) {
			names = append(names, name)
		}
	}
	return names
}

// unpackKernel downloads packages and leaves in dir what openKernel reads.
func unpackKernel(ctx context.Context, dir string, packages []string) error {
	if _, err := run(ctx, dir, nil, append([]string{"apt-get", "-q", "download"}, packages...)...); err != nil {
		return fmt.Errorf("%w (stale package lists? run `apt-get update` as root)", err)
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != len(packages) {
		return fmt.Errorf("testvm: apt-get left %d packages in %s, wanted %d", len(debs), dir, len(packages))
	}
	for _, deb := range debs {
		if _, err := run(ctx, dir, nil, "dpkg", "-x", deb, dir); err != nil {
			return err
		}
		if err := os.Remove(deb); err != nil {
			return fmt.Errorf("testvm: unpack kernel: %w", err)
		}
	}
	// Where /usr is merged the modules are packed there; depmod looks in /lib.
	if _, err := os.Stat(filepath.Join(dir, "lib")); errors.Is(err, os.ErrNotExist) {
		if err := os.Symlink("usr/lib", filepath.Join(dir, "lib")); err != nil {
			return fmt.Errorf("testvm: unpack kernel: %w", err)
		}
	}
	k, err := openKernel(dir)
	if err != nil {
		return err
	}
	_, err = run(ctx, dir, nil, "depmod", "-b", dir, k.Release)
	return err
}

// openKernel finds the one kernel below dir.
func openKernel(dir string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("testvm: %d kernels in %s, wanted one; delete that folder", len(images), dir)
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return &Kernel{
		Release: release,
		Image:   images[0],
		Modules: filepath.Join(dir, "lib", "modules", release),
	}, nil
}
