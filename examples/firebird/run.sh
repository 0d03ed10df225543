#!/usr/bin/env bash
# Two instances of firebird on this machine, a client that writes, a crash, a planned move.
exec "$(dirname "$0")/../run.sh" firebird
