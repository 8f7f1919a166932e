// Command mandos-escrow-unlock runs in the initramfs: it asks the machine's
// servers for the boot passphrases of encrypted volumes, answers those who ask
// for them, and compares what was opened with what was enrolled.
//
// It is not for a running system. It may import packages initrd and unlock, the
// readers of package luks, and the leaves: a test holds the list, because
// everything it links is loaded at every boot.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
