#!/bin/sh
# Makes the packages from the programs in bin: in dist, a deb and an rpm for
# each nfpm file. The same commit gives the same bytes, wherever and whenever it
# is built.
# Usage: packaging/build.sh NFPM, with VERSION (of git describe) and
# SOURCE_DATE_EPOCH in the environment
set -eu
cd "$(dirname "$0")/.."
umask 022

stage=dist/stage
rm -rf $stage dist/mandos-escrow*.deb dist/mandos-escrow*.rpm # of an earlier version
trap 'rm -rf $stage' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p $stage/man/client $stage/completion $stage/client

for page in docs/man/*.8; do
	gzip -9 -n <"$page" >"$stage/man/${page##*/}.gz"
done
mv $stage/man/mandos-escrow-unlock.8.gz $stage/man/client/

# The program may be one for another machine; the one that is run here is not.
GOARCH=$(go env GOHOSTARCH) CGO_ENABLED=0 go build -o $stage/mandos-escrow ./cmd/mandos-escrow
for shell in bash zsh fish; do
	$stage/mandos-escrow completion $shell >$stage/completion/$shell
done

for script in postinst postrm; do
	cat packaging/scripts/client/rebuild.sh packaging/scripts/client/$script >$stage/client/$script
done

ARCH=$(go env GOARCH)
PACKAGE_VERSION=$(packaging/version.sh "$VERSION" "$SOURCE_DATE_EPOCH")
export ARCH PACKAGE_VERSION SOURCE_DATE_EPOCH
for package in mandos-escrow mandos-escrow-client; do
	for kind in deb rpm; do
		"$1" package --config packaging/$package.yaml --packager $kind --target dist/ >/dev/null
	done
done
ls dist/mandos-escrow*
