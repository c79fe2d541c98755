//! Large programs, and small ones that are hard on hooks, under the shim: they do what
//! they do without it, while snapshots are taken.
//!
//! What these programs write in ways that nobody can hold makes snapshots unverified;
//! here it only matters that nothing breaks. How many were verified is printed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use snapshim_tests::effect::{self, Script};
use snapshim_tests::process::{self, installed};
use snapshim_tests::product;

const LIMIT: Duration = Duration::from_secs(240);

/// Who runs what refuses to be root.
const NOBODY: &str = "nobody";

fn same(
    name: &str,
    programs: &Path,
    user: Option<&str>,
    script: &str,
    expect: &str,
    except: &[&str],
) {
    effect::same(&Script {
        name: &format!("apps-{name}"),
        script,
        except,
        expect,
        programs,
        limit: LIMIT,
        user,
    });
}

/// `expect`: part of what it says when it works.
fn app(name: &str, user: Option<&str>, script: &str, expect: &str, except: &[&str]) {
    same(
        name,
        Path::new("/nonexistent"),
        user,
        script,
        expect,
        except,
    );
}

#[track_caller]
fn needs(tool: &str, package: &str) {
    assert!(
        installed(tool),
        "this test needs {tool}: apt-get install {package}"
    );
}

#[test]
fn postgresql_works() {
    let bin = std::fs::read_dir("/usr/lib/postgresql")
        .ok()
        .and_then(|versions| versions.flatten().map(|v| v.path().join("bin")).max())
        .expect("this test needs PostgreSQL: apt-get install postgresql");
    // The cluster itself holds times and ids: what it answers is compared.
    let script = format!(
        r#"export PATH={}:$PATH PGHOST=$PWD PGUSER=tester PGDATABASE=postgres
export PGDATA=$PWD/cluster
initdb -U tester -A trust -E UTF8 --locale=C >"$HOME/initdb" || cat "$HOME/initdb"
printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '$PWD'" "shared_buffers = 16MB" \
    "max_connections = 20" >>$PGDATA/postgresql.conf
start() {{ pg_ctl -w -t 60 -l "$HOME/log" start >/dev/null || cat "$HOME/log"; }}
ask() {{ psql -XAtc "$1"; }}
start
pgbench -i -s 1 -q 2>/dev/null >&2; echo initialised $?
pgbench -n -c 4 -j 2 -t 100 2>/dev/null >&2; echo run $?
ask "create table t as select i, repeat('x', i) as v from generate_series(1, 500) i; create index on t(v)"
ask "checkpoint; vacuum analyze t"
pg_ctl -w stop -m fast >/dev/null; echo stopped $?
start
ask "select count(*) from pgbench_history"
ask "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
ask "select count(*), sum(length(v)) from t"
ask "select nothing"
pg_ctl -w stop -m immediate >/dev/null; echo killed $?
start
ask "select count(*), sum(length(v)) from t"
pg_ctl -w stop >/dev/null; echo stopped $?
pg_amcheck --version >/dev/null; pg_controldata | grep 'cluster state'
rm -rf cluster"#,
        bin.display()
    );
    app(
        "postgresql",
        Some(NOBODY),
        &script,
        "stopped 0\n400\nt\n500|125250\nkilled 0\n500|125250\nstopped 0\n",
        &[],
    );
}

#[test]
fn mariadb_works() {
    needs("mariadbd", "mariadb-server");
    app(
        "mariadb",
        Some(NOBODY),
        r#"mariadb-install-db --no-defaults --datadir="$PWD/db" --auth-root-authentication-method=normal \
    --skip-test-db >"$HOME/install" 2>&1 || cat "$HOME/install"
start() {
    mariadbd --no-defaults --datadir="$PWD/db" --socket="$PWD/socket" --skip-networking \
        --pid-file="$PWD/pid" --innodb-buffer-pool-size=16M >>"$HOME/log" 2>&1 &
    server=$!
    while kill -0 $server 2>/dev/null; do
        mariadb-admin --no-defaults -uroot -S "$PWD/socket" ping >/dev/null 2>&1 && return
        sleep 0.1
    done
    cat "$HOME/log"
}
ask() { mariadb --no-defaults -uroot -S "$PWD/socket" -N -B "$@"; }
stop() { mariadb-admin --no-defaults -uroot -S "$PWD/socket" shutdown; wait $server; echo ended $?; }
start
ask -e "create database d; create table d.t (i int primary key auto_increment, v varchar(100)) engine=InnoDB;
    create table d.a (i int primary key, v text) engine=Aria"
for i in $(seq 200); do
    echo "insert into t(v) values ('value $i'), ('other $i'); replace into a values($i % 50, '$i');"
done | ask d
ask d -e "update t set v = concat(v, '+') where i % 3 = 0; delete from t where i % 7 = 0"
stop
start
ask d -e "select count(*), sum(length(v)) from t; select count(*), max(v) from a; check table t; check table a"
ask d -e "select nothing"
stop
rm -rf db"#,
        "ended 0\n343\t",
        &[],
    );
}

