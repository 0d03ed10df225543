# shellcheck shell=bash disable=SC2034
# MariaDB, by the conventions of the official image.
TAG=dbsupervisor/mariadb:10
STOP_SIGNAL=SIGTERM

change() {
	echo 'ENV LANG=C.UTF-8'
	echo 'CMD ["mariadbd"]'
	echo 'EXPOSE 3306'
	echo 'VOLUME /var/lib/mysql'
}
