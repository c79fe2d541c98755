"""moves.py DATABASE: whether the writer has moved money yet, by reading the database it writes."""

import sqlite3
import sys

database = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
sys.exit(database.execute("select moves from total").fetchone()[0] == 0)
