#!/usr/bin/env bash
# The main job on a real LUKS volume in an image file: a machine enrolls, boots
# by itself, is refused when disabled, loses its passphrase, is approved by a
# second person, and is opened again. No root.
# Usage: main-job.sh BIN_DIR [luks1|luks2]
. "$(dirname "$0")/lib.sh"
type=${2:-luks2}

step "A machine has an encrypted disk (${type^^}), which only its user's passphrase opens"
printf %s 'what its user typed at installation' >user.pass
printf %s 'nobody ever chose this one' >stranger.pass
truncate -s 64M disk.img
case $type in
luks1) cost='--pbkdf-force-iterations 1000' ;;
luks2) cost='--pbkdf-memory 65536 --pbkdf-force-iterations 4' ;;
*) fail "no type $type" ;;
esac
# shellcheck disable=SC2086 # several options
cryptsetup luksFormat -q --type "$type" $cost disk.img user.pass
uuid=$(cryptsetup luksUUID disk.img)
opens user.pass disk.img
exits 2 cryptsetup open --test-passphrase --key-file stranger.pass disk.img

step "A server starts. What it keeps is sealed to a key whose passphrase it does not know"
printf %s 'seven-badgers-under-a-tin-roof-4821' >master.pass
address=127.0.0.1:$(free_port)
exits 0 "$escrow" server init --state srv --name srv1 --listen "$address" --address "$address" --master-passphrase-file master.pass
exits 1 "$escrow" server init --state srv --name srv1 --listen "$address" --address "$address" --master-passphrase-file master.pass
start srv
[ "$(stat -c %a srv/control.sock srv/store.db srv/keys/store.key | sort -u)" = 600 ]

step "Two people log in: bob, who helps users, and alice, who approves"
exits 0 "$escrow" admin add alice --role approver --state srv >alice.invite
exits 0 "$escrow" admin add bob --role helpdesk --state srv >bob.invite
exits 0 "$escrow" admin login --home alice --invite-file alice.invite
exits 0 "$escrow" admin login --home bob --invite-file bob.invite
exits 7 "$escrow" admin login --home mallory --invite-file bob.invite

step "The machine enrolls: one command, and a token that works once"
exits 0 "$escrow" token create --state srv --uses 1 --ttl 1h >token
exits 1 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root nowhere
exits 1 "$escrow" enroll --token-file token --device disk.img --passphrase-file stranger.pass --root .
mkdir root
exits 0 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root root
exits 0 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root root
mkdir twin
exits 7 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root twin
opens user.pass disk.img
exits 0 "$escrow" volume inspect disk.img --json >header.json
jq -e --arg uuid "$uuid" '.uuid == $uuid and (.slots | length) == 3' header.json
"$escrow" --home bob packet list --json |
	jq -e --arg uuid "$uuid" 'length == 1 and .[0].volume.uuid == $uuid and .[0].verified'

step "It boots by itself: it gets its boot passphrase, and the disk opens"
exits 0 "$unlock" --config root/etc/mandos-escrow --print >boot.pass
opens boot.pass disk.img

step "It is stolen and disabled: it gets nothing, not even when the server crashed"
exits 0 "$escrow" machine disable --state srv --all
exits 7 "$unlock" --config root/etc/mandos-escrow --print --once >refused
crash srv
start srv
exits 7 "$unlock" --config root/etc/mandos-escrow --print --once >>refused
[ ! -s refused ]

step "It turns up again and is enabled: it boots as before"
exits 0 "$escrow" machine enable --state srv --all
exits 0 "$unlock" --config root/etc/mandos-escrow --print --once >again
cmp boot.pass again

step "Its user forgets the passphrase: bob asks for a recovery, and is told six words"
exits 0 "$escrow" --home bob recover --request --volume "$uuid" --reason 'forgot it over the holidays' --json >request.json
request=$(jq -er .id request.json)
words=$(jq -er .words request.json)
[ "$(wc -w <<<"$words")" = 6 ]
note "the words, for alice's ear only: $words"

step "Nobody can approve their own request, and before an approval there is nothing to get"
exits 0 "$escrow" --home alice recover --request --volume "$uuid" --reason 'just looking' --json >hers.json
hers=$(jq -er .id hers.json)
other_words=$(jq -er .words hers.json)
exits 7 "$escrow" --home alice recover --approve "$hers" --words "$other_words" --key-passphrase-file master.pass
exits 7 "$escrow" --home bob recover --approve "$hers" --words "$other_words" --key-passphrase-file master.pass
exits 3 "$escrow" --home bob recover --release "$request" --out packet.asc --otp-file otp
[ ! -e packet.asc ] && [ ! -e otp ]

step "Alice approves: bob told her the words, and she knows the master key's passphrase"
exits 7 "$escrow" --home alice recover --approve "$request" --words "$other_words" --key-passphrase-file master.pass
exits 1 "$escrow" --home alice recover --approve "$request" --words "$words" --key-passphrase-file stranger.pass
exits 0 "$escrow" --home alice recover --approve "$request" --words "$words" --key-passphrase-file master.pass
exits 0 "$escrow" --home alice recover --deny "$hers"

step "Bob gets a packet, and a one-time password that he passes on by another way"
exits 0 "$escrow" --home bob recover --release "$request" --out packet.asc --otp-file otp
[ "$(stat -c %a packet.asc otp | sort -u)" = 600 ]
note "the one-time password: $(cat otp)"

step "The packet opens without any of our programs: stock gpg reads it"
mkdir gnupg
exits 0 gpg --homedir "$folder/gnupg" --batch --pinentry-mode loopback --passphrase-file otp --output plain --decrypt packet.asc
gpgconf --homedir "$folder/gnupg" --kill all
grep -F "$uuid" plain
sed -n 's/^recovery-passphrase: *//p' plain | tr -d '\n' >recovery.pass
[ "$(wc -c <recovery.pass)" = 55 ]
opens recovery.pass disk.img
if grep -i '^volume-key' plain; then fail 'a packet with a passphrase gives the volume key away'; fi
note "what bob can read to the user: $(cat recovery.pass)"

step "The user gets back in, with a new passphrase; a wrong one-time password did nothing"
printf %s 'a new one, easier to remember' >new.pass
sha256sum disk.img >before
exits 5 "$escrow" recover --restore packet.asc --otp-file stranger.pass --device disk.img --new-passphrase-file new.pass
sha256sum --check before
exits 0 "$escrow" recover --restore packet.asc --otp-file otp --device disk.img --new-passphrase-file new.pass
opens new.pass disk.img
note "most of this is the new keyslot's key derivation, which is slow on purpose"
exits 2 cryptsetup open --test-passphrase --key-file stranger.pass disk.img

step "All of it is in the audit log, which is a chain that nobody changes unseen"
exits 0 "$escrow" audit verify --state srv
"$escrow" audit show --state srv --json |
	jq -e --arg request "$request" '[.[] | select(.request == $request) | .action] as $seen
		| ["recover.request", "recover.approve", "recover.release"] - $seen == []'
note "$("$escrow" audit show --state srv --json | jq length) entries"

step "No secret lies about: not on the server, not in anybody's folder, not in a log"
stop srv
for secret in user.pass boot.pass new.pass master.pass; do
	nowhere "$secret" srv srv.server.log alice bob root packet.asc
done
for secret in otp recovery.pass; do
	nowhere "$secret" srv srv.server.log alice bob root
done
passed
