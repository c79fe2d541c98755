#!/bin/bash
# Checks the units, and runs what they would run. Needs bwrap and cc, systemd-analyze if
# there is one, and cargo unless there is a $SNAPSHIM_BIN.
#
#   examples/systemd/run.sh [DIRECTORY [COUNT]]
. "$(dirname "$0")/../lib.sh"
need bwrap

compile counter
compile check
mkdir "$work/bin" "$work/lib" "$work/lib/ledger"
cp "$work/counter" "$work/bin/"
cp "$snapshim" "$work/bin/snapshim"
run_dir=$SNAPSHIM_DIR

# A command in a machine that has the programs, and the directories that systemd makes.
inside() {
    bwrap --dev-bind / / --bind "$work/bin" /usr/local/bin --bind "$work/lib" /var/lib \
        --tmpfs /run --bind "$run_dir" /run/ledger --die-with-parent "$@"
}

if command -v systemd-analyze >/dev/null; then
    # Of what it does not know it says so, and ends with 0.
    said=$(inside systemd-analyze verify --man=no "$here"/ledger*.service "$here"/ledger*.timer 2>&1) &&
        [[ $said != *ledger* ]] || die "systemd-analyze finds fault with the units: $said"
    echo "systemd-analyze finds no fault with the units."
else
    echo "There is no systemd-analyze: the units are not checked by it."
fi

# What a unit starts, in its environment.
start_unit() {
    local line words variable
    line=$(sed -n 's/^ExecStart=//p' "$here/$1")
    variable=$(sed -n 's/^Environment=//p' "$here/$1")
    # So that the example does not take a quarter of an hour.
    line=${line/--every 15m/--every 500ms}
    read -ra words <<<"$line"
    printf '%s: %s\n' "$1" "$line"
    inside env "$variable" "${words[@]}"
}

snapshots=$work/lib/ledger/.snapshim/ledger
has_snapshots() { (($(find "$snapshots" -name manifest.json 2>/dev/null | wc -l) >= $1)); }
is_verified() { grep -q '"verified": true' "$1/manifest.json"; }

start start_unit ledger.service
service=$pid
wait_for has_snapshots 2
# 4: the hold bound was hit, on a busy machine.
for try in 1 2 3 4 5; do
    code=0
    start_unit ledger-snapshot.service || code=$?
    ((code == 4)) || break
done
((code == 0)) || die "ledger-snapshot.service ended with $code at try $try"

good=0 all=0
for snapshot in "$snapshots"/2*; do
    found=$("$work/check" "$snapshot/tree/var/lib/ledger") && is_verified "$snapshot" && good=$((good + 1))
    all=$((all + 1))
    printf '%s: %s\n' "$(basename "$snapshot")" "$found"
done

# As KillMode=mixed does: the main process is told, and passes it on.
main=$(descendants "$service" | while read -r id; do
    [[ $(readlink "/proc/$id/exe") != /usr/local/bin/snapshim ]] || echo "$id"
done | sed -n 1p)
kill -TERM "$main"
code=0
wait "$service" || code=$?
forget "$service"
printf '%s of %s snapshots verified and consistent. The service ended with %s after SIGTERM.\n' \
    "$good" "$all" "$code"
((good == all && all >= 3 && code == 143))
