"""SQLite in one of its modes, written by several processes."""

import os
import pathlib
import sqlite3
import time

import common

WORKERS = 4
KEPT = 500
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def connect(data, mode):
    database = sqlite3.connect(f"{data}/bank.db", isolation_level=None, timeout=60)
    if mode == "mmap":
        database.execute("pragma mmap_size = 268435456")
    return database


def prepare(data, mode):
    database = connect(data, mode)
    database.execute(f"pragma journal_mode = {'wal' if mode in ('wal', 'mmap') else 'delete'}")
    database.executescript(f"""
        begin;
        create table account(id integer primary key, balance integer);
        create table done(worker integer primary key, count integer);
        create table move(id integer primary key, worker, one, other, amount, note text);
        create index notes on move(note);
        create table total(moves integer);
        insert into total values (0);
        with recursive n(i) as (select 0 union all select i + 1 from n where i < {common.ACCOUNTS - 1})
            insert into account select i, {common.START} from n;
        with recursive n(i) as (select 0 union all select i + 1 from n where i < {WORKERS - 1})
            insert into done select i, 0 from n;
        commit;""")
    database.close()


def work(data, mode, number):
    database = connect(data, mode)
    ledger = common.Ledger(data, number, "plain")
    while True:
        one, other, amount = common.transfer()
        ask = database.execute
        ask("begin immediate")
        ask("update account set balance = balance - ? where id = ?", (amount, one))
        ask("insert into move(worker, one, other, amount, note) values (?, ?, ?, ?, ?)",
            (number, one, other, amount, f"{number} {ledger.count} " * 20))
        ask("update account set balance = balance + ? where id = ?", (amount, other))
        ask("delete from move where id <= (select max(id) from move) - ?", (KEPT,))
        ask("update done set count = count + 1 where worker = ?", (number,))
        ask("update total set moves = moves + 1")
        ask("commit")
        ledger.add()
        # A bench writes as fast as it can.
        if mode_pause:
            common.pause()


def is_hot(data):
    """As SQLite tells it: a journal that is there and whose header was not overwritten."""
    try:
        with open(f"{data}/bank.db-journal", "rb") as file:
            return file.read(8) == JOURNAL_MAGIC
    except FileNotFoundError:
        return False


def check(data, mode):
    common.recovery(int(is_hot(data)), "hot journals")
    database = connect(data, mode)

    def ask(question):
        return database.execute(question).fetchone()

    try:
        if mode != "rollback":
            # Of frames in the log, those that recovery found valid.
            ask("select count(*) from total")
            common.recovery(max(ask("pragma wal_checkpoint(passive)")[1], 0), "frames replayed")
        found = ask("pragma integrity_check")[0]
        common.expect(found == "ok", f"integrity_check: {found}")
        balance = ask("select sum(balance) from account")[0]
        moves, counted = ask("select moves, (select sum(count) from done) from total")
        first, last, rows = ask("select min(id), max(id), count(*) from move")
        done = dict(database.execute("select worker, count from done").fetchall())
    except sqlite3.DatabaseError as error:
        common.fail(error)
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(moves == counted == last, f"{moves} moves, {counted} counted, {last} the last")
    common.expect(rows == last - first + 1 == min(moves, KEPT), f"{rows} rows from {first} to {last}")
    for number in range(WORKERS):
        common.expect_ledger(data, number, done[number])
    common.units(moves)


verb, data, scratch, mode = common.arguments()
mode, _, option = mode.partition("-")
mode_pause = option != "bench"
mode = mode or "rollback"
if verb == "load":
    if not pathlib.Path(data, "bank.db").exists():
        prepare(data, mode)
    if option == "bench":
        WORKERS = 1
    common.workers(WORKERS, lambda number: work(data, mode, number))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data, mode)
