"""check.py DIRECTORY: whether the database in a copy is sound, as SQLite and its sums tell.

Works on a copy of the copy: opening it may roll a transaction back, and that writes."""

import pathlib
import shutil
import sqlite3
import sys
import tempfile

with tempfile.TemporaryDirectory() as scratch:
    try:
        for file in pathlib.Path(sys.argv[1]).glob("bank.db*"):
            shutil.copy(file, scratch)
        database = sqlite3.connect(f"{scratch}/bank.db")

        def ask(question):
            return database.execute(question).fetchone()[0]

        found = ask("pragma integrity_check")
        if found != "ok":
            print("corrupt:", found.replace("\n", " ")[:60])
            sys.exit(1)
        total, moves = ask("select moves from total"), ask("select count(*) from move")
        balance = ask("select sum(balance) from account")
    except FileNotFoundError as error:
        print("a file is gone:", error.filename)
        sys.exit(1)
    except sqlite3.DatabaseError as error:
        print("corrupt:", error)
        sys.exit(1)
    if balance != 0 or moves != total or total == 0:
        print(f"wrong: {moves} moves of {total}, balances add up to {balance}")
        sys.exit(1)
    print(f"sound: {moves} moves")
