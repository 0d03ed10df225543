#!/usr/bin/env bash
# Checks the protocol's models with Spin: the good ones must have no error in a complete
# search, and with each rule switched off a violation of the expected rule must be found.
#
#   run.sh         small sizes, for CI
#   run.sh full    larger ones as well, three instances (four minutes)
#   run.sh -k ...  keeps the working directory, to replay a trail: spin -t -p MODEL.pml
#
# Needs spin (6.5) and gcc. Exits with 0 if there was no surprise, 1 if there was, 2 if
# something is missing. MODEL_JOBS (2) runs at a time, MODEL_MEM (1400 MiB) for each.
set -u
here=$(cd "$(dirname "$0")" && pwd)
keep=
size=small
for a in "$@"; do
	case $a in
	-k) keep=1 ;;
	full) size=full ;;
	*) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
	esac
done
for tool in spin gcc; do
	if ! command -v "$tool" >/dev/null; then
		echo "run.sh: $tool is missing (Debian: apt-get install spin gcc)" >&2
		exit 2
	fi
done
jobs=${MODEL_JOBS:-2}
mem=${MODEL_MEM:-1400}
dir=$(mktemp -d)
# shellcheck disable=SC2317 # the trap calls it
cleanup() { if [ -z "$keep" ]; then rm -rf "$dir"; else echo "kept: $dir"; fi; }
trap cleanup EXIT
trap 'exit 130' INT TERM

# size  model  switch  other definitions  expected result: ok, or the rule violated (where
# several are broken, which one is met first depends on the order of the search)
runs() {
	cat <<-'END'
	small register -                   -                 ok
	small lease    -                   -DN=3,-DSUSPEND   ok
	small gc       -                   -                 ok
	small handoff  -                   -DW=2             ok
	small pin      -                   -                 ok
	full  register -                   -DN=3,-DMAXV=4    ok
	full  register -                   -DLATE=2          ok
	full  register -                   -DMAXV=6,-DKEEP=3 ok
	full  gc       -                   -DT=3,-DS=3       ok
	full  handoff  -                   -DW=3             ok
	full  handoff  -                   -DN=3,-DW=1       ok
	full  pin      -                   -DR=2,-DS=3       ok
	small register SHOW                -                 shown
	small lease    SHOW                -                 shown
	small gc       SHOW                -                 shown
	small handoff  SHOW                -DW=2             shown
	small pin      SHOW                -                 shown
	small register NO_PRED_CHECK       -                 swap_counted
	small register NO_PRED_READBACK    -                 swap_counted
	small register NO_LISTING          -                 loaded_record
	small register NO_ASCENDING        -                 swap_counted
	small register NO_STOP_AT_ERROR    -                 swap_counted
	small register NO_FRESH_NONCE      -                 swap_counted
	small register NO_UNKNOWN          -                 swap_counted
	small register NO_UNKNOWN_LOST     -                 swap_denied
	small register NO_SAME_FILE        -                 swap_counted
	small register NO_LOAD_ANCHOR      -                 loaded_record
	small register NO_ANCHOR           -                 loaded_record
	small register NO_INSTANT          -                 loaded_record
	small register NO_ANCHOR_FILE      -                 loaded_record
	small register LEARN_LATE          -                 known_file
	small lease    NO_TTL_WAIT         -                 one_writer
	small lease    NO_WATCHED_VERSION  -                 one_writer
	small lease    NO_TTL_IN_VERSION   -                 one_writer
	small lease    NO_SEND_STAMP       -                 one_writer
	small lease    NO_GUARD            -                 one_writer
	small lease    NO_MARGIN           -                 one_writer
	small lease    NO_FRESH_NONCE      -                 one_writer
	small lease    NO_UNKNOWN          -                 one_writer
	small lease    NO_BOOTTIME         -DSUSPEND         one_writer
	small gc       NO_COMMIT_GATE      -                 head|objects_exist
	small gc       NO_CHECK_TERM       -                 head|objects_exist
	small gc       NO_CHECK_HEAD       -                 head|gc|objects_exist
	small gc       NO_CHECK_GCSEQ      -                 objects_exist
	small gc       NO_TWO_COMMITS      -                 objects_exist
	small gc       NO_SEEN_CONDEMNED   -                 objects_exist
	small gc       NO_AVOID            -                 objects_exist
	small gc       NO_FRESH_NAMES      -                 objects_exist
	small gc       NO_WRITTEN_FIRST    -                 objects_exist
	small gc       NO_UNKNOWN          -                 objects_exist
	small handoff  NO_RELEASE_GIVES_UP -DW=2             one_writer|handoff_kept|release
	small handoff  NO_INCARNATION_SWAP -DW=2             one_writer|handoff_kept|release
	small handoff  NO_CHECK_INC        -DW=2             one_writer|handoff_kept|release
	small handoff  NO_SYNC_FIRST       -DW=2             head_on_disk|head
	small handoff  NO_STOP_FIRST       -DW=2             handoff_kept
	small handoff  NO_COMMIT_FIRST     -DW=2             handoff_kept
	small handoff  NO_FORK             -DW=2             head_on_disk|fork_stays_out|head
	small pin      NO_PINS             -                 pinned_read
	small pin      PINS_BEFORE         -                 pinned_read
	small pin      NO_SECOND_LOOK      -                 pinned_read
	small pin      CONDEMNED_ONLY      -                 pinned_read
	small pin      PIN_AFTER           -                 pinned_read
	END
}

