//! A program under the shim does what it does without it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshim_tests::process::{self, Proc, installed, run};
use snapshim_tests::{Fs, Lab, effect, lab, product};

const LIMIT: Duration = Duration::from_secs(120);

/// Compares a script's effects with the shim and without.
fn same(name: &str, script: &str, except: &[&str]) {
    let programs = product::program("deterministic");
    effect::same(&effect::Script {
        name: &format!("harmless-{name}"),
        script,
        except,
        expect: "",
        programs: programs.parent().unwrap(),
        limit: LIMIT,
        user: None,
    });
}

fn needs(tool: &str) {
    assert!(
        installed(tool),
        "this test needs {tool}: apt-get install {tool}"
    );
}

#[test]
fn every_call_that_changes_a_file() {
    product::program("deterministic");
    same(
        "calls",
        "for i in 1 2 3 4 5 6; do mkdir $i; \"$PROGRAMS\"/deterministic $i; echo $?; done",
        &[],
    );
}

#[test]
fn sqlite3_works() {
    needs("sqlite3");
    let sql = "create table t(k integer primary key, v text);
        with recursive n(i) as (select 1 union all select i+1 from n where i < 300)
        insert into t select i, 'value ' || i from n; ";
    let more = "insert into t(v) select 'more ' || k from t where k % 7 = 0; \
        update t set v = v || '+' where k % 3 = 0; delete from t where k % 11 = 0;";
    same(
        "sqlite3",
        &format!(
            "for mode in delete wal truncate; do
               sqlite3 $mode.db \"pragma journal_mode=$mode; {sql}\"
               for i in $(seq 8); do sqlite3 $mode.db \"begin; {more} commit;\"; done
               sqlite3 $mode.db 'pragma integrity_check; select count(*), sum(length(v)) from t'
             done
             sqlite3 delete.db 'select * from none'"
        ),
        &[],
    );
}

#[test]
fn python3_works() {
    needs("python3");
    same(
        "python3",
        r#"python3 - <<'END'
import json, mmap, os, shutil, subprocess, sys, tempfile, threading, time
def work(n):
    for i in range(60):
        with open(f"file-{n}", "a") as f:
            f.write(f"{n} {i}\n")
        with open(f"tmp-{n}", "w") as f:
            json.dump({"n": n, "i": i}, f)
        os.replace(f"tmp-{n}", f"json-{n}")
        time.sleep(0.005)
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
shutil.copy("file-1", "copied"); shutil.copytree(".", "../data/sub", ignore=shutil.ignore_patterns("sub"))
print(subprocess.run("echo from a shell | tee shell-file; exit 3", shell=True).returncode, flush=True)
with tempfile.TemporaryDirectory(dir=".") as d:
    open(os.path.join(d, "x"), "w").write("x")
with open("mapped", "w+b") as f:
    f.truncate(8192); m = mmap.mmap(f.fileno(), 8192); m[:5] = b"hello"; m.flush(); m.close()
print(sorted(os.listdir(".")))
open("/nowhere/file", "w")
END"#,
        &[],
    );
}

#[test]
fn perl_works() {
    needs("perl");
    same(
        "perl",
        r#"perl -e '
$| = 1;
for my $i (1..400) {
    open(my $f, ">>", "log") or die; print $f "line $i\n"; close $f;
    open(my $t, ">", "t.tmp") or die; print $t "x" x $i; close $t; rename "t.tmp", "t";
    select(undef, undef, undef, 0.001);
}
for my $n (1..20) { my $p = fork; if (!$p) { open(my $f, ">", "child-$n"); print $f $n; close $f; exit $n } waitpid $p, 0; print $? >> 8, "\n" }
print `ls`; symlink "log", "link"; link "log", "hard"; chmod 0600, "log"; truncate "t", 10; unlink "nothing" or warn "unlink: $!";
exit 7'"#,
        &[],
    );
}

#[test]
fn shell_pipelines_work() {
    same(
        "bash",
        r#"for i in $(seq 60); do
    seq 1 $((i * 50)) | sort -rn | tee part-$i | awk '{ s += $1 } END { print s }' >> sums
    cat part-* | gzip -n > all.gz
    mv part-$i done-$i
done
zcat all.gz | md5sum
dd if=/dev/zero of=zeros bs=64k count=32 2>/dev/null
head -c 100000 zeros | tr '\0' 'z' > zs; cp --sparse=always zeros sparse; sed -i s/z/y/ zs
cat <<< here > here; (exit 5); echo $?; ls no-such-file; echo "$(< here)"
trap 'echo bye' EXIT
exit 4"#,
        &[],
    );
}

