# shellcheck shell=bash disable=SC2034
# Redis, by the conventions of the official image.
TAG=dbsupervisor/redis:7
STOP_SIGNAL=SIGTERM

change() {
	echo 'CMD ["redis-server"]'
	echo 'WORKDIR /data'
	echo 'EXPOSE 6379'
	echo 'VOLUME /data'
}
