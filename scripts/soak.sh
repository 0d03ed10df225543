#!/usr/bin/env bash
# The long tests: the fault table again and again, long random runs, the models at full size.
# Goes on after a failure and says at the end what failed. Full logs in build/soak.
#   SOAK_COUNT=10    rounds of the fault table and the consistency test
#   FAULTS_SCALE=68  pgbench scale of the warm volume that is taken over: 1 GiB
#   FAULTS_TTL=10s   TTL of the leases in the fault table
#   SOAK_RANDOM=10m  how long harm of every kind is done to three instances
#   SOAK_FUZZ=2m     time for each fuzz test; 0 leaves them out
#   SOAK_MODEL=yes   no leaves the models out
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
count=${SOAK_COUNT:-10}
fuzz=${SOAK_FUZZ:-2m}
export FAULTS_SCALE=${FAULTS_SCALE:-68} FAULTS_TTL=${FAULTS_TTL:-10s}
echo "fault table: TTL $FAULTS_TTL, pgbench scale $FAULTS_SCALE"
logs=build/soak/$(date -u +%Y%m%dT%H%M%SZ)
mkdir -p "$logs"
failed=()

# step NAME COMMAND...: logs everything, shows what each test measured and how it ended.
step() {
	local name=$1 begin=$SECONDS
	shift
	printf '=== %s\n' "$name"
	if "$@" >"$logs/$name.log" 2>&1; then
		grep -hE '^(ok|---|[[:space:]]+--- FAIL)|_test\.go:[0-9]+: ' "$logs/$name.log" | grep -v 'SKIP' || true
		printf '=== %s passed in %d s\n' "$name" $((SECONDS - begin))
	else
		failed+=("$name")
		grep -hE '^(FAIL|panic|--- FAIL|[[:space:]]+--- FAIL)|_test\.go:[0-9]+: ' "$logs/$name.log" | tail -n 60
		printf '=== %s FAILED after %d s: %s\n' "$name" $((SECONDS - begin)) "$logs/$name.log"
	fi
}

for ((n = 1; n <= count; n++)); do
	step "faults-$n" go test -count=1 -v -timeout 60m ./tests/faults
	step "consistency-$n" env ROUNDS=10 go test -count=1 -v -timeout 60m ./tests/consistency
done
step random env FAULTS_RANDOM="${SOAK_RANDOM:-10m}" go test -count=1 -v -timeout 60m -run TestRandomHarm ./tests/faults
# Change tracking: a hundred windows of each kind.
step track env TRACK_ROUNDS="${TRACK_ROUNDS:-100}" DBSUPERVISOR_REQUIRE_TRACKING=1 go test -count=1 -v -timeout 60m -run TestWindows ./internal/track
# Snapshots that fail in every step, ten times each, while another process changes files.
step aborted env TEST_LONG=1 go test -count=1 -v -timeout 60m -run TestVolumeAborted ./internal/sync
step unit go test -race -count=5 -timeout 60m ./cmd/... ./internal/...
if [ "$fuzz" != 0 ]; then
	# One at a time: go test -fuzz takes one test of one package.
	# shellcheck disable=SC2016
	while read -r package test; do
		step "fuzz-$(basename "$package")-$test" go test -run '^$' -fuzz "^$test\$" -fuzztime "$fuzz" "$package"
	done < <(go list -f '{{$p := .ImportPath}}{{$d := .Dir}}{{range .TestGoFiles}}{{$p}} {{$d}}/{{.}}{{"\n"}}{{end}}' ./internal/... |
		while read -r package file; do
			sed -nE "s|^func (Fuzz[A-Za-z0-9_]*)\(.*|$package \1|p" "$file"
		done)
fi
if [ "${SOAK_MODEL:-yes}" = yes ]; then step model tests/model/run.sh full; fi

if [ ${#failed[@]} -gt 0 ]; then
	printf 'FAILED: %s\n' "${failed[@]}"
	exit 1
fi
echo "all passed, $count rounds; logs in $logs"
