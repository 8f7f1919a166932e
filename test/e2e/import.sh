#!/usr/bin/env bash
# Moving from volume_key and Anaconda: Debian's volume_key makes packets of a LUKS1
# volume, to a certificate and under a passphrase; an administrator imports them,
# and the server gives them back when the right people say so. And the other way
# round: a packet to the server's own key, and to its trustees, made where no server
# is reached. No root.
# Usage: import.sh BIN_DIR
. "$(dirname "$0")/lib.sh"
export GNUPGHOME=$folder/g
mkdir "$GNUPGHOME"
for tool in volume_key openssl; do
	command -v "$tool" >/dev/null || { echo "$0: needs $tool: run test/setup.sh e2e" >&3; exit 1; }
done

step "A machine that volume_key looks after: its packets, to a certificate and under a passphrase"
printf %s 'what its user typed at installation' >user.pass
printf %s 'a packet passphrase that is long enough' >packet.pass
printf %s 'a new one, easier to remember' >new.pass
printf %s 'another new one, as easy' >newer.pass
truncate -s 16M disk.img
cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 disk.img user.pass
uuid=$(cryptsetup luksUUID disk.img)
openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj '/O=Firm/CN=Escrow'
save() { volume_key --batch --save disk.img "$@"; } # secrets come on its standard input
{ cat user.pass && printf '\0'; } >secrets
save -c cert.pem --output-format asymmetric -o key-certificate <secrets
save -c cert.pem -o key-wrapped <secrets
save -c cert.pem --create-random-passphrase random-wrapped <secrets
{ cat user.pass && printf '\0' && cat packet.pass && printf '\0' && cat packet.pass && printf '\0'; } >secrets
save -o key-passphrase <secrets

step "They are shown, with what nobody vouches for"
for packet in key-certificate key-wrapped; do
	exits 0 "$escrow" volume show "$packet" --key key.pem --json --secrets >shown.json
	jq -e --arg uuid "$uuid" '.volume.uuid == $uuid and (.volume_key | length) == 128 and (.unauthenticated | length) > 0' shown.json
done
exits 0 "$escrow" volume show key-passphrase --packet-passphrase-file packet.pass --json --secrets >shown.json
jq -e '(.volume_key | length) == 128 and .unauthenticated == []' shown.json
exits 5 "$escrow" volume show key-passphrase --packet-passphrase-file new.pass
exits 0 "$escrow" volume show random-wrapped --key key.pem --json --secrets >shown.json
jq -er .passphrase shown.json | tr -d '\n' >random.pass
opens random.pass disk.img

step "A server, and an administrator who imports them"
printf %s 'seven-badgers-under-a-tin-roof-4821' >master.pass
address=127.0.0.1:$(free_port)
exits 0 "$escrow" server init --state srv --name srv1 --listen "$address" --address "$address" --master-passphrase-file master.pass
start srv
for who in 'alice approver' 'bob helpdesk' 'adam admin'; do
	read -r name role <<<"$who"
	exits 0 "$escrow" admin add "$name" --role "$role" --state srv >invite
	exits 0 "$escrow" --home "$name" admin login --invite-file invite
done
exits 7 "$escrow" --home bob packet import key-certificate --key key.pem
exits 0 "$escrow" --home adam packet import key-certificate --key key.pem --device disk.img --json >certificate.json
jq -e --arg uuid "$uuid" '.proved and .volume.uuid == $uuid and .servers == ["srv1"] and (.unauthenticated | length) > 0' certificate.json
exits 0 "$escrow" --home adam packet import key-certificate --key key.pem --json >again.json
[ "$(jq -r .packet again.json)" = "$(jq -r .packet certificate.json)" ]
exits 0 "$escrow" --home adam packet import random-wrapped --key key.pem --device disk.img --json >random.json
truncate -s 16M other.img
cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 other.img user.pass
exits 4 "$escrow" --home adam packet import key-passphrase --packet-passphrase-file packet.pass --device other.img
exits 0 "$escrow" --home adam packet import key-passphrase --packet-passphrase-file packet.pass --json >passphrase.json
jq -e '.proved | not' passphrase.json
"$escrow" --home bob packet list --json | jq -e 'length == 3 and ([.[] | select(.verified)] | length) == 2 and all(.imported)'

recovered() { # PACKET_ID PAYLOAD DEVICE NEW_PASSPHRASE_FILE: asked, approved, released onto the volume
	exits 0 "$escrow" --home bob recover --request --volume "$1" --for "$2" --reason 'its user left' --json >request.json
	exits 0 "$escrow" --home alice recover --approve "$(jq -er .id request.json)" --words "$(jq -er .words request.json)" --key-passphrase-file master.pass
	exits 0 "$escrow" --home bob recover --release "$(jq -er .id request.json)" --device "$3" --new-passphrase-file "$4"
	opens "$4" "$3"
}

step "The volume key, and a random passphrase, come back from the server and restore the volume"
recovered "$(jq -er .packet certificate.json)" volume-key disk.img new.pass
recovered "$(jq -er .packet random.json)" passphrase disk.img newer.pass

step "The machine enrolls: what was imported stays beside its own packet, and is no alarm"
exits 0 "$escrow" token create --state srv --uses 2 --ttl 1h >token
mkdir root
exits 0 "$escrow" enroll --token-file token --device disk.img --passphrase-file new.pass --root root --name laptop7
"$escrow" --home bob packet list --json | jq -e '[.[] | select(.imported | not)] | length == 1 and .[0].verified'
"$escrow" --home adam audit show --json | jq -e 'any(.action == "packet.import") and all(.action | startswith("alarm.") | not)'
exits 0 "$escrow" --home bob recover --request --volume laptop7 --reason 'forgot it' --json >own.json
"$escrow" --home bob packet list --json | jq -e --slurpfile own own.json '.[] | select(.id == $own[0].packet) | .imported | not'

step "A machine without a network: to the server's own key, and to the trustees of a token"
printf %s 'what another user typed' >other.pass
truncate -s 64M far.img
cryptsetup luksFormat -q --type luks2 --pbkdf-memory 65536 --pbkdf-force-iterations 4 far.img other.pass
exits 0 "$escrow" volume save far.img to-server --passphrase-file other.pass --recipient <("$escrow" --home bob master export)
exits 0 "$escrow" volume save far.img to-trustees --passphrase-file other.pass --token-file token
exits 0 "$escrow" --home adam packet import to-trustees --json >carried.json
exits 0 "$escrow" --home adam packet import to-trustees
exits 0 "$escrow" master export --private --state srv --out master-key.asc
exits 0 "$escrow" volume restore far.img to-server --key master-key.asc --key-passphrase-file master.pass --new-passphrase-file newer.pass
opens newer.pass far.img
recovered "$(jq -er .packet carried.json)" volume-key far.img new.pass

step "Without a server: a packet of volume_key becomes one that gpg reads"
exits 0 "$escrow" packet import key-wrapped --key key.pem --device disk.img --out moved.asc --new-packet-passphrase-file packet.pass
gpg --batch --pinentry-mode loopback --passphrase-file packet.pass -d moved.asc >plain
grep -q '^volume-key: ' plain && grep -q '^data-offset: ' plain
rm plain
gpgconf --kill all
exits 1 "$escrow" packet import key-wrapped --key key.pem --out moved.asc --new-packet-passphrase-file packet.pass

step "No secret lies about"
stop srv
for secret in user.pass other.pass new.pass newer.pass random.pass packet.pass master.pass; do
	nowhere "$secret" srv srv.server.log adam bob alice root
done
passed
