#!/usr/bin/env bash
# Makes sure that the image dbsupervisor/postgres:15 is here: one that is present, else the
# official image if a registry can be reached, else one built from Debian packages.
#   IMAGE_SOURCE=auto|pull|build   what to try (default auto)
#   OFFICIAL_IMAGE=postgres:15     what to look for and pull
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../../../scripts/lib.sh
. "$here/../../../scripts/lib.sh"

TAG=dbsupervisor/postgres:15
OFFICIAL=${OFFICIAL_IMAGE:-postgres:15}
source=${IMAGE_SOURCE:-auto}

present() { docker image inspect "$1" >/dev/null 2>&1; }
label() { docker image inspect -f '{{index .Config.Labels "dbsupervisor.content"}}' "$1" 2>/dev/null || true; }

case $source in auto | pull | build) ;; *) die "IMAGE_SOURCE must be auto, pull or build" ;; esac

if [ "$source" != build ]; then
	# Ours, up to date; or somebody else's under this name, which we leave alone.
	if present "$TAG"; then
		content=$(label "$TAG")
		if [ -z "$content" ] || [ "$content" = "$("$here/build.sh" --content)" ]; then exit 0; fi
	elif present "$OFFICIAL"; then
		say "using $OFFICIAL, which is present"
		docker tag "$OFFICIAL" "$TAG"
		exit 0
	# A registry that drops packets must not hold everything up: no progress for this long
	# and we build. A name that does not resolve fails at once.
	elif timeout "${PULL_TIMEOUT:-180}" docker pull -q "$OFFICIAL" >/dev/null 2>&1; then
		say "pulled $OFFICIAL"
		docker tag "$OFFICIAL" "$TAG"
		exit 0
	elif [ "$source" = pull ]; then
		die "cannot pull $OFFICIAL"
	fi
fi
exec "$here/build.sh" "$TAG"
