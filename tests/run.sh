#!/bin/bash
# Installs what the tests need, runs every check and every test, and leaves no
# mount or loop device behind, however it ends.
#
#   tests/run.sh          everything, at its default length
#   SNAPSHIM_TEST_FULL=1 tests/run.sh    with the full counts of docs/testing.md
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(build-essential gcc-multilib xfsprogs btrfs-progs e2fsprogs util-linux strace rsync attr
    acl sqlite3 redis-server python3 perl git musl-tools libaio-dev liburing-dev libseccomp-dev
    libgdbm-dev liblmdb-dev python3-lmdb lmdb-utils python3-bsddb3 db5.3-util rocksdb-tools
    rrdtool libkyotocabinet-dev kyotocabinet-utils
    openjdk-17-jdk-headless libh2-java golang-go nodejs erlang-base qemu-utils postgresql
    mariadb-server tzdata zsh fish man-db groff-base patch bubblewrap restic
    systemd procps)

say() { printf '\n== %s\n' "$*"; }

install() {
    local missing=()
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok' ||
            missing+=("$package")
    done
    ((${#missing[@]} == 0)) && return
    say "installing ${missing[*]}"
    apt-get update -qq
    # RUNLEVEL=1: packages do not start their services.
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${missing[@]}" >/dev/null
}

# The tests unmount what they mounted; this is for those that were killed.
cleanup() {
    local at device
    while read -r device at _; do
        [[ $at == *snapshim-test-* ]] && umount -l "$at" 2>/dev/null
    done < <(tac /proc/mounts)
    losetup -a 2>/dev/null | grep -F snapshim-test- | cut -d: -f1 |
        while read -r device; do losetup -d "$device" 2>/dev/null; done
    rm -rf "${TMPDIR:-/tmp}"/snapshim-test-* /dev/shm/snapshim-test-*
}
trap 'cleanup || true' EXIT
trap 'exit 130' INT TERM HUP

if [[ $(id -u) != 0 ]]; then
    echo "tests/run.sh: needs root, to install packages and to mount file systems" >&2
    echo "  run it as root in a throw-away machine or container with loop devices" >&2
    exit 2
fi

install

say "format, lints, documentation"
cargo fmt --all --check
cargo clippy --workspace --all-targets --quiet -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
if command -v cargo-deny >/dev/null; then
    cargo deny --all-features check bans licenses sources
fi

say "build"
cargo build --release --workspace

say "tests"
built=$(realpath "${CARGO_TARGET_DIR:-target}")/release
export SNAPSHIM_BIN="$built/snapshim" SNAPSHIM_SO="$built/libsnapshim.so"
# All of them, whatever fails: one run is to show everything.
cargo test --workspace --no-fail-fast "$@"

say "what holds see of each way to change a file"
cargo run --release --quiet -p snapshim-tests --bin coverage -- --quick

say "the demonstration of the README"
examples/demo.sh
