#!/usr/bin/env bash
# Builds an engine's image from the packages of this machine's own Debian mirror, for where
# no registry can be reached. An image follows the conventions of the engine's official one,
# so that the same configuration works with both.
#   build.sh ENGINE [TAG]      build it unless the image named TAG is this content already
#   build.sh --content ENGINE  print the hash of what would be built
#
# A recipe is a directory with
#   recipe.sh      TAG, STOP_SIGNAL, and change (VERSION): what `docker commit -c` is given
#   install.sh     run in a container of Debian: packages, users, directories
#   entrypoint.sh  becomes docker-entrypoint.sh
#
# Three layers: Debian, shared by all; the engine, kept as dbsupervisor/ENGINE-packages:<hash>;
# and the entry point, a second.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../../scripts/lib.sh
. "$here/../../scripts/lib.sh"
export PATH=$PATH:/usr/sbin:/sbin

only_hash=
if [ "${1-}" = --content ]; then
	only_hash=1
	shift
fi
engine=${1:?which engine}
[ -e "$here/$engine/recipe.sh" ] || die "no recipe for $engine"
# shellcheck source=postgres/recipe.sh
. "$here/$engine/recipe.sh"
TAG=${2:-$TAG}

debian=$("$here/debian.sh" --name)
packages=dbsupervisor/$engine-packages:$(cat "$here/$engine/install.sh" "$here/inside.sh" <(echo "$debian") | sha256sum | cut -c1-16)
content=$(cat "$here/$engine/recipe.sh" "$here/$engine/entrypoint.sh" "$here/build.sh" <(echo "$packages") | sha256sum | cut -c1-16)
if [ -n "$only_hash" ]; then
	echo "$content"
	exit 0
fi

label() { docker image inspect -f '{{index .Config.Labels "dbsupervisor.content"}}' "$1" 2>/dev/null || true; }

only_one images
[ "$(label "$TAG")" != "$content" ] || exit 0

stage=$(mktemp -d "${TMPDIR:-/var/tmp}/dbsupervisor-image.XXXXXX")
container=
# shellcheck disable=SC2329
cleanup() {
	[ -z "$container" ] || docker rm -f "$container" >/dev/null 2>&1 || true
	rm -rf "$stage"
}
trap cleanup EXIT

if ! docker image inspect "$packages" >/dev/null 2>&1; then
	"$here/debian.sh" >/dev/null
	say "building the image of $engine from Debian packages"
	install -m 0755 "$here/inside.sh" "$stage/inside.sh"
	install -m 0644 "$here/$engine/install.sh" "$stage/install.sh"
	apt-config dump | grep -E '^Acquire::' >"$stage/apt.conf" || true
	install -m 0600 "$([ -f /etc/apt/auth.conf ] && echo /etc/apt/auth.conf || echo /dev/null)" "$stage/auth.conf"
	# The machine's own network: that is how its mirror can be reached.
	container=$(docker create --network host -v "$stage:/mnt:ro" "$debian" /bin/bash /mnt/inside.sh)
	docker start -a "$container" >"$stage/log" 2>&1 9>&- || {
		tail -n 30 "$stage/log" >&2
		die "installing $engine failed"
	}
	docker cp "$container:/etc/dbsupervisor-version" "$stage/version" >/dev/null
	docker commit -m "Debian with $engine" -c "LABEL dbsupervisor.version=$(cat "$stage/version")" "$container" "$packages" >/dev/null
	docker rm -f "$container" >/dev/null
	container=
fi

version=$(docker image inspect -f '{{index .Config.Labels "dbsupervisor.version"}}' "$packages")
# Not `docker build`: the classic builder is leaving the client, the new one is an extra
# package, and neither is needed for one file.
# The stop signal is taken over from the container: commit has no change for it.
container=$(docker create --stop-signal "$STOP_SIGNAL" "$packages" true)
install -m 0755 "$here/$engine/entrypoint.sh" "$stage/docker-entrypoint.sh"
docker cp "$stage/docker-entrypoint.sh" "$container:/usr/local/bin/docker-entrypoint.sh" >/dev/null
old=$(docker image inspect -f '{{.Id}}' "$TAG" 2>/dev/null || true)
args=()
while IFS= read -r line; do args+=(-c "$line"); done < <(change "$version")
docker commit "${args[@]}" -c 'ENTRYPOINT ["docker-entrypoint.sh"]' \
	-c "LABEL dbsupervisor.content=$content" "$container" "$TAG" >/dev/null
# What the name pointed to before; stays while a container uses it.
if [ -n "$old" ]; then docker rmi "$old" >/dev/null 2>&1 || true; fi
