// Package testvm boots QEMU machines that prove an unattended LUKS boot: a
// stock kernel, an initramfs that holds the boot program, an encrypted root,
// and a server on a real network.
//
// It is a test harness. It is not linked into any program, decides nothing
// about keys, and does not know what the boot program and the server say to
// each other. It drives apt, dpkg, depmod, mmdebstrap, mkfs.ext4, cryptsetup, ip
// and qemu as programs, and imports no other package of this module; only the guest's
// first program, in the folder init, imports luks/dmcrypt.
package testvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// tools are the programs that a run needs, each in a package that setup.sh
// installs.
var tools = []string{"qemu-system-x86_64", "mkfs.ext4", "depmod", "cryptsetup", "ip", "apt-get", "dpkg", "mmdebstrap"}

// CheckHost says what this host lacks to run the machines, and what to do
// about it: root is needed to make network namespaces and tap devices.
func CheckHost() error {
	if os.Geteuid() != 0 {
		return errors.New("testvm: needs root, to make network namespaces: run as root, or with sudo")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return fmt.Errorf("testvm: needs tap devices; in a container give it /dev/net/tun: %w", err)
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("testvm: needs %s; run testvm/setup.sh: %w", tool, err)
		}
	}
	return nil
}

// CacheDir is the folder that unpacked kernels and Debian roots are kept in:
// $MANDOS_ESCROW_TESTVM_CACHE, or mandos-escrow/testvm in the user's cache
// folder. Nothing in it is secret and all of it may be deleted.
func CacheDir() (string, error) {
	if dir := os.Getenv("MANDOS_ESCROW_TESTVM_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("testvm: set MANDOS_ESCROW_TESTVM_CACHE: %w", err)
	}
	return filepath.Join(base, "mandos-escrow", "testvm"), nil
}

// run runs a program in dir with stdin and returns its standard output. The
// error holds the arguments and standard error, so secrets go by stdin.
func run(ctx context.Context, dir string, stdin []byte, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("testvm: %s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
