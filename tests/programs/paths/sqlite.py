# sqlite.py MODE FILE N: see paths.c. MODE is a journal mode.
import os, signal, sqlite3, sys, time

mode, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
signal.alarm(120)
parent = os.getppid()
db = sqlite3.connect(path, isolation_level=None)
db.execute("pragma journal_mode=" + mode)
db.execute("pragma synchronous=off")
db.execute("create table if not exists t(i integer primary key, v text)")
i = 1
while count == 0 or i <= count:
    db.execute("replace into t values(?, ?)", (i % 100, "value %d" % i))
    i += 1
    if count == 0:
        time.sleep(0.0003)
        if os.getppid() != parent:
            break
db.close()
print(mode, i - 1, "records", file=sys.stderr)
