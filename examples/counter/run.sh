#!/bin/bash
# Takes snapshots of a program that writes all the time and knows nothing of it
# (counter.c), checks each with an independent program (check.c), and does the same with
# plain copies. Needs cc, and cargo unless there is a $SNAPSHIM_BIN.
#
#   examples/counter/run.sh [DIRECTORY [COUNT]]
set -- "${1:-${TMPDIR:-/var/tmp}}" "${2:-10}"
. "$(dirname "$0")/../lib.sh"

compile counter
compile check
data=$work/data
mkdir "$work/copy"

start "$snapshim" run --name counter --watch "$data" --store "$work/store" -- "$work/counter" "$data"
run=$pid
wait_for test -s "$data/total"

printf '\nsnapshim checkpoint, %s times, on %s\n\n' "$count" "$(stat -f -c %T "$data")"
printf '| snapshot | verified | held, µs | capture | independent check |\n'
printf '|---|---|---|---|---|\n'
good=0 verified=0
for ((i = 0; i < count; i++)); do
    checkpoint counter
    ((code != 0)) || verified=$((verified + 1))
    if found=$("$work/check" "$(copy_of "$data")"); then good=$((good + 1)); fi
    printf '| %s | %s | %s | %s | %s |\n' \
        "$(field id)" "$(field verified)" "$(field hold_us)" "$(field capture)" "$found"
    reasons
    sleep 0.05
done
finish "$run"

# The control: the same program, the same check, copies by cp, reflinks where there are any.
start "$work/counter" "$data"
plain=$pid
sleep 0.3
bad=0 example=
for ((i = 0; i < count || (bad == 0 && i < 200); i++)); do
    cp --reflink=auto "$data/ledger" "$work/copy/ledger"
    cp --reflink=auto "$data/total" "$work/copy/total"
    found=$("$work/check" "$work/copy") || bad=$((bad + 1)) example=$found
done
finish "$plain"

printf '\n%s of %s snapshots consistent, %s verified.\n' "$good" "$count" "$verified"
printf 'Without the gate, %s of %s copies are not%s.\n' "$bad" "$i" "${example:+, for example: $example}"
((good == count && verified == count && bad > 0))
