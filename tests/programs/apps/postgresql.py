"""PostgreSQL under pgbench."""

import os
import pathlib
import re
import subprocess

import common

CLIENTS = 4
BIN = max(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
SETTINGS = {
    "listen_addresses": "''", "shared_buffers": "16MB", "max_connections": "20",
    # Checkpoints all the time, so that snapshots fall into some.
    "min_wal_size": "32MB", "max_wal_size": "64MB", "checkpoint_timeout": "30s",
}


def tool(name, *args):
    return [str(BIN / name), *args]


def serve(data, scratch):
    log = f"{scratch}/log"
    server = common.start(tool("postgres", "-D", f"{data}/cluster", "-k", scratch), log)

    def answers():
        common.expect(server.poll() is None, "it does not start:\n" + pathlib.Path(log).read_text()[-800:])
        ready = tool("pg_isready", "-q", "-h", scratch)
        return subprocess.run(ready, stdin=subprocess.DEVNULL).returncode == 0

    common.wait_until(answers, "postgres")
    return server


def ask(scratch, question):
    return common.run(["psql", "-XAtq", "-h", scratch, "-d", "postgres", "-c", question]).strip()


def load(data, scratch):
    common.run(tool("initdb", "-k", "-A", "trust", "-E", "UTF8", "--locale=C", f"{data}/cluster"))
    with open(f"{data}/cluster/postgresql.conf", "a") as conf:
        conf.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())
    server = serve(data, scratch)
    common.run(tool("pgbench", "-h", scratch, "-i", "-s", "1", "-q", "postgres"))
    ask(scratch, "create extension amcheck")
    os.mkdir(f"{data}/told")
    # Its log says, of each client, what was committed: a line a transaction.
    bench = common.start(
        tool("pgbench", "-h", scratch, "-n", "-c", str(CLIENTS), "-j", "2", "-T", "100000", "-R", "150",
             "-l", f"--log-prefix={data}/told/log", "postgres"), f"{scratch}/pgbench")
    common.wait_until(lambda: any(f.stat().st_size for f in pathlib.Path(data, "told").iterdir()), "the first updates")
    common.ready(scratch)
    common.wait_for_ever()


def check(data, scratch):
    # Whole lines only: stdio writes blocks.
    told = sum(file.read_bytes().count(b"\n") for file in pathlib.Path(data, "told").iterdir())
    pathlib.Path(data, "cluster/postmaster.pid").unlink(missing_ok=True)
    server = serve(data, scratch)
    log = pathlib.Path(scratch, "log").read_text()
    starts = re.search(r"redo starts at ([0-9A-F]+)/([0-9A-F]+)", log)
    ends = re.search(r"redo done at ([0-9A-F]+)/([0-9A-F]+)", log)
    common.expect("PANIC" not in log, log[-800:])
    replayed = 0
    if starts and ends:
        at = [(int(m[1], 16) << 32) + int(m[2], 16) for m in (starts, ends)]
        replayed = at[1] - at[0]
    common.recovery(replayed // 1024, "KiB of WAL replayed")
    common.run(tool("pg_amcheck", "-h", scratch, "-d", "postgres", "--heapallindexed"))
    accounts, tellers, branches, deltas, rows = map(int, ask(
        scratch, """select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),
            (select sum(bbalance) from pgbench_branches), coalesce(sum(delta), 0), count(*) from pgbench_history"""
    ).split("|"))
    server.send_signal(3)
    server.wait(60)
    common.expect(accounts == tellers == branches == deltas,
                  f"accounts {accounts}, tellers {tellers}, branches {branches}, history {deltas}")
    common.expect(told <= rows, f"{told} transactions were reported, {rows} are there")
    common.units(rows)


verb, data, scratch, mode = common.arguments()
load(data, scratch) if verb == "load" else check(data, scratch)
