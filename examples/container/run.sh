#!/bin/bash
# A program in a container (bubblewrap: pid, mount and IPC namespaces of its own), its
# coordinator on the host, beside it and within; and copies without the gate. Needs bwrap and cc,
# and cargo unless there is a $SNAPSHIM_BIN. "Within" needs root.
#
#   examples/container/run.sh [DIRECTORY [COUNT]]
. "$(dirname "$0")/../lib.sh"
need bwrap

compile counter
compile check
data=$work/data
mkdir "$work/copy"

# What `snapshim env` prints is for the host; the paths of gate and shim are the same in the
# container, as compose.yaml has it.
"$snapshim" env --name legacy --watch "$data" --store "$work/store" |
    sed 's/^export //' >"$work/snapshim.env"
sites=$(sed -n 's/^SNAPSHIM_SITES=//p' "$work/snapshim.env")

# The program in its container; the arguments are its environment.
container() {
    local variable environment=()
    for variable; do environment+=(--setenv "${variable%%=*}" "${variable#*=}"); done
    exec bwrap --die-with-parent --unshare-pid --unshare-ipc --clearenv \
        --ro-bind /usr /usr --symlink usr/lib /lib --symlink usr/lib64 /lib64 \
        --proc /proc --dev /dev \
        --bind "$data" /srv/data --ro-bind "$work/counter" /app/legacy \
        --bind "$SNAPSHIM_DIR" "$SNAPSHIM_DIR" --ro-bind "$sites" "$sites" \
        "${environment[@]}" /app/legacy /srv/data
}

# Starts it; its id on the host is in $program.
start_container() {
    rm -f "$data/ledger" "$data/total"
    start container "$@"
    wait_for test -s "$data/total"
    program=$(descendants "$pid" | tail -1)
}

check_copy() {
    found=$("$work/check" "$(copy_of "$data")") || die "not consistent: $found"
}

mapfile -t environment <"$work/snapshim.env"
start_container "${environment[@]}"
printf '\nThe program is %s on the host, %s in its container.\n\n' "$program" \
    "$(sed -n 's/^NSpid:.*\t//p' "/proc/$program/status")"
printf '| coordinator | verified | writers | independent check |\n|---|---|---|---|\n'
row() { printf '| %s | %s | %s | %s |\n' "$1" "$(field verified)" "$(writers pid)" "$found"; }

for ((i = 0; i < count; i++)); do
    checkpoint legacy
    check_copy
    row "on the host"
    reasons
    ((code == 0)) || die "not verified from the host"
    [[ $(writers pid) == "$program" ]] || die "the certificate does not name the program"
done

host=$snapshim
beside() { bwrap --dev-bind / / --unshare-pid --proc /proc "$host" "$@"; }
snapshim=beside
checkpoint legacy
check_copy
row "in a container beside"
reasons
((code == 5)) || die "verified from where nothing can be seen"

if [[ $(id -u) == 0 ]]; then
    within() {
        nsenter --target "$program" --pid unshare --mount \
            sh -c 'mount -t proc proc /proc && exec "$@"' sh "$host" "$@"
    }
    snapshim=within
    checkpoint legacy
    check_copy
    row "in its pid namespace"
    reasons
    ((code == 0)) || die "not verified from within"
    grep -q 'pid namespace of its own' "$work/json" || die "nothing is said of what is outside"
fi
snapshim=$host

kill -KILL "$program"
wait "$pid" 2>/dev/null || :
forget "$pid"
checkpoint legacy
((code == 0)) || die "a dead container keeps snapshots from being verified"
slots=$("$snapshim" status legacy --json | sed -n 's/^  "slots_used": \([0-9]*\),/\1/p')
((slots == 0)) || die "$slots slots of a dead container were not freed"
echo
echo "Killed, with its container: the next snapshot is verified, and its slot is free."
start_container "${environment[@]}"
checkpoint legacy
check_copy
((code == 0)) || die "not verified after it was started again"
echo "Started again: $found."
finish "$pid"

# The control: the same container, without the environment.
start_container
bad=0 example=
for ((i = 0; i < count || (bad == 0 && i < 200); i++)); do
    cp --reflink=never "$data/ledger" "$data/total" "$work/copy"
    found=$("$work/check" "$work/copy") || bad=$((bad + 1)) example=$found
done
finish "$pid"
printf 'Without the gate, %s of %s copies are not consistent%s.\n' "$bad" "$i" \
    "${example:+, for example: $example}"
((bad > 0))
