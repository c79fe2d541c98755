#!/bin/bash
# SQLite under load: snapshots of a database while it is written, each opened and checked;
# and the same with plain copies. Needs python3, and cargo unless there is a $SNAPSHIM_BIN.
#
#   examples/sqlite/run.sh [DIRECTORY [COUNT]]
. "$(dirname "$0")/../lib.sh"
need python3

# Copies of a database in use, file by file, until one is unsound or there are so many;
# sets $bad of $copies.
copy_plainly() {
    local data=$1 most=$2
    bad=0 copies=0
    while ((copies < count || (bad == 0 && copies < most))); do
        rm -rf "$work/copy"
        mkdir "$work/copy"
        # By reading, as most programs do. The journal may come and go meanwhile: so it does for whoever copies plainly.
        cp --reflink=never "$data"/bank.db* "$work/copy/" 2>/dev/null || :
        copies=$((copies + 1))
        found=$(python3 "$here/check.py" "$work/copy") || bad=$((bad + 1)) example=$found
    done
}

# A database that has seen a few transactions. By asking SQLite, which waits for its turn: a
# plain copy of it may be unsound for any number of times.
is_busy() {
    [[ -s $1/bank.db ]] && python3 "$here/moves.py" "$1/bank.db" 2>/dev/null
}

printf '\n| journal mode | snapshots | verified | sound | held by | held, µs | plain copies unsound |\n'
printf '|---|---|---|---|---|---|---|\n'
wrong=0
for mode in delete wal; do
    data=$work/data/$mode
    mkdir "$data"
    start "$snapshim" run --name "bank-$mode" --watch "$data" --store "$work/store" -- \
        python3 "$here/writer.py" "$data/bank.db" "$mode"
    run=$pid
    wait_for is_busy "$data"
    good=0 verified=0 longest=0
    for ((i = 0; i < count; i++)); do
        checkpoint "bank-$mode" --keep-last 2
        ((code != 0)) || verified=$((verified + 1))
        if found=$(python3 "$here/check.py" "$(copy_of "$data")"); then
            good=$((good + 1))
        else
            printf '    %s: %s\n' "$(field id)" "$found"
        fi
        reasons
        held=$(field hold_us)
        ((held <= longest)) || longest=$held
    done
    layers=$(writers layer)
    finish "$run"

    mkdir "$work/data/plain-$mode"
    start python3 "$here/writer.py" "$work/data/plain-$mode/bank.db" "$mode"
    plain=$pid
    wait_for is_busy "$work/data/plain-$mode"
    # In WAL mode it takes more luck.
    most=100
    [[ $mode != wal ]] || most=10
    copy_plainly "$work/data/plain-$mode" "$most"
    finish "$plain"
    printf '| %s | %s | %s | %s | %s | at most %s | %s of %s%s |\n' "$mode" "$count" "$verified" "$good" \
        "$layers" "$longest" "$bad" "$copies" "${example:+, for example $example}"
    ((good == count && verified == count)) || wrong=1
    ((bad > 0)) || [[ $mode == wal ]] || die "the control shows nothing: all $copies plain copies are sound"
    example=
done
((wrong == 0))
