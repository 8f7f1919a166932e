package initrd

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"mandos-escrow/internal/secret"
)

// controlDevice speaks to the kernel's device-mapper, for two calls. It is code
// of our own: anatol/devmapper, which package luks/dmcrypt links by way of
// luks.go, makes tables but does not read them.
type controlDevice struct{}

const (
	control   = "/dev/mapper/control"
	headSize  = int(unsafe.Sizeof(unix.DmIoctl{}))
	tableSize = 32 << 10 // of a reply; a crypt target has some hundred bytes
)

// table reads a mapping's table. The kernel is told to wipe its own copy.
func (controlDevice) table(device uint64) ([]target, error) {
	buf := make([]byte, headSize+tableSize)
	defer secret.Wipe(buf)
	if err := call(unix.DM_TABLE_STATUS, device, unix.DM_STATUS_TABLE_FLAG|unix.DM_SECURE_DATA_FLAG, buf); err != nil {
		return nil, fmt.Errorf("read table: %w", err)
	}
	head := (*unix.DmIoctl)(unsafe.Pointer(&buf[0]))
	if head.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
		return nil, errors.New("read table: it is too long")
	}
	if head.Data_start < uint32(headSize) || head.Data_start > uint32(len(buf)) {
		return nil, errors.New("read table: the reply has no data")
	}
	targets, err := parseTargets(buf[head.Data_start:], head.Target_count)
	if err != nil {
		return nil, fmt.Errorf("read table: %w", err)
	}
	return targets, nil
}

func (controlDevice) remove(device uint64) error {
	return call(unix.DM_DEV_REMOVE, device, 0, make([]byte, headSize))
}

// call makes one ioctl; its reply is in buf.
func call(command uint, device uint64, flags uint32, buf []byte) error {
	f, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	*(*unix.DmIoctl)(unsafe.Pointer(&buf[0])) = unix.DmIoctl{
		Version:   [3]uint32{4, 0, 0},
		Data_size: uint32(len(buf)), Data_start: uint32(headSize), Dev: device, Flags: flags,
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(command), uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
		return errno
	}
	return nil
}
