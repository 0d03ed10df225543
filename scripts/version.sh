#!/bin/sh
# The version that goes into the binary: the tag, or the commit, and whether it was changed.
cd "$(dirname "$0")/.." || exit 1
git describe --tags --always --dirty 2>/dev/null || echo unknown
