"""stores.py MODE DIR: real stores that write through mappings.

sqlite: transaction k sets two rows to k, in WAL mode, whose index is mapped.
mmap:   k goes into each of 64 pages of a mapping, from the first to the last.
rrd:    second k is put into x.rrd, then into y.rrd, by an rrdtool that maps them.
sqlite and mmap put k into DIR/log afterwards, by a call. check-MODE: whether a copy in DIR
could be of one instant."""
import mmap, os, sqlite3, struct, subprocess, sys

mode, where = sys.argv[1], sys.argv[2]
PAGES, PAGE = 64, 4096


def path(name):
    return os.path.join(where, name)


def word(data, at=0):
    return struct.unpack_from("<Q", data.ljust(at + 8, b"\0"), at)[0]


def check(words):
    """Falling from the first to the last by at most one in all."""
    ok = words == sorted(words, reverse=True) and words[0] <= words[-1] + 1 and words[0] > 0
    print(words[0])
    sys.exit(0 if ok else f"not of one instant: {words}")


def read(name):
    with open(path(name), "rb") as file:
        return file.read()


if mode == "check-sqlite":
    db = sqlite3.connect(path("db"))
    (verdict,) = db.execute("PRAGMA integrity_check").fetchone()
    rows = [v for (v,) in db.execute("SELECT v FROM t ORDER BY id")]
    if verdict != "ok" or rows[0] != rows[1]:
        sys.exit(f"{verdict}: {rows}")
    check([rows[0], word(read("log"))])
elif mode == "check-mmap":
    data = read("map")
    check([word(data, p * PAGE) for p in range(PAGES)] + [word(read("log"))])
elif mode == "check-rrd":
    for name in "xy":
        subprocess.run(["rrdtool", "dump", path(name + ".rrd")], check=True, stdout=subprocess.DEVNULL)
    last = [int(subprocess.run(["rrdtool", "last", path(n + ".rrd")], check=True, capture_output=True).stdout)
            for n in "xy"]
    check(last)

stats = os.open(os.environ["SNAPSHIM_TEST_STATS"], os.O_RDWR | os.O_CREAT)
log = os.open(path("log"), os.O_RDWR | os.O_CREAT)


def done(k):
    os.pwrite(log, struct.pack("<Q", k), 0)
    os.pwrite(stats, struct.pack("<Q", k), 0)


k = 0
if mode == "sqlite":
    db = sqlite3.connect(path("db"), isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=OFF")
    db.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v INTEGER)")
    db.execute("INSERT OR REPLACE INTO t VALUES (1, 0), (2, 0)")
    while True:
        k += 1
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE t SET v=? WHERE id=1", (k,))
        db.execute("UPDATE t SET v=? WHERE id=2", (k,))
        db.execute("COMMIT")
        done(k)
elif mode == "mmap":
    fd = os.open(path("map"), os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGES * PAGE)
    area = memoryview(mmap.mmap(fd, PAGES * PAGE)).cast("Q")
    while True:
        k += 1
        for page in range(PAGES):
            area[page * PAGE // 8] = k
        done(k)
elif mode == "rrd":
    start = 1_000_000_000
    tool = subprocess.Popen(["rrdtool", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(line):
        tool.stdin.write(line + "\n")
        tool.stdin.flush()
        for answer in tool.stdout:
            if answer.startswith("OK"):
                return
            if answer.startswith("ERROR"):
                sys.exit(answer)

    for name in "xy":
        say(f"create {path(name + '.rrd')} -b {start} -s 1 DS:v:GAUGE:10:U:U RRA:AVERAGE:0.5:1:3600")
    while True:
        k += 1
        for name in "xy":
            say(f"update {path(name + '.rrd')} {start + k}:{k}")
        done(k)
