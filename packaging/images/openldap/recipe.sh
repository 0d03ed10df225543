# shellcheck shell=bash disable=SC2034
# OpenLDAP with LMDB. There is no official image; the conventions are this one's own.
TAG=dbsupervisor/openldap:2
STOP_SIGNAL=SIGTERM

change() {
	echo 'CMD ["slapd"]'
	echo 'EXPOSE 389'
	echo 'VOLUME /var/lib/ldap'
}
