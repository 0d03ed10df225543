#!/usr/bin/env bash
# The entry point, with conventions of the official MariaDB image:
#   MARIADB_ROOT_PASSWORD, or MARIADB_ROOT_PASSWORD_FILE   required for a new database
#   MARIADB_DATABASE, MARIADB_USER, MARIADB_PASSWORD       made then, if set
# root on this machine's socket needs no password if it is root of the container.
set -Eeuo pipefail
die() { echo "entrypoint: $*" >&2; exit 1; }

if [ $# -eq 0 ] || [ "${1:0:1}" = - ]; then set -- mariadbd "$@"; fi
if [ "$1" != mariadbd ]; then exec "$@"; fi
data=/var/lib/mysql

if [ "$(id -u)" = 0 ]; then
	mkdir -p "$data" /run/mysqld
	if [ "$(stat -c %U "$data")" != mysql ]; then
		find "$data" \! -user mysql -exec chown mysql:mysql '{}' +
	fi
	chown mysql:mysql /run/mysqld
	exec setpriv --reuid=mysql --regid=mysql --init-groups --inh-caps=-all \
		env HOME="$data" USER=mysql "${BASH_SOURCE[0]}" "$@"
fi

# quoted TEXT: as an SQL string.
quoted() {
	local s=${1//\\/\\\\}
	printf "'%s'" "${s//\'/\'\'}"
}

# A database is made in .init and moved up, the directory "mysql" last: a container that is
# killed on the way leaves something that the next start throws away.
new=$data/.init
if [ ! -d "$data/mysql" ] && [ -d "$new" ]; then
	echo "entrypoint: making the database was interrupted, starting over" >&2
	find "$data" -mindepth 1 -maxdepth 1 \! -name .init -exec rm -rf '{}' +
	rm -rf "$new"
fi
if [ -d "$new" ]; then rmdir "$new"; fi
if [ ! -d "$data/mysql" ]; then
	found=$(find "$data" -mindepth 1 -maxdepth 1 \! -name lost+found -print -quit)
	[ -z "$found" ] || die "$data is not empty ($found) and has no database: refusing to make one there"
	password=${MARIADB_ROOT_PASSWORD-}
	if [ -n "${MARIADB_ROOT_PASSWORD_FILE-}" ]; then password=$(<"$MARIADB_ROOT_PASSWORD_FILE"); fi
	[ -n "$password" ] || die "set MARIADB_ROOT_PASSWORD or MARIADB_ROOT_PASSWORD_FILE"
	mkdir -m 0700 "$new"
	mariadb-install-db --no-defaults --datadir="$new" --skip-test-db --auth-root-authentication-method=normal >/dev/null
	{
		# One statement a line. The accounts of other hosts have no password.
		echo "DELETE FROM mysql.global_priv WHERE Host <> 'localhost';"
		echo "DELETE FROM mysql.proxies_priv WHERE Host <> 'localhost';"
		echo 'FLUSH PRIVILEGES;'
		echo "ALTER USER root@localhost IDENTIFIED VIA unix_socket OR mysql_native_password USING PASSWORD($(quoted "$password"));"
		echo "CREATE USER root@'%' IDENTIFIED BY $(quoted "$password");"
		echo "GRANT ALL ON *.* TO root@'%' WITH GRANT OPTION;"
		if [ -n "${MARIADB_DATABASE-}" ]; then
			db=\`${MARIADB_DATABASE//\`/\`\`}\`
			echo "CREATE DATABASE $db;"
			if [ -n "${MARIADB_USER-}" ]; then
				echo "CREATE USER $(quoted "$MARIADB_USER")@'%' IDENTIFIED BY $(quoted "${MARIADB_PASSWORD-}");"
				echo "GRANT ALL ON $db.* TO $(quoted "$MARIADB_USER")@'%';"
			fi
		fi
	} | mariadbd --no-defaults --bootstrap --datadir="$new"
	find "$new" -mindepth 1 -maxdepth 1 \! -name mysql -exec mv -t "$data" '{}' +
	sync -f "$data"
	mv "$new/mysql" "$data/mysql"
	rmdir "$new"
	sync -f "$data"
	echo "entrypoint: the database is made" >&2
fi
exec "$@"
