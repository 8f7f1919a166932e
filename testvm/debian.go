package testvm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// System is a Debian system with the kernel that apt would install here, by
// the program that makes its initramfs.
type System struct {
	Name     string   // in the name of the cached file
	Packages []string // beside the essential ones and the kernel
	Conf     string   // text of /etc/dracut.conf.d/testvm.conf; empty: no such file
}

// The two systems that a machine's owner may have.
var (
	InitramfsTools = System{
		Name: "initramfs-tools",
		Packages: []string{
			"systemd-sysv", "udev", "dbus", "cryptsetup-initramfs", "initramfs-tools", "busybox", "iproute2", "zstd",
		},
	}
	// A chroot has none of a machine's devices, so dracut is told which of its
	// modules are wanted. Left to itself it takes network file systems and
	// takes three times as long.
	Dracut = System{
		Name:     "dracut",
		Packages: []string{"systemd-sysv", "udev", "dbus", "cryptsetup", "dracut", "iproute2", "zstd"},
		Conf: `hostonly="no"
early_microcode="no"
compress="zstd"
dracutmodules+=" base systemd systemd-initrd systemd-ask-password systemd-udevd dracut-systemd udev-rules rootfs-block fs-lib kernel-modules dm crypt shutdown usrmount "
`,
	}
)

// excluded is what no test looks at: half of a small system's files.
var excluded = []string{"/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/i18n/*", "/usr/share/zoneinfo/*"}

// FindSystem returns the tar file of a system's root, made by mmdebstrap from
// the host's own package sources. It is kept in cache for a week, because
// archives change and security updates are part of a real system.
func FindSystem(ctx context.Context, cache string, system System) (string, error) {
	packages, _, err := candidate(ctx)
	if err != nil {
		return "", err
	}
	suite, err := hostSuite("/etc/os-release")
	if err != nil {
		return "", err
	}
	packages = append(packages, system.Packages...)
	year, week := time.Now().UTC().ISOWeek()
	key := fmt.Sprintf("%q", []any{suite, packages, excluded, system.Conf, year, week})
	name := fmt.Sprintf("root-%s-%x.tar", system.Name, sha256.Sum256([]byte(key)))
	file := filepath.Join(cache, name)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("testvm: root cache: %w", err)
	}
	old, _ := filepath.Glob(filepath.Join(cache, "root-"+system.Name+"-*.tar"))
	part, err := os.MkdirTemp(cache, "part-")
	if err != nil {
		return "", fmt.Errorf("testvm: root cache: %w", err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	if err := system.bootstrap(ctx, part, suite, packages); err != nil {
		return "", err
	}
	if err := os.Rename(filepath.Join(part, "root.tar"), file); err != nil {
		return "", fmt.Errorf("testvm: root cache: %w", err)
	}
	// What another run uses right now stays readable to it.
	for _, file := range old {
		_ = os.Remove(file)
	}
	return file, nil
}

// bootstrap makes root.tar in dir, with the host's settings for downloading.
func (s System) bootstrap(ctx context.Context, dir, suite string, packages []string) error {
	settings, err := run(ctx, "", nil, "apt-config", "dump", "Acquire")
	if err != nil {
		return err
	}
	write := func(name, text string) {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	write("apt.conf", string(settings))
	write("dracut.conf", s.Conf)
	if err != nil {
		return fmt.Errorf("testvm: root: %w", err)
	}
	argv := []string{
		"mmdebstrap", "--quiet", "--mode=root", "--variant=minbase",
		"--aptopt=" + filepath.Join(dir, "apt.conf"), "--include=" + strings.Join(packages, ","),
	}
	for _, path := range excluded {
		argv = append(argv, "--dpkgopt=path-exclude="+path)
	}
	if s.Conf != "" {
		// Before the packages: theirs already make an image.
		argv = append(argv, "--essential-hook=mkdir -p \"$1/etc/dracut.conf.d\"",
			"--essential-hook=copy-in "+dir+"/dracut.conf /etc/dracut.conf.d")
	}
	argv = append(argv, suite, "root.tar")
	sources := []string{"/etc/apt/sources.list"}
	for _, pattern := range []string{"/etc/apt/sources.list.d/*.list", "/etc/apt/sources.list.d/*.sources"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		sources = append(sources, found...)
	}
	for _, file := range sources {
		if _, err := os.Stat(file); err == nil {
			argv = append(argv, file)
		}
	}
	_, err = run(ctx, dir, nil, argv...)
	return err
}

// hostSuite returns VERSION_CODENAME of an os-release(5) file.
func hostSuite(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("testvm: which Debian: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(name, `"`), nil
		}
	}
	return "", fmt.Errorf("testvm: %s names no suite", file)
}
