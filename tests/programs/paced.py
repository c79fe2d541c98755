"""paced.py CONTROL DATABASE: the SQLite writer of the benchmark.

Each transaction adds one row to each of two tables and moves an amount between two
accounts; the words and the times are those of paced.h.
"""
import ctypes, mmap, os, signal, sqlite3, sys, time

READY, PID, RUN, RATE, BURST, REACHED, CALLS, BUCKETS, ORIGIN, IDLE = range(10)
PAUSE, GO, END = range(3)

# PR_SET_PDEATHSIG, PR_SET_TIMERSLACK
libc = ctypes.CDLL(None)
libc.prctl(1, signal.SIGKILL)
libc.prctl(29, 1)

with open(sys.argv[1], "r+b") as file:
    shared = mmap.mmap(file.fileno(), 0)
words = memoryview(shared)[:4096].cast("Q")
buckets = memoryview(shared)[4096:].cast("I")

db = sqlite3.connect(sys.argv[2], isolation_level=None)
db.execute("pragma synchronous = normal")
db.executescript(
    "create table a (n integer primary key, fill blob);"
    "create table b (n integer primary key, fill blob);"
    "create table account (id integer primary key, amount integer);"
    "insert into account values (0, 0), (1, 0);"
)
serial = 0


def call():
    global serial
    serial += 1
    fill = serial.to_bytes(8, "little") * 64
    db.execute("begin immediate")
    db.execute("insert into a values (?, ?)", (serial, fill))
    db.execute("update account set amount = amount + ? where id = ?", (serial, serial % 2))
    db.execute("update account set amount = amount - ? where id = ?", (serial, 1 - serial % 2))
    db.execute("insert into b values (?, ?)", (serial, fill))
    db.execute("commit")


def bucket(ns):
    return 2 * min((ns - words[ORIGIN]) // 1000000, words[BUCKETS] - 1)


words[PID] = os.getpid()
words[READY] = 1
while words[RUN] != END:
    for _ in range(words[BURST]):
        call()
        words[CALLS] += 1
    words[BURST] = 0
    due = time.monotonic_ns()
    while words[RUN] == GO:
        rate = words[RATE]
        early = due - time.monotonic_ns()
        if rate and early > 0:
            time.sleep(early / 1e9)
        call()
        end = time.monotonic_ns()
        at = bucket(due)
        buckets[at] = max(buckets[at], min((end - due) // 1000, 2**32 - 1))
        buckets[bucket(end) + 1] += 1
        words[REACHED] = due
        words[CALLS] += 1
        due = due + 1000000000 // rate if rate else end
    if words[RUN] == PAUSE and not words[BURST]:
        words[IDLE] = 1
        while words[RUN] == PAUSE and not words[BURST]:
            time.sleep(0.005)
        words[IDLE] = 0
