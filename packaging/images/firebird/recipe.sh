# shellcheck shell=bash disable=SC2034
# Firebird 3, with the conventions of the project's own image.
TAG=dbsupervisor/firebird:3
STOP_SIGNAL=SIGTERM

change() {
	echo 'ENV LANG=C.UTF-8'
	echo 'CMD ["firebird"]'
	echo 'EXPOSE 3050'
	echo 'VOLUME /var/lib/firebird/data'
}
