"""LMDB, written by several processes."""

import os

import lmdb

import common

WORKERS = 3


def open_(data, mode, **options):
    return lmdb.open(f"{data}/db", map_size=64 << 20, max_dbs=4, writemap=mode == "writemap", **options)


def number(txn, key, db):
    return int(txn.get(key, db=db))


def work(data, mode, worker):
    env = open_(data, mode)
    accounts, meta, log = [env.open_db(name) for name in (b"accounts", b"meta", b"log")]
    ledger = common.Ledger(data, worker)
    mine = b"done-%d" % worker
    while True:
        one, other, amount = common.transfer()
        with env.begin(write=True) as txn:
            for account, change in ((one, -amount), (other, amount)):
                key = b"%d" % account
                txn.put(key, b"%d" % (number(txn, key, accounts) + change), db=accounts)
            moves = number(txn, b"moves", meta) + 1
            txn.put(b"%08d" % moves, os.urandom(300).hex().encode(), db=log)
            txn.delete(b"%08d" % (moves - 500), db=log)
            txn.put(b"moves", b"%d" % moves, db=meta)
            txn.put(mine, b"%d" % (number(txn, mine, meta) + 1), db=meta)
        ledger.add()
        common.pause()


def prepare(data, mode):
    env = open_(data, mode)
    accounts, meta, log = [env.open_db(name) for name in (b"accounts", b"meta", b"log")]
    with env.begin(write=True) as txn:
        for account in range(common.ACCOUNTS):
            txn.put(b"%d" % account, b"%d" % common.START, db=accounts)
        txn.put(b"moves", b"0", db=meta)
        for worker in range(WORKERS):
            txn.put(b"done-%d" % worker, b"0", db=meta)
    env.close()


def check(data, mode):
    # Every page of every tree, and the list of free ones.
    common.run(["mdb_stat", "-ef", "-a", f"{data}/db"])
    common.run(["mdb_dump", "-a", "-f", "/dev/null", f"{data}/db"])
    common.recovery(0, "repairs (there are none: the newer good meta page counts)")
    env = open_(data, mode)
    accounts, meta, log = [env.open_db(name, create=False) for name in (b"accounts", b"meta", b"log")]
    with env.begin() as txn:
        balance = sum(int(value) for _, value in txn.cursor(db=accounts))
        moves = number(txn, b"moves", meta)
        done = [number(txn, b"done-%d" % worker, meta) for worker in range(WORKERS)]
        keys = [int(key) for key, _ in txn.cursor(db=log)]
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(sum(done) == moves, f"{moves} moves, {sum(done)} counted")
    expected = list(range(max(1, moves - 499), moves + 1))
    common.expect(keys == expected, f"{len(keys)} log entries of {moves} moves")
    for worker in range(WORKERS):
        common.expect_ledger(data, worker, done[worker])
    # A writer can still write.
    with env.begin(write=True) as txn:
        txn.put(b"moves", b"0", db=meta)
    common.units(moves)


verb, data, scratch, mode = common.arguments()
if verb == "load":
    prepare(data, mode)
    common.workers(WORKERS, lambda worker: work(data, mode, worker))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data, mode)
