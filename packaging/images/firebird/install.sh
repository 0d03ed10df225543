# shellcheck shell=bash
# A number that stays, so that any build can take over another one's data.
groupadd -r -g 999 firebird
useradd -r -g firebird -u 999 -d /var/lib/firebird -s /usr/sbin/nologin firebird
apt install firebird3.0-server firebird3.0-utils
version firebird3.0-server
for tool in firebird isql-fb gfix fbsvcmgr gsec; do
	command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
data=/var/lib/firebird/data
install -d -o firebird -g firebird -m 0750 "$data" /var/lib/firebird/new /tmp/firebird
conf=/etc/firebird/3.0
# The password database lies with the others, so that accounts move with them.
sed -ri 's/^(RemoteBindAddress|DatabaseAccess|SecurityDatabase)\s*=.*/#&/' "$conf/firebird.conf"
printf 'DatabaseAccess = Restrict %s\nSecurityDatabase = %s/security3.fdb\n' "$data" "$data" >>"$conf/firebird.conf"
grep -q '^security.db' "$conf/databases.conf"
sed -ri "s|^security.db\s*=.*|security.db = $data/security3.fdb|" "$conf/databases.conf"
mv /var/lib/firebird/3.0/system/security3.fdb /usr/share/firebird/3.0/security3.fdb
chmod 0644 /usr/share/firebird/3.0/security3.fdb
