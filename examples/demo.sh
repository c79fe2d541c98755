#!/bin/sh
# The demonstration: examples/counter. Options as there.
exec "$(dirname "$0")/counter/run.sh" "$@"
