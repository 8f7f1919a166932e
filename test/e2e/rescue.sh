#!/usr/bin/env bash
# A rescue system, which has the programs and nothing else, gets a locked-out
# volume back by a one-use invite: from one server, typed; and from two of three,
# of which one is dead. No root.
# Usage: rescue.sh BIN_DIR
. "$(dirname "$0")/lib.sh"

step "Two machines: one at a server alone, one at three servers of which two are enough"
printf %s 'what its user typed at installation' >user.pass
printf %s 'a new one, easier to remember' >new.pass
for name in laptop7 laptop8; do
	truncate -s 64M "$name.img"
	cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$name.img" user.pass
	mkdir "$name"
done
for n in 1 2 3; do
	printf 'the master key of number %s, nobody guesses it' "$n" >"master$n.pass"
	address=127.0.0.1:$(free_port)
	exits 0 "$escrow" server init --state "srv$n" --name "srv$n" --listen "$address" --address "$address" --master-passphrase-file "master$n.pass"
	start "srv$n"
	exits 0 "$escrow" token create --state "srv$n" --uses 1 --ttl 1h >"token$n"
	for who in "alice$n approver" 'bob helpdesk'; do
		read -r name role <<<"$who"
		exits 0 "$escrow" admin add "$name" --role "$role" --state "srv$n" >invite
		exits 0 "$escrow" --home "$name" admin login --invite-file invite
	done
done
exits 0 "$escrow" token create --state srv1 --uses 1 --ttl 1h >alone
exits 0 "$escrow" enroll --token-file alone --device laptop7.img --passphrase-file user.pass --root laptop7 --name laptop7
exits 0 "$escrow" token merge --threshold 2 token1 token2 token3 >token
exits 0 "$escrow" enroll --token-file token --device laptop8.img --passphrase-file user.pass --root laptop8 --name laptop8
before=$(sha256sum <laptop8.img)

step "The helpdesk reads the invite out; the rescue system types it, asks, and waits"
export XDG_RUNTIME_DIR=$folder/memory
mkdir memory
exits 0 "$escrow" --home bob --server srv1 recover --invite --volume laptop7 --text >typed
note "an invite of one server takes $(wc -l <typed) lines"
[ "$(wc -l <typed)" -le 6 ]
rescue() { # INVITE DEVICE CODE [OPTION...]
	local invite=$1 device=$2 code=$3
	shift 3
	exits "$code" "$escrow" recover --request --invite "$invite" --device "$device" --reason 'forgot it' --new-passphrase-file new.pass "$@"
}
rescue typed laptop8.img 4 # another volume
rescue typed laptop7.img 3 --no-wait --json >request.json
"$escrow" recover --request --invite typed --device laptop7.img --reason 'forgot it' --new-passphrase-file new.pass &
waiting=$!
exits 0 "$escrow" --home alice1 recover --approve "$(jq -er .id request.json)" --words "$(jq -er .words request.json)" --key-passphrase-file master1.pass
wait "$waiting"
opens new.pass laptop7.img
[ -z "$(ls memory)" ]
rescue typed laptop7.img 7 # once

step "From three servers, one of which is dead: two approve, one alone is not enough"
exits 0 "$escrow" --home bob recover --invite --volume laptop8 --out stick
note "an invite of three servers takes $("$escrow" --home bob recover --invite --volume laptop8 --text | wc -l) lines typed"
crash srv3
rescue stick laptop8.img 3 --no-wait --json >request.json
request=$(jq -er .id request.json) words=$(jq -er .words request.json)
exits 0 "$escrow" --home alice1 recover --approve "$request" --words "$words" --key-passphrase-file master1.pass
rescue stick laptop8.img 3 --no-wait
[ "$(sha256sum <laptop8.img)" = "$before" ]
exits 0 "$escrow" --home alice2 recover --approve "$request" --words "$words" --key-passphrase-file master2.pass
rescue stick laptop8.img 0
opens new.pass laptop8.img
[ -z "$(ls memory)" ]

step "No secret lies about"
stop srv1
stop srv2
for secret in user.pass new.pass; do
	nowhere "$secret" srv1 srv2 srv3 bob alice1 alice2 ./*.server.log
done
passed
