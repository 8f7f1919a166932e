#!/bin/sh
# Installs what the test machines need: by apt as root, otherwise it prints the
# one command that does. Says nothing when nothing is missing.
exec "$(dirname "$0")/../test/setup.sh" vm
