#!/bin/bash
# Runs in a container of the Debian image, with the build's files below /mnt: installs one
# engine by its recipe's install.sh and leaves nothing that belongs to this machine.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root

# How this machine reaches its mirror: proxies and the like, for as long as the build runs.
cp /mnt/apt.conf /etc/apt/apt.conf.d/99build
if [ -s /mnt/auth.conf ]; then
	mkdir -p /etc/apt/auth.conf.d
	cp /mnt/auth.conf /etc/apt/auth.conf.d/99build.conf
fi
apt() { apt-get -q -y --no-install-recommends -o Acquire::Retries=5 "$@"; }
# version PACKAGE: which engine this is, for the image's label.
version() { dpkg-query -W -f '${Version}' "$1" >/etc/dbsupervisor-version; }

apt update
# shellcheck source=/dev/null
. /mnt/install.sh

rm -rf /usr/share/{doc,man,info,locale}/* /var/cache/apt/* /var/cache/debconf/*-old /var/lib/apt/lists/* \
	/var/log/* /etc/apt/apt.conf.d/99build /etc/apt/auth.conf.d/99build.conf /etc/machine-id /tmp/*
mkdir -p /var/cache/apt/archives/partial /var/lib/apt/lists/partial
