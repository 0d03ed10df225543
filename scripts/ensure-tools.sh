#!/usr/bin/env bash
# Installs what the make targets need from Debian packages; says nothing when all is there.
#   ensure-tools.sh GROUP...   with GROUP one of: race model image integration peers proxy lint bpf qemu nfs
set -euo pipefail
. "$(dirname "$0")/lib.sh"

packages=()
# want COMMAND PACKAGE...: by command where there is one, so that a tool that was installed
# by other means counts.
want() {
	local cmd=$1
	shift
	have "$cmd" || packages+=("$@")
}

export PATH=$PATH:/usr/sbin:/sbin
[ $# -gt 0 ] || set -- race model image integration lint
for group in "$@"; do
	case $group in
	race) # the race detector needs cgo
		want gcc gcc libc6-dev ;;
	model)
		want spin spin
		want gcc gcc libc6-dev ;;
	image)
		want debootstrap debootstrap
		[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || packages+=(debian-archive-keyring)
		want flock util-linux ;;
	integration)
		want nft nftables
		want mkfs.xfs xfsprogs
		want mkfs.btrfs btrfs-progs
		want mkfs.ext4 e2fsprogs
		want losetup mount
		want ip iproute2 ;;
	bpf) # make bpf alone; what it makes is committed
		want clang clang
		want llvm-strip llvm ;;
	peers) # what the sync engine is measured beside
		want rsync rsync
		want rclone rclone
		want restic restic
		want borg borgbackup ;;
	proxy) # what our proxy is measured beside, and the stand-in for a cloud's load balancer
		if ! have haproxy && [ -d /run/systemd/system ]; then
			systemctl mask --runtime -q haproxy.service # the package's must not begin to serve
		fi
		want haproxy haproxy ;;
	lint)
		want shellcheck shellcheck ;;
	qemu)
		want qemu-system-x86_64 qemu-system-x86
		[ -e /bin/busybox ] || packages+=(busybox-static)
		want mkfs.ext4 e2fsprogs
		want mkfs.xfs xfsprogs
		want xz xz-utils ;;
	nfs)
		want ganesha.nfsd nfs-ganesha nfs-ganesha-vfs
		want dbus-daemon dbus-daemon dbus
		want dbus-send dbus-bin dbus
		want losetup mount ;;
	*) die "unknown group $group" ;;
	esac
done
if [ ${#packages[@]} -gt 0 ]; then
	case " ${packages[*]} " in
	*" nfs-ganesha "*)
		# The tests start a server of their own; the package's must not begin to serve.
		if [ -d /run/systemd/system ]; then
			units=(nfs-ganesha.service)
			have rpcbind || units+=(rpcbind.service rpcbind.socket) # one that was there stays as it is
			systemctl mask --runtime -q "${units[@]}"
			apt_install "${packages[@]}"
			systemctl disable -q "${units[@]}" || true
			systemctl unmask --runtime -q "${units[@]}"
		else
			apt_install "${packages[@]}"
		fi ;;
	*) apt_install "${packages[@]}" ;;
	esac
fi

for group in "$@"; do
	if [ "$group" = integration ] && [ ! -e /dev/fuse ]; then
		# The faulty share of the tests is a FUSE file system, mounted without fusermount.
		need_root "create /dev/fuse"
		modprobe fuse 2>/dev/null || true
		[ -e /dev/fuse ] || mknod -m 0666 /dev/fuse c 10 229
	fi
done
