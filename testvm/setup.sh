#!/bin/sh
# Installs what the test machines need: by apt as root, otherwise it prints the
# one command that does. Says nothing when nothing is missing.
set -eu
PATH=$PATH:/usr/sbin:/sbin

missing=
need() { # program, package
	command -v "$1" >/dev/null || missing="$missing $2"
}
need qemu-system-x86_64 qemu-system-x86
need mkfs.ext4 e2fsprogs
need depmod kmod
need cryptsetup cryptsetup-bin
need ip iproute2
need xz xz-utils
need zstd zstd

# The kernel is downloaded when the machines first run, not installed; apt has
# to know one.
update=
apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 ||
	apt-cache show linux-image-virtual >/dev/null 2>&1 || update=yes

[ -n "$missing$update" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "testvm: missing:${missing:- package lists}; run: sudo apt-get update${missing:+ && sudo apt-get install -y --no-install-recommends$missing}" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
# shellcheck disable=SC2086 # one word a package
[ -z "$missing" ] || apt-get -q install -y --no-install-recommends $missing
