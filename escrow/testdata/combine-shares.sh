#!/bin/bash
# combine-shares.sh ENVELOPE...
# Prints the content key, in hex, from the opened envelopes of exactly N
# trustees, N at least 2.
set -eu
mult() { # product = $1 * $2 in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1 (0x11b)
	local a=$1 b=$2
	product=0
	while ((b)); do
		((b & 1)) && ((product ^= a)) || :
		((a <<= 1, a > 255)) && ((a ^= 0x11b)) || :
		((b >>= 1)) || :
	done
}
divide() { # quotient = $1 / $2: what times $2 gives $1
	for ((quotient = 0; quotient < 256; quotient++)); do
		mult "$quotient" "$2"
		((product == $1)) && return
	done
}
shares=() xs=() weights=() id=
for file; do
	share=$(sed -n 's/^share: //p' "$file")
	[ "$(printf "$(sed 's/../\\x&/g' <<<"$share")" | sha256sum | cut -d ' ' -f 1)" = \
		"$(sed -n 's/^digest: //p' "$file" | sed -n "$(sed -n 's/^index: //p' "$file")p")" ]
	[ "$(sed -n 's/^threshold: //p' "$file")" = $# ]
	next=$(grep -E '^(set-id|threshold|digest|commitment): ' "$file")
	[ "${id:=$next}" = "$next" ] # all of one set
	shares+=("$share") xs+=($((16#${share: -2})))
done
for i in "${!xs[@]}"; do # weight i: the product of x_j / (x_j - x_i) for all other j
	weight=1
	for j in "${!xs[@]}"; do
		((i == j)) && continue
		divide "${xs[j]}" $((xs[j] ^ xs[i]))
		mult "$weight" "$quotient"
		weight=$product
	done
	weights+=("$weight")
done
for ((at = 0; at < ${#shares[0]} - 2; at += 2)); do # each byte: the sum of y_i * weight i
	byte=0
	for i in "${!shares[@]}"; do
		mult $((16#${shares[i]:at:2})) "${weights[i]}"
		((byte ^= product)) || :
	done
	printf %02x "$byte"
done
echo
