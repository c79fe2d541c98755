"""MariaDB with InnoDB tables, and procedures that move money."""

import pathlib
import re
import subprocess
import time

import common

WORKERS = 3
PROCEDURE = """delimiter //
create procedure work(w int) begin
    declare a, b, x int;
    loop
        set a = floor(rand() * {accounts}), x = 1 + floor(rand() * 100);
        set b = (a + 1 + floor(rand() * ({accounts} - 1))) mod {accounts};
        start transaction;
        update account set balance = balance - x where id = least(a, b);
        update account set balance = balance + x where id = greatest(a, b);
        insert into move(worker, amount, note) values (w, x, repeat(md5(rand()), 8));
        update done set count = count + 1 where worker = w;
        commit;
        do sleep(rand() * 0.02);
    end loop;
end//
"""


def client(scratch, *args):
    return ["mariadb", "--no-defaults", "-uroot", "-S", f"{scratch}/socket", "-N", "-B", *args]


def serve(data, scratch):
    log = pathlib.Path(f"{scratch}/log")
    server = common.start(
        ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}/db", f"--socket={scratch}/socket",
         "--skip-networking", f"--pid-file={scratch}/pid", "--innodb-buffer-pool-size=16M",
         "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=1"], log)

    def answers():
        common.expect(server.poll() is None, "it does not start:\n" + log.read_text()[-800:])
        ping = ["mariadb-admin", "--no-defaults", "-uroot", "-S", f"{scratch}/socket", "ping"]
        return subprocess.run(ping, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

    common.wait_until(answers, "mariadbd")
    return server


def ask(scratch, question):
    return common.run(client(scratch, "d", "-e", question)).split()


def load(data, scratch):
    common.run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}/db",
                "--auth-root-authentication-method=normal", "--skip-test-db"])
    serve(data, scratch)
    text = f"""create database d; use d;
        create table account(id int primary key, balance int) engine=InnoDB;
        create table move(id int primary key auto_increment, worker int, amount int, note text, key(note(40))) engine=InnoDB;
        create table done(worker int primary key, count int) engine=InnoDB;
        insert into account select seq, {common.START} from seq_0_to_{common.ACCOUNTS - 1};
        insert into done select seq, 0 from seq_0_to_{WORKERS - 1};
        """ + PROCEDURE.format(accounts=common.ACCOUNTS)
    subprocess.run(client(scratch), input=text, text=True, check=True, timeout=60)
    for worker in range(WORKERS):
        common.start(client(scratch, "d", "-e", f"call work({worker})"), f"{scratch}/client-{worker}")
    common.wait_until(lambda: int(ask(scratch, "select sum(count) from done")[0]) > 50, "the first updates")
    common.ready(scratch)
    common.wait_for_ever()


def check(data, scratch):
    server = serve(data, scratch)
    log = pathlib.Path(scratch, "log").read_text()
    lsn = re.search(r"(?:from|at) checkpoint LSN=(\d+)", log)
    end = re.search(r"(?:End of log at LSN=|up to (?:end of log )?LSN=|; log sequence number )(\d+)", log)
    replayed = int(end[1]) - int(lsn[1]) if lsn and end else 0
    common.recovery(max(replayed, 0) // 1024, "KiB of redo log replayed")
    undone = re.search(r"(\d+) transaction\(s\) which must be rolled back", log)
    common.recovery(int(undone[1]) if undone else 0, "transactions rolled back")
    common.run(["mariadb-check", "--no-defaults", "-uroot", "-S", f"{scratch}/socket", "--all-databases", "--extended"])
    said = common.run(client(scratch, "d", "-e", "check table account, move, done extended"))
    common.expect(said.count("OK") == 3, said)
    balance, done, moves = map(int, ask(scratch, """
        select sum(balance) from account; select sum(count) from done; select count(*) from move"""))
    server.kill()
    server.wait()
    common.expect(balance == common.TOTAL, f"balances add up to {balance}")
    common.expect(done == moves, f"{moves} moves, {done} counted")
    common.units(moves)


verb, data, scratch, mode = common.arguments()
load(data, scratch) if verb == "load" else check(data, scratch)
