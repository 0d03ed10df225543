# shellcheck shell=bash
# The user's numbers are those of the official image.
groupadd -r -g 999 redis
useradd -r -g redis -u 999 -d /data -s /usr/sbin/nologin redis
apt install redis-server redis-tools
version redis-server
install -d -o redis -g redis /data