#[test]
fn java_with_h2_works() {
    needs("java", "openjdk-17-jdk-headless libh2-java");
    assert!(
        Path::new("/usr/share/java/h2.jar").exists(),
        "this test needs H2: apt-get install libh2-java"
    );
    app(
        "h2",
        None,
        r#"sql() { java -XX:-UsePerfData -cp /usr/share/java/h2.jar org.h2.tools.Shell -url "jdbc:h2:$PWD/h2" \
    -user sa -password '' -sql "$1" | sed 's/, [0-9]* ms)/)/'; }
sql "create table t(i int primary key, v varchar); insert into t select x, 'value ' || x from system_range(1, 5000)"
sql "update t set v = v || '+' where mod(i, 3) = 0; delete from t where mod(i, 7) = 0; checkpoint"
sql "select count(*), sum(length(v)) from t"
sql "select * from none" 2>&1 | head -1
sql "shutdown compact" >/dev/null; ls"#,
        "4286",
        &[".mv.db", ".trace.db"],
    );
}

#[test]
fn node_works() {
    needs("node", "nodejs");
    app(
        "node",
        None,
        r#"node - <<'END'
const fs = require('fs'), cp = require('child_process'), zlib = require('zlib');
const {Worker} = require('worker_threads');
(async () => {
    await Promise.all([...Array(8).keys()].map(async n => {
        for (let i = 0; i < 60; i++) {
            await fs.promises.appendFile(`log-${n}`, `${n} ${i}\n`);
            await fs.promises.writeFile(`tmp-${n}`, String(i));
            await fs.promises.rename(`tmp-${n}`, `file-${n}`);
        }
    }));
    await new Promise(done => {
        const out = fs.createWriteStream('stream.gz'), zip = zlib.createGzip();
        zip.pipe(out); out.on('finish', done);
        for (let i = 0; i < 20000; i++) zip.write(`line ${i}\n`);
        zip.end();
    });
    fs.copyFileSync('stream.gz', 'copy.gz'); fs.truncateSync('log-1', 10);
    fs.symlinkSync('log-2', 'link'); fs.mkdirSync('a/b/c', {recursive: true}); fs.utimesSync('log-3', 1, 2);
    console.log(cp.execSync('cat log-* | wc -l; zcat copy.gz | md5sum').toString());
    const worker = new Worker(`require('fs').writeFileSync('worker', 'x'.repeat(1e6))`, {eval: true});
    worker.on('exit', code => { console.log('worker', code); fs.unlink('nothing', e => { console.error(e.code); process.exit(6); }); });
})();
END"#,
        "422\n",
        &[],
    );
}

#[test]
fn erlang_works() {
    needs("erl", "erlang-base");
    app(
        "erlang",
        None,
        r#"cat >"$HOME/t.escript" <<'END'
#!/usr/bin/env escript
main(_) ->
    Self = self(),
    Pids = [spawn(fun() -> work(N), Self ! done end) || N <- lists:seq(1, 8)],
    [receive done -> ok end || _ <- Pids],
    {ok, t} = dets:open_file(t, [{file, "table.dets"}]),
    [ok = dets:insert(t, {I rem 100, I}) || I <- lists:seq(1, 3000)],
    ok = dets:sync(t), Size = dets:info(t, size), ok = dets:close(t),
    io:format("~p ~p~n", [Size, lists:sort(element(2, file:list_dir(".")))]),
    io:format("~s", [os:cmd("cat log-* | md5sum")]),
    io:format("~p~n", [file:delete("nothing")]), halt(3).
work(N) ->
    Log = "log-" ++ integer_to_list(N),
    [begin ok = file:write_file(Log, io_lib:format("~p ~p~n", [N, I]), [append]),
           ok = file:write_file(Log ++ ".new", "x"), ok = file:rename(Log ++ ".new", "file-" ++ integer_to_list(N))
     end || I <- lists:seq(1, 100)].
END
escript "$HOME/t.escript""#,
        "100 [",
        &["table.dets"],
    );
}

