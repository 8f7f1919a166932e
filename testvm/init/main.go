// Command init is the first program in a test machine's initramfs: it runs the
// boot program as a distribution's scripts would, opens the root volume with
// what that printed, and starts the root's own init.
//
// It is not part of the product. It says on the console what it did, in lines
// that begin with "testvm: ", and powers the machine off when it cannot go on.
// It imports luks/dmcrypt and initrd, and no other package of this module.
//
// Kernel command line: testvm.addr=ADDRESS/BITS for eth0; testvm.once to run
// the boot program with --once; testvm.nolink to leave out the link by UUID that
// udev would make, so that the boot program has to look at all block devices;
// testvm.network=ADDRESS/BITS to do nothing but bring up the network that the
// other words ask for until a link has that address, and put it back;
// testvm.exchange to put something else in the place of the header after the
// volume was opened.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mandos-escrow/luks/dmcrypt"
)

const (
	disk   = "/dev/vda"
	volume = "testvm-root"
)

func main() {
	if err := boot(); err != nil {
		fmt.Printf("testvm: init failed: %v\n", err)
	}
	powerOff()
}

// boot returns only if the root's init was not started.
func boot() error {
	if err := mountSystem(); err != nil {
		return err
	}
	options, err := commandLine()
	if err != nil {
		return err
	}
	if err := loadModules("/modules"); err != nil {
		return err
	}
	if address, ok := options["testvm.network"]; ok {
		return tryNetwork(address)
	}
	if _, ok := options["testvm.nolink"]; !ok {
		if err := linkByUUID(disk); err != nil {
			return err
		}
	}
	if err := setAddress("eth0", options["testvm.addr"]); err != nil {
		return err
	}
	_, once := options["testvm.once"]
	passphrase, err := askServer(once)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		fmt.Printf("testvm: unlock exit %d, %d bytes printed\n", exit.ExitCode(), len(passphrase))
		clear(passphrase)
		return nil
	}
	if err != nil {
		return err
	}
	err = dmcrypt.Map(disk, passphrase, volume)
	clear(passphrase)
	if err != nil {
		return err
	}
	fmt.Println("testvm: volume opened")
	if _, ok := options["testvm.exchange"]; ok {
		if err := wipeHeader(); err != nil {
			return err
		}
	}
	if err := checkMapped(); err != nil {
		return err
	}
	return switchRoot()
}

// wipeHeader puts something else in the place of the header of the volume that
// is open.
func wipeHeader() error {
	f, err := os.OpenFile(disk, os.O_WRONLY|unix.O_SYNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(bytes.Repeat([]byte("x"), 1<<20))
	return errors.Join(err, f.Close())
}

// checkMapped has the boot program compare what the kernel mapped with what was
// enrolled, as the scripts of an image do before they mount it.
func checkMapped() error {
	cmd := exec.Command("/bin/mandos-escrow-unlock", "--config", "/etc/mandos-escrow", "--check-mapped")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		left, _ := filepath.Glob("/sys/block/dm-*") // the pattern is a good one
		return fmt.Errorf("check what is mapped: %w, %d mappings left", err, len(left))
	}
	return nil
}

// commandLine returns the words of the kernel command line, with what follows
// their equals sign.
func commandLine() (map[string]string, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	options := map[string]string{}
	for _, word := range strings.Fields(string(line)) {
		key, value, _ := strings.Cut(word, "=")
		options[key] = value
	}
	return options, nil
}

// askServer runs the boot program and returns what it printed. Its messages go
// to the console.
func askServer(once bool) ([]byte, error) {
	args := []string{"--config", "/etc/mandos-escrow", "--print"}
	if once {
		args = append(args, "--once")
	}
	fmt.Println("testvm: asking for the passphrase")
	cmd := exec.Command("/bin/mandos-escrow-unlock", args...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, &out, os.Stderr
	err := cmd.Run()
	return out.Bytes(), err
}

// powerOff ends the machine when the serial line has sent everything.
func powerOff() {
	unix.Sync()
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
