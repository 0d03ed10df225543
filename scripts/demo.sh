#!/usr/bin/env bash
# The demo: two instances on this machine, a crash, a switchover. KEEP=1 leaves everything
# running, STOP=1 ends what KEEP=1 left.
set -euo pipefail
cd "$(dirname "$0")/.."
args=(-binary build/dbsupervisor)
if [ "${KEEP:-}" = 1 ]; then args+=(-keep); fi
if [ "${STOP:-}" = 1 ]; then args+=(-stop); fi
exec go run ./tests/demo "${args[@]}"
