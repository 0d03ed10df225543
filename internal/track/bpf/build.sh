#!/usr/bin/env bash
# Builds track.o from track.c and kernel.h, and notes what it was built from: a test compares.
# Needs clang 14 or later; the rest of the repository doesn't.
set -euo pipefail
cd "$(dirname "$0")"
clang=${CLANG:-clang}
# -g: field accesses are adjusted to the running kernel by what goes into .BTF; DWARF is
# taken away again. bpfel serves every little-endian processor.
"$clang" -target bpfel -mcpu=v3 -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter \
	-ffile-prefix-map="$PWD"=. -c track.c -o track.o
strip=$(command -v llvm-strip || compgen -G '/usr/bin/llvm-strip-*' | sort -V | tail -n 1)
"$strip" -g track.o
cat track.c kernel.h | sha256sum | cut -d ' ' -f 1 >track.o.source
"$clang" --version | head -n 1