#[test]
fn qemu_img_works() {
    needs("qemu-img", "qemu-utils");
    app(
        "qemu-img",
        None,
        r#"qemu-img create -q -f qcow2 disk.qcow2 64M
for i in $(seq 20); do qemu-io -f qcow2 -c "write -q -P $i ${i}M 300k" -c flush disk.qcow2 >/dev/null; done
qemu-img snapshot -c one disk.qcow2; qemu-img convert -O raw disk.qcow2 raw; md5sum raw
qemu-img convert -c -O qcow2 raw packed.qcow2; qemu-img check packed.qcow2; qemu-img check disk.qcow2
qemu-img resize -q disk.qcow2 80M; qemu-img compare disk.qcow2 packed.qcow2; qemu-img rebase -u -b '' packed.qcow2
for t in native threads io_uring; do qemu-img bench -w -c 200 -d 8 -s 4k -t none -i $t -f raw raw >/dev/null 2>&1 && echo $t; done
md5sum raw; qemu-img info nothing"#,
        "No errors were found",
        // Snapshots hold their time.
        &["disk.qcow2"],
    );
}

/// `strain.c` with what this machine has; returns the directory it is in.
fn strain() -> PathBuf {
    let flags = ["-pthread", "-DWITH_SECCOMP", "-lseccomp"];
    assert!(
        Path::new("/usr/include/seccomp.h").exists(),
        "this test needs libseccomp: apt-get install libseccomp-dev"
    );
    let program = product::compiled("cc", "strain", "strain", &flags);
    program.parent().unwrap().to_owned()
}

/// A mode of `strain.c`, so often that a snapshot has a chance to fall into it.
fn strained(mode: &str, times: usize, expect: &str) {
    let programs = strain();
    let script =
        format!("for i in $(seq {times}); do \"$PROGRAMS\"/strain {mode} $i; echo $?; done");
    same(mode, &programs, None, &script, expect, &[]);
}

#[test]
fn cancelled_threads_run_their_cleanups() {
    strained("cancel", 2, "480 threads cancelled, 960 cleanups");
}

#[test]
fn cancelled_threads_run_their_destructors() {
    needs("g++", "build-essential");
    let programs = strain();
    let program = programs.join(format!("unwind-{}", std::process::id()));
    let mut command = std::process::Command::new("g++");
    command.args(["-O2", "-pthread", "-o"]).arg(&program);
    command.arg(product::sources().join("unwind.cpp"));
    process::run(command, Duration::from_secs(60)).ok("g++");
    let run = format!("\"$PROGRAMS\"/unwind-{}", std::process::id());
    let script = format!("for i in 1 2 3; do {run} $i; done");
    let expect = "600 cancelled, 1200 made, 1200 destroyed, 600 caught\n";
    same("unwind", &programs, None, &script, expect, &[]);
    let _ = std::fs::remove_file(&program);
}

#[test]
fn small_stacks_suffice() {
    strained("small-stacks", 8, "400 threads");
}

#[test]
fn the_smallest_signal_stack_suffices() {
    strained("altstack", 3, "2000 signals");
}

#[test]
fn jumps_out_of_writes() {
    strained("longjmp", 2, "300 jumps");
}

#[test]
fn coroutines() {
    strained("contexts", 60, "4500 switches");
}

#[test]
fn signals_in_writes() {
    strained("signals", 2, "signals in writes");
}

#[test]
fn a_storm_of_vforks() {
    strained("vfork", 3, "0 wrong statuses");
}

#[test]
fn a_sandbox_of_libseccomp() {
    strained("seccomp", 2, "alive");
}
