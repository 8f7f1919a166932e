#!/bin/sh
# Makes the version of a package, which dpkg and rpm order alike, from what
# `git describe --tags --always --dirty` says. Without a tag the time of the
# commit orders it, and every tagged version is newer.
# Usage: packaging/version.sh DESCRIPTION SECONDS-SINCE-1970
set -eu
case $1 in
v[0-9]* | [0-9]*.*)
	echo "${1#v}" | sed -E 's/-([0-9]+)-g([0-9a-f]+)/+\1.g\2/; s/-dirty$/+dirty/; s/-/~/g'
	;;
*)
	printf '0~git%s.%s\n' "$(date -u -d "@$2" +%Y%m%d%H%M%S)" "$1" | sed 's/-dirty$/+dirty/; s/-/./g'
	;;
esac
