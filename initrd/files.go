package initrd

import "embed"

// Files are what initramfs-tools and dracut need to put the boot program into
// their images, in a folder for each. Folders says where they are installed.
// Files that begin with #! are programs (mode 0755), the others are not (0644).
// The packages install the same files; this copy is for machines without one.
//
//go:embed initramfs-tools dracut
var Files embed.FS

// Folders are where the folders of Files belong, below the root.
var Folders = map[string]string{
	"initramfs-tools": "usr/share/initramfs-tools",
	"dracut":          "usr/lib/dracut/modules.d",
}

// Program is where the boot program lies, below the root and in the image.
const Program = "usr/lib/mandos-escrow/mandos-escrow-unlock"
