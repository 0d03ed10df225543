#!/usr/bin/env bash
# Prints the address from which apt on this machine gets a suite, for debootstrap.
#   mirror.sh SUITE   (APT_DIR=/etc/apt)
# Reads both forms of apt's configuration; fails when the suite is in neither.
set -euo pipefail
dir=${APT_DIR:-/etc/apt}
suite=$1

# candidates: all addresses of the suite, in apt's order.
candidates() {
	local f
	for f in "$dir/sources.list" "$dir"/sources.list.d/*.list; do
		[ -f "$f" ] || continue
		# deb [options] address suite component...
		sed -nE 's/^[[:space:]]*deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+)[[:space:]]+([^[:space:]]+).*/\2 \3/p' "$f" |
			awk -v s="$suite" '{ sub("/$", "", $2) } $2 == s { print $1 }'
	done
	for f in "$dir"/sources.list.d/*.sources; do
		[ -f "$f" ] || continue
		# Stanzas are separated by blank lines; a line that begins with a blank goes on
		# with the field before.
		awk -v s="$suite" '
			function flush(  n, m, i, j, us, ss) {
				if ((types " ") ~ / deb / && enabled !~ /^ *(no|false|0|off) *$/) {
					n = split(uris, us, " ")
					m = split(suites, ss, " ")
					for (i = 1; i <= n; i++)
						for (j = 1; j <= m; j++) {
							sub("/$", "", ss[j])
							if (ss[j] == s) print us[i]
						}
				}
				types = uris = suites = enabled = field = ""
			}
			/^[ \t]*$/ { flush(); next }
			/^#/ { next }
			{ val = $0 }
			/^[^ \t]/ {
				field = tolower($0); sub(/[ \t]*:.*/, "", field)
				sub(/^[^:]*:/, "", val)
			}
			{ gsub(/[ \t]+/, " ", val) }
			field == "types" { types = types " " val }
			field == "uris" { uris = uris " " val }
			field == "suites" { suites = suites " " val }
			field == "enabled" { enabled = tolower(val) }
			END { flush() }' "$f"
	done
}

while read -r uri; do
	case $uri in
	mirror+file:/*) # apt chooses from a list; debootstrap wants one
		list=${uri#mirror+file:}
		uri=$(awk '/^(http|https|file|copy):/ { print $1; exit }' "$list") ;;
	esac
	case $uri in
	http://* | https://* | file:/* | copy:/*)
		echo "${uri%/}"
		exit 0 ;;
	esac
done < <(candidates)
echo "mirror.sh: apt has no usable source for $suite in $dir" >&2
exit 1
