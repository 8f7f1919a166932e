#!/bin/sh
# open-certificate-packet.sh PACKET KEY.pem
# Prints what a packet to a certificate holds. Needs openssl 3. Its arguments
# show the content key to others on this machine: use one of your own.
set -eu
packet=$1 key=$2
label='mandos-escrow certificate-packet 1'
dir=$(mktemp -d -p /dev/shm) # memory, not a disk
trap 'rm -rf "$dir"' EXIT
field() { sed -n "s/^$1: //p" "$packet"; }
hex() { od -An -v -tx1 | tr -d ' \n'; }
sum() { sha256sum | cut -d ' ' -f 1; }
hkdf() { openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt "hexkey:$1" -kdfopt "info:$label $2" -binary HKDF | hex; }

openssl pkey -in "$key" -pubout -outform DER >"$dir/public"
[ "$(sum <"$dir/public")" = "$(field key-sha256)" ] # sealed to this key
field wrapped-key | base64 -d >"$dir/wrapped"
case $(field key-method) in
rsa-oaep-sha256)
	openssl pkeyutl -decrypt -inkey "$key" -in "$dir/wrapped" -out "$dir/content" \
		-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256
	content=$(hex <"$dir/content")
	;;
ecdh-hkdf-sha256)
	openssl pkey -pubin -inform DER -in "$dir/wrapped" -pubout -out "$dir/once.pem"
	openssl pkeyutl -derive -inkey "$key" -peerkey "$dir/once.pem" -out "$dir/shared"
	content=$(hkdf "$(hex <"$dir/shared")" "key $(cat "$dir/wrapped" "$dir/public" | sum)")
	;;
*) exit 1 ;;
esac
[ "$(sed '/^mac: /,$d' "$packet" | openssl mac -digest SHA256 -macopt "hexkey:$(hkdf "$content" mac)" -binary HMAC | hex)" = "$(field mac)" ]
field payload | base64 -d >"$dir/message"
printf %s "$content" | gpg -q --batch --pinentry-mode loopback --passphrase-fd 0 -d "$dir/message"
