package initrd

import (
	"errors"
	"os"
	"strconv"
)

// question is somebody who waits for the passphrase of a device.
type question struct {
	id     string // no two questions of a boot share it
	device string // as crypttab names it: a path, or UUID=...

	// answer hands a passphrase over. nil says that it was taken, and nothing
	// about whether it was right.
	answer func(passphrase []byte) error
}

// What can become of an answer.
var (
	errGone = errors.New("somebody else was first") // nobody waits any more
	errBusy = errors.New("cannot be answered now")  // later, perhaps
)

// source finds questions. It is asked again and again, and says each time which
// ones are open.
type source interface{ pending() []question }

// lives tells whether a process is there.
func lives(proc string, pid int) bool {
	_, err := os.Stat(proc + "/" + strconv.Itoa(pid))
	return err == nil
}
