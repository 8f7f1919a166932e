#!/bin/sh
# open-sheet.sh LINES [GPG-OPTION]...
# Prints what a sheet holds. The file LINES has its typed lines, in capitals, and
# nothing else.
set -eu
lines=$1
shift
text=$(sort "$lines" | tr -d ' \r' | awk -v abc=ABCDEFGHIJKLMNOPQRSTUVWXYZ234567 '{
	size = length($0) - 4
	check = substr($0, 1, 2) + 0
	for (i = 0; i < size; i++)
		check = (32 * check + index(abc, substr($0, 3 + i, 1)) - 1) % 1021
	if (substr($0, 1, 2) + 0 != NR || substr($0, 3 + size) != substr(abc, int(check / 32) + 1, 1) substr(abc, check % 32 + 1, 1)) {
		print "line " NR " is missing or mistyped" >"/dev/stderr"
		exit 1
	}
	printf "%s", substr($0, 3, size)
}')
while [ $((${#text} % 8)) != 0 ]; do text=$text=; done
printf %s "$text" | base32 -d | gpg -q "$@" -d
