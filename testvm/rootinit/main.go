// Command rootinit is /sbin/init on a test machine's encrypted root: it prints
// the marker that stands on that root and nowhere else, and powers off.
//
// It is not part of the product, and imports no other package of this module.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	marker, err := os.ReadFile("/etc/testvm-marker")
	if err != nil {
		fmt.Printf("testvm: no marker: %v\n", err)
	} else {
		fmt.Printf("testvm: marker %s\n", marker)
	}
	// The serial line must have sent everything before the power goes.
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
