#!/bin/sh
# open-with-gpg.sh PACKET PAYLOAD INDEX
# Prints a payload (passphrase or volume-key) of a packet with threshold 1.
# gpg has the private key of trustee number INDEX.
set -eu
packet=$1 payload=$2 index=$3
field() { sed -n "s/^$1: //p" "$2"; }
sum() { sha256sum | cut -d ' ' -f 1; }
dir=$(mktemp -d -p /dev/shm) # memory, not a disk
trap 'rm -rf "$dir"' EXIT

field "$payload-share-$index" "$packet" | base64 -d | gpg -q -d >"$dir/envelope"
field "$payload-payload" "$packet" | base64 -d >"$dir/message"

# The envelope names the header and the message that it was made for.
[ "$(sed '/^[a-z-]*-payload: /,$d' "$packet" | sum)" = "$(field header-sha256 "$dir/envelope")" ]
[ "$(sum <"$dir/message")" = "$(field payload-sha256 "$dir/envelope")" ]
[ "$(field threshold "$dir/envelope")" = 1 ]

# With threshold 1 the share is the content key, and its hex is the passphrase.
field share "$dir/envelope" |
	gpg -q --batch --pinentry-mode loopback --passphrase-fd 0 -d "$dir/message"
