#!/bin/sh
# Makes luks/testdata/kernel.gz (as "kernel.sh headers", then gzip -9n) and luks/content/testdata/kernel.txt ("kernel.sh data"), for ciphers that not every
# kernel has. Run as root where there are a device-mapper and all crypto modules: cryptsetup 2.6.1, Linux 6.1, in a virtual machine.
# A line of headers: type, cipher, bits, volume key, header (LUKS2: 512 bytes and the JSON); with "refused" before it, if we do not read it.
# A line of data: cipher, key bytes (byte i is 7i+1), sector size, first IV, SHA-256 of what 4096 bytes (byte i is i/8*11+i) are on the disk.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
printf pass >pw

header() { # TYPE CIPHER BITS [refused]
	truncate -s 24M v
	kdf=--pbkdf-force-iterations=1000
	[ "$1" = luks1 ] || kdf="$kdf --pbkdf=pbkdf2 --luks2-keyslots-size=1m"
	# shellcheck disable=SC2086 # two options
	cryptsetup luksFormat -q --type "$1" $kdf -c "$2" -s "$3" --key-file pw v >/dev/null 2>&1
	key=$(cryptsetup luksDump -q --dump-volume-key --key-file pw v | sed -n '/MK dump:/,$p' | sed 's/MK dump://' | tr -d ' \t\n')
	if [ "$1" = luks1 ]; then
		head -c 592 v >image
	else
		{ head -c 512 v; head -c 16384 v | tail -c +4097 | tr -d '\000'; } >image
	fi
	echo "${4:+$4 }$1 $2 $3 ${key:--} $(od -An -v -tx1 image | tr -d ' \n')"
	rm v
}

headers() {
	for type in luks1 luks2; do
		for cipher in aes serpent twofish camellia; do
			for mode in cbc-plain:256 cbc-plain64:192 cbc-essiv:sha256:256 cbc-benbi:256 xts-plain:512 xts-plain64:256 xts-plain64:384 \
				xts-essiv:sha256:512 lrw-benbi:256 lrw-benbi:320 lrw-benbi:384; do
				header $type "$cipher-${mode%:*}" "${mode##*:}"
			done
		done
		header $type serpent-cbc-essiv:sha256 128
		header $type twofish-xts-essiv:sha256 256
		header $type xchacha12,aes-adiantum-plain64 256
		header $type xchacha20,aes-adiantum-plain64 256
	done
	header luks1 aes-cbc-elephant 256 refused
	header luks1 aes-cbc-lmk 256 refused
	for bad in aes-cbc-eboiv:256 aes-cbc-null:256 aes-cbc-plain64be:128 aes-ctr-plain64:256 aes-ecb:256 aes-lrw-plain:384 aes-lrw-plain64:384 aes-pcbc-plain64:256 \
		aes-xts-benbi:512 aes-xts-plain64be:512 'capi:xts(aes)-plain64:512' cast5-cbc-plain64:128 cast6-xts-plain64:512 cipher_null-ecb:256 \
		des3_ede-cbc-plain64:192 serpent-cbc-essiv:sha1:256 xchacha12,serpent-adiantum-plain64:256; do
		header luks2 "${bad%:*}" "${bad##*:}" refused
	done
}

data() {
	octal=$(awk 'BEGIN { for (i = 0; i < 4096; i++) printf "\\%03o", (int(i / 8) * 11 + i) % 256 }')
	# shellcheck disable=SC2059 # the bytes
	printf "$octal" >plain
	truncate -s 1M disk
	loop=$(losetup -f --show disk)
	for c in $1; do
		for size in 512 4096; do
			for iv in 0 4294967304; do
				key=$(awk -v n="${c##*:}" 'BEGIN { for (i = 0; i < n; i++) printf "%02x", (7 * i + 1) % 256 }')
				dmsetup create kernel-sh --table "0 64 crypt ${c%:*} $key $iv $loop 8 1 sector_size:$size"
				dmsetup mknodes kernel-sh # where there is no udev
				[ -b /dev/mapper/kernel-sh ]
				dd if=plain of=/dev/mapper/kernel-sh bs=4k count=1 conv=fsync 2>/dev/null
				dmsetup remove --retry kernel-sh
				echo 3 >/proc/sys/vm/drop_caches
				echo "${c%:*} ${c##*:} $size $iv $(dd if="$loop" bs=4k skip=1 count=1 2>/dev/null | sha256sum | cut -d' ' -f1)"
			done
		done
	done
	losetup -d "$loop"
}

case ${1:-} in
headers) headers ;;
data) data "$(for c in aes twofish serpent camellia; do
	echo "$c-xts-plain64:64 $c-xts-plain:32 $c-cbc-essiv:sha256:32 $c-cbc-plain:16 $c-cbc-benbi:32 $c-xts-essiv:sha256:64"
done) aes-cbc-plain64:24 twofish-cbc-plain64:32 serpent-cbc-plain64:24 camellia-cbc-plain64:24 aes-lrw-benbi:48 twofish-lrw-benbi:48 serpent-lrw-benbi:32 \
	xchacha12,aes-adiantum-plain64:32 xchacha20,aes-adiantum-plain64:32" ;;
*) echo "usage: kernel.sh headers|data" >&2; exit 2 ;;
esac
