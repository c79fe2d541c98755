//! PostgreSQL, which refuses to run as root, and its own load generator.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;

use super::control::{Control, now_ns};
use crate::{Lab, Proc, lab, process};

/// Who runs it.
pub const USER: &str = "nobody";
const SCALE: &str = "5";
const LIMIT: Duration = Duration::from_secs(120);

/// Where its programs are.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let newest = versions.flatten().map(|v| v.path().join("bin")).max();
    newest.unwrap_or_else(|| "/usr/bin".into())
}

/// Whether one of its programs is there.
pub fn has(name: &str) -> bool {
    programs().join(name).is_file()
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8 path").to_owned()
}

/// Where a server's socket is: not among the data, and not too long a path.
fn sockets(lab: &Lab, dir: &Path) -> PathBuf {
    let name = dir.file_name().expect("a directory of data");
    let at = lab.shm().join(format!("socket-{}", name.to_string_lossy()));
    if !at.exists() {
        fs::create_dir(&at).expect("a directory for a socket");
        lab::give(&at, USER);
    }
    at
}

/// A command of its own user; the working directory is one that everybody may enter.
fn as_user(lab: &Lab, dir: &Path, program: &str) -> Command {
    let mut command = lab.command("setpriv");
    command
        .args([
            "--reuid",
            USER,
            "--regid",
            &lab::group_of(USER),
            "--clear-groups",
        ])
        .arg(programs().join(program))
        .current_dir("/")
        .env("PGHOST", sockets(lab, dir))
        .env("PGUSER", "tester")
        .env("PGDATABASE", "postgres")
        .env("PGDATA", dir.join("cluster"))
        .env("HOME", "/nonexistent");
    command
}

fn run(lab: &Lab, dir: &Path, program: &str, args: &[&str]) -> process::Ended {
    let mut command = as_user(lab, dir, program);
    command.args(args);
    process::run(command, LIMIT)
}

/// A cluster with pgbench's tables.
pub fn prepare(lab: &Lab, dir: &Path) {
    lab.give_to(USER);
    lab::give(dir, USER);
    let settings = format!(
        "listen_addresses = ''\nunix_socket_directories = '{}'\nshared_buffers = 32MB\n\
         max_connections = 20\nautovacuum = off\nmax_wal_size = 64MB\nmin_wal_size = 32MB\n",
        text(&sockets(lab, dir))
    );
    let init = [
        "-U",
        "tester",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--locale=C",
        "--no-sync",
    ];
    run(lab, dir, "initdb", &init).ok("initdb");
    let file = dir.join("cluster/postgresql.conf");
    let before = fs::read_to_string(&file).expect("its settings");
    fs::write(&file, before + &settings).expect("its settings");
    start(lab, dir);
    run(lab, dir, "pgbench", &["-i", "-q", "-s", SCALE]).ok("pgbench -i");
    stop(lab, dir, "fast");
}

fn start(lab: &Lab, dir: &Path) -> bool {
    let log = text(&sockets(lab, dir).join("log"));
    // A file of output would be waited for as long as the server has it.
    let args = ["-w", "-t", "60", "-s", "-l", &log, "start"];
    run(lab, dir, "pg_ctl", &args).code() == 0
}

fn stop(lab: &Lab, dir: &Path, how: &str) {
    run(lab, dir, "pg_ctl", &["-w", "-s", "stop", "-m", how]);
}

/// The server in the foreground.
pub fn server(dir: &Path) -> (PathBuf, Vec<String>) {
    let group = lab::group_of(USER);
    let mut args: Vec<String> = ["--reuid", USER, "--regid", &group, "--clear-groups"]
        .map(str::to_owned)
        .into();
    args.push(text(&programs().join("postgres")));
    args.extend(["-D".to_owned(), text(&dir.join("cluster"))]);
    ("/usr/bin/setpriv".into(), args)
}

/// The clients of one server.
#[derive(Debug)]
pub struct Clients {
    ask: Vec<(String, String)>,
    log: PathBuf,
    running: Option<Proc>,
    data: PathBuf,
}

