#!/usr/bin/env bash
# The entry point, with the conventions of the official PostgreSQL image:
#   PGDATA                    the data directory; a cluster is made in it when it is empty
#   POSTGRES_PASSWORD         required then, or POSTGRES_PASSWORD_FILE,
#                             or POSTGRES_HOST_AUTH_METHOD=trust
#   POSTGRES_USER             the superuser (default postgres)
#   POSTGRES_DB               a database to create (default: as the user)
#   POSTGRES_INITDB_ARGS      further arguments of initdb
#   /docker-entrypoint-initdb.d/*.sh, *.sql, *.sql.gz   run once, in order
# Data checksums are on unless POSTGRES_INITDB_ARGS has --no-data-checksums.
set -Eeuo pipefail

die() { echo "entrypoint: $*" >&2; exit 1; }

# from_file NAME [DEFAULT]: sets NAME from NAME_FILE, for secrets that are mounted.
from_file() {
	local name=$1 file=$1_FILE value=${2-}
	if [ -n "${!name-}" ] && [ -n "${!file-}" ]; then die "$name and $file are both set: set one"; fi
	if [ -n "${!name-}" ]; then
		value=${!name}
	elif [ -n "${!file-}" ]; then
		value=$(<"${!file}") || die "cannot read $file"
	fi
	export "$name=$value"
	unset "$file"
}

# A first argument that is an option belongs to the server.
if [ $# -eq 0 ] || [ "${1:0:1}" = - ]; then set -- postgres "$@"; fi
if [ "$1" != postgres ]; then exec "$@"; fi

# Asking for help or the version needs no data.
for arg in "$@"; do
	case $arg in -'?' | --help | --describe-config | -V | --version) exec "$@" ;; esac
done

export PGDATA=${PGDATA:-/var/lib/postgresql/data}

if [ "$(id -u)" = 0 ]; then
	# The volume may belong to anybody on a fresh disk; what a snapshot restored already
	# has its owner, and walking a large tree at each start would cost time.
	mkdir -p "$PGDATA" /run/postgresql
	if [ "$(stat -c %U "$PGDATA")" != postgres ]; then
		find "$PGDATA" \! -user postgres -exec chown postgres:postgres '{}' +
	fi
	chmod 0700 "$PGDATA"
	chown postgres:postgres /run/postgresql
	chmod 3775 /run/postgresql
	# The server refuses to run as root, and exec keeps this the process that gets signals.
	exec setpriv --reuid=postgres --regid=postgres --init-groups --inh-caps=-all \
		env HOME=/var/lib/postgresql USER=postgres "${BASH_SOURCE[0]}" "$@"
fi

# A cluster is made in PGDATA/.init and moved up, PG_VERSION last: a container that is
# killed on the way leaves something that the next start throws away, never a half-made
# cluster that looks like one.
new=$PGDATA/.init
if [ ! -s "$PGDATA/PG_VERSION" ] && [ -d "$new" ]; then
	echo "entrypoint: making the cluster was interrupted, starting over" >&2
	find "$PGDATA" -mindepth 1 -maxdepth 1 \! -name .init -exec rm -rf '{}' +
	rm -rf "$new"
fi

# Killed between the last two steps.
if [ -d "$new" ]; then rmdir "$new"; fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
	found=$(find "$PGDATA" -mindepth 1 -maxdepth 1 \! -name lost+found -print -quit)
	[ -z "$found" ] || die "$PGDATA has no PG_VERSION but is not empty ($found): refusing to make a cluster there"
	from_file POSTGRES_PASSWORD
	from_file POSTGRES_USER postgres
	from_file POSTGRES_DB "$POSTGRES_USER"
	from_file POSTGRES_INITDB_ARGS
	method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
	if [ -z "$POSTGRES_PASSWORD" ] && [ "$method" != trust ]; then
		die "set POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE (or POSTGRES_HOST_AUTH_METHOD=trust)"
	fi

	args=(--username="$POSTGRES_USER")
	case " $POSTGRES_INITDB_ARGS " in
	*' --no-data-checksums '*) POSTGRES_INITDB_ARGS=${POSTGRES_INITDB_ARGS//--no-data-checksums/} ;;
	*) args+=(--data-checksums) ;;
	esac
	# As in the official image the arguments are a line of shell words.
	declare -a more
	eval "more=($POSTGRES_INITDB_ARGS)"
	mkdir -m 0700 "$new"
	initdb -D "$new" "${args[@]}" "${more[@]}" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD")
	printf '\nhost all all all %s\n' "$method" >>"$new/pg_hba.conf"

	# Scripts see a server that nobody else can reach.
	export PGPASSWORD=$POSTGRES_PASSWORD
	query() { psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc -U "$POSTGRES_USER" "$@"; }
	pg_ctl -D "$new" -w -o "-c listen_addresses='' -p 5432" start
	if [ "$POSTGRES_DB" != postgres ]; then
		query -d postgres -v db="$POSTGRES_DB" <<<'CREATE DATABASE :"db";'
	fi
	for f in /docker-entrypoint-initdb.d/*; do
		case $f in
		*.sh)
			if [ -x "$f" ]; then "$f"; else
				# shellcheck disable=SC1090
				. "$f"
			fi
			;;
		*.sql) query -d "$POSTGRES_DB" -f "$f" ;;
		*.sql.gz) gunzip -c "$f" | query -d "$POSTGRES_DB" ;;
		esac
	done
	pg_ctl -D "$new" -m fast -w stop
	unset PGPASSWORD

	find "$new" -mindepth 1 -maxdepth 1 \! -name PG_VERSION -exec mv -t "$PGDATA" '{}' +
	sync -f "$PGDATA"
	mv "$new/PG_VERSION" "$PGDATA/PG_VERSION"
	rmdir "$new"
	sync -f "$PGDATA"
	echo "entrypoint: the cluster is made" >&2
fi
unset POSTGRES_PASSWORD

exec "$@"
