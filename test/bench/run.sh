#!/usr/bin/env bash
# Prints what the programs cost, beside what they may cost at most. It decides
# nothing: a busy machine makes every time longer.
# Usage: run.sh BIN_DIR
set -euo pipefail
bin=$(cd "${1:?usage: $0 BIN_DIR}" && pwd)
cd "$(dirname "$0")/../.."
declare -A is=()

while read -r name value; do is[$name]=$value; done < <(test/bench/programs.sh "$bin")
[ -n "${is[boot_peak_kb]:-}" ] || { echo "$0: the programs could not be measured" >&2; exit 1; }

output=$(go test ./internal/server -run '^$' -bench . -benchtime 5s)
echo "$output"
metric() { # BENCHMARK UNIT
	awk -v name="$1" -v unit="$2" '$1 ~ "^" name "-[0-9]+$" { for (i = 2; i < NF; i++) if ($(i + 1) == unit) print $i }' <<<"$output"
}

row() { printf '%-54s %14s   %s\n' "$@"; }
echo
row what measured 'budget, at most'
row 'boot program, bytes' "${is[boot_bytes]}" 7000000
row 'boot program, bytes after zstd -19' "${is[boot_zstd]}" 2500000
row 'boot program, peak memory, KiB' "${is[boot_peak_kb]}" -
row 'boot program, from exec to passphrase, loopback, ms' "${is[boot_ms]}" 50
row 'enrolment of a volume with cheap key derivation, ms' "${is[enrolment_ms]}" -
row 'server, idle with 10,000 machines, MB' "$(metric BenchmarkIdle MB)" '74 (64 + 1 KB a machine)'
echo
row server 'boots/s' 'bare handshakes/s, ratio (budget, at least: 0.5)'
for machines in 1 1000 100000; do
	name=BenchmarkBoot/machines=$machines
	row "with $machines machines" "$(metric "$name" boots/s)" "$(metric "$name" handshakes/s), $(metric "$name" ratio)"
done
