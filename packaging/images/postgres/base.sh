#!/usr/bin/env bash
# Fills the directory given with Debian and a PostgreSQL server, without documentation,
# translations, and the JIT compiler with its 120 MB (PostgreSQL goes on without it).
# Called by build.sh with MIRROR, CODENAME, ARCH and SOURCES.
set -euo pipefail
root=$1
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

for try in 1 2 3; do
	if debootstrap --variant=minbase --arch="$ARCH" "$CODENAME" "$root" "$MIRROR"; then break; fi
	[ "$try" != 3 ] || exit 1
	rm -rf --one-file-system "$root"
	sleep $((try * 5))
done

inside() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
	DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 "$@"; }

# Nothing may start in here, and no cluster is wanted but the one of PGDATA.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 0755 "$root/usr/sbin/policy-rc.d"
mkdir -p "$root/etc/postgresql-common"
echo 'create_main_cluster = false' >"$root/etc/postgresql-common/createcluster.conf"
cat >"$root/etc/dpkg/dpkg.cfg.d/trim" <<'END'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/lib/postgresql/*/lib/bitcode/*
path-exclude=/usr/lib/postgresql/*/lib/llvmjit*
END
cp "$SOURCES" "$root/etc/apt/sources.list"
# How this machine reaches its mirror: proxies and the like, for as long as the build runs.
mkdir -p "$root/etc/apt/apt.conf.d"
apt-config dump | grep -E '^Acquire::' >"$root/etc/apt/apt.conf.d/99build" || true
mkdir -p "$root/etc/apt/auth.conf.d"
if [ -f /etc/apt/auth.conf ]; then cp /etc/apt/auth.conf "$root/etc/apt/auth.conf.d/99build.conf"; fi
cp /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null || true
cp /etc/hosts "$root/etc/hosts" 2>/dev/null || true

# The user's numbers are those of the official image, so that either can take over the
# other's data directory.
inside groupadd -r -g 999 postgres
inside useradd -r -g postgres -u 999 -d /var/lib/postgresql -s /bin/bash postgres

mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT
apt() { inside apt-get -q -y --no-install-recommends -o Acquire::Retries=5 "$@"; }
apt update
version=15
inside apt-cache show "postgresql-$version" >/dev/null 2>&1 ||
	version=$(inside apt-cache depends postgresql | sed -nE 's/.*Depends: postgresql-([0-9]+)$/\1/p' | head -n 1)
apt install "postgresql-$version"
umount "$root/proc"
trap - EXIT

bin=/usr/lib/postgresql/$version/bin
for tool in postgres initdb pg_ctl psql pgbench pg_amcheck pg_checksums pg_isready; do
	[ -x "$root$bin/$tool" ] || { echo "$tool is missing" >&2; exit 1; }
done

sample=$root/usr/share/postgresql/$version/postgresql.conf.sample
sed -ri "s/^#?(listen_addresses)\s*=.*/\1 = '*'/" "$sample"
grep -q "^listen_addresses = '\*'" "$sample"
echo "$version" >"$root/etc/dbsupervisor-postgres-version"
install -d -o 999 -g 999 -m 0700 "$root/var/lib/postgresql/data"
install -d -o 999 -g 999 -m 3777 "$root/run/postgresql"
install -d -m 0755 "$root/docker-entrypoint-initdb.d"

rm -rf "$root"/usr/share/{doc,man,info,locale}/* "$root"/usr/lib/*/libLLVM* "$root"/usr/lib/llvm-* \
	"$root"/var/cache/apt/* "$root"/var/cache/debconf/*-old "$root"/var/lib/apt/lists/* \
	"$root"/var/log/* "$root"/etc/apt/apt.conf.d/99build "$root"/etc/apt/auth.conf.d/99build.conf \
	"$root"/etc/apt/sources.list "$root"/etc/resolv.conf "$root"/etc/hosts \
	"$root"/etc/hostname "$root"/etc/machine-id "$root"/tmp/* "$root"/usr/sbin/policy-rc.d
mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
