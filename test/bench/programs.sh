#!/usr/bin/env bash
# Measures the built programs against a real server on loopback: prints lines
# of NAME VALUE. Usage: programs.sh BIN_DIR
. "$(dirname "$0")/../e2e/lib.sh"
runs=20 enrolments=5

figure() { printf '%s %s\n' "$1" "$2" >&3; }

milliseconds() { # COMMAND...: to standard output, which nothing else may use
	local start=$EPOCHREALTIME
	"$@" >&2
	awk -v from="$start" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.1f\n", (to - from) * 1000 }'
}

median() { sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }

figure boot_bytes "$(stat -c %s "$unlock")"
figure boot_zstd "$(zstd -q -19 -c "$unlock" | wc -c)"

printf %s 'a passphrase of somebody' >user.pass
printf %s 'seven-badgers-under-a-tin-roof-4821' >master.pass
address=127.0.0.1:$(free_port)
exits 0 "$escrow" server init --state srv --name srv1 --listen "$address" --address "$address" --master-passphrase-file master.pass
start srv
"$escrow" token create --state srv --uses "$enrolments" --ttl 1h >token
enroll() { "$escrow" enroll --token-file token --device "disk$1.img" --passphrase-file user.pass --root "root$1" --name "machine$1"; }
for n in $(seq "$enrolments"); do
	truncate -s 64M "disk$n.img"
	cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "disk$n.img" user.pass
	mkdir "root$n"
	milliseconds enroll "$n"
done >times.txt
figure enrolment_ms "$(median <times.txt)"

config=root1/etc/mandos-escrow
for _ in $(seq "$runs"); do milliseconds "$unlock" --config "$config" --print --once; done >times.txt
figure boot_ms "$(median <times.txt)"
/usr/bin/time -f %M -o peak "$unlock" --config "$config" --print --once
figure boot_peak_kb "$(cat peak)"
stop srv
