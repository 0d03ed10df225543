#!/usr/bin/env bash
# The sync engine beside rsync, rclone, restic and borg: prints tables and writes
# build/bench/sync.json, rows of {what, value, unit, goal, met}. -full: 30 GiB, without peers.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/ensure-tools.sh integration peers
mkdir -p build/bench
# One that containers can run.
CGO_ENABLED=0 go build -o build/bench/bench ./tests/bench
exec build/bench/bench -sync -binary build/dbsupervisor -out build/bench "$@"
