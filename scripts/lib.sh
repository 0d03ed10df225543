# shellcheck shell=bash
# What the scripts here share. Sourced, never run.

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

need_root() {
	[ "$(id -u)" = 0 ] || die "must be root to $1; run it with sudo"
}

# apt_install PACKAGE...: installs what is missing. The package lists are fetched only when
# an install fails without, because a machine with current lists should not pay for them.
apt_install() {
	local missing=() p try log
	for p in "$@"; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	have apt-get || die "needs the packages ${missing[*]}, and this is no Debian: install them by hand"
	need_root "install ${missing[*]}"
	say "installing ${missing[*]}"
	log=$(mktemp)
	for try in 1 2 3 4; do
		if DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends \
			-o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 \
			install "${missing[@]}" </dev/null >"$log" 2>&1; then
			rm -f "$log"
			return 0
		fi
		# Refused at once usually means missing or stale lists; a network needs a moment.
		[ "$try" = 1 ] || sleep $((try * 3))
		DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=5 \
			-o DPkg::Lock::Timeout=300 update </dev/null >>"$log" 2>&1 || true
	done
	tail -n 20 "$log" >&2
	rm -f "$log"
	die "cannot install ${missing[*]}"
}

# only_one NAME: waits until no other run of NAME is under way on this machine. Children
# that outlive the script must close descriptor 9.
only_one() {
	local dir=/run/lock
	[ -w "$dir" ] || dir=${TMPDIR:-/tmp}
	exec 9>"$dir/dbsupervisor-$1.lock"
	flock 9
}
