#!/usr/bin/env bash
# Puts dbsupervisor on a Debian or Amazon Linux 2023 machine that has the shared directory
# mounted already. Meant for EC2 user data and for running by hand; running it again changes
# only what differs. It stops at the first step that fails and says which.
#
# What to install, one of:
#   DBSUPERVISOR_RELEASE         path, https:// or s3:// address of a release (make dist)
#   DBSUPERVISOR_RELEASE_SHA256  its checksum; required for https:// and s3://
#   (neither)                    the unpacked release or built checkout that this script is in
# The cluster:
#   DBSUPERVISOR_CLUSTER         its name; required
#   DBSUPERVISOR_CONFIG          a finished configuration file to install
# Without DBSUPERVISOR_CONFIG, and only where there is no configuration yet, one is written:
#   DBSUPERVISOR_SHARE           the cluster's directory on the share; required
#   DBSUPERVISOR_SHARE_MOUNT     the mount point above it (default: found out)
#   DBSUPERVISOR_INSTANCE        this machine's name (default: its host name)
#   DBSUPERVISOR_ZONE            its availability zone
#   DBSUPERVISOR_ENGINE          postgres (default) or generic
#   DBSUPERVISOR_IMAGE           the database's image; required
#   DBSUPERVISOR_ENV_FILE        file with the database's environment (passwords), mode 0600
#   DBSUPERVISOR_DIR             local disk for the volume (default /var/lib/dbsupervisor/NAME)
#   DBSUPERVISOR_INIT            once: the first machine makes the cluster (default: never)
#   DBSUPERVISOR_SCHEDULE        when to commit snapshots (default "@every 1m")
#   DBSUPERVISOR_START           no: enable, but don't start
# A file system of its own for the volume, made once (dbsupervisor volume create), one of:
#   DBSUPERVISOR_VOLUME_SIZE     in a file beside it, such as 20GiB
#   DBSUPERVISOR_VOLUME_DEVICE   on this empty block device
# and, if need be:
#   DBSUPERVISOR_VOLUME_FS       xfs (default: standbys refresh in clones) or ext4
#   DBSUPERVISOR_VOLUME_FILE     the file (default /var/lib/dbsupervisor/NAME.img)
set -Eeuo pipefail

STEP=begin
log() { printf '%s bootstrap: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" >&2; }
step() {
	STEP=$*
	log "$STEP"
}
fail() {
	log "FAILED at \"$STEP\": $*"
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

# Where everything goes, for tests.
ROOT=${DBSUPERVISOR_ROOT-}
here=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)

step "check the settings"
[ "$(id -u)" = 0 ] || fail "must be root"
cluster=${DBSUPERVISOR_CLUSTER-}
[[ $cluster =~ ^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$ ]] ||
	fail "DBSUPERVISOR_CLUSTER must be lower-case letters, digits and dashes, at most 32 (is \"$cluster\")"
config=$ROOT/etc/dbsupervisor/$cluster.yaml
write_config=no
if [ -n "${DBSUPERVISOR_CONFIG-}" ]; then
	[ -f "$DBSUPERVISOR_CONFIG" ] || fail "DBSUPERVISOR_CONFIG: no file $DBSUPERVISOR_CONFIG"
elif [ ! -e "$config" ]; then
	write_config=yes
	[ -n "${DBSUPERVISOR_SHARE-}" ] || fail "DBSUPERVISOR_SHARE is not set, and there is no $config"
	[ -n "${DBSUPERVISOR_IMAGE-}" ] || fail "DBSUPERVISOR_IMAGE is not set, and there is no $config"
	[ -d "$DBSUPERVISOR_SHARE" ] || fail "DBSUPERVISOR_SHARE: no directory $DBSUPERVISOR_SHARE; is the share mounted?"
	mount=${DBSUPERVISOR_SHARE_MOUNT:-$(stat -c %m "$DBSUPERVISOR_SHARE")}
	# An unmounted share is a directory of the root disk.
	[ "$mount" != / ] || fail "$DBSUPERVISOR_SHARE is on the root file system: mount the share first"
	mountpoint -q "$mount" || fail "$mount is not a mount point: mount the share first"
	if [ -n "${DBSUPERVISOR_ENV_FILE-}" ]; then
		[ -f "$DBSUPERVISOR_ENV_FILE" ] || fail "DBSUPERVISOR_ENV_FILE: no file $DBSUPERVISOR_ENV_FILE"
	fi
fi

volume_size=${DBSUPERVISOR_VOLUME_SIZE-} volume_device=${DBSUPERVISOR_VOLUME_DEVICE-}
volume_fs=${DBSUPERVISOR_VOLUME_FS:-xfs}
if [ -n "$volume_size" ] && [ -n "$volume_device" ]; then
	fail "set only one of DBSUPERVISOR_VOLUME_SIZE and DBSUPERVISOR_VOLUME_DEVICE"
fi
make_volume=no
if [ -n "$volume_size$volume_device" ]; then make_volume=yes; fi

# retry COMMAND...: a machine that has just booted may wait for its network or for another
# package run.
retry() {
	local n
	for n in 1 2 3 4 5; do
		if "$@"; then return 0; fi
		log "attempt $n of $1 failed"
		sleep $((n * ${DBSUPERVISOR_RETRY_SECONDS:-3}))
	done
	return 1
}

step "install Docker and nftables"
# shellcheck disable=SC1091
os=$(. "$ROOT/etc/os-release" && echo "${ID-} ${VERSION_ID-}")
case $os in
debian\ *)
	export DEBIAN_FRONTEND=noninteractive
	install_packages() {
		apt-get -q -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 update &&
			apt-get -q -y --no-install-recommends -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 install "$@"
	}
	packages=(docker.io iptables nftables ca-certificates curl)
	;;
