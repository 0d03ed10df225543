#!/usr/bin/env bash
# The benchmark: prints a table and writes build/bench/NAME.json, rows of
# {what, value, unit, goal, met}.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/bench
exec go run ./tests/bench -binary build/dbsupervisor -out build/bench "$@"
