#!/usr/bin/env bash
# Five servers, any three of them, on a real LUKS volume in an image file: one is
# down when the machine enrolls, two are dead when it boots and when its people
# get back in, and the machine is disabled only when enough have it. No root.
# Usage: several-servers.sh BIN_DIR
. "$(dirname "$0")/lib.sh"

step "A machine has an encrypted disk, and five servers have a master key and an approver each"
printf %s 'what its user typed at installation' >user.pass
printf %s 'a new one, easier to remember' >new.pass
truncate -s 64M disk.img
cryptsetup luksFormat -q --type luks2 --pbkdf-memory 65536 --pbkdf-force-iterations 4 disk.img user.pass
for n in 1 2 3 4 5; do
	printf 'the master key of number %s, nobody guesses it' "$n" >"master$n.pass"
	address=127.0.0.1:$(free_port)
	exits 0 "$escrow" server init --state "srv$n" --name "srv$n" --listen "$address" --address "$address" --master-passphrase-file "master$n.pass"
	start "srv$n"
	exits 0 "$escrow" token create --state "srv$n" --uses 1 --ttl 1h >"token$n"
	for who in "alice$n approver" 'bob helpdesk' 'carol admin'; do
		read -r name role <<<"$who"
		exits 0 "$escrow" admin add "$name" --role "$role" --state "srv$n" >invite
		exits 0 "$escrow" --home "$name" admin login --invite-file invite
	done
done
exits 0 "$escrow" token merge --threshold 3 token1 token2 token3 token4 token5 >token

step "It enrolls at all of them, one of which does not answer, and then follows"
crash srv5
mkdir root
exits 0 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root root --name laptop7 --json >enrolled.json
jq -e '.[0].behind == ["srv5"]' enrolled.json
start srv5
exits 0 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root root --json >again.json
jq -e '.[0] | .already_enrolled and .behind == null' again.json
[ "$(jq -r '.[0].packet' again.json)" = "$(jq -r '.[0].packet' enrolled.json)" ]
"$escrow" --home carol packet list --json | jq -e 'length == 1 and (.[0].at | length) == 5'

step "It boots from any three of them, and not from two"
exits 0 "$unlock" --config root/etc/mandos-escrow --print --once >boot.pass
opens boot.pass disk.img
crash srv1
crash srv2
exits 0 "$unlock" --config root/etc/mandos-escrow --print --once >again
cmp boot.pass again
crash srv3
exits 1 "$unlock" --config root/etc/mandos-escrow --print --once >alone
[ ! -s alone ]
start srv3

step "With two of them dead, three people get its user back in, and two do not"
exits 0 "$escrow" --home bob recover --request --volume laptop7 --reason 'forgot it' --json >request.json
request=$(jq -er .id request.json)
words=$(jq -er .words request.json)
for n in 3 4; do
	exits 0 "$escrow" --home "alice$n" recover --approve "$request" --words "$words" --key-passphrase-file "master$n.pass"
	exits 7 "$escrow" --home "alice$n" recover --approve "$request" --words "$words" --key-passphrase-file "master$n.pass"
	exits 3 "$escrow" --home bob recover --release "$request" --out packet.asc --otp-file otp
done
exits 1 "$escrow" --home alice5 recover --approve "$request" --words "$words" --key-passphrase-file master4.pass
exits 0 "$escrow" --home alice5 recover --approve "$request" --words "$words" --key-passphrase-file master5.pass
exits 0 "$escrow" --home bob recover --release "$request" --out packet.asc --otp-file otp
exits 0 "$escrow" recover --restore packet.asc --otp-file otp --device disk.img --new-passphrase-file new.pass
opens new.pass disk.img

step "It is stolen: three of five must have that before it is disabled"
crash srv5
exits 1 "$escrow" --home carol machine disable laptop7
start srv1
exits 0 "$escrow" --home carol machine disable laptop7 # srv2 and srv5 do not answer, and are too few
"$escrow" --home carol machine list --json | jq -e '[.[0].at[] | select(.state | startswith("disabled"))] | length == 3'
start srv2
start srv5
exits 7 "$unlock" --config root/etc/mandos-escrow --print --once >refused
[ ! -s refused ]

step "No secret lies about: not on any server, not in anybody's folder, not in a log"
for n in 1 2 3 4 5; do
	stop "srv$n"
	for secret in user.pass boot.pass new.pass "master$n.pass" otp; do
		nowhere "$secret" "srv$n" "srv$n.server.log" "alice$n"
	done
done
for secret in user.pass boot.pass new.pass otp; do
	nowhere "$secret" bob carol root
done
passed