amzn\ 2023*)
	install_packages() { dnf -q -y install "$@"; }
	# curl-minimal comes with the system and conflicts with curl.
	packages=(docker nftables tar gzip)
	;;
*) fail "this is \"$os\"; made for Debian and Amazon Linux 2023" ;;
esac
needed=(dockerd nft)
if [ $make_volume = yes ]; then
	needed+=("mkfs.$volume_fs")
	case $volume_fs in
	xfs) packages+=(xfsprogs) ;;
	ext4) packages+=(e2fsprogs) ;;
	*) fail "DBSUPERVISOR_VOLUME_FS must be xfs or ext4 (is \"$volume_fs\")" ;;
	esac
fi
missing=no
for name in "${needed[@]}"; do
	command -v "$name" >/dev/null || missing=yes
done
if [ $missing = no ]; then
	log "present already"
else
	retry install_packages "${packages[@]}" >&2 || fail "cannot install ${packages[*]}"
fi
systemctl enable --now docker.service >&2 || fail "cannot start docker.service; see: journalctl -u docker"

step "fetch the release"
src=
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
release=${DBSUPERVISOR_RELEASE-}
case $release in
'')
	# Unpacked releases have the script beside the binary, checkouts below userdata/.
	if [ -x "$here/dbsupervisor" ]; then
		src=$here
	elif [ -x "$here/../build/dbsupervisor" ]; then
		mkdir -p "$tmp/r"
		cp "$here/../build/dbsupervisor" "$tmp/r/"
		cp -r "$here/../packaging/systemd" "$tmp/r/systemd"
		src=$tmp/r
	else
		fail "no binary beside this script: set DBSUPERVISOR_RELEASE"
	fi
	;;
https://*) retry curl -fsSL --connect-timeout 10 -o "$tmp/release" "$release" || fail "cannot fetch $release" ;;
s3://*) retry aws s3 cp --only-show-errors "$release" "$tmp/release" >&2 || fail "cannot fetch $release" ;;
*) cp "$release" "$tmp/release" || fail "cannot read $release" ;;
esac
if [ -z "$src" ]; then
	sum=${DBSUPERVISOR_RELEASE_SHA256-}
	case $release in
	https://* | s3://*) [ -n "$sum" ] || fail "set DBSUPERVISOR_RELEASE_SHA256" ;;
	esac
	if [ -n "$sum" ]; then
		echo "$sum  $tmp/release" | sha256sum -c --quiet >&2 || fail "$release is not the release expected"
	fi
	mkdir "$tmp/r"
	tar -xzf "$tmp/release" -C "$tmp/r" --strip-components=1 || fail "$release is no release archive"
	src=$tmp/r
fi

