#!/usr/bin/env bash
# The demo with an engine; see the directories beside this one.
#   run.sh ENGINE
set -euo pipefail
cd "$(dirname "$0")/.."
engine=${1:?which engine}
scripts/ensure-tools.sh race image integration
scripts/ensure-docker.sh
packaging/images/ensure.sh "$engine"
make --no-print-directory build
if [ "$engine" = postgres ]; then exec scripts/demo.sh; fi
exec go run ./tests/demo -binary build/dbsupervisor -engine "$engine"