# one NUMBER MODEL SWITCH DEFINITIONS EXPECTED: writes a line of the table, and "surprise"
# beside it if there is one.
one() {
	local n=$1 model=$2 switch=$3 defs=$4 expected=$5
	local d=$dir/$n-$model-$switch start=$SECONDS got states
	mkdir -p "$d" && cp "$here/$model.pml" "$d" && cd "$d" || return
	local args=()
	[ "$switch" = - ] || args+=("-D$switch")
	# shellcheck disable=SC2206 # several definitions, to be split
	[ "$defs" = - ] || args+=(${defs//,/ })
	spin -a "${args[@]}" "$model.pml" >spin.out 2>&1
	if ! gcc -O2 -w -DSAFETY -DCOLLAPSE -DMEMLIM="$mem" -o pan pan.c >gcc.out 2>&1; then
		got="does not compile"
	else
		./pan -m2000000 >pan.out 2>&1
		states=$(sed -n 's/^ *\([0-9][0-9.e+]*\) states, stored.*/\1/p' pan.out)
		if grep -q 'assertion violated' pan.out; then
			got=$(sed -n 's/^pan:1: assertion violated *\(.*\) (at depth.*/\1/p' pan.out | head -n 1 | grep -o '[a-z_]*' | tail -n 1)
		elif grep -qE '^pan:1:|errors: [^0]' pan.out; then
			got="other error"
		elif grep -qE 'max search depth too small|out of memory|memory limit|Search not completed' pan.out ||
			! grep -q 'errors: 0' pan.out; then
			got=truncated
		elif [ "$switch" = - ] && grep -A9999 '^unreached in' pan.out | grep -E '^\s.*, state [0-9]+,' | grep -vq '"-end-"'; then
			got="unreached code"
		else
			got=ok
		fi
	fi
	local verdict=as_expected
	if ! [[ $got =~ ^($expected)$ ]]; then
		verdict="SURPRISE, expected $expected"
		: >"$dir/$n.surprise"
	fi
	printf '%-9s %-20s %-18s %-15s %11s %5d s  %s\n' "$model" "$switch" "${defs//,/ }" "$got" "${states:-?}" $((SECONDS - start)) "$verdict" >"$dir/$n.line"
	[ -n "$keep" ] || { cd "$dir" && rm -rf "$d"; }
}

# A function, so that the file is read as a whole before anything runs.
main() {
	printf '%-9s %-20s %-18s %-15s %11s %7s\n' model switch definitions result states time
	n=100
	started=$SECONDS
	while read -r which model switch defs expected; do
		[ "$size" = full ] || [ "$which" = small ] || continue
		n=$((n + 1))
		while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
		one "$n" "$model" "$switch" "$defs" "$expected" &
	done < <(runs)
	wait
	cat "$dir"/*.line
	count=$(cat "$dir"/*.line | wc -l)
	surprises=$(find "$dir" -maxdepth 1 -name '*.surprise' | wc -l)
	echo "$count runs, $surprises surprises, $((SECONDS - started)) s"
	[ "$surprises" = 0 ] && [ "$count" = $((n - 100)) ]
}
main
exit $?