# put SOURCE TARGET MODE: replaces TARGET in one step, only if it differs.
changed=no
put() {
	if cmp -s "$1" "$2"; then return 0; fi
	install -D -m "$3" "$1" "$2.new"
	mv -f "$2.new" "$2"
	log "installed $2"
	changed=yes
}

step "install the binary and the units"
put "$src/dbsupervisor" "$ROOT/usr/local/bin/dbsupervisor" 0755
for unit in "$src"/systemd/*.service "$src"/systemd/*.slice; do
	sed 's|@BINDIR@|/usr/local/bin|g; s|@SYSCONFDIR@|/etc|g' "$unit" >"$tmp/unit"
	put "$tmp/unit" "$ROOT/etc/systemd/system/$(basename "$unit")" 0644
done
put "$src/systemd/dbsupervisor.tmpfiles" "$ROOT/etc/tmpfiles.d/dbsupervisor.conf" 0644

if [ $make_volume = yes ]; then
	step "make the volume's file system"
	dir=${DBSUPERVISOR_DIR:-/var/lib/dbsupervisor/$cluster}
	if [ -n "$volume_device" ]; then
		on=(--device "$volume_device")
	else
		file=${DBSUPERVISOR_VOLUME_FILE:-/var/lib/dbsupervisor/$cluster.img}
		install -d -m 0755 "$ROOT$(dirname "$file")"
		on=(--file "$ROOT$file" --size "$volume_size")
	fi
	# Once it is made, this only sees to it that it is mounted; what holds data is refused.
	"$ROOT/usr/local/bin/dbsupervisor" volume create "${on[@]}" --fs "$volume_fs" --mount "$ROOT$dir" --fstab "$ROOT/etc/fstab" >&2 ||
		fail "no file system for the volume, see above"
fi

step "write the configuration"
# quote VALUE: as a YAML string, whatever is in it.
quote() { printf "'%s'" "${1//\'/\'\'}"; }
setting() { if [ -n "$2" ]; then printf '%s: %s\n' "$1" "$(quote "$2")"; fi; }
install -d -m 0755 "$ROOT/etc/dbsupervisor"
if [ -n "${DBSUPERVISOR_CONFIG-}" ]; then
	put "$DBSUPERVISOR_CONFIG" "$config" 0600
elif [ $write_config = yes ]; then
	{
		echo "# Written by bootstrap.sh; never overwritten by it. All settings: config example."
		setting cluster "$cluster"
		setting instance "${DBSUPERVISOR_INSTANCE-}"
		setting zone "${DBSUPERVISOR_ZONE-}"
		setting share "$DBSUPERVISOR_SHARE"
		setting share_mount "$mount"
		setting dir "${DBSUPERVISOR_DIR-}"
		setting init "${DBSUPERVISOR_INIT-}"
		echo "sync:"
		setting '  schedule' "${DBSUPERVISOR_SCHEDULE:-@every 1m}"
		echo "database:"
		setting '  engine' "${DBSUPERVISOR_ENGINE:-postgres}"
		setting '  image' "$DBSUPERVISOR_IMAGE"
		setting '  env_file' "${DBSUPERVISOR_ENV_FILE-}"
	} >"$tmp/config"
	put "$tmp/config" "$config" 0600
else
	log "keeping $config"
fi
"$ROOT/usr/local/bin/dbsupervisor" config check --config "$config" >&2 ||
	fail "$config is refused, see above"

step "enable the units"
systemctl daemon-reload
systemd-tmpfiles --create dbsupervisor.conf >&2
systemctl enable "dbsupervisor-guard@$cluster.service" "dbsupervisor@$cluster.service" >&2
if [ "${DBSUPERVISOR_START:-yes}" = no ]; then
	log "not started, as asked for"
elif systemctl is-active -q "dbsupervisor@$cluster.service"; then
	if [ $changed = yes ]; then
		step "restart the agent without touching the database"
		"$ROOT/usr/local/bin/dbsupervisor" agent restart --config "$config" >&2 ||
			fail "the new version is installed, but the old agent goes on running"
	fi
else
	step "start the agent"
	# Not waiting: a first restore may take longer than the cloud waits for user data.
	systemctl start --no-block "dbsupervisor@$cluster.service" ||
		fail "see: journalctl -u dbsupervisor@$cluster"
fi
STEP=end
log "done; look at it with: dbsupervisor status --config $config"
