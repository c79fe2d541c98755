#!/bin/bash
# Snapshots of a shell pipeline: several processes that write different files, as one set;
# and the same with plain copies. Needs no compiler but cargo, unless there is a $SNAPSHIM_BIN.
#
#   examples/pipeline/run.sh [DIRECTORY [COUNT]]
. "$(dirname "$0")/../lib.sh"

# Starts the pipeline and waits until both files are written.
run_pipeline() {
    mkdir "$data"
    start "$@" sh "$here/pipeline.sh" "$data"
    wait_for test -s "$data/index"
}

data=$work/data/set
run_pipeline "$snapshim" run --name pipeline --watch "$data" --store "$work/store" --
run=$pid
printf '\n| snapshot | verified | held, µs | processes | check |\n|---|---|---|---|---|\n'
good=0 verified=0
for ((i = 0; i < count; i++)); do
    checkpoint pipeline --keep-last 2
    ((code != 0)) || verified=$((verified + 1))
    if found=$("$here/check.sh" "$(copy_of "$data")"); then good=$((good + 1)); fi
    printf '| %s | %s | %s | %s | %s |\n' \
        "$(field id)" "$(field verified)" "$(field hold_us)" "$(writers pid)" "$found"
    reasons
done
finish "$run"

# The control.
data=$work/data/plain
run_pipeline
plain=$pid
mkdir "$work/copy"
bad=0 example=
for ((i = 0; i < count || (bad == 0 && i < 50); i++)); do
    cp --reflink=never "$data/events.log" "$data/index" "$work/copy/"
    found=$("$here/check.sh" "$work/copy") || bad=$((bad + 1)) example=$found
done
finish "$plain"

printf '\n%s of %s snapshots consistent, %s verified.\n' "$good" "$count" "$verified"
printf 'Of plain copies, %s of %s are not%s.\n' "$bad" "$i" "${example:+, for example: $example}"
((good == count && verified == count && bad > 0))
