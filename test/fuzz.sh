#!/usr/bin/env bash
# Runs every fuzz target of the module for some time each.
# Usage: fuzz.sh TIME, as in 30s
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: $0 TIME}

targets=$(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' [a-z]*/ | sort)
[ -n "$targets" ] || { echo "$0: no fuzz target found" >&2; exit 1; }
while IFS=: read -r file text; do
	target=${text#func }
	echo "== $target in $(dirname "$file")"
	go test "./$(dirname "$file")" -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x
done <<<"$targets"
echo 'fuzz: ok'
