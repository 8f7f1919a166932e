#!/bin/sh
# Makes the boot images anew. An image that cannot be made leaves the old one,
# which still asks for a passphrase.
set -e

rebuild() { # UPDATE-INITRAMFS-OPTION...
	if command -v update-initramfs >/dev/null; then
		update-initramfs -u "$@"
	elif command -v dracut >/dev/null; then
		rebuild_by_dracut
	fi
}

# dracut writes over the image it replaces, and removes it when that fails. So
# it writes beside it, and what became whole takes the old one's place.
rebuild_by_dracut() {
	failed=
	id=$(cat /etc/machine-id 2>/dev/null) || id=
	for modules in /lib/modules/*; do
		kernel=${modules##*/}
		for image in "/boot/initrd.img-$kernel" "/boot/initramfs-$kernel.img" "$modules/initrd" "$modules/initramfs.img" \
			"/boot/efi/$id/$kernel/initrd" "/boot/$id/$kernel/initrd" "/efi/$id/$kernel/initrd" \
			"/boot/efi/Default/$kernel/initrd" "/boot/Default/$kernel/initrd" "/efi/Default/$kernel/initrd"; do
			[ -f "$image" ] || continue
			if (umask 077 && dracut --quiet --force "$image.mandos-escrow" "$kernel") && mv -f "$image.mandos-escrow" "$image"; then
				continue
			fi
			rm -f "$image.mandos-escrow"
			failed="$failed $image"
		done
	done
	[ -z "$failed" ] || {
		echo "mandos-escrow-client: could not make$failed anew" >&2
		return 1
	}
}

enrolled() { [ -e /etc/mandos-escrow/unlock.conf ]; }
