package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mountSystem mounts what every program expects.
func mountSystem() error {
	for _, m := range []struct{ source, target string }{
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"devtmpfs", "/dev"},
		{"tmpfs", "/run"},
	} {
		if err := unix.Mount(m.source, m.target, m.source, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// loadModules loads every module in dir, in the order of the names.
func loadModules(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := loadModule(file); err != nil {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	// The CPU may lack what an accelerated cipher needs; the plain one serves.
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// linkByUUID makes the link in /dev/disk/by-uuid that udev would make. Both
// LUKS headers have the UUID as text at byte 168, in 40 bytes (LUKS1 on-disk
// format 1.2.3, figure 1; LUKS2 1.1.3, section 2.1).
func linkByUUID(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	uuid := make([]byte, 40)
	if _, err := f.ReadAt(uuid, 168); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	uuid, _, _ = bytes.Cut(uuid, []byte{0})
	const dir = "/dev/disk/by-uuid"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Symlink(device, filepath.Join(dir, filepath.Base(string(uuid))))
}

// setAddress brings up a network interface with a static IPv4 address
// (netdevice(7)).
func setAddress(name, address string) error {
	prefix, err := netip.ParsePrefix(address)
	if err != nil {
		return fmt.Errorf("testvm.addr: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	mask := [4]byte{}
	for bit := range prefix.Bits() {
		mask[bit/8] |= 0x80 >> (bit % 8)
	}
	addr := prefix.Addr().As4()
	for _, step := range []struct {
		request uint
		value   []byte
	}{{unix.SIOCSIFADDR, addr[:]}, {unix.SIOCSIFNETMASK, mask[:]}} {
		if err := req.SetInet4Addr(step.value); err != nil {
			return fmt.Errorf("network: %w", err)
		}
		if err := unix.IoctlIfreq(fd, step.request, req); err != nil {
			return fmt.Errorf("network: address of %s: %w", name, err)
		}
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("network: bring up %s: %w", name, err)
	}
	return nil
}

// switchRoot mounts the opened volume and starts its init. It returns only
// with an error.
func switchRoot() error {
	device, err := mappedDevice(volume)
	if err != nil {
		return err
	}
	if err := unix.Mount(device, "/root", "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, dir := range []string{"/dev", "/proc", "/run", "/sys"} {
		if err := unix.Mount(dir, "/root"+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	return fmt.Errorf("start /sbin/init: %w", unix.Exec("/sbin/init", []string{"init"}, os.Environ()))
}

// mappedDevice finds the kernel's node of a device-mapper device; the link in
// /dev/mapper is udev's work, and there is no udev here.
func mappedDevice(name string) (string, error) {
	for range 100 {
		files, err := filepath.Glob("/sys/block/dm-*/dm/name")
		if err != nil {
			return "", err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(text)) == name {
				return filepath.Join("/dev", strings.Split(file, "/")[3]), nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return "", fmt.Errorf("no device-mapper device %s", name)
}
