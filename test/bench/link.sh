#!/usr/bin/env bash
# From start to passphrase, on a link that is down at the start and has IPv6
# link-local addresses only: the boot program beside a stock mandos-client, in
# one virtual LAN, turn by turn. Both find their server by mDNS.
# Usage: link.sh BIN_DIR     as root, in network namespaces of its own
. "$(dirname "$0")/../e2e/lib.sh"
rounds=${ROUNDS:-10}
stock=/usr/lib/x86_64-linux-gnu/mandos/plugins.d/mandos-client
site=bench-$$ # begins the names of both namespaces
declare -A services=()

leave_site() {
	local code=$?
	for pid in "${services[@]}"; do kill "$pid" || true; done
	wait "${services[@]}" || true
	ip netns del "$site-servers" || true
	ip netns del "$site-machine" || true
	leave "$code"
}
trap leave_site EXIT
figure() { printf '%-34s %s\n' "$@" >&3; }
there() { ip netns exec "$site-servers" "$@"; }

ip netns add "$site-servers"
ip netns add "$site-machine"
ip -n "$site-servers" link add eth0 type veth peer name eth0 netns "$site-machine"
ip -n "$site-servers" link set lo up
ip -n "$site-servers" link set eth0 up

# Ours. The enrolled address leads to the machine itself, where nobody listens.
printf %s 'a passphrase of somebody' >user.pass
printf %s 'seven-badgers-under-a-tin-roof-4821' >master.pass
truncate -s 32M disk.img
cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 disk.img user.pass
"$escrow" server init --state srv --name srv1 --listen '[::]:7625' --address 127.0.0.1:7625 --master-passphrase-file master.pass
there "$escrow" server run --state srv >>srv.server.log 2>&1 &
services[ours]=$!
exits 0 "$escrow" server status --state srv --wait 30s
"$escrow" token create --state srv --uses 1 --ttl 1h >token
mkdir root
there "$escrow" enroll --token-file token --device disk.img --passphrase-file user.pass --root root --name machine

# Stock Mandos wants a system bus, avahi and a log; they get folders of their own.
mkdir conf keys
mandos-keygen --dir keys --tls-keytype ed25519 --type RSA --length 4096 --force >&2
printf %s 'a passphrase of somebody' >secret
mandos-keygen --dir keys --passfile secret --no-ssh --name machine >conf/clients.conf
printf '[DEFAULT]\n' >conf/mandos.conf
cat >stock.sh <<'EOF'
set -e
umask 022
mount -t tmpfs tmpfs /run
mkdir -p /run/dbus /run/avahi-daemon /run/state dev
cp -r conf /run/conf
chown -R _mandos /run/conf /run/state
mount -t tmpfs tmpfs dev
cp -a /dev/null /dev/zero /dev/random /dev/urandom /dev/fd dev/
mount --move dev /dev
socat -u UNIX-RECV:/dev/log OPEN:/dev/null &
log=$!
dbus-daemon --system --nofork --nopidfile &
bus=$!
until [ -e /run/dbus/system_bus_socket ]; do sleep 0.1; done
avahi-daemon --no-drop-root --no-chroot --no-rlimits &
avahi=$!
sleep 1
mandos --foreground --interface eth0 --configdir /run/conf --statedir /run/state &
mandos=$!
trap 'kill $mandos $avahi $bus $log; wait' TERM
wait
EOF
there bash stock.sh >>stock.server.log 2>&1 &
services[stock]=$!
for _ in $(seq 100); do there ss -Hltn '! sport = 7625' | grep -q . && break; sleep 0.2; done

# A question as systemd-cryptsetup asks it, and what comes back.
cat >ours.sh <<'EOF'
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/ask-password
socat -u UNIX-RECVFROM:/run/systemd/ask-password/sck.bench OPEN:answer,creat,trunc &
answer=$!
until [ -S /run/systemd/ask-password/sck.bench ]; do sleep 0.01; done
printf '[Ask]\nPID=%d\nSocket=/run/systemd/ask-password/sck.bench\nAcceptCached=0\nEcho=0\nNotAfter=0\nMessage=Please enter passphrase for disk.img\nId=cryptsetup:%s\n' \
	$$ "$PWD/disk.img" >/run/systemd/ask-password/draft
mv /run/systemd/ask-password/draft /run/systemd/ask-password/ask.bench
start=$EPOCHREALTIME
"$1" --config root/etc/mandos-escrow >&2 &
program=$!
wait $answer
awk -v from="$start" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.0f\n", (to - from) * 1000 }'
rm /run/systemd/ask-password/ask.bench
kill $program
wait $program
EOF
ours() {
	ip netns exec "$site-machine" timeout 60 bash ours.sh "$unlock"
	tail -c +2 answer | cryptsetup open --test-passphrase --key-file - disk.img
}
mandos() {
	local start=$EPOCHREALTIME
	ip netns exec "$site-machine" timeout 60 "$stock" --pubkey keys/pubkey.txt --seckey keys/seckey.txt \
		--tls-privkey keys/tls-privkey.pem --tls-pubkey keys/tls-pubkey.pem --network-hook-dir "$folder" >answer
	awk -v from="$start" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.0f\n", (to - from) * 1000 }'
	cmp answer secret >&2
}

for _ in $(seq "$rounds"); do
	for program in ours mandos; do
		ip -n "$site-machine" link set eth0 down
		sleep 1
		$program >>"$program.times"
	done
done
figure 'link down to passphrase, ms' 'least, median, most'
for program in ours mandos; do
	figure "$program" "$(sort -n "$program.times" | awk '{ all[NR] = $1 } END { print all[1], all[int((NR + 1) / 2)], all[NR] }')"
done
