#!/usr/bin/env bash
# The entry point:
#   LDAP_SUFFIX            what the directory holds, such as dc=example,dc=com
#   LDAP_ADMIN_PASSWORD    of cn=admin below it
#   LDAP_SIZE              bytes that the data may grow to (default 1 GiB)
#   LDAP_READ_ONLY=1       refuse all changes
# The data lies in /var/lib/ldap, in one file that the server stores into through a shared
# mapping (LMDB's writemap). The configuration is made anew at each start and has no database
# of its own, so no client can change it.
set -Eeuo pipefail
die() { echo "entrypoint: $*" >&2; exit 1; }
if [ $# -eq 0 ] || [ "${1:0:1}" = - ]; then set -- slapd "$@"; fi
if [ "$1" != slapd ]; then exec "$@"; fi
data=/var/lib/ldap
suffix=${LDAP_SUFFIX:?such as dc=example,dc=com}
[ -n "${LDAP_ADMIN_PASSWORD-}" ] || die "set LDAP_ADMIN_PASSWORD"
case $suffix in dc=*) ;; *) die "LDAP_SUFFIX must begin with dc=" ;; esac
if [ "$(stat -c %U "$data")" != openldap ]; then
	find "$data" \! -user openldap -exec chown openldap:openldap '{}' +
fi
conf=/etc/ldap/slapd.conf
umask 0027
{
	for schema in core cosine inetorgperson nis; do echo "include /etc/ldap/schema/$schema.schema"; done
	echo 'modulepath /usr/lib/ldap'
	echo 'moduleload back_mdb'
	echo 'pidfile /run/slapd/slapd.pid'
	echo 'database mdb'
	echo "suffix \"$suffix\""
	echo "rootdn \"cn=admin,$suffix\""
	echo "rootpw $(printf %s "$LDAP_ADMIN_PASSWORD" | slappasswd -n -T /dev/stdin)"
	echo "directory $data"
	echo "maxsize ${LDAP_SIZE:-1073741824}"
	echo 'envflags writemap'
	echo 'index objectClass,cn eq'
	if [ "${LDAP_READ_ONLY-}" = 1 ]; then echo 'readonly on'; fi
} >"$conf"
chgrp openldap "$conf"
if [ ! -e "$data/data.mdb" ]; then
	# In a transaction, so a start that is killed here leaves it all or nothing; the file
	# without it is made anew.
	rm -rf "$data/new"
	install -d -o openldap -g openldap -m 0750 "$data/new"
	sed "s|^directory .*|directory $data/new|" "$conf" >"$conf.new"
	first=${suffix%%,*}
	printf 'dn: %s\nobjectClass: dcObject\nobjectClass: organization\ndc: %s\no: %s\n' "$suffix" "${first#dc=}" "${first#dc=}" |
		slapadd -f "$conf.new" >/dev/null
	chown openldap:openldap "$data/new"/*
	sync -f "$data"
	mv "$data/new/data.mdb" "$data/data.mdb"
	rm -rf "$data/new" "$conf.new"
fi
ulimit -n 4096 # it sizes tables by the limit
exec "$@" -d 0 -u openldap -g openldap -f "$conf" -h "ldap:/// ldapi:///"