#[test]
fn git_works() {
    needs("git");
    // The index holds times and inode numbers.
    same(
        "git",
        r#"export GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z'
git init -q -b main repo && cd repo
git config user.name t; git config user.email t@example.org; git config gc.auto 0; git config pack.threads 1
for i in $(seq 15); do seq $i 500 > file-$((i % 5)); git add -A; git commit -q -m "commit $i"; done
git checkout -q -b side HEAD~3; echo side > side; git add side; git commit -q -m side
git checkout -q main; git merge -q -m merge side; git tag v1; git gc -q; git clone -q . ../clone
git log --oneline --graph; git fsck --strict; git status --short; git -C ../clone rev-parse HEAD; git merge nothing"#,
        &["/index", "repo/.git/logs", "clone/.git/logs"],
    );
}

#[test]
fn tar_works() {
    same(
        "tar",
        r#"mkdir -p in/sub; for i in $(seq 120); do echo $i > in/file-$i; done; ln -s file-1 in/link; ln in/file-2 in/hard
head -c 3000000 /dev/zero | tr '\0' 'z' > in/sub/large
for i in 1 2 3 4 5; do tar --sort=name --mtime=@0 -cf out.tar in; mkdir x$i; tar -C x$i -xf out.tar; done
tar -tvf out.tar | md5sum; gzip -n out.tar; tar -xf nothing.tar; diff -r in x3 && echo same"#,
        &[],
    );
}

#[test]
fn gcc_works() {
    needs("gcc");
    same(
        "gcc",
        r#"for i in $(seq 6); do
  printf '#include <stdio.h>\nint f%d(int x) { printf("%%d\\n", x); return x * %d; }\n' $i $i > f$i.c
  gcc -O2 -c f$i.c -o f$i.o
done
echo 'int f3(int); int main(void) { return f3(4); }' > main.c
gcc -save-temps -O2 main.c f*.o -o program; ./program; echo $?; ar rcD lib.a f*.o; gcc -c nothing.c"#,
        &[],
    );
}

#[test]
fn redis_works() {
    needs("redis-server");
    // The dump holds the time it was made.
    same(
        "redis",
        r#"redis-server --port 0 --unixsocket "$PWD/socket" --dir "$PWD" --appendonly yes --appendfsync always --save '' --daemonize no > /dev/null &
server=$!
cli() { redis-cli -s "$PWD/socket" "$@"; }
for i in $(seq 200); do cli ping > /dev/null 2>&1 && break; sleep 0.05; done
for i in $(seq 150); do echo "set key:$i value:$i"; echo "rpush list $i"; echo "incr counter"; done | cli | tail -1
cli eval 'for i = 1, 20000 do redis.call("hset", "hash", i, i * i) end return redis.call("hlen", "hash")' 0
cli save; cli bgrewriteaof; sleep 0.5; cli dbsize; cli get key:77; cli llen list; cli debug digest; cli nothing
cli shutdown nosave; wait $server; echo $?
redis-server --port 0 --unixsocket "$PWD/socket" --dir "$PWD" --appendonly yes > /dev/null & server=$!
for i in $(seq 200); do cli ping 2>/dev/null | grep -q PONG && break; sleep 0.05; done
cli dbsize; cli debug digest; kill $server; wait $server; echo $?"#,
        &["dump.rdb", ".rdb", ".aof", ".manifest"],
    );
}

#[test]
fn a_musl_program_works() {
    if !installed("musl-gcc") {
        println!("SKIPPED: musl-gcc is not installed");
        return;
    }
    let program = product::compiled(
        "musl-gcc",
        "writes",
        "writes-musl",
        &[
            "-pthread",
            "-idirafter",
            "/usr/include",
            "-idirafter",
            "/usr/include/x86_64-linux-gnu",
        ],
    );
    let Some(lab) = Lab::new("harmless-musl", Fs::Xfs, LIMIT) else {
        return;
    };
    let file = lab.data().join("file");
    let mut command = lab.run_command(&["--every", "100ms"]);
    command.arg(&program).arg("300000").arg(&file);
    let ended = run(command, LIMIT).ok("a musl program");
    assert_eq!(fs::read(&file).unwrap(), vec![b'x'; 300_000]);
    let stored = lab.stored();
    println!(
        "musl: {} checkpoints, {:?}; {}",
        stored.len(),
        stored.last().map(|s| s.1.reasons()),
        ended.err()
    );
}

