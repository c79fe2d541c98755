# What the examples share; read by their run.sh, not run by itself.
#
#   examples/NAME/run.sh [DIRECTORY [COUNT]]
#
# DIRECTORY is where the data goes: any file system; XFS or btrfs for reflinks. COUNT is how
# many snapshots are taken. $SNAPSHIM_BIN names a built snapshim to use instead of building one.
#
# Gives: $here (the example), $root (the sources), $work (a directory that goes away, with
# data/ in it), $count, $snapshim, and $SNAPSHIM_DIR, a directory of gates of its own.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
name=$(basename "$here")
count=${2:-5}
work=$(cd "${1:-${TMPDIR:-/var/tmp}}" && mktemp -d "$PWD/snapshim-$name.XXXXXX")
SNAPSHIM_DIR=$(mktemp -d "/dev/shm/snapshim-$name.XXXXXX")
export SNAPSHIM_DIR
started=()

# The processes below a process.
descendants() {
    local child
    for child in $(ps -o pid= --ppid "$1"); do
        printf '%s\n' "$child"
        descendants "$child"
    done
}

# Ends what this script started, by id, and leaves nothing behind.
cleanup() {
    local pid
    trap - EXIT INT TERM HUP
    for pid in "${started[@]}"; do finish "$pid"; done
    rm -rf "$work" "$SNAPSHIM_DIR"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

die() {
    printf '%s: %s\n' "$name" "$*" >&2
    exit 1
}

need() {
    local program
    for program; do
        command -v "$program" >/dev/null || die "needs $program"
    done
}

# Starts a command in the background; its id is in $pid.
start() {
    "$@" &
    pid=$!
    started+=("$pid")
}

# Ends what `start` started, with all it has started.
finish() {
    local all
    # Once it has been waited for, its id may be another's.
    [[ " ${started[*]} " == *" $1 "* ]] || return 0
    all=$(descendants "$1")
    # shellcheck disable=SC2086
    kill $all "$1" 2>/dev/null || :
    wait "$1" 2>/dev/null || :
    forget "$1"
}

forget() {
    local left=() pid
    for pid in "${started[@]}"; do [[ $pid == "$1" ]] || left+=("$pid"); done
    started=("${left[@]}")
}

# Waits until a command succeeds.
wait_for() {
    local tries=0
    until "$@"; do
        tries=$((tries + 1))
        ((tries <= 400)) || die "waited too long for: $*"
        sleep 0.05
    done
}

# A checkpoint: its certificate is in $work/json then, and the exit code in $code, which is
# 0 (verified) or 5 (not verified). On a machine that is busy with other things the hold bound may be
# hit (4): nothing is published then, and the thing to do is to try again.
checkpoint() {
    local try
    for try in 1 2 3 4 5; do
        code=0
        "$snapshim" checkpoint "$@" --json >"$work/json" || code=$?
        ((code == 4)) || break
        echo "    try $try hit the hold bound" >&2
    done
    ((code == 0 || code == 5)) || exit "$code"
}

# A field of that certificate which is not inside another.
field() {
    sed -n "s/^  \"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$work/json"
}

# A field of its writers, each once, with commas between.
writers() {
    sed -n '/^  "writers": \[/,/^  \]/p' "$work/json" |
        sed -n "s/^      \"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" | sort -u | paste -sd, -
}

# The reasons, if it is not verified.
reasons() {
    sed -n '/^  "reasons": \[/,/^  \]/p' "$work/json" |
        sed -n 's/^      "text": "\(.*\)",\{0,1\}$/    not verified: \1/p'
}

# Where a file or directory, by its absolute path, is in that snapshot.
copy_of() {
    printf '%s%s\n' "$(field path)" "$1"
}

compile() {
    "${CC:-cc}" -O2 -Wall -o "$work/$1" "$root/examples/counter/$1.c"
}

if [[ -n ${SNAPSHIM_BIN:-} ]]; then
    snapshim=$SNAPSHIM_BIN
else
    echo "Building snapshim…"
    cargo build --quiet --release --manifest-path "$root/Cargo.toml" -p snapshim
    snapshim=${CARGO_TARGET_DIR:-$root/target}/release/snapshim
fi
mkdir "$work/data"
