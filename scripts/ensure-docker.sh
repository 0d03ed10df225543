#!/usr/bin/env bash
# Makes sure that a Docker engine answers: installs Debian's where there is none, starts it
# with or without systemd, and waits for it. Says nothing when one answers already.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
export PATH=$PATH:/usr/sbin:/sbin

LOG=${DBSUPERVISOR_DOCKERD_LOG:-/var/log/dbsupervisor-dockerd.log}

answers() { timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# wait_for SECONDS [PID]: until it answers; gives up early when PID has ended.
wait_for() {
	local end=$((SECONDS + $1))
	while [ $SECONDS -lt $end ]; do
		answers && return 0
		[ -z "${2-}" ] || kill -0 "$2" 2>/dev/null || return 1
		sleep 0.3
	done
	return 1
}

if have docker && answers; then exit 0; fi
[ -z "${DOCKER_HOST-}" ] || die "DOCKER_HOST=$DOCKER_HOST does not answer; fix or unset it"
need_root "install and start a Docker engine"
only_one docker
if have docker && answers; then exit 0; fi

if ! have dockerd; then
	# iptables: dockerd's own networking calls it; it is only recommended by docker.io.
	apt_install docker.io iptables ca-certificates
fi
# Since Debian 13 the client is a package of its own.
have docker || apt_install docker-cli

if [ -d /run/systemd/system ]; then
	systemctl start docker.service || true
	if wait_for 60; then exit 0; fi
	journalctl -u docker.service -n 20 --no-pager >&2 || true
	die "docker.service was started but does not answer"
fi

# Another init may be starting it right now, or the package just has.
if pid=$(cat /run/docker.pid 2>/dev/null) && kill -0 "$pid" 2>/dev/null; then
	if wait_for 30 "$pid"; then exit 0; fi
fi

if ! mountpoint -q /sys/fs/cgroup; then
	mount -t cgroup2 cgroup2 /sys/fs/cgroup || die "cannot mount the cgroup file system"
fi

# try_dockerd ARGS...: starts a daemon that outlives this script.
try_dockerd() {
	rm -f /run/docker.pid
	printf '\n--- dockerd %s\n' "$*" >>"$LOG"
	# shellcheck disable=SC2016
	setsid -f sh -c 'echo $$ >"$0"; exec dockerd "$@"' /run/dbsupervisor-dockerd.pid "$@" \
		</dev/null >>"$LOG" 2>&1 9>&-
	local tries=50
	until [ -s /run/dbsupervisor-dockerd.pid ] || [ $((tries -= 1)) = 0 ]; do sleep 0.1; done
	wait_for 60 "$(cat /run/dbsupervisor-dockerd.pid)"
}

say "starting dockerd, log in $LOG"
rm -f /run/dbsupervisor-dockerd.pid
if try_dockerd; then exit 0; fi
if ! grep -qs storage-driver /etc/docker/daemon.json; then
	# The default overlay driver refuses some backing file systems, other overlays for one.
	for driver in fuse-overlayfs vfs; do
		[ $driver != fuse-overlayfs ] || apt_install fuse-overlayfs || continue
		say "dockerd did not start; trying the storage driver $driver"
		rm -f /run/dbsupervisor-dockerd.pid
		if try_dockerd --storage-driver "$driver"; then exit 0; fi
	done
fi
tail -n 30 "$LOG" >&2
die "dockerd does not start"