/// Calls that `strace -c` counts in a program under an open gate.
fn counts(lab: &Lab, env: &[(String, String)], writes: &str) -> BTreeMap<String, u64> {
    let report = lab.beside("strace");
    let mut command = lab.command("strace");
    command
        .args(["-c", "-f", "-U", "name,calls", "-o"])
        .arg(&report);
    for (name, value) in env {
        command.arg("-E").arg(format!("{name}={value}"));
    }
    command
        .arg(product::program("writes"))
        .arg(writes)
        .arg(lab.data().join("file"));
    run(command, LIMIT).ok("strace");
    let text = fs::read_to_string(&report).unwrap();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, calls) = (words.next()?, words.next()?);
            Some((name.to_owned(), calls.parse().ok()?))
        })
        .filter(|(name, _)| name != "total")
        .collect()
}

#[test]
fn an_open_gate_costs_no_system_call() {
    needs("strace");
    let Some(lab) = Lab::new("harmless-strace", Fs::Xfs, LIMIT) else {
        return;
    };
    let env = lab.env(&[]);
    // Once before, so that all find the slot of a process that is gone.
    counts(&lab, &env, "10");
    let (few, many) = (counts(&lab, &env, "1000"), counts(&lab, &env, "100000"));
    let bare = counts(&lab, &[], "1000");
    let mut attachment = few.clone();
    for (name, calls) in &bare {
        *attachment.entry(name.clone()).or_default() -= *calls;
    }
    attachment.retain(|_, calls| *calls != 0);
    println!("calls made by attachment: {attachment:?}");
    let mut difference = many.clone();
    for (name, calls) in &few {
        let entry = difference.entry(name.clone()).or_default();
        *entry = entry.wrapping_sub(*calls);
    }
    difference.retain(|_, calls| *calls != 0);
    assert_eq!(difference, BTreeMap::from([("write".to_owned(), 99_000)]));
    assert_eq!(few["write"], bare["write"], "a write of our own");
}

#[test]
fn other_preloaded_libraries_work_before_and_after_it() {
    let Some(lab) = Lab::new("harmless-chain", Fs::Xfs, LIMIT) else {
        return;
    };
    let library = product::compiled(
        "cc",
        "countwrites",
        "countwrites.so",
        &["-shared", "-fPIC", "-ldl"],
    );
    let library = library.to_str().unwrap();
    let env = lab.env(&[]);
    let shim = &env
        .iter()
        .find(|(n, _)| n == "LD_PRELOAD")
        .expect("LD_PRELOAD")
        .1;
    let (count, file) = (lab.beside("count"), lab.data().join("file"));
    let check = |what: &str, mut command: Command| {
        command.env("COUNTWRITES", &count);
        run(command, LIMIT).ok(what);
        let counted = fs::read_to_string(&count).unwrap_or_default();
        // `run` itself may be counted too: it inherits the library.
        assert!(
            counted.lines().any(|n| n == "1000"),
            "{what}: counted {counted:?}"
        );
        assert_eq!(fs::read(&file).unwrap().len(), 1000, "{what}");
        fs::remove_file(&count).unwrap();
    };
    for order in [
        format!("{shim}:{library}"),
        format!("{library}:{shim}"),
        format!("{library} {shim}"),
    ] {
        let mut command = lab.command(product::program("writes"));
        command
            .arg("1000")
            .arg(&file)
            .envs(env.clone())
            .env("LD_PRELOAD", &order);
        check(&order, command);
    }
    let mut command = lab.run_command(&[]);
    command
        .arg(product::program("writes"))
        .arg("1000")
        .arg(&file);
    command.env("LD_PRELOAD", library);
    check("under run", command);
    let outcome = lab.checkpoint(&[]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
}

#[test]
fn run_passes_the_exit_status_on() {
    let Some(lab) = Lab::new("harmless-status", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let code = |program: &str, args: &[&str]| {
        let mut command = lab.run_command(&[]);
        command.arg(program).args(args);
        run(command, LIMIT)
    };
    for wanted in [0, 1, 2, 5, 77, 255] {
        assert_eq!(
            code("sh", &["-c", &format!("exit {wanted}")]).code(),
            wanted
        );
    }
    let missing = code("/nowhere/program", &[]);
    assert_eq!(missing.code(), 127, "{}", missing.err());
    assert!(
        missing.err().contains("/nowhere/program"),
        "{}",
        missing.err()
    );
    let missing = code("no-such-program-anywhere", &[]);
    assert_eq!(missing.code(), 127, "{}", missing.err());
    let text = lab.beside("text");
    fs::write(&text, "not a program").unwrap();
    let not_executable = code(text.to_str().unwrap(), &[]);
    assert_eq!(not_executable.code(), 126, "{}", not_executable.err());
    let directory = code(lab.store().parent().unwrap().to_str().unwrap(), &[]);
    assert_eq!(directory.code(), 126, "{}", directory.err());

    // Death by a signal is mirrored: by the same signal, or as shells say it.
    for signal in [
        Signal::SIGTERM,
        Signal::SIGKILL,
        Signal::SIGSEGV,
        Signal::SIGABRT,
        Signal::SIGPIPE,
    ] {
        let ended = code(
            "sh",
            &["-c", &format!("ulimit -c 0; kill -{} $$", signal as i32)],
        );
        assert_eq!(
            ended.code(),
            128 + signal as i32,
            "{signal}: {}",
            ended.err()
        );
    }
}

#[test]
fn run_forwards_signals() {
    let Some(lab) = Lab::new("harmless-signals", Fs::Tmpfs, LIMIT) else {
        return;
    };
    for (signal, name) in [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
    ] {
        let marker = lab.data().join("ready");
        let script = format!(
            "ulimit -c 0; trap 'echo got {name}; exit 9' {name}; touch '{}'; while :; do sleep 0.05; done",
            marker.display()
        );
        let mut command = lab.run_command(&["--every", "100ms"]);
        command.args(["bash", "-c", &script]);
        // A shell cannot trap what was ignored when it started, as under nohup.
        // SAFETY: signal(2) may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl)?;
                Ok(())
            });
        }
        let mut proc = Proc::piped(command);
        assert!(
            process::wait_until(LIMIT / 4, || marker.exists()),
            "{name}: did not start"
        );
        proc.signal(signal);
        let ended = proc.wait(Duration::from_secs(20));
        assert_eq!(
            (ended.code(), ended.out().trim()),
            (9, format!("got {name}").as_str()),
            "{}",
            ended.err()
        );
        fs::remove_file(&marker).unwrap();
    }
}

