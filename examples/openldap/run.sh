#!/usr/bin/env bash
# Two instances of openldap on this machine, a client that writes, a crash, a planned move.
exec "$(dirname "$0")/../run.sh" openldap
