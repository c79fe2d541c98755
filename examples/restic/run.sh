#!/bin/bash
# Hands snapshots to restic while the program writes on and further snapshots come and go;
# and lets restic read the live files, for comparison. Needs restic and cc, and cargo unless
# there is a $SNAPSHIM_BIN.
#
#   examples/restic/run.sh [DIRECTORY [COUNT]]
set -- "${1:-${TMPDIR:-/var/tmp}}" "${2:-2}"
. "$(dirname "$0")/../lib.sh"
need restic

compile counter
compile check
data=$work/data
export RESTIC_REPOSITORY=$work/repository RESTIC_PASSWORD=example RESTIC_CACHE_DIR=$work/cache
restic init --quiet

start "$snapshim" run --name ledger --watch "$data" --store "$work/store" -- "$work/counter" "$data"
run=$pid
wait_for test -s "$data/total"

keep=12
snapshot() {
    checkpoint ledger --keep-last "$keep"
    ((code == 0)) || die "not verified: $(reasons)"
}
ids() { (cd "$work/store/ledger" && printf '%s\n' 2*); }

# Other snapshots, some a second, until told to stop; never so many that the one that restic
# reads is pruned.
meanwhile() {
    local i
    for ((i = 0; i < keep - 1; i++)); do
        [[ ! -e $work/enough ]] || break
        snapshot
        echo . >>"$work/taken"
        sleep 0.1
    done
}

restored() {
    rm -rf "$work/restored"
    restic restore latest --quiet --target "$work/restored"
}

for ((i = 0; i < keep; i++)); do snapshot; done
good=0 taken=0 pruned=0
for ((i = 0; i < count; i++)); do
    rm -f "$work/enough" "$work/taken"
    # The directory of one snapshot: `latest` is another one a moment later.
    now=$(readlink -f "$work/store/ledger/latest")
    before=$(ids)
    start meanwhile
    others=$pid
    wait_for test -s "$work/taken"
    said=$(restic backup --quiet "$now/tree" 2>&1) || die "restic ended with $?: $said"
    [[ -z $said ]] || die "restic says: $said"
    touch "$work/enough"
    wait "$others"
    forget "$others"
    [[ $(readlink -f "$work/store/ledger/latest") != "$now" ]] || die "latest did not move"
    taken=$((taken + $(wc -l <"$work/taken")))
    pruned=$((pruned + $(comm -23 <(echo "$before") <(ids) | wc -l)))
    restored
    diff -r "$now/tree" "$work/restored$now/tree" || die "what came back is not the snapshot"
    found=$("$work/check" "$work/restored$now/tree$data") && good=$((good + 1))
    printf 'restic of a snapshot: %s\n' "$found"
done

# The control: the same program, the same restic, the live files.
bad=0
for ((i = 0; i < count || (bad == 0 && i < 20); i++)); do
    restic backup --quiet "$data"
    restored
    found=$("$work/check" "$work/restored$data") || bad=$((bad + 1))
    printf 'restic of live files: %s\n' "$found"
done
finish "$run"

printf '\n%s of %s backups of snapshots consistent and equal to them, while %s others were taken and %s pruned.\n' \
    "$good" "$count" "$taken" "$pruned"
printf 'Of the live files, %s of %s backups are not consistent.\n' "$bad" "$i"
((good == count && taken > 0 && pruned > 0 && bad > 0))
