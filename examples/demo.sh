#!/bin/sh
# Takes snapshots of a program that writes all the time and knows nothing of it
# (counter/counter.c), checks each with an independent program (counter/check.c),
# and does the same with plain copies. Needs cargo and cc. Leaves nothing behind
# but the build.
#
#   examples/demo.sh [DIRECTORY [COUNT]]
#
# DIRECTORY is where the data goes: any file system; XFS or btrfs for reflinks.
# $SNAPSHIM_BIN names a built snapshim to use instead of building one.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
where=${1:-${TMPDIR:-/var/tmp}}
count=${2:-10}

work=$(mktemp -d "$where/snapshim-demo.XXXXXX")
gates=$(mktemp -d /dev/shm/snapshim-demo.XXXXXX)
run=
plain=
cleanup() {
    trap - EXIT INT TERM HUP
    # run passes the signal on to its program.
    if [ -n "$run" ]; then kill "$run" 2>/dev/null || :; fi
    if [ -n "$plain" ]; then kill "$plain" 2>/dev/null || :; fi
    wait
    rm -rf "$work" "$gates"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [ -n "${SNAPSHIM_BIN:-}" ]; then
    snapshim=$SNAPSHIM_BIN
else
    echo "Building snapshim…"
    cargo build --quiet --release --manifest-path "$root/Cargo.toml" -p snapshim
    snapshim=${CARGO_TARGET_DIR:-$root/target}/release/snapshim
fi
for program in counter check; do
    ${CC:-cc} -O2 -Wall -o "$work/$program" "$root/examples/counter/$program.c"
done

data=$work/data
SNAPSHIM_DIR=$gates
export SNAPSHIM_DIR
mkdir "$data" "$work/copy"

wait_for() {
    tries=0
    until [ -s "$1" ]; do
        tries=$((tries + 1))
        if [ "$tries" -gt 200 ]; then
            echo "demo: the program does not start" >&2
            exit 1
        fi
        sleep 0.05
    done
}

# A field of the JSON object in $work/json that is not inside another.
field() {
    sed -n "s/^  \"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$work/json"
}

"$snapshim" run --name demo --watch "$data" --store "$work/store" -- "$work/counter" "$data" &
run=$!
wait_for "$data/total"

fs=$(stat -f -c %T "$data")
printf '\nsnapshim checkpoint, %s times, on %s\n\n' "$count" "$fs"
printf '| snapshot | verified | held, µs | capture | independent check |\n'
printf '|---|---|---|---|---|\n'
good=0
verified=0
i=0
while [ "$i" -lt "$count" ]; do
    i=$((i + 1))
    code=0
    "$snapshim" checkpoint demo --json >"$work/json" || code=$?
    case $code in
    0) verified=$((verified + 1)) ;;
    5) ;;
    *) exit "$code" ;;
    esac
    id=$(field id)
    if found=$("$work/check" "$work/store/demo/$id/tree$(cd "$data" && pwd -P)"); then
        good=$((good + 1))
    fi
    printf '| %s | %s | %s | %s | %s |\n' \
        "$id" "$(field verified)" "$(field hold_us)" "$(field capture)" "$found"
    if [ "$code" -eq 5 ]; then
        sed -n 's/^      "text": "\(.*\)",\{0,1\}$/    not verified: \1/p' "$work/json"
    fi
    sleep 0.05
done
kill "$run"
wait "$run" 2>/dev/null || :
run=

# The control: the same program, the same check, copies by cp, reflinks where there are any.
"$work/counter" "$data" &
plain=$!
sleep 0.3
bad=0
i=0
while [ "$i" -lt "$count" ]; do
    i=$((i + 1))
    cp --reflink=auto "$data/ledger" "$work/copy/ledger"
    cp --reflink=auto "$data/total" "$work/copy/total"
    found=$("$work/check" "$work/copy") || {
        bad=$((bad + 1))
        example=$found
    }
done
kill "$plain"
wait "$plain" 2>/dev/null || :
plain=

printf '\n%s of %s snapshots consistent, %s verified.\n' "$good" "$count" "$verified"
printf 'Without the gate, %s of %s copies are not' "$bad" "$count"
if [ "$bad" -gt 0 ]; then printf ', for example: %s' "$example"; fi
printf '.\n'
[ "$good" -eq "$count" ] && [ "$verified" -eq "$count" ] && [ "$bad" -gt 0 ]
