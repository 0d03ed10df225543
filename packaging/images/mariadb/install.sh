# shellcheck shell=bash
# The user's numbers are those of the official image.
groupadd -r -g 999 mysql
useradd -r -g mysql -u 999 -d /var/lib/mysql -s /usr/sbin/nologin mysql
apt install mariadb-server mariadb-client
version mariadb-server

for tool in mariadbd mariadb-install-db mariadb mariadb-check mariadb-dump mariadb-admin innochecksum; do
	command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
# All addresses, no look-up of clients' names, and no rotation of a log that is not kept.
sed -ri 's/^(bind-address|expire_logs_days|user)\s*=.*/#&/' /etc/mysql/mariadb.conf.d/50-server.cnf
printf '[mariadbd]\nbind-address=*\nskip-name-resolve\n' >/etc/mysql/mariadb.conf.d/60-container.cnf
# What the package has made there is another database.
rm -rf /var/lib/mysql /etc/mysql/debian.cnf
install -d -o mysql -g mysql -m 0750 /var/lib/mysql
install -d -o mysql -g mysql -m 0755 /run/mysqld
install -d -m 0755 /docker-entrypoint-initdb.d
