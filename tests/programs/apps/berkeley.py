"""Berkeley DB with transactions, written by several processes."""

import os

from bsddb3 import db

import common

WORKERS = 3
FLAGS = db.DB_CREATE | db.DB_INIT_MPOOL | db.DB_INIT_LOCK | db.DB_INIT_LOG | db.DB_INIT_TXN


def open_env(data, flags=0):
    env = db.DBEnv()
    env.set_lk_detect(db.DB_LOCK_DEFAULT)
    env.log_set_config(db.DB_LOG_AUTO_REMOVE, 1)
    env.open(f"{data}/env", FLAGS | flags)
    return env


def open_db(env, name, kind=db.DB_BTREE):
    table = db.DB(env)
    table.open(name, None, kind, db.DB_CREATE | db.DB_AUTO_COMMIT)
    return table


def work(data, worker):
    env = open_env(data)
    accounts, meta = open_db(env, "accounts"), open_db(env, "meta")
    log = open_db(env, "log", db.DB_HASH)
    ledger = common.Ledger(data, worker)

    def add(txn, table, key, change):
        value = int(table.get(key, txn=txn, flags=db.DB_RMW)) + change
        table.put(key, b"%d" % value, txn=txn)
        return value

    while True:
        one, other, amount = common.transfer()
        txn = env.txn_begin()
        try:
            moves = add(txn, meta, b"moves", 1)
            add(txn, accounts, b"%d" % one, -amount)
            add(txn, accounts, b"%d" % other, amount)
            log.put(b"%08d" % moves, os.urandom(200), txn=txn)
            if moves > 500:
                log.delete(b"%08d" % (moves - 500), txn=txn)
            add(txn, meta, b"done-%d" % worker, 1)
        except db.DBLockDeadlockError:
            txn.abort()
            continue
        txn.commit()
        ledger.add()
        if ledger.count % 200 == 0:
            env.txn_checkpoint(0, 0, 0)
        common.pause()


def prepare(data):
    os.mkdir(f"{data}/env")
    env = open_env(data)
    accounts, meta = open_db(env, "accounts"), open_db(env, "meta")
    log = open_db(env, "log", db.DB_HASH)
    for account in range(common.ACCOUNTS):
        accounts.put(b"%d" % account, b"%d" % common.START)
    meta.put(b"moves", b"0")
    for worker in range(WORKERS):
        meta.put(b"done-%d" % worker, b"0")
    for table in (accounts, meta, log):
        table.close()
    env.close()


def check(data):
    logs = sum(f.stat().st_size for f in os.scandir(f"{data}/env") if f.name.startswith("log."))
    common.recovery(logs // 1024, "KiB of log looked through")
    env = open_env(data, db.DB_RECOVER)
    env.close()
    common.run(["db5.3_verify", "-h", f"{data}/env", "accounts", "meta", "log"])
    env = open_env(data)
    accounts, meta = open_db(env, "accounts"), open_db(env, "meta")
    log = open_db(env, "log", db.DB_HASH)
    balance = sum(int(value) for value in accounts.values())
    moves = int(meta[b"moves"])
    done = [int(meta[b"done-%d" % worker]) for worker in range(WORKERS)]
    keys = sorted(int(key) for key in log.keys())
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(sum(done) == moves, f"{moves} moves, {sum(done)} counted")
    common.expect(keys == list(range(max(1, moves - 499), moves + 1)), f"{len(keys)} log entries of {moves} moves")
    for worker in range(WORKERS):
        common.expect_ledger(data, worker, done[worker])
    common.units(moves)


verb, data, scratch, mode = common.arguments()
if verb == "load":
    prepare(data)
    common.workers(WORKERS, lambda worker: work(data, worker))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data)
