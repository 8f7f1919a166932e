// Package initrd is what the boot program does in the initramfs beside the
// protocol: it brings up the network, hears the questions for passphrases that
// the image's own programs ask, answers those for enrolled volumes, and compares
// what was opened. Its folders hold what puts all that into an image.
//
// It is not the protocol (package unlock), makes no image (internal/bootimage),
// and opens no volume itself. It may import unlock, the readers of luks, and the
// leaves; no os/exec, because the boot program links it.
package initrd
