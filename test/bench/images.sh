#!/usr/bin/env bash
# What unattended boot adds to an initramfs-tools image: mandos-escrow, Mandos
# and Clevis side by side, each in a Debian root of its own. Kernel modules are
# not counted: which of them are in is a matter of the machine.
# Usage: images.sh BIN_DIR     as root; needs mmdebstrap, cpio, zstd
set -euo pipefail
bin=$(cd "${1:?usage: $0 BIN_DIR}" && pwd)
cd "$(dirname "$0")/../.."
sources=()
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
	[ ! -e "$file" ] || sources+=("$file")
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A root in which nothing tells where the crypttab's volume is: the image opens
# it all the same, by the option.
root() { # NAME PACKAGES
	# shellcheck disable=SC2016 # mmdebstrap's shell expands it
	mmdebstrap --quiet --mode=root --variant=minbase --include="linux-image-cloud-amd64,initramfs-tools,cryptsetup-initramfs,busybox,zstd,udev${2:+,$2}" \
		--customize-hook='echo MODULES=list >"$1/etc/initramfs-tools/conf.d/modules"' \
		--customize-hook='echo root UUID=00000000-0000-4000-8000-000000000000 none luks,initramfs >"$1/etc/crypttab"' \
		bookworm "$work/$1" "${sources[@]}" >&2
}

# The image without kernel modules: bytes of the archive, and after zstd -19.
size() { # NAME
	LC_ALL=C chroot "$work/$1" update-initramfs -u -k all >&2
	LC_ALL=C chroot "$work/$1" sh -c 'unmkinitramfs /boot/initrd.img-* /image' >&2
	rm -rf "$work/$1/image/usr/lib/modules"
	(cd "$work/$1/image" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc) >"$work/cpio"
	echo "$(stat -c %s "$work/cpio") $(zstd -q -19 -c "$work/cpio" | wc -c)"
}

root base ''
read -r base packed < <(size base)

cp -a "$work/base" "$work/ours"
rm -rf "$work/ours/image"
install -D "$bin/mandos-escrow-unlock" "$work/ours/usr/lib/mandos-escrow/mandos-escrow-unlock"
cp -a initrd/initramfs-tools/. "$work/ours/usr/share/initramfs-tools/"
mkdir -m 700 "$work/ours/etc/mandos-escrow"
for file in unlock.conf tls-privkey.pem tls-pubkey.pem seckey.txt pubkey.txt; do
	head -c 700 /dev/urandom >"$work/ours/etc/mandos-escrow/$file" # as large as they are, about
done
root mandos mandos-client
root clevis clevis-initramfs

row() { printf '%-16s %14s %14s\n' "$@"; }
row adds bytes 'after zstd -19'
for name in ours mandos clevis; do
	read -r bytes zstd < <(size $name)
	row $name $((bytes - base)) $((zstd - packed))
done
row '(image without)' "$base" "$packed"
