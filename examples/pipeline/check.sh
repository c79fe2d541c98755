#!/bin/sh
# check.sh DIRECTORY: whether the log is whole, and each entry of the index has its line there.
cd "$1" || exit
lines=$(wc -l <events.log)
awk -v lines="$lines" -v bytes="$(wc -c <events.log)" '
    FILENAME == "events.log" { if ($1 != FNR) { print "line " FNR " of the log is " $1; exit bad = 1 } next }
    $1 != FNR || $2 != 64 * FNR - 64 { print "entry " FNR " of the index is wrong"; exit bad = 1 }
    $2 + 64 > bytes { print "entry " FNR " of the index has no line in the log, which has " lines; exit bad = 1 }
    END { if (!bad) print FNR " entries of the index, " lines " lines of the log"; exit bad }
' events.log index
