"""What the loads and checks of the application matrix share.

Each application is a script of its own, `NAME.py VERB DATA SCRATCH [MODE]`. `load` works on
DATA, which is watched, until it is ended, and makes SCRATCH/ready once it is at work; sockets and
logs are in SCRATCH. `check` opens a restored DATA with the program itself, and ends with 0 if
the program's own checker and the invariants are content; else it says what is wrong.

Money moves between accounts, so that balances add up to what they did in the beginning; and each
worker writes into a file of its own, its ledger, how many updates it was told are committed:
what was acknowledged is never missing, and at most one update is ahead of its ledger.
"""

import ctypes
import os
import pathlib
import random
import signal
import socket
import struct
import subprocess
import sys
import time

ACCOUNTS = 50
START = 1000
TOTAL = ACCOUNTS * START


def arguments():
    """Verb, data, scratch directory, mode."""
    verb, data, scratch = sys.argv[1:4]
    return verb, data, scratch, sys.argv[4] if len(sys.argv) > 4 else ""


def fail(text):
    """Ends a check: the copy is not sound."""
    print(str(text).strip(), file=sys.stderr)
    sys.exit(1)


def expect(is_so, text):
    if not is_so:
        fail(text)


def recovery(number, what):
    """What the program had to do to open the copy."""
    print("recovery", number, what)


def units(number):
    """How many updates the copy has seen: that the load was one."""
    print("units", number)


def ready(scratch):
    pathlib.Path(scratch, "ready").touch()


class Ledger:
    """What one worker was told is committed. Kept the way the application keeps its own files, so
    that it is not in the way of a commit point: synced, or closed, after each update."""

    def __init__(self, data, who, how="sync"):
        self.path = f"{data}/ledger-{who}"
        self.how = how
        self.file = None if how == "close" else self.open()
        self.count = 0

    def open(self):
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def add(self):
        self.count += 1
        file = self.open() if self.file is None else self.file
        os.pwrite(file, struct.pack("<q", self.count), 0)
        if self.how == "sync":
            os.fdatasync(file)
        if self.file is None:
            os.close(file)


def acknowledged(data, who):
    try:
        with open(f"{data}/ledger-{who}", "rb") as file:
            text = file.read(8)
    except FileNotFoundError:
        return 0
    return struct.unpack("<q", text)[0] if len(text) == 8 else 0


def expect_ledger(data, who, done, ahead=1):
    """That nothing acknowledged is missing, and not more than one update is under way."""
    told = acknowledged(data, who)
    expect(told <= done, f"worker {who} was told of {told} updates, and {done} are there")
    expect(done <= told + ahead, f"worker {who} has made {done} updates, {told} in its ledger")


def transfer():
    """From, to, amount."""
    one, other = random.sample(range(ACCOUNTS), 2)
    return one, other, random.randint(1, 100)


def pause():
    time.sleep(random.random() * 0.004)


def dies_with_parent():
    """The kernel ends this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def workers(count, work):
    """`work(number)` in so many processes, for ever; ends when one of them does."""
    for number in range(count):
        if os.fork() == 0:
            dies_with_parent()
            status = 1
            try:
                random.seed()
                work(number)
            except BaseException as error:
                print(f"worker {number}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)


def wait_for_ever():
    os.wait()
    sys.exit("a part of the load has ended")


def start(command, log, **options):
    """A server, which ends with this process."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            preexec_fn=dies_with_parent, **options)


def run(command, **options):
    """A tool that must succeed; what it says."""
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=120, errors="replace", **options)
    if ended.returncode != 0:
        fail(f"{command[0]}: status {ended.returncode}: {ended.stdout[-600:]}")
    return ended.stdout


def wait_until(is_so, what, limit=90):
    until = time.monotonic() + limit
    while not is_so():
        if time.monotonic() > until:
            fail(f"{what}: not within {limit} s")
        time.sleep(0.02)
