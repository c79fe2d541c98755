"""Redis with an append-only file that is rewritten all the time, synced before each answer (`aof`) or
each second (`everysec`: then an answer may come before the command is in the file), or with dumps
alone (`rdb`); several clients move money in transactions."""

import os
import pathlib
import socket

import common

WORKERS = 3


class Client:
    """Just enough of the protocol."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")

    def send(self, *words):
        words = [str(word).encode() for word in words]
        text = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)
        self.socket.sendall(text)

    def answer(self):
        line = self.file.readline()
        kind, text = line[:1], line[1:].strip()
        if kind == b"-" or not line:
            raise OSError(text.decode() or "the server has gone")
        if kind == b"$":
            return None if text == b"-1" else self.file.read(int(text) + 2)[:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(text))]
        return int(text) if kind == b":" else text

    def __call__(self, *words):
        self.send(*words)
        return self.answer()

    def transaction(self, *commands):
        for command in [("multi",), *commands, ("exec",)]:
            self.send(*command)
        return [self.answer() for _ in range(len(commands) + 2)][-1]


def serve(data, scratch, mode, settings=()):
    path = f"{scratch}/redis"
    pathlib.Path(path).unlink(missing_ok=True)
    command = ["redis-server", "--port", "0", "--unixsocket", path, "--dir", data, "--daemonize", "no"]
    for name, value in {
        "appendonly": "no" if mode == "rdb" else "yes",
        "appendfsync": "always" if mode == "aof" else "everysec",
        "save": "1 1" if mode == "rdb" else "",
        "auto-aof-rewrite-min-size": "400kb", "auto-aof-rewrite-percentage": "50",
        "rdb-save-incremental-fsync": "no", "stop-writes-on-bgsave-error": "no", **dict(settings),
    }.items():
        command += [f"--{name}", value]
    log = f"{scratch}/log"
    server = common.start(command, log)

    def answers():
        try:
            return Client(path)("ping") == b"PONG"
        except OSError:
            common.expect(server.poll() is None, "it does not start:\n" + pathlib.Path(log).read_text()[-600:])
            return False

    common.wait_until(answers, "redis-server")
    return server, Client(path)


def work(data, scratch, mode, worker):
    client = Client(f"{scratch}/redis")
    ledger = common.Ledger(data, worker) if mode == "aof" else None
    count = 0
    while True:
        one, other, amount = common.transfer()
        count += 1
        client.transaction(
            ("hincrby", "accounts", one, -amount), ("incr", "moves"),
            ("lpush", "log", f"{worker} {count} " * 20), ("ltrim", "log", 0, 499),
            ("hincrby", "accounts", other, amount), ("incr", f"done-{worker}"))
        if ledger:
            ledger.add()
        common.pause()


def check(data, scratch, mode):
    cut = 0
    appended = 0
    for file in pathlib.Path(data).rglob("*"):
        if file.name.endswith(".manifest"):
            said = common.run(["sh", "-c", 'redis-check-aof "$1" || :', "sh", str(file)])
            # A command cut off at the end is cut away when it is started.
            cut += "All AOF files and manifest are valid" not in said
        # What a dump that is still being written leaves is not read by anybody.
        if file.name.endswith(".rdb") and not file.name.startswith("temp-"):
            common.run(["redis-check-rdb", str(file)])
        if file.name.endswith(".incr.aof"):
            appended += file.stat().st_size
    if mode != "rdb":
        common.recovery(cut, "tails cut off")
        common.recovery(appended // 1024, "KiB of commands replayed")
    else:
        left = sum(file.name.startswith("temp-") for file in pathlib.Path(data).iterdir())
        common.recovery(left, "unfinished dumps ignored")
    server, ask = serve(data, scratch, mode, [("auto-aof-rewrite-percentage", "0"), ("save", "")])
    balance = sum(int(value) for value in ask("hvals", "accounts"))
    moves, entries = int(ask("get", "moves")), ask("llen", "log")
    done = [int(ask("get", f"done-{worker}") or 0) for worker in range(WORKERS)]
    server.kill()
    server.wait()
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(sum(done) == moves, f"{moves} moves, {sum(done)} counted")
    common.expect(entries == min(moves, 500), f"{entries} log entries of {moves} moves")
    if mode == "aof":
        for worker in range(WORKERS):
            common.expect_ledger(data, worker, done[worker])
    common.units(moves)


verb, data, scratch, mode = common.arguments()
if verb == "load":
    server, ask = serve(data, scratch, mode)
    for account in range(common.ACCOUNTS):
        ask("hset", "accounts", account, common.START)
    ask("set", "moves", 0)
    common.workers(WORKERS, lambda worker: work(data, scratch, mode, worker))
    made = "dump.rdb" if mode == "rdb" else "appendonlydir"
    common.wait_until(lambda: os.path.exists(f"{data}/{made}") and int(ask("get", "moves")) > 50, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()
else:
    check(data, scratch, mode)
