"""RocksDB, written by several threads of one process."""

import ctypes
import pathlib
import threading
import os

import common

WORKERS = 2
lib = ctypes.CDLL(next(str(p) for p in sorted(pathlib.Path("/usr/lib/x86_64-linux-gnu").glob("librocksdb.so.*"))))
P, S, T = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t


def function(name, result, *args):
    found = getattr(lib, f"rocksdb_{name}")
    found.restype, found.argtypes = result, args
    return found


ERR = ctypes.POINTER(ctypes.c_char_p)
options_create = function("options_create", P)
set_create = function("options_set_create_if_missing", None, P, ctypes.c_ubyte)
set_buffer = function("options_set_write_buffer_size", None, P, T)
set_paranoid = function("options_set_paranoid_checks", None, P, ctypes.c_ubyte)
open_db = function("open", P, P, S, ERR)
close_db = function("close", None, P)
write_options = function("writeoptions_create", P)
set_sync = function("writeoptions_set_sync", None, P, ctypes.c_ubyte)
read_options = function("readoptions_create", P)
batch_create = function("writebatch_create", P)
batch_put = function("writebatch_put", None, P, S, T, S, T)
batch_delete = function("writebatch_delete", None, P, S, T)
batch_destroy = function("writebatch_destroy", None, P)
write_batch = function("write", None, P, P, P, ERR)
get_value = function("get", P, P, P, S, T, ctypes.POINTER(T), ERR)
free = function("free", None, P)
iterate = function("create_iterator", P, P, P)
iter_first = function("iter_seek_to_first", None, P)
iter_valid = function("iter_valid", ctypes.c_ubyte, P)
iter_next = function("iter_next", None, P)
iter_key = function("iter_key", P, P, ctypes.POINTER(T))
iter_value = function("iter_value", P, P, ctypes.POINTER(T))
iter_error = function("iter_get_error", None, P, ERR)


def checked(call, *args):
    error = ctypes.c_char_p()
    result = call(*args, ctypes.byref(error))
    if error.value:
        common.fail(error.value.decode())
    return result


def open_(data):
    options = options_create()
    set_create(options, 1)
    set_paranoid(options, 1)
    # Small, so that tables are written and merged all the time.
    set_buffer(options, 256 << 10)
    return checked(open_db, options, f"{data}/db".encode())


def get(db, key):
    size = T()
    at = checked(get_value, db, READ, key, len(key), ctypes.byref(size))
    if not at:
        return 0
    text = ctypes.string_at(at, size.value)
    free(at)
    return int(text)


def batch(db, puts, deletes=()):
    all_ = batch_create()
    for key, value in puts:
        batch_put(all_, key, len(key), value, len(value))
    for key in deletes:
        batch_delete(all_, key, len(key))
    checked(write_batch, db, WRITE, all_)
    batch_destroy(all_)


def work(db, data, worker, lock):
    ledger = common.Ledger(data, worker)
    while True:
        one, other, amount = common.transfer()
        with lock:
            puts = [(b"account-%d" % account, b"%d" % (get(db, b"account-%d" % account) + change))
                    for account, change in ((one, -amount), (other, amount))]
            moves = get(db, b"moves") + 1
            mine = b"done-%d" % worker
            puts += [(b"moves", b"%d" % moves), (mine, b"%d" % (get(db, mine) + 1)),
                     (b"log-%08d" % moves, os.urandom(800))]
            batch(db, puts, [b"log-%08d" % (moves - 500)])
        ledger.add()
        common.pause()


def check(data):
    said = common.run(["ldb", f"--db={data}/db", "checkconsistency"])
    common.expect("OK" in said, said)
    for table in pathlib.Path(data, "db").glob("*.sst"):
        common.run(["sst_dump", f"--file={table}", "--command=verify"])
    logs = sum(f.stat().st_size for f in pathlib.Path(data, "db").glob("*.log"))
    common.recovery(logs // 1024, "KiB of log replayed")
    db = open_(data)
    found = {}
    at = iterate(db, READ)
    iter_first(at)
    size = T()
    while iter_valid(at):
        key = ctypes.string_at(iter_key(at, ctypes.byref(size)), size.value)
        found[key] = ctypes.string_at(iter_value(at, ctypes.byref(size)), size.value)
        iter_next(at)
    checked(iter_error, at)
    balance = sum(int(value) for key, value in found.items() if key.startswith(b"account-"))
    moves = int(found[b"moves"])
    done = [int(found.get(b"done-%d" % worker, b"0")) for worker in range(WORKERS)]
    keys = sorted(int(key[4:]) for key in found if key.startswith(b"log-"))
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(sum(done) == moves, f"{moves} moves, {sum(done)} counted")
    common.expect(keys == list(range(max(1, moves - 499), moves + 1)), f"{len(keys)} log entries of {moves} moves")
    for worker in range(WORKERS):
        common.expect_ledger(data, worker, done[worker])
    common.units(moves)


WRITE, READ = write_options(), read_options()
verb, data, scratch, mode = common.arguments()
if verb == "load":
    set_sync(WRITE, 1)
    db = open_(data)
    batch(db, [(b"account-%d" % account, b"%d" % common.START) for account in range(common.ACCOUNTS)] + [(b"moves", b"0")])
    lock = threading.Lock()
    for worker in range(WORKERS):
        threading.Thread(target=work, args=(db, data, worker, lock), daemon=True).start()
    common.wait_until(lambda: common.acknowledged(data, 0) > 3, "the first updates")
    common.ready(scratch)
    threading.Event().wait()
else:
    check(data)
