# shellcheck shell=bash
# The server without the JIT compiler with its 120 MB (PostgreSQL goes on without it).

# No cluster is wanted but the one of PGDATA.
mkdir -p /etc/postgresql-common
echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
cat >>/etc/dpkg/dpkg.cfg.d/trim <<'END'
path-exclude=/usr/lib/postgresql/*/lib/bitcode/*
path-exclude=/usr/lib/postgresql/*/lib/llvmjit*
END
# The user's numbers are those of the official image, so that either can take over the
# other's data directory.
groupadd -r -g 999 postgres
useradd -r -g postgres -u 999 -d /var/lib/postgresql -s /bin/bash postgres

version=15
apt-cache show "postgresql-$version" >/dev/null 2>&1 ||
	version=$(apt-cache depends postgresql | sed -nE 's/.*Depends: postgresql-([0-9]+)$/\1/p' | head -n 1)
apt install "postgresql-$version"
rm -rf /usr/lib/*/libLLVM* /usr/lib/llvm-*

for tool in postgres initdb pg_ctl psql pgbench pg_amcheck pg_checksums pg_isready; do
	[ -x "/usr/lib/postgresql/$version/bin/$tool" ] || { echo "$tool is missing" >&2; exit 1; }
done
sample=/usr/share/postgresql/$version/postgresql.conf.sample
sed -ri "s/^#?(listen_addresses)\s*=.*/\1 = '*'/" "$sample"
grep -q "^listen_addresses = '\*'" "$sample"
echo "$version" >/etc/dbsupervisor-version
install -d -o 999 -g 999 -m 0700 /var/lib/postgresql/data
install -d -o 999 -g 999 -m 3777 /run/postgresql
install -d -m 0755 /docker-entrypoint-initdb.d
