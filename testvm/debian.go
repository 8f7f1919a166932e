package testvm

import (
	"context"
	"crypto/sha256"
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
	Prompt   string   // what the console shows last when it asks for a passphrase
	Packages []string // beside the essential ones and the kernel
}

// The two systems that a machine's owner may have.
var (
	InitramfsTools = System{
		Name:   "initramfs-tools",
		Prompt: "Please unlock disk ",
		Packages: []string{
			"systemd-sysv", "udev", "dbus", "cryptsetup-initramfs", "initramfs-tools", "busybox", "iproute2", "zstd",
		},
	}
	Dracut = System{
		Name:     "dracut",
		Prompt:   "(press TAB for no echo)",
		Packages: []string{"systemd-sysv", "udev", "dbus", "cryptsetup", "dracut", "iproute2", "zstd"},
	}
)

// excluded is what no test looks at.
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
	key := fmt.Sprintf("%q", []any{suite, packages, excluded, year, week})
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
	if err := bootstrap(ctx, part, suite, packages); err != nil {
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
func bootstrap(ctx context.Context, dir, suite string, packages []string) error {
	settings, err := run(ctx, "", nil, "apt-config", "dump", "Acquire")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "apt.conf"), settings, 0o644); err != nil {
		return fmt.Errorf("testvm: root: %w", err)
	}
	argv := []string{
		"mmdebstrap", "--quiet", "--mode=root", "--variant=minbase",
		"--aptopt=" + filepath.Join(dir, "apt.conf"), "--include=" + strings.Join(packages, ","),
	}
	for _, path := range excluded {
		argv = append(argv, "--dpkgopt=path-exclude="+path)
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
