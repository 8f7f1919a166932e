#!/usr/bin/env bash
# Shows the main job, step by step: e2e/main-job.sh, with an introduction.
# Usage: demo.sh BIN_DIR
set -euo pipefail
cat <<'TEXT'
A machine with an encrypted disk, a server, and two people. All of it is real: the programs, the LUKS volume (in a
file), the server (on this machine only). It happens in a folder of its own, which is removed at the end.

TEXT
"$(dirname "$0")/e2e/main-job.sh" "${1:?usage: $0 BIN_DIR}" luks2
echo 'demo: ok'
