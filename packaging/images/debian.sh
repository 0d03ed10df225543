#!/usr/bin/env bash
# Makes sure that the image that all engines' images are built on is here, Debian without
# documentation and translations, and prints its name. Half a minute when it is not.
# The release is this machine's own, so that its mirror surely has it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../../scripts/lib.sh
. "$here/../../scripts/lib.sh"
export PATH=$PATH:/usr/sbin:/sbin

codename=$(. /etc/os-release && if [ "${ID-}" = debian ]; then echo "${VERSION_CODENAME-}"; fi)
: "${codename:=bookworm}"
arch=$(dpkg --print-architecture 2>/dev/null || uname -m)
# The packages' versions are not part of the hash: to get newer ones remove the image.
image=dbsupervisor/debian:$(cat "$0" <(echo "$codename $arch") | sha256sum | cut -c1-16)

[ "${1-}" = --name ] && { echo "$image"; exit 0; }
if docker image inspect "$image" >/dev/null 2>&1; then echo "$image"; exit 0; fi
need_root "build an image with debootstrap"
have debootstrap || apt_install debootstrap
mirror=$("$here/mirror.sh" "$codename")
say "building the image of Debian $codename that the others stand on"
work=$(mktemp -d "${TMPDIR:-/var/tmp}/dbsupervisor-image.XXXXXX")
# One file system, so that nothing mounted inside by a failed run is ever emptied.
trap 'umount -q "$work/root/proc" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT
root=$work/root

for try in 1 2 3; do
	if LC_ALL=C.UTF-8 debootstrap --variant=minbase --arch="$arch" "$codename" "$root" "$mirror" >"$work/log" 2>&1; then break; fi
	if [ "$try" = 3 ]; then
		tail -n 30 "$work/log" >&2
		die "debootstrap failed"
	fi
	rm -rf --one-file-system "$root"
	sleep $((try * 5))
done

# Nothing may start while packages are installed.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 0755 "$root/usr/sbin/policy-rc.d"
cat >"$root/etc/dpkg/dpkg.cfg.d/trim" <<'END'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
END
{
	echo "deb $mirror $codename main"
	for suite in "$codename-updates" "$codename-security"; do
		if uri=$("$here/mirror.sh" "$suite" 2>/dev/null); then echo "deb $uri $suite main"; fi
	done
} >"$root/etc/apt/sources.list"
rm -rf "$root"/usr/share/{doc,man,info,locale}/* "$root"/var/cache/apt/* "$root"/var/cache/debconf/*-old \
	"$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/etc/{resolv.conf,hosts,hostname,machine-id} "$root"/tmp/*
mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
tar -C "$root" --numeric-owner -c . | docker import -m "Debian $codename" - "$image" >/dev/null
echo "$image"
