# shellcheck shell=bash disable=SC2034
# PostgreSQL: 15 where the Debian release has it, otherwise the release's own version.
TAG=dbsupervisor/postgres:15
OFFICIAL=${OFFICIAL_IMAGE:-postgres:15}
STOP_SIGNAL=SIGINT

change() {
	echo "ENV PATH=/usr/lib/postgresql/$1/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	echo "ENV LANG=C.UTF-8 PG_MAJOR=$1 PGDATA=/var/lib/postgresql/data"
	echo 'CMD ["postgres"]'
	echo 'EXPOSE 5432'
	echo 'VOLUME /var/lib/postgresql/data'
}
