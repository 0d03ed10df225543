#!/usr/bin/env bash
# The entry point, with conventions of the Firebird project's image:
#   FIREBIRD_ROOT_PASSWORD   of SYSDBA; required for a new volume
#   FIREBIRD_DATABASE        a database to create in /var/lib/firebird/data then
# Accounts are kept in the volume too (security3.fdb), so they are where the data is.
set -Eeuo pipefail
die() { echo "entrypoint: $*" >&2; exit 1; }
if [ $# -eq 0 ]; then set -- firebird; fi
if [ "$1" != firebird ]; then exec "$@"; fi
data=/var/lib/firebird/data
if [ "$(id -u)" = 0 ]; then
	mkdir -p "$data"
	if [ "$(stat -c %U "$data")" != firebird ]; then
		find "$data" \! -user firebird -exec chown firebird:firebird '{}' +
	fi
	install -d -o firebird -g firebird -m 0770 /tmp/firebird /run/firebird3.0
	exec setpriv --reuid=firebird --regid=firebird --init-groups --inh-caps=-all "${BASH_SOURCE[0]}" "$@"
fi

# create FILE [SQL]: a database that is whole or not there.
create() {
	[ ! -e "$1" ] || return 0
	rm -f "$1.new"
	printf "create database '%s.new' page_size 8192 default character set UTF8;\n%s\n" "$1" "${2-}" | isql-fb -q -b -user SYSDBA
	sync -f "$data"
	mv "$1.new" "$1"
}
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

if [ ! -e "$data/security3.fdb" ]; then
	[ -n "${FIREBIRD_ROOT_PASSWORD-}" ] || die "set FIREBIRD_ROOT_PASSWORD"
	cp /usr/share/firebird/3.0/security3.fdb "$data/security3.fdb.new"
	sync -f "$data"
	mv "$data/security3.fdb.new" "$data/security3.fdb"
fi
# Again at each start until it is done: a start may be killed.
if [ -n "${FIREBIRD_ROOT_PASSWORD-}" ] && [ ! -e "$data/.accounts" ]; then
	printf 'create or alter user SYSDBA password %s using plugin Srp;\ncommit;\n' "$(quoted "$FIREBIRD_ROOT_PASSWORD")" |
		isql-fb -q -b -user SYSDBA security.db
	touch "$data/.accounts"
fi
if [ -n "${FIREBIRD_DATABASE-}" ]; then
	case $FIREBIRD_DATABASE in
	*/*) die "FIREBIRD_DATABASE is a name, not a path" ;;
	esac
	create "$data/$FIREBIRD_DATABASE"
fi
exec "$@"
