# shellcheck shell=bash
# Sourced by the end-to-end tests, which run the built programs as users do: in
# a folder of their own, with exact exit codes, and with every process ended by
# its id. Only the lines of step and note are seen; what commands say is kept
# and shown when a test fails.
set -Eeuo pipefail
umask 077
export LC_ALL=C.UTF-8 PATH=$PATH:/usr/sbin:/sbin

programs=$(cd "${1:?usage: $0 BIN_DIR ...}" && pwd)
escrow=$programs/mandos-escrow
unlock=$programs/mandos-escrow-unlock
for tool in cryptsetup gpg jq; do
	command -v "$tool" >/dev/null || { echo "$0: needs $tool: run test/setup.sh e2e" >&2; exit 1; }
done

folder=$(mktemp -d)
cd "$folder"
export HOME=$folder XDG_CONFIG_HOME=$folder/.config
declare -A servers=() # state folder: process id
exec 3>&1 </dev/null >>"$folder/commands.log" 2>&1

trap 'echo "failed in line $LINENO of ${BASH_SOURCE[0]##*/}: $BASH_COMMAND"' ERR
trap 'leave $?' EXIT
trap 'exit 1' INT TERM

leave() { # EXIT_CODE
	trap - ERR EXIT
	local state
	[ "$1" = 0 ] || complain
	for state in "${!servers[@]}"; do crash "$state" || true; done
	cd /
	rm -rf "$folder"
	exit "$1"
}

complain() {
	[ ! -t 3 ] || echo
	echo "  FAILED  $title"
	echo '-- the last lines of what the commands said:'
	tail -n 25 "$folder/commands.log"
	for log in "$folder"/*.server.log; do
		[ ! -e "$log" ] || { echo "-- of ${log##*/}:" && tail -n 15 "$log"; }
	done
} >&3

fail() { echo "$*" && exit 1; }

title='' since='' notes=()
step() { # TEXT: what comes next, in words; ends the step before
	passed
	echo "== $*"
	title=$* since=$EPOCHREALTIME notes=()
	[ ! -t 3 ] || printf '     ...  %s' "$title" >&3
}

note() { notes+=("$*"); } # TEXT: shown below the step's line

passed() { # ends the last step: its line, with the seconds it took
	[ -n "$title" ] || return 0
	local text
	[ ! -t 3 ] || printf '\r' >&3
	awk -v from="$since" -v to="$EPOCHREALTIME" 'BEGIN { printf "%6.2f s", to - from }' >&3
	printf '  %s\n' "$title" >&3
	for text in "${notes[@]}"; do printf '            %s\n' "$text" >&3; done
	title=''
}

exits() { # CODE COMMAND...: no other exit code will do
	local want=$1 got=0
	shift
	timeout 60 "$@" || got=$?
	[ "$got" = "$want" ] || fail "exit code $got instead of $want: $*"
}

free_port() {
	local port
	while :; do
		port=$((20000 + RANDOM % 12000))
		(: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
	done
	echo "$port"
}

start() { # STATE
	"$escrow" server run --state "$1" >>"$1.server.log" 2>&1 &
	servers[$1]=$!
	exits 0 "$escrow" server status --state "$1" --wait 30s
}

crash() { # STATE: no moment to write anything down
	kill -9 "${servers[$1]}"
	wait "${servers[$1]}" || true
	unset "servers[$1]"
}

stop() { # STATE: as a service manager would; exit code 0 is due
	local code=0
	kill "${servers[$1]}"
	wait "${servers[$1]}" || code=$?
	unset "servers[$1]"
	[ "$code" = 0 ] || fail "server $1 ended with exit code $code"
}

opens() { cryptsetup open --test-passphrase --key-file "$1" "$2"; } # PASSPHRASE_FILE DEVICE

# nowhere SECRET_FILE PLACE...: its bytes stand in none of these files and
# folders, neither as they are nor in base64 or hex.
nowhere() {
	local secret=$1 form code
	shift
	[ -s "$secret" ] || fail "$secret is empty: nothing to look for"
	for form in 'cat' 'base64 -w0' 'od -An -v -tx1'; do
		case $form in
		cat) cat "$secret" ;;
		*) $form "$secret" | tr -d ' =\n' ;;
		esac >needle
		code=0
		grep -rlaiF -f needle "$@" || code=$?
		[ "$code" = 1 ] || fail "$secret ($form) stands in the files above"
	done
	rm needle
}
