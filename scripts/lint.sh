#!/usr/bin/env bash
# golangci-lint and shellcheck. With LINT=auto (make test) a linter that cannot be had is
# reported and left out; otherwise that is an error.
#   lint.sh GOLANGCI_VERSION
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$(dirname "$0")/.."
mode=${LINT:-must}

unavailable() {
	[ "$mode" = auto ] || die "$1"
	say "SKIPPED: $1"
}

if bin=$(scripts/ensure-lint.sh "$1"); then
	"$bin" run ./...
else
	unavailable "golangci-lint $1 cannot be built here (no module proxy?)"
fi

if scripts/ensure-tools.sh lint; then
	# By name or by first line, so that a new script is never forgotten.
	scripts=()
	while IFS= read -r -d '' f; do
		case $f in
		*.sh) scripts+=("$f") ;;
		*) if head -c 64 "$f" | head -n 1 | tr -d '\0' | grep -qE '^#!.*[/ ](ba)?sh( |$)'; then scripts+=("$f"); fi ;;
		esac
	done < <(find . -path ./.git -prune -o -path ./build -prune -o -type f \
		! -name '*.go' ! -name '*.md' ! -name '*.yaml' ! -name '*.yml' -print0)
	shellcheck -x -P SCRIPTDIR "${scripts[@]}"
else
	unavailable "shellcheck cannot be installed here"
fi
