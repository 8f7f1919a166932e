package secret

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Harden keeps this process's memory out of core dumps and away from other
// processes of the same user (prctl(2) PR_SET_DUMPABLE, setrlimit(2)), and
// locks it in RAM as far as it is allowed to (mlockall(2)): without the right
// to lock it all, nothing is locked, because a half-locked Go heap would fail
// at some later allocation.
func Harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("secret: make the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("secret: forbid core dumps: %w", err)
	}
	if mayLockAll() {
		// A refusal (an old kernel, a seccomp filter) leaves pages unlocked, which is allowed.
		_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	}
	return nil
}

func mayLockAll() bool {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err == nil && limit.Cur == unix.RLIM_INFINITY {
		return true
	}
	var caps [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return false
	}
	return caps[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}
