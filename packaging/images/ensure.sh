#!/usr/bin/env bash
# Makes sure that the engines' images are here: one that is present, else (of an engine whose
# recipe names an official image) that if a registry can be reached, else one built from
# Debian packages.
#   ensure.sh [ENGINE...]          default: all that have a recipe
#   IMAGE_SOURCE=auto|pull|build   what to try (default auto)
#   OFFICIAL_IMAGE=postgres:15     what to look for and pull instead of the recipe's
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../../scripts/lib.sh
. "$here/../../scripts/lib.sh"

source=${IMAGE_SOURCE:-auto}
case $source in auto | pull | build) ;; *) die "IMAGE_SOURCE must be auto, pull or build" ;; esac

present() { docker image inspect "$1" >/dev/null 2>&1; }
label() { docker image inspect -f '{{index .Config.Labels "dbsupervisor.content"}}' "$1" 2>/dev/null || true; }

# have_image ENGINE: true unless it must be built.
have_image() {
	local TAG OFFICIAL='' content
	# shellcheck source=postgres/recipe.sh
	. "$here/$1/recipe.sh"
	if [ "$source" = build ]; then return 1; fi
	# Ours, up to date; or somebody else's under this name, which we leave alone.
	if present "$TAG"; then
		content=$(label "$TAG")
		[ -z "$content" ] || [ "$content" = "$("$here/build.sh" --content "$1")" ]
		return
	fi
	[ -n "$OFFICIAL" ] || return 1
	if present "$OFFICIAL"; then
		say "using $OFFICIAL, which is present"
	# A registry that drops packets must not hold everything up: no progress for this long
	# and we build. A name that does not resolve fails at once.
	elif timeout "${PULL_TIMEOUT:-180}" docker pull -q "$OFFICIAL" >/dev/null 2>&1; then
		say "pulled $OFFICIAL"
	elif [ "$source" = pull ]; then
		die "cannot pull $OFFICIAL"
	else
		return 1
	fi
	docker tag "$OFFICIAL" "$TAG"
}

if [ $# = 0 ]; then
	for recipe in "$here"/*/recipe.sh; do
		set -- "$@" "$(basename "$(dirname "$recipe")")"
	done
fi
for engine; do
	have_image "$engine" || "$here/build.sh" "$engine"
done
