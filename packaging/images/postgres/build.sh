#!/usr/bin/env bash
# Builds a PostgreSQL image from the packages of this machine's own Debian mirror, for where
# no registry can be reached. Follows the conventions of the official image, so that the
# same configuration works with both.
#   build.sh [TAG]      build it unless the image named TAG is this content already
#   build.sh --content  print the hash of what would be built
#
# Two layers: Debian with PostgreSQL, about a minute, kept as
# dbsupervisor/debian-postgres-base:<hash>; and the entry point on top, a second.
# The server is 15 where the Debian release has it; otherwise the release's own version, and
# the label dbsupervisor.postgres says so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../../../scripts/lib.sh
. "$here/../../../scripts/lib.sh"
export PATH=$PATH:/usr/sbin:/sbin

BASE=dbsupervisor/debian-postgres-base
TAG=dbsupervisor/postgres:15

# The release of this machine, so that its mirror surely has it.
codename=$(. /etc/os-release && if [ "${ID-}" = debian ]; then echo "${VERSION_CODENAME-}"; fi)
: "${codename:=bookworm}"
arch=$(dpkg --print-architecture 2>/dev/null || uname -m)
# The packages' versions are not part of the hash: to get newer ones remove the base image.
base=$(cat "$here/base.sh" <(echo "$codename $arch") | sha256sum | cut -c1-16)
content=$(cat "$here/entrypoint.sh" "$here/build.sh" <(echo "$base") | sha256sum | cut -c1-16)

case ${1-} in
--content)
	echo "$content"
	exit 0
	;;
-*) die "unknown option $1" ;;
?*) TAG=$1 ;;
esac

label() { docker image inspect -f '{{index .Config.Labels "dbsupervisor.content"}}' "$1" 2>/dev/null || true; }

need_root "build an image with debootstrap"
only_one postgres-image
[ "$(label "$TAG")" != "$content" ] || exit 0

if ! docker image inspect "$BASE:$base" >/dev/null 2>&1; then
	mirror=$("$here/mirror.sh" "$codename")
	have debootstrap || apt_install debootstrap
	say "building the image from the Debian packages of $codename (about a minute)"
	work=$(mktemp -d "${TMPDIR:-/var/tmp}/dbsupervisor-image.XXXXXX")
	# One file system, so that nothing mounted inside by a failed run is ever emptied.
	trap 'umount -q "$work/root/proc" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT
	{
		echo "deb $mirror $codename main"
		for suite in "$codename-updates" "$codename-security"; do
			if uri=$("$here/mirror.sh" "$suite" 2>/dev/null); then echo "deb $uri $suite main"; fi
		done
	} >"$work/sources.list"
	MIRROR=$mirror CODENAME=$codename ARCH=$arch SOURCES=$work/sources.list \
		"$here/base.sh" "$work/root" >"$work/log" 2>&1 || {
		tail -n 30 "$work/log" >&2
		die "building the base image failed"
	}
	version=$(cat "$work/root/etc/dbsupervisor-postgres-version")
	tar -C "$work/root" --numeric-owner -c . |
		docker import -m 'Debian with PostgreSQL' \
			-c "LABEL dbsupervisor.postgres=$version" \
			- "$BASE:$base" >/dev/null
fi

version=$(docker image inspect -f '{{index .Config.Labels "dbsupervisor.postgres"}}' "$BASE:$base")
# Not `docker build`: the classic builder is leaving the client, the new one is an extra
# package, and neither is needed for one file.
# The stop signal is taken over from the container: commit has no change for it.
container=$(docker create --stop-signal SIGINT "$BASE:$base" true)
drop_container() { docker rm -f "$container" >/dev/null 2>&1 || true; }
trap 'drop_container; [ -z "${work-}" ] || { umount -q "$work/root/proc" 2>/dev/null || true; rm -rf --one-file-system "$work"; }' EXIT
stage=$(mktemp -d)
install -m 0755 "$here/entrypoint.sh" "$stage/docker-entrypoint.sh"
docker cp -q "$stage/docker-entrypoint.sh" "$container:/usr/local/bin/docker-entrypoint.sh" 2>/dev/null ||
	docker cp "$stage/docker-entrypoint.sh" "$container:/usr/local/bin/docker-entrypoint.sh"
rm -rf "$stage"
old=$(docker image inspect -f '{{.Id}}' "$TAG" 2>/dev/null || true)
docker commit \
	-c "ENV PATH=/usr/lib/postgresql/$version/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
	-c "ENV LANG=C.UTF-8 PG_MAJOR=$version PGDATA=/var/lib/postgresql/data" \
	-c 'ENTRYPOINT ["docker-entrypoint.sh"]' \
	-c 'CMD ["postgres"]' \
	-c 'EXPOSE 5432' \
	-c 'VOLUME /var/lib/postgresql/data' \
	-c "LABEL dbsupervisor.content=$content" \
	"$container" "$TAG" >/dev/null
drop_container
# What the name pointed to before; stays while a container uses it.
if [ -n "$old" ]; then docker rmi "$old" >/dev/null 2>&1 || true; fi
