#!/bin/sh
# Gets the tools of a job: by apt as root, otherwise it prints the one command
# that does. Says nothing when nothing is missing.
# Usage: test/setup.sh demo|e2e|unit|packages|vm|test|lint|bench...
set -eu
PATH=$PATH:/usr/sbin:/sbin

missing=
need() { # PACKAGE, then a test that the tool is there
	package=$1
	shift
	"$@" >/dev/null 2>&1 || missing="$missing $package"
}
have() { need "$2" command -v "$1"; }
c_compiler() { echo '#include <stdlib.h>' | gcc -E -; }
kernel_known() { apt-cache show linux-image-cloud-amd64 || apt-cache show linux-image-virtual; }

demo() {
	have cryptsetup cryptsetup-bin
	have gpg gpg
	have gpg-agent gpg-agent
	have jq jq
	need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt # to download Go modules
}
unit() {
	demo
	need 'gcc libc6-dev' c_compiler # the race detector
	have ip iproute2                # hosts on a link, in network namespaces
	have sq sq # the other OpenPGP, to compare with
	have xxd xxd                    # what the documents say to type
	have openssl openssl # the other TLS key reader
	have ip iproute2     # network namespaces, which need no root
	have volume_key volume-key # its packets, to import
	have pdftoppm poppler-utils     # a printed page, and
	have zbarimg zbar-tools         # the code on it
	have systemd-analyze systemd    # what it says about our units
	have mkfs.ext4 e2fsprogs        # data of a volume
}
packages() {
	have dpkg-deb dpkg
	have rpm rpm
}
vm() {
	have qemu-system-x86_64 qemu-system-x86
	have mmdebstrap mmdebstrap
	have mkfs.ext4 e2fsprogs
	have depmod kmod
	have cryptsetup cryptsetup-bin
	have ip iproute2
	have xz xz-utils
	have zstd zstd
	# A kernel is downloaded when the machines first run, not installed; apt has
	# to know one.
	kernel_known >/dev/null 2>&1 || lists=yes
	root="network namespaces"
}

lists='' root=''
for job in "$@"; do
	case $job in
	demo) demo ;;
	e2e) demo && have volume_key volume-key && have openssl openssl && have xxd xxd ;;
	unit) unit ;;
	packages) packages ;;
	lint) have shellcheck shellcheck ;;
	vm) vm ;;
	test) unit && packages && vm ;;
	bench-boot)
		demo
		have zstd zstd
		have cpio cpio
		have mmdebstrap mmdebstrap
		have ip iproute2
		have socat socat
		have mandos mandos
		need mandos-client test -x /usr/lib/x86_64-linux-gnu/mandos/plugins.d/mandos-client
		have avahi-daemon avahi-daemon
		have dbus-daemon dbus
		root='chroots and network namespaces'
		;;
	bench) demo && have zstd zstd && need time test -x /usr/bin/time ;;
	*) echo "$0: no job $job" >&2 && exit 2 ;;
	esac
done
# shellcheck disable=SC2046,SC2086 # one word a package
set -- "$*" $(printf '%s\n' $missing | sort -u)
asked=$1
shift

if [ "$(id -u)" != 0 ]; then
	if [ -n "$root" ]; then
		echo "make $asked: needs root, for $root; run: sudo env \"PATH=\$PATH\" make $asked" >&2
		exit 1
	elif [ $# != 0 ]; then
		echo "make $asked: missing: $*; run: sudo apt-get update && sudo apt-get install -y --no-install-recommends $*" >&2
		exit 1
	fi
	exit 0
fi
[ -n "$*$lists" ] || exit 0
export DEBIAN_FRONTEND=noninteractive
echo "make $asked: apt-get gets ${*:-package lists}"
apt-get -qq update
[ $# = 0 ] || apt-get -qq install -y --no-install-recommends "$@" >/dev/null
