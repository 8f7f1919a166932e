#!/usr/bin/env bash
# A recovery passphrase that was read to somebody is replaced: the machine notices,
# rotates by itself, and nothing that was known before opens the disk. No root.
# Usage: rotate.sh BIN_DIR
. "$(dirname "$0")/lib.sh"

# The boot program stands where a boot image would have it.
root=$folder/root
printf %s 'what its user typed at installation' >user.pass
printf %s 'seven-badgers-under-a-tin-roof-4821' >master.pass

recover() { # OUT: bob asks, alice approves, and the packet's plaintext is OUT
	exits 0 "$escrow" --home bob recover --request --volume laptop7 --reason 'forgot it' --json >request.json
	exits 0 "$escrow" --home alice recover --approve "$(jq -er .id request.json)" --words "$(jq -er .words request.json)" --key-passphrase-file master.pass
	exits 0 "$escrow" --home bob recover --release "$(jq -er .id request.json)" --out "$1.asc" --otp-file "$1.otp"
	exits 0 "$escrow" recover --open "$1.asc" --otp-file "$1.otp" --out "$1"
	sed -n 's/^recovery-passphrase: *//p' "$1" | tr -d '\n' >"$1.pass"
	[ "$(wc -c <"$1.pass")" = 55 ]
}

step "A machine is enrolled, and all is well"
truncate -s 64M disk.img
cryptsetup luksFormat -q --type luks2 --pbkdf-memory 65536 --pbkdf-force-iterations 4 disk.img user.pass
address=127.0.0.1:$(free_port)
exits 0 "$escrow" server init --state srv --name srv1 --listen "$address" --address "$address" --master-passphrase-file master.pass
start srv
exits 0 "$escrow" admin add alice --role approver --state srv >alice.invite
exits 0 "$escrow" admin add bob --role helpdesk --state srv >bob.invite
exits 0 "$escrow" admin login --home alice --invite-file alice.invite
exits 0 "$escrow" admin login --home bob --invite-file bob.invite
exits 0 "$escrow" token create --state srv --uses 1 --ttl 1h >token
mkdir "$root"
exits 0 "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root "$root" --name laptop7
exits 0 "$escrow" verify --root "$root" --prove --json >verify.json
jq -e 'length == 1 and .[0].ok and .[0].proved and .[0].due == [] and .[0].servers[0].told' verify.json
exits 0 "$escrow" rotate --due --root "$root" --json >rotate.json
jq -e '.[0].rotated | not' rotate.json
"$escrow" --home bob packet list --json | jq -e '.[0].checked_at != null'

step "Its recovery passphrase is read to somebody: verify says that it is due"
recover first
opens first.pass disk.img
exits 0 "$unlock" --config "$root/etc/mandos-escrow" --print --once >first.boot
exits 0 "$escrow" verify --root "$root" --json >verify.json
jq -e '.[0].ok and (.[0].due | length) == 1' verify.json

step "The machine rotates by itself, without a token and without a person"
rm token
exits 0 "$escrow" rotate --due --root "$root" --json >rotate.json
jq -e '.[0].rotated' rotate.json
exits 2 cryptsetup open --test-passphrase --key-file first.pass disk.img
exits 2 cryptsetup open --test-passphrase --key-file first.boot disk.img
opens user.pass disk.img
exits 0 "$escrow" volume inspect disk.img --json >header.json
jq -e '(.slots | length) == 3' header.json
exits 0 "$escrow" verify --root "$root" --prove --json >verify.json
jq -e '.[0].ok and .[0].due == []' verify.json

step "It boots as before, and the new recovery passphrase is escrowed"
exits 0 "$unlock" --config "$root/etc/mandos-escrow" --print --once >second.boot
opens second.boot disk.img
recover second
opens second.pass disk.img
"$escrow" --home bob packet list --json | jq -e '[.[].superseded_by // empty] | length == 1'

step "A keyslot that somebody removed is noticed, and the server says so"
cryptsetup luksKillSlot -q --key-file user.pass disk.img "$(jq -er '.[0].recovery_slot' rotate.json)"
exits 5 "$escrow" verify --root "$root"
"$escrow" audit show --state srv --json | jq -e '[.[] | select(.action == "alarm.verify")] | length == 1'
exits 0 "$escrow" rotate --root "$root"
exits 0 "$escrow" verify --root "$root"

step "Another disk in its place is not this volume; a server that is away is named"
mv disk.img away.img
truncate -s 64M disk.img
cryptsetup luksFormat -q --type luks2 --pbkdf-memory 65536 --pbkdf-force-iterations 4 disk.img user.pass
exits 4 "$escrow" verify --root "$root"
exits 4 "$escrow" rotate --root "$root" --passphrase-file user.pass
mv away.img disk.img
exits 2 "$escrow" rotate --root "$root" --reencrypted
stop srv
exits 1 "$escrow" verify --root "$root" 2>&1 | tee said
grep -F srv1 said
exits 1 "$escrow" rotate --due --root "$root"

step "No secret lies about"
for secret in user.pass first.pass first.boot second.pass second.boot master.pass; do
	nowhere "$secret" srv srv.server.log alice bob root
done
passed
