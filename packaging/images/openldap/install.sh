# shellcheck shell=bash
groupadd -r -g 999 openldap
useradd -r -g openldap -u 999 -d /var/lib/ldap -s /usr/sbin/nologin openldap
# No directory is wanted but the one that the entry point makes.
echo 'slapd slapd/no_configuration boolean true' | debconf-set-selections
apt install slapd ldap-utils lmdb-utils
version slapd
for tool in slapd slapadd slapcat slapschema slappasswd ldapmodify ldapsearch mdb_copy mdb_stat; do
	command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
rm -rf /var/lib/ldap /etc/ldap/slapd.d
install -d -o openldap -g openldap -m 0750 /var/lib/ldap
install -d -o openldap -g openldap -m 0755 /run/slapd
