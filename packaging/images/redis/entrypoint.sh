#!/bin/sh
# As in the official image: options are the server's, which runs as redis in /data.
set -eu
case ${1-} in '' | -* | *.conf) set -- redis-server "$@" ;; esac
if [ "$1" = redis-server ] && [ "$(id -u)" = 0 ]; then
	find . \! -user redis -exec chown redis '{}' +
	exec setpriv --reuid=redis --regid=redis --init-groups --inh-caps=-all "$0" "$@"
fi
umask 0077
exec "$@"
