#!/usr/bin/env bash
# One laptop and no server: a volume is saved, shown, and restored from a packet in
# a file, with its keyslots wiped and with its header gone, and from the printed
# page. No root, no network.
# Usage: volume.sh BIN_DIR luks1|luks2
. "$(dirname "$0")/lib.sh"
type=${2:?luks1 or luks2}

printf %s 'what its user typed at installation' >user.pass
printf %s 'kept-apart-from-the-packet-93' >packet.pass
printf %s 'the new passphrase, by telephone 5' >new.pass
key() { cryptsetup luksDump -q --dump-volume-key --key-file "$1" "$2" | sed -n '/MK dump:/,$p'; } # PASSPHRASE_FILE DEVICE
data() { tail -c +$((offset + 1)) "$1" | sha256sum; }

step "A volume is inspected and saved: under a passphrase, to a certificate, to an OpenPGP key"
cheap=(--pbkdf pbkdf2 --pbkdf-force-iterations 1000)
[ "$type" = luks2 ] || cheap=(--iter-time 10)
truncate -s 40M disk.img
cryptsetup luksFormat -q --type "$type" "${cheap[@]}" disk.img user.pass
exits 0 "$escrow" volume inspect disk.img --json >header.json
jq -e --arg type "$type" '.type == $type and (.uuid | length) == 36 and .cipher != "" and .key_bits >= 256 and .sector_size >= 512 and (.slots | length) == 1' header.json
offset=$(jq -er .offset header.json)
head -c 8M /dev/urandom | dd of=disk.img bs=4096 seek=$((offset / 4096)) conv=notrunc status=none
openssl req -x509 -newkey rsa:3072 -noenc -keyout rsa.pem -out certificate.pem -subj /CN=escrow -days 30
gpg --batch --quiet --passphrase '' --quick-gen-key escrow@example.org rsa3072 encrypt never
gpg --batch --armor --export escrow@example.org >key.asc
gpg --batch --armor --export-secret-keys escrow@example.org >secret.asc
exits 0 "$escrow" volume save disk.img passphrase.packet --passphrase-file user.pass --packet-passphrase-file packet.pass --recovery-passphrase
exits 0 "$escrow" volume save disk.img certificate.packet --passphrase-file user.pass --certificate certificate.pem
exits 0 "$escrow" volume save disk.img recipient.packet --passphrase-file user.pass --recipient key.asc
cp disk.img whole.img

step "What is in a packet is shown, and secrets on request only; each sealing has the same volume key"
exits 0 "$escrow" volume show passphrase.packet --packet-passphrase-file packet.pass --json >hidden.json
jq -e '.volume_key == null and .recovery_passphrase == null' hidden.json
exits 0 "$escrow" volume show passphrase.packet --packet-passphrase-file packet.pass --secrets --json >shown.json
exits 0 "$escrow" volume show certificate.packet --key rsa.pem --secrets --json >certificate.json
exits 0 "$escrow" volume show recipient.packet --key secret.asc --secrets --json >recipient.json
for shown in shown certificate recipient; do
	[ "$(jq -er .volume.uuid $shown.json)" = "$(jq -er .uuid header.json)" ]
	jq -er .volume_key $shown.json | xxd -r -p >$shown.key
	cmp $shown.key shown.key
done
printf %s "$(jq -er .recovery_passphrase shown.json)" >recovery.pass
opens recovery.pass disk.img
nowhere shown.key passphrase.packet certificate.packet recipient.packet
nowhere recovery.pass passphrase.packet

step "The keyslots are wiped: restored with the volume key"
cryptsetup luksErase -q disk.img
exits 0 "$escrow" volume restore disk.img certificate.packet --key rsa.pem --new-passphrase-file new.pass
opens new.pass disk.img
[ "$(key new.pass disk.img)" = "$(key user.pass whole.img)" ]

step "Header and its copy are gone: nothing without --rebuild, nothing with another volume's packet"
dd if=/dev/urandom of=disk.img bs="$offset" count=1 conv=notrunc status=none
cp disk.img gone.img
truncate -s 40M other.img
cryptsetup luksFormat -q --type "$type" "${cheap[@]}" other.img user.pass
head -c 8M /dev/urandom | dd of=other.img bs=4096 seek=$((offset / 4096)) conv=notrunc status=none
exits 0 "$escrow" volume save other.img other.packet --passphrase-file user.pass --packet-passphrase-file packet.pass
exits 5 "$escrow" volume restore disk.img passphrase.packet --packet-passphrase-file packet.pass --new-passphrase-file new.pass
exits 4 "$escrow" volume restore disk.img other.packet --packet-passphrase-file packet.pass --new-passphrase-file new.pass --rebuild
cmp disk.img gone.img

step "Written anew from the packet: same volume, same key, same data"
exits 0 "$escrow" volume restore disk.img recipient.packet --key secret.asc --new-passphrase-file new.pass --rebuild
exits 0 "$escrow" volume inspect disk.img --json >rebuilt.json
for field in type uuid cipher key_bits offset sector_size; do
	[ "$(jq -c .$field rebuilt.json)" = "$(jq -c .$field header.json)" ]
done
[ "$(key new.pass disk.img)" = "$(key user.pass whole.img)" ]
[ "$(data disk.img)" = "$(data whole.img)" ]

step "From the page: typed lines, one of them wrong, then right"
exits 0 "$escrow" volume save disk.img small.packet --passphrase-file new.pass --packet-passphrase-file packet.pass
exits 0 "$escrow" packet print small.packet --packet-passphrase-file packet.pass --text --out sheet.txt
exits 0 "$escrow" packet print small.packet --packet-passphrase-file packet.pass --out sheet.pdf
[ "$(head -c 5 sheet.pdf)" = %PDF- ]
nowhere shown.key sheet.txt sheet.pdf
dd if=/dev/zero of=disk.img bs="$offset" count=1 conv=notrunc status=none
sed -E 's/^( *02 .*)[A-M]/\17/' sheet.txt >mistyped.txt
exits 5 "$escrow" volume restore disk.img mistyped.txt --packet-passphrase-file packet.pass --new-passphrase-file new.pass --rebuild 2>mistyped.err
grep 'line 02' mistyped.err
# A page has no room for a fingerprint, and these data are no file system.
exits 4 "$escrow" volume restore disk.img sheet.txt --packet-passphrase-file packet.pass --new-passphrase-file new.pass --rebuild
exits 0 "$escrow" volume restore disk.img sheet.txt --packet-passphrase-file packet.pass --new-passphrase-file new.pass --rebuild --unchecked
[ "$(key new.pass disk.img)" = "$(key user.pass whole.img)" ]
[ "$(data disk.img)" = "$(data whole.img)" ]
passed
