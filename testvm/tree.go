package testvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// reporter is the last program of a Debian machine's boot: it says on the
// serial line what the machine runs from and what the boot program left behind,
// and powers off without stopping any service.
const reporter = `#!/bin/sh
text=
say() { text="${text}testvm: $*
"; }
for mapping in /sys/block/dm-*/dm; do
	say "mapping $(cat "$mapping/name") $(cat "$mapping/uuid")"
done
for exe in /proc/[0-9]*/exe; do
	case $(readlink "$exe") in *mandos-escrow-unlock*) say "the boot program still runs" ;; esac
done
for file in /run/mandos-escrow/*; do
	[ ! -f "$file" ] || say "$(stat -c '%A %n' "$file"): $(tr '\n' ';' <"$file")"
done
say "network $(ip -br address show | grep -v '^lo ' | tr -s ' \n' ' ')"
say "root on $(cat "/sys/dev/block/$(mountpoint -d /)/dm/uuid")"
say "marker $(cat /etc/testvm-marker)"
# At once, so that no other line stands between.
printf '\n%s' "$text" >/dev/ttyS0
# stty waits until all of it was sent.
stty -F /dev/ttyS0 sane
poweroff -ff -d
`

const reporterUnit = `[Unit]
Description=Say that the machine is up
# multi-user.target itself, not what it needs, is what had to be reached.
After=multi-user.target

[Service]
ExecStart=/usr/local/sbin/testvm-report

[Install]
WantedBy=multi-user.target
`

// masked are units that cost seconds of a software CPU each and prove nothing
// here.
var masked = []string{
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
	"getty@tty1.service", "serial-getty@ttyS0.service", "systemd-logind.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
	"systemd-journal-flush.service", "systemd-pstore.service", "kmod-static-nodes.service",
	"modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service",
	"dev-hugepages.mount", "dev-mqueue.mount", "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
}

// Tree is the root of a Debian machine, in a folder of the host.
type Tree struct {
	Dir     string
	Kernel  *Kernel
	devices map[string]string // image files by the names that they have in /dev
}

// Unpack makes a root out of the tar file of a system (FindSystem), whose root
// will be /dev/mapper/root and which says marker when it has booted.
func Unpack(ctx context.Context, tar, dir, marker string) (*Tree, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("testvm: root: %w", err)
	}
	if _, err := run(ctx, dir, nil, "tar", "-xpf", tar, "--numeric-owner", "--exclude=./dev/*"); err != nil {
		return nil, err
	}
	kernel, err := openKernel(dir)
	if err != nil {
		return nil, err
	}
	t := &Tree{Dir: dir, Kernel: kernel, devices: map[string]string{}}
	for _, file := range []struct {
		name, text string
		mode       os.FileMode
	}{
		{"etc/fstab", "/dev/mapper/root / ext4 errors=remount-ro 0 1\n", 0o644},
		{"etc/hostname", "testvm\n", 0o644},
		// Without these two, systemd takes it for a first boot and an upgrade.
		{"etc/machine-id", strings.Repeat("0123456789abcdef", 2) + "\n", 0o444},
		{"etc/.updated", "", 0o644},
		{"var/.updated", "", 0o644},
		// A busy host is no dead disk.
		{"etc/systemd/system.conf.d/testvm.conf", "[Manager]\nDefaultDeviceTimeoutSec=10min\nDefaultTimeoutStartSec=10min\n", 0o644},
		{"etc/testvm-marker", marker + "\n", 0o644},
		{"usr/local/sbin/testvm-report", reporter, 0o755},
		{"etc/systemd/system/testvm-report.service", reporterUnit, 0o644},
	} {
		if err := t.Write(file.name, file.text, file.mode); err != nil {
			return nil, err
		}
	}
	return t, t.links()
}

// links enables the reporter and masks units.
func (t *Tree) links() error {
	const dir = "etc/systemd/system/"
	links := map[string]string{dir + "multi-user.target.wants/testvm-report.service": "../testvm-report.service"}
	for _, unit := range masked {
		links[dir+unit] = "/dev/null"
	}
	for name, target := range links {
		if err := os.MkdirAll(filepath.Dir(t.Path(name)), 0o755); err != nil {
			return fmt.Errorf("testvm: root: %w", err)
		}
		if err := os.Symlink(target, t.Path(name)); err != nil {
			return fmt.Errorf("testvm: root: %w", err)
		}
	}
	return nil
}

// Path is where a file of the root lies on the host.
func (t *Tree) Path(name string) string { return filepath.Join(t.Dir, name) }

// Write makes a file of the root, or puts another in its place.
func (t *Tree) Write(name, text string, mode os.FileMode) error {
	_ = os.Remove(t.Path(name))
	if err := os.MkdirAll(filepath.Dir(t.Path(name)), 0o755); err != nil {
		return fmt.Errorf("testvm: root: %w", err)
	}
	if err := os.WriteFile(t.Path(name), []byte(text), mode); err != nil {
		return fmt.Errorf("testvm: root: %w", err)
	}
	return nil
}

// Attach shows an image file to commands in the root, as /dev/NAME.
func (t *Tree) Attach(name, image string) { t.devices[name] = image }

// chroot runs a command in a root as an installer does, with /proc, /sys and
// the root's own /dev. Its arguments: the root, pairs of a name in /dev and an
// image file, "--", and the command. It runs in a mount namespace of its own,
// which `ip netns exec` makes: nothing stays mounted when it is killed.
const chroot = `set -e
tree=$1
shift
mount -t proc proc "$tree/proc"
mount -t sysfs sysfs "$tree/sys"
mount -t tmpfs -o mode=0755 tmpfs "$tree/dev"
show() { # the host's file $2 as $1 in /dev
	: >"$tree/dev/$1"
	mount --bind "$2" "$tree/dev/$1"
}
for node in null zero full random urandom tty; do show $node /dev/$node; done
ln -s /proc/self/fd "$tree/dev/fd"
while [ "$1" != -- ]; do
	show "$1" "$2"
	shift 2
done
shift
exec chroot "$tree" "$@"`

// Command is a command in the root, which reaches the LAN's servers.
func (t *Tree) Command(ctx context.Context, lan *LAN, argv ...string) *exec.Cmd {
	args := []string{"sh", "-c", chroot, "chroot", t.Dir}
	for name, image := range t.devices {
		args = append(args, name, image)
	}
	cmd := lan.ServerCommand(ctx, slices.Concat(args, []string{"--"}, argv)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	return cmd
}

// Initrd is the image that the root's own programs made.
func (t *Tree) Initrd() string { return t.Path("boot/initrd.img-" + t.Kernel.Release) }
