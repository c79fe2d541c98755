"""gdbm, whose lock is held from open to close: opened by several processes in turn for each
update (`turns`), or kept open by one that syncs after each (`open`, without mapping the file:
`nommap`)."""

import ctypes
import pathlib

import common

WORKERS = 3
READER, WRCREAT, REPLACE = 0, 2, 1
NOMMAP = 0x80

gdbm = ctypes.CDLL("libgdbm.so.6")


class Datum(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("size", ctypes.c_int)]


gdbm.gdbm_open.restype = ctypes.c_void_p
gdbm.gdbm_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
gdbm.gdbm_close.argtypes = gdbm.gdbm_sync.argtypes = [ctypes.c_void_p]
gdbm.gdbm_store.argtypes = [ctypes.c_void_p, Datum, Datum, ctypes.c_int]
gdbm.gdbm_fetch.argtypes = [ctypes.c_void_p, Datum]
gdbm.gdbm_delete.argtypes = [ctypes.c_void_p, Datum]
gdbm.gdbm_fetch.restype = Datum
gdbm.gdbm_firstkey.argtypes = [ctypes.c_void_p]
gdbm.gdbm_firstkey.restype = Datum
gdbm.gdbm_nextkey.argtypes = [ctypes.c_void_p, Datum]
gdbm.gdbm_nextkey.restype = Datum
gdbm.gdbm_count.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_ulonglong)]
gdbm.gdbm_avail_verify.argtypes = [ctypes.c_void_p]
gdbm.gdbm_needs_recovery.argtypes = [ctypes.c_void_p]
gdbm.gdbm_strerror.restype = ctypes.c_char_p
gdbm.gdbm_errno_location.restype = ctypes.POINTER(ctypes.c_int)
free = ctypes.CDLL(None).free
free.argtypes = [ctypes.c_void_p]


def datum(text):
    return Datum(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))


def error():
    return gdbm.gdbm_strerror(gdbm.gdbm_errno_location().contents).decode()


def open_(data, mode, how=WRCREAT):
    flags = how | (NOMMAP if mode == "nommap" else 0)
    return gdbm.gdbm_open(f"{data}/bank.gdbm".encode(), 0, flags, 0o644, None)


def put(db, key, value):
    if gdbm.gdbm_store(db, datum(key), datum(value), REPLACE) != 0:
        common.fail(f"store: {error()}")


def get(db, key):
    found = gdbm.gdbm_fetch(db, datum(key))
    if not found.at:
        common.fail(f"no {key}: {error()}")
    text = ctypes.string_at(found.at, found.size)
    free(found.at)
    return text


def update(db, worker):
    one, other, amount = common.transfer()
    moves = int(get(db, b"moves")) + 1
    put(db, b"moves", b"%d" % moves)
    for account, change in ((one, -amount), (other, amount)):
        key = b"account-%d" % account
        put(db, key, b"%d" % (int(get(db, key)) + change))
    put(db, b"log-%d" % moves, b"%d " % moves * (moves % 50 + 1))
    if moves > 500:
        gdbm.gdbm_delete(db, datum(b"log-%d" % (moves - 500)))
    key = b"done-%d" % worker
    put(db, key, b"%d" % (int(get(db, key)) + 1))
    put(db, b"last", b"%d" % moves)


def work(data, mode, worker):
    ledger = common.Ledger(data, worker, "close" if mode == "turns" else "sync")
    db = None
    while True:
        # Whoever finds it locked tries again.
        while not db:
            db = open_(data, mode)
            if not db:
                common.pause()
        update(db, worker)
        if mode == "turns":
            gdbm.gdbm_close(db)
            db = None
        else:
            gdbm.gdbm_sync(db)
        ledger.add()
        common.pause()


def prepare(data, mode, workers):
    db = open_(data, mode)
    for account in range(common.ACCOUNTS):
        put(db, b"account-%d" % account, b"%d" % common.START)
    for worker in range(workers):
        put(db, b"done-%d" % worker, b"0")
    put(db, b"moves", b"0")
    put(db, b"last", b"0")
    gdbm.gdbm_close(db)


def check(data, mode, workers):
    db = open_(data, "", READER)
    common.expect(db, f"cannot be opened: {error()}")
    common.recovery(int(gdbm.gdbm_needs_recovery(db) != 0), "recoveries needed")
    common.expect(gdbm.gdbm_avail_verify(db) == 0, f"the list of free space: {error()}")
    count = ctypes.c_ulonglong()
    common.expect(gdbm.gdbm_count(db, ctypes.byref(count)) == 0, f"count: {error()}")
    found = {}
    key = gdbm.gdbm_firstkey(db)
    while key.at:
        text = ctypes.string_at(key.at, key.size)
        found[text] = get(db, text)
        key = gdbm.gdbm_nextkey(db, key)
    common.expect(len(found) == count.value, f"{len(found)} keys, {count.value} counted")
    moves, last = int(found[b"moves"]), int(found[b"last"])
    balance = sum(int(value) for key, value in found.items() if key.startswith(b"account-"))
    done = [int(found[b"done-%d" % worker]) for worker in range(workers)]
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(moves == last == sum(done), f"{moves} moves, {last} the last, {sum(done)} counted")
    for move in range(max(1, moves - 499), moves + 1):
        expected = b"%d " % move * (move % 50 + 1)
        common.expect(found.get(b"log-%d" % move) == expected, f"entry {move} is not what was stored")
    for worker in range(workers):
        common.expect_ledger(data, worker, done[worker])
    gdbm.gdbm_close(db)
    common.units(moves)


verb, data, scratch, mode = common.arguments()
workers = WORKERS if mode == "turns" else 1
if verb == "load":
    prepare(data, mode, workers)
    common.workers(workers, lambda worker: work(data, mode, worker))
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data, mode, workers)