impl Clients {
    /// None yet.
    pub fn new(lab: &Lab, dir: &Path) -> Clients {
        Clients {
            ask: vec![
                ("PGHOST".into(), text(&sockets(lab, dir))),
                ("PGUSER".into(), "tester".into()),
                ("PGDATABASE".into(), "postgres".into()),
            ],
            log: sockets(lab, dir).join("transactions"),
            running: None,
            data: dir.to_owned(),
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(programs().join(program));
        command.envs(self.ask.iter().cloned());
        command
    }

    /// Whether the server answers.
    pub fn is_up(&self) -> bool {
        let mut command = self.command("psql");
        command.args(["-XAtc", "select 1"]);
        process::run(command, LIMIT).code() == 0
    }

    /// Starts them.
    pub fn start(&mut self, rate: u64) {
        let mut command = self.command("pgbench");
        command.args(["-n", "-c", "2", "-T", "600", "-l"]);
        command.arg(format!("--log-prefix={}", text(&self.log)));
        if rate > 0 {
            command.arg(format!("--rate={rate}"));
        }
        self.running = Some(Proc::piped(command));
        // They connect before they begin.
        std::thread::sleep(Duration::from_millis(300));
    }

    /// Ends them, and records what they measured.
    pub fn end(&mut self, control: &Control) -> bool {
        let Some(mut running) = self.running.take() else {
            return true;
        };
        let pid = running.pid();
        // What its own timer sends it when its time is over.
        running.signal(Signal::SIGALRM);
        let ended = running.wait(Duration::from_secs(60));
        if ended.code() != 0 {
            eprintln!("pgbench: {}", ended.err());
        }
        let path = format!("{}.{pid}", text(&self.log));
        let log = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(&path);
        let clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let ahead = clock.map_or(0, |d| d.as_nanos() as u64) - now_ns();
        for line in log.lines() {
            // client transaction LATENCY script SECONDS MICROSECONDS lag: with a rate, from
            // the time it was due.
            let fields: Vec<u64> = line.split(' ').filter_map(|f| f.parse().ok()).collect();
            if let [_, _, latency, _, seconds, micros, ..] = fields[..] {
                let end = seconds * 1_000_000_000 + micros * 1000 - ahead;
                control.record(end - latency * 1000, end);
            }
        }
        ended.code() == 0
    }

    /// Asks the server to end.
    pub fn stop_server(&mut self) {
        self.running = None;
        let file = self.data.join("cluster/postmaster.pid");
        let pid = fs::read_to_string(file).ok();
        let pid = pid.and_then(|t| t.lines().next()?.trim().parse().ok());
        if let Some(pid) = pid {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGINT);
        }
    }
}

/// Whether a server starts on a copy of `dir` and finds what every transaction keeps: all sums
/// are equal. On tmpfs, so that it takes no time of the file system that is measured.
pub fn check(lab: &Lab, dir: &Path) -> bool {
    let scratch = lab.shm().join("checked");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir(&scratch).expect("a directory");
    let mut command = Command::new("cp");
    command.arg("-a").arg(dir.join("cluster")).arg(&scratch);
    let copied = process::run(command, LIMIT).code() == 0;
    let _ = fs::remove_file(scratch.join("cluster/postmaster.pid"));
    let settings = scratch.join("cluster/postgresql.conf");
    let line = format!(
        "unix_socket_directories = '{}'\nfsync = off\n",
        text(&sockets(lab, &scratch))
    );
    let appended = fs::read_to_string(&settings).map(|s| fs::write(&settings, s + &line));
    let mut good = copied && appended.is_ok();
    // A copy need not have kept owners and modes to be of one instant.
    let at = text(&scratch);
    for args in [["chown", "-R", USER, &at], ["chmod", "-R", "go-rwx", &at]] {
        let mut command = Command::new(args[0]);
        command.args(&args[1..]);
        good &= process::run(command, LIMIT).code() == 0;
    }
    good = good && start(lab, &scratch);
    if good {
        let sums = "select (select sum(abalance) from pgbench_accounts) = s \
                    and (select sum(bbalance) from pgbench_branches) = s \
                    and (select sum(tbalance) from pgbench_tellers) = s \
                    from (select coalesce(sum(delta), 0) as s from pgbench_history) as h";
        let ended = run(lab, &scratch, "psql", &["-XAtc", sums]);
        good = ended.code() == 0 && ended.out().trim() == "t";
        stop(lab, &scratch, "immediate");
    }
    let _ = fs::remove_dir_all(&scratch);
    good
}
