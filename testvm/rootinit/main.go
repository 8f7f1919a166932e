// Command rootinit is /sbin/init on a test machine's encrypted root: it says
// which mapping it runs from, prints the marker that stands on that root and
// nowhere else, and powers off.
//
// It is not part of the product, and imports no other package of this module.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := report(); err != nil {
		fmt.Printf("testvm: rootinit failed: %v\n", err)
	}
	// The serial line must have sent everything before the power goes.
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func report() error {
	var root unix.Stat_t
	if err := unix.Stat("/", &root); err != nil {
		return err
	}
	// Only a device-mapper device has this file (sysfs-block-dm of the kernel).
	mapping, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/dm/uuid", unix.Major(root.Dev), unix.Minor(root.Dev)))
	if err != nil {
		return err
	}
	marker, err := os.ReadFile("/etc/testvm-marker")
	if err != nil {
		return err
	}
	fmt.Printf("testvm: root on %stestvm: marker %s\n", mapping, marker)
	return nil
}
