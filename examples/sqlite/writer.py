"""writer.py DATABASE MODE: moves money between accounts, for ever. Knows nothing of snapshots.

At the end of each transaction all balances add up to 0, and `moves` has as many rows as `total`
says. MODE is SQLite's journal mode: delete or wal."""

import random
import sqlite3
import sys

ACCOUNTS = 10000

database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute(f"pragma journal_mode = {sys.argv[2]}")
# A small cache, so that transactions are written to the file before they are complete.
database.execute("pragma cache_size = 20")
# As fast as it can: what a snapshot shows does not depend on what was synced.
database.execute("pragma synchronous = off")
database.execute("pragma wal_autocheckpoint = 200")
database.executescript(
    """
    begin;
    create table account (id integer primary key, balance integer, note text);
    create table move (id integer primary key, amount integer);
    create table total (moves integer);
    insert into total values (0);
    """
)
database.executemany(
    "insert into account values (?, 0, ?)", ((i, "x" * 400) for i in range(ACCOUNTS))
)
database.execute("commit")
while True:
    amount = random.randrange(1, 100)
    database.execute("begin immediate")
    for account in random.sample(range(ACCOUNTS), 60):
        # Each time one gets what the next one gives.
        database.execute("update account set balance = balance + ? where id = ?", (amount, account))
        amount = -amount
    database.execute("insert into move (amount) values (?)", (amount,))
    database.execute("update total set moves = moves + 1")
    database.execute("commit")