#[test]
fn run_works_in_pipelines() {
    let Some(lab) = Lab::new("harmless-pipelines", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let shell = |script: &str| {
        let run_command = lab.run_command(&["--every", "100ms"]);
        let mut command = lab.command("bash");
        command.args(["-c", script, "bash"]);
        command
            .arg(run_command.get_program())
            .args(run_command.get_args());
        run(command, LIMIT)
    };
    assert_eq!(shell("\"$@\" seq 100000 | tail -1").out(), "100000\n");
    assert_eq!(
        shell("seq 100000 | \"$@\" sort -rn | head -1").out(),
        "100000\n"
    );
    assert_eq!(
        shell("\"$@\" sh -c 'echo a; echo b >&2' 2>/dev/null | cat").out(),
        "a\n"
    );
    assert_eq!(
        shell("\"$@\" yes | head -2; echo ${PIPESTATUS[0]}").out(),
        "y\ny\n141\n"
    );
    assert_eq!(shell("echo in | \"$@\" cat").out(), "in\n");
    assert_eq!(
        shell("\"$@\" sh -c 'cat; echo $?' < /dev/null").out(),
        "0\n"
    );
    // Closed descriptors stay closed, and are not taken for something else.
    let ended = shell("\"$@\" sh -c 'cat 2>&1; ls /proc/self/fd | wc -l' <&-");
    assert_eq!(ended.code(), 0, "{}", ended.err());
    assert_eq!(
        shell("\"$@\" sh -c 'echo to a closed stdout' >&-; echo $?")
            .out()
            .trim(),
        "1"
    );
    assert_eq!(
        shell("exec 3>&1; \"$@\" sh -c 'echo three >&3'").out(),
        "three\n"
    );
    let run_command = lab.run_command(&[]);
    let mut command = lab.command(run_command.get_program());
    command.args(run_command.get_args());
    command.args(["sh", "-c", "ls -l /proc/self/fd | wc -l"]);
    let plain = shell("sh -c 'ls -l /proc/self/fd | wc -l'").out();
    assert_eq!(
        run(command, LIMIT).out(),
        plain,
        "descriptors leak into the program"
    );
}

#[test]
fn run_behaves_under_job_control() {
    let Some(lab) = Lab::new("harmless-jobs", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let pty = nix::pty::openpty(None, None).expect("a pty");
    let run_command = lab.run_command(&["--every", "100ms"]);
    let quoted: Vec<String> = std::iter::once(run_command.get_program())
        .chain(run_command.get_args())
        .map(|a| format!("'{}'", a.to_str().unwrap()))
        .collect();
    let ticks = lab.data().join("ticks");
    let program = format!(
        "{} bash -c 'for i in $(seq 1 40); do echo $i >> {}; sleep 0.05; done; echo work $((40+2))'",
        quoted.join(" "),
        ticks.display()
    );
    let mut command = lab.command("bash");
    command
        .args(["--norc", "-i"])
        .env("PS1", "> ")
        .env("TERM", "dumb");
    command
        .stdin(Stdio::from(pty.slave.try_clone().unwrap()))
        .stdout(Stdio::from(pty.slave.try_clone().unwrap()))
        .stderr(Stdio::from(pty.slave));
    // SAFETY: setsid and the ioctl are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let mut shell = Proc::start(command);
    let mut master = fs::File::from(pty.master);
    let screen = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let (mut reader, seen) = (master.try_clone().unwrap(), screen.clone());
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n) = std::io::Read::read(&mut reader, &mut buffer) {
            if n == 0 {
                break;
            }
            seen.lock()
                .unwrap()
                .push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
    let shows = |text: &str| {
        let shown = process::wait_until(Duration::from_secs(15), || {
            screen.lock().unwrap().contains(text)
        });
        assert!(
            shown,
            "the terminal does not show {text:?}:\n{}",
            screen.lock().unwrap()
        );
    };
    let lines = || {
        fs::read_to_string(&ticks)
            .unwrap_or_default()
            .lines()
            .count()
    };
    shows("> ");
    writeln!(master, "{program}").unwrap();
    assert!(
        process::wait_until(Duration::from_secs(15), || lines() > 3),
        "{}",
        screen.lock().unwrap()
    );
    master.write_all(b"\x1a").unwrap();
    shows("Stopped");
    std::thread::sleep(Duration::from_millis(100));
    let stopped_at = lines();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        lines(),
        stopped_at,
        "the program goes on while it is stopped"
    );
    writeln!(master, "fg").unwrap();
    shows("work 42");
    assert_eq!(lines(), 40);
    // ^C ends the next one, and the shell goes on.
    fs::remove_file(&ticks).unwrap();
    writeln!(master, "{program}").unwrap();
    assert!(process::wait_until(Duration::from_secs(15), || lines() > 3));
    // A shell that is told while its child ends of itself goes on: that is its way.
    for _ in 0..10 {
        master.write_all(b"\x03").unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let before = lines();
        std::thread::sleep(Duration::from_millis(150));
        if lines() == before {
            break;
        }
    }
    writeln!(master, "echo status $?").unwrap();
    shows("status 130");
    writeln!(master, "exit").unwrap();
    process::wait_until(Duration::from_secs(5), || !shell.is_running());
}

#[test]
fn a_program_may_close_every_descriptor_and_scrub_its_environment() {
    let Some(lab) = Lab::new("harmless-scrub", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let file = lab.data().join("file");
    let script = format!(
        "for fd in $(seq 3 255); do eval \"exec $fd>&-\"; done; exec 3>'{0}'; echo mine >&3; \
         env -i /bin/sh -c 'echo scrubbed >> {0}'; cat '{0}'",
        file.display()
    );
    let mut command = lab.run_command(&["--every", "100ms"]);
    command.args(["bash", "-c", &script]);
    assert_eq!(run(command, LIMIT).ok("scrub").out(), "mine\nscrubbed\n");
}

#[test]
fn children_that_outlive_the_program_keep_writing() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("harmless-daemon", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let file = lab.data().join("file");
    let script = format!(
        "(for i in $(seq 40); do echo $i; sleep 0.05; done > '{}') & echo $!",
        file.display()
    );
    let mut command = lab.run_command(&[]);
    command.args(["bash", "-c", &script]);
    let proc = Proc::start({
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    });
    // The pipe stays open as long as the child lives.
    let ended = proc.wait(LIMIT);
    assert_eq!(ended.code(), 0);
    let lines = || {
        fs::read_to_string(&file)
            .unwrap_or_default()
            .lines()
            .count()
    };
    assert!(
        process::wait_until(Duration::from_secs(20), || lines() == 40),
        "{}",
        lines()
    );
    let pid: i32 = ended.out().trim().parse().unwrap();
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    assert!(Path::new(&file).exists());
}
