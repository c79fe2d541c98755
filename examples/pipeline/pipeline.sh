#!/bin/sh
# pipeline.sh DIRECTORY: three programs that know nothing of snapshots. The first makes events;
# the second appends each, a line of 64 bytes, to events.log, and hands its number on; the
# third appends the number and where in the log it is to index.
cd "$1" || exit
yes event | nl -w 1 |
    while read -r number event; do
        printf '%-16s%-47s\n' "$number" "$event $number"
        echo "$number" >&3
    done 3>&1 >>events.log |
    while read -r number; do
        echo "$number $((number * 64 - 64))"
    done >>index
