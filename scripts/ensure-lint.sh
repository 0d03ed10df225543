#!/usr/bin/env bash
# Prints the path of golangci-lint VERSION; builds it into build/bin when it is not there.
#   ensure-lint.sh VERSION
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$(dirname "$0")/.."
version=$1

is_it() { [ -x "$1" ] && "$1" version 2>/dev/null | grep -q "version ${version#v} "; }

for bin in "$PWD/build/bin/golangci-lint" "$(command -v golangci-lint || true)" "$(go env GOPATH)/bin/golangci-lint"; do
	if is_it "$bin"; then
		echo "$bin"
		exit 0
	fi
done
say "building golangci-lint $version (some minutes, once)"
mkdir -p build/bin
# GOFLAGS are those of this checkout, not of the tool.
GOFLAGS='' GOBIN=$PWD/build/bin go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version" >&2
echo "$PWD/build/bin/golangci-lint"
