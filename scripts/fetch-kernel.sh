#!/usr/bin/env bash
# Unpacks Debian's cloud kernel into build/qemu, once, and prints the directory: vmlinuz,
# release, modules. Nothing is installed. NEW=1 fetches the newest one again.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$(dirname "$0")/.."
dir=$PWD/build/qemu/kernel

mkdir -p "${dir%/*}"
only_one kernel
if [ -e "$dir/release" ] && [ -z "${NEW-}" ]; then
	echo "$dir"
	exit 0
fi
[ "$(dpkg --print-architecture)" = amd64 ] || die "only for amd64"

# package: the newest kernel that the package lists know, without fetching anything.
package() {
	apt-cache depends linux-image-cloud-amd64 2>/dev/null |
		sed -nE 's/^ *Depends: (linux-image-[0-9].*-cloud-amd64)$/\1/p' | head -n 1
}

tmp=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
for try in 1 2 3; do
	name=$(package)
	if [ -n "$name" ] && (cd "$tmp" && apt-get -q -o Acquire::Retries=5 download "$name") >"$tmp/log" 2>&1; then
		break
	fi
	[ "$try" != 3 ] || { tail -n 20 "$tmp/log" >&2; die "cannot fetch Debian's cloud kernel"; }
	# No or stale lists.
	need_root "fetch the package lists"
	apt-get -q -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 update </dev/null >"$tmp/log" 2>&1 || true
done
say "unpacking $name"
mkdir "$tmp/x" "$tmp/kernel"
dpkg-deb -x "$tmp"/*.deb "$tmp/x"
release=${name#linux-image-}
mv "$tmp/x/boot/vmlinuz-$release" "$tmp/kernel/vmlinuz"
# Where /lib is merged into /usr, packages have it there.
for lib in "$tmp/x/lib" "$tmp/x/usr/lib"; do
	if [ -d "$lib/modules/$release" ]; then mv "$lib/modules/$release/kernel" "$tmp/kernel/modules"; fi
done
[ -d "$tmp/kernel/modules" ] || die "$name has no modules"
# So that nobody needs a decompressor.
find "$tmp/kernel/modules" -name '*.ko.xz' -exec xz -d {} +
echo "$release" >"$tmp/kernel/release"
rm -rf "$dir"
mv "$tmp/kernel" "$dir"
echo "$dir"
