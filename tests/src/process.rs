//! Processes that end: by deadline, with their test, or with this process.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process with its output, killed when dropped.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    what: String,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    reaped: Option<ExitStatus>,
}

/// How a process ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if it had to be killed at the deadline.
    pub status: Option<ExitStatus>,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// From the start of the wait to its end.
    pub wall: Duration,
}

impl Ended {
    /// The exit code, 128 + the signal as shells have it, or -1 if the process
    /// had to be killed at the deadline.
    pub fn code(&self) -> i32 {
        match self.status {
            Some(s) => s.code().unwrap_or_else(|| 128 + s.signal().unwrap_or(0)),
            None => -1,
        }
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Panics with the output unless the process succeeded.
    #[track_caller]
    pub fn ok(self, what: &str) -> Ended {
        assert!(
            self.code() == 0,
            "{what}: exit {}\nstdout: {}\nstderr: {}",
            self.code(),
            self.out(),
            self.err()
        );
        self
    }
}

/// The processes that run now, for the watchdog's account.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn running() -> MutexGuard<'static, BTreeSet<i32>> {
    RUNNING.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether `pid` is that of a [`Proc`], which waits for it itself.
pub(crate) fn is_managed(pid: i32) -> bool {
    running().contains(&pid)
}

fn drain(from: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    from.map(|mut from| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            let _ = from.read_to_end(&mut all);
            all
        })
    })
}

impl Proc {
    /// Starts `command`. Output that the command does not send elsewhere is
    /// kept. The process is killed when the calling thread ends.
    #[track_caller]
    pub fn start(mut command: Command) -> Proc {
        let what = format!("{:?}", command.get_program());
        dies_with_us(&mut command);
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {what}: {e}"));
        running().insert(child.id() as i32);
        Proc {
            what,
            stdout: drain(child.stdout.take()),
            stderr: drain(child.stderr.take()),
            child,
            reaped: None,
        }
    }

    /// Starts `command` with both outputs kept and nothing on standard input.
    #[track_caller]
    pub fn piped(mut command: Command) -> Proc {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Proc::start(command)
    }

    /// Its id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        if self.reaped.is_none() {
            self.reaped = self.child.try_wait().expect("wait");
            if self.reaped.is_some() {
                running().remove(&self.pid());
            }
        }
        self.reaped.is_none()
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            let _ = kill(Pid::from_raw(self.pid()), signal);
        }
    }

    /// Waits for its end; kills it, with its descendants, at the deadline.
    pub fn wait(mut self, deadline: Duration) -> Ended {
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        while self.is_running() && start.elapsed() < deadline {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        let status = self.reaped;
        let wall = start.elapsed();
        if status.is_none() {
            eprintln!("{} missed its deadline of {deadline:?}", self.what);
            eprintln!("{}", describe(self.pid()));
            self.end();
        }
        let take = |handle: Option<JoinHandle<Vec<u8>>>| {
            handle
                .map(|h| h.join().unwrap_or_default())
                .unwrap_or_default()
        };
        Ended {
            stdout: take(self.stdout.take()),
            stderr: take(self.stderr.take()),
            status,
            wall,
        }
    }

    /// Kills it with its descendants, each by id.
    pub fn end(&mut self) {
        if self.is_running() {
            for pid in descendants(self.pid()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = self.child.kill();
            self.reaped = self.child.wait().ok();
            running().remove(&self.pid());
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs `command` to its end.
#[track_caller]
pub fn run(command: Command, deadline: Duration) -> Ended {
    Proc::piped(command).wait(deadline)
}

/// Runs a tool by name with arguments, and expects success.
#[track_caller]
pub fn tool(name: &str, args: &[&str]) -> Ended {
    let mut command = Command::new(name);
    command.args(args);
    run(command, Duration::from_secs(120)).ok(&format!("{name} {args:?}"))
}

/// Whether a tool is installed.
pub fn installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(name).is_file())
}

/// Makes the kernel kill the process when the thread that starts it ends.
pub fn dies_with_us(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches nothing of ours.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
            Ok(())
        });
    }
}

/// Fields of `/proc/PID/stat` after the name: state, parent, …
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &stat[stat.rfind(')')? + 2..];
    Some(rest.split(' ').map(str::to_owned).collect())
}

/// Start time of a process in clock ticks since boot.
pub fn start_time(pid: i32) -> Option<u64> {
    stat(pid)?.get(19)?.parse().ok()
}

/// The name of a process.
pub fn name(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

/// The state letter of a process.
pub fn state(pid: i32) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// `root` and its descendants, and of each whether it is stopped from outside: every
/// thread is in tracing stop or stopped by a signal, or has ended. Not counted: workers
/// of an io_uring, which nothing can stop, and a thread that waits for the child it
/// made by vfork, which will stop before it runs again.
pub fn stops(root: i32) -> Vec<(i32, bool)> {
    let mut found = vec![(root, false)];
    let mut next = 0;
    while let Some((pid, _)) = found.get(next).copied() {
        let mut stopped = true;
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let dir = task.path();
            stopped &= is_stopped(&dir);
            let children = fs::read_to_string(dir.join("children")).unwrap_or_default();
            found.extend(
                children
                    .split(' ')
                    .filter_map(|child| Some((child.parse().ok()?, false))),
            );
        }
        found[next].1 = stopped;
        next += 1;
    }
    found
}

/// The same of one thread, by its directory under `/proc`.
fn is_stopped(task: &Path) -> bool {
    const IO_WORKER: u64 = 0x10;
    let Ok(stat) = fs::read_to_string(task.join("stat")) else {
        return true;
    };
    let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let state = fields.next();
    let flags = fields.nth(5).and_then(|f| f.parse::<u64>().ok());
    match state {
        Some("t" | "T" | "Z" | "X") => true,
        _ if flags.is_some_and(|f| f & IO_WORKER != 0) => true,
        Some("D") => {
            let call = fs::read_to_string(task.join("syscall")).unwrap_or_default();
            let makes = [libc::SYS_clone, libc::SYS_clone3, libc::SYS_vfork];
            let number = call.split(' ').next().and_then(|n| n.parse().ok());
            number.is_some_and(|n: libc::c_long| makes.contains(&n))
        }
        _ => false,
    }
}

/// Whether a process has `file` open.
pub fn has_open(pid: i32, file: &Path) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut links = descriptors.into_iter().flatten().flatten();
    links.any(|d| fs::read_link(d.path()).is_ok_and(|to| to == file))
}

/// All processes.
pub fn all_pids() -> Vec<i32> {
    fs::read_dir("/proc")
        .map(|dir| {
            dir.flatten()
                .filter_map(|e| e.file_name().to_str()?.parse().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// The children of `pid`, theirs, and so on.
pub fn descendants(pid: i32) -> Vec<i32> {
    let parents: Vec<(i32, i32)> = all_pids()
        .into_iter()
        .filter_map(|p| Some((p, stat(p)?.get(1)?.parse().ok()?)))
        .collect();
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            parents
                .iter()
                .filter(|(_, pp)| *pp == parent)
                .map(|(p, _)| *p),
        );
        next += 1;
    }
    found.remove(0);
    found
}

/// The processes whose environment holds `entry` ("NAME=value").
pub fn with_environment(entry: &str) -> Vec<i32> {
    with_entry(|e| e == entry.as_bytes())
}

/// The processes whose environment holds an entry that begins so.
pub fn with_environment_like(beginning: &str) -> Vec<i32> {
    with_entry(|e| e.starts_with(beginning.as_bytes()))
}

fn with_entry(which: impl Fn(&[u8]) -> bool) -> Vec<i32> {
    all_pids()
        .into_iter()
        .filter(|pid| *pid != std::process::id() as i32)
        .filter(|pid| environment(*pid).split(|b| *b == 0).any(&which))
        .collect()
}

/// That of a thread, if the first one has ended before the others.
fn environment(pid: i32) -> Vec<u8> {
    let of = |dir: &Path| fs::read(dir.join("environ")).ok().filter(|e| !e.is_empty());
    let tasks = || {
        fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
    };
    of(Path::new(&format!("/proc/{pid}")))
        .or_else(|| tasks().flatten().find_map(|task| of(&task.path())))
        .unwrap_or_default()
}

/// What a process is doing, for people.
pub fn describe(pid: i32) -> String {
    let read = |what: &str| {
        fs::read_to_string(format!("/proc/{pid}/{what}"))
            .unwrap_or_default()
            .replace('\0', " ")
            .trim()
            .to_owned()
    };
    let mut text = format!("  pid {pid}: {}\n", read("cmdline"));
    if let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) {
        for task in tasks.flatten().take(8) {
            let tid = task.file_name().to_string_lossy().into_owned();
            text += &format!(
                "    thread {tid}: state {} wchan {} syscall {}\n",
                tid.parse().ok().and_then(state).unwrap_or('?'),
                read(&format!("task/{tid}/wchan")),
                read(&format!("task/{tid}/syscall")),
            );
        }
    }
    text
}

/// Ends a test that takes too long: first its processes, so that the test can
/// fail by itself, then, if that does not help, everything.
#[derive(Debug)]
pub struct Watchdog {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches over `test` for `limit`; processes are recognised by `entry` in
    /// their environment.
    pub fn new(test: &str, entry: String, limit: Duration) -> Watchdog {
        let done = Arc::new(AtomicBool::new(false));
        let (test, seen) = (test.to_owned(), done.clone());
        let thread = std::thread::spawn(move || {
            let expired = |limit: Duration| {
                let start = Instant::now();
                while start.elapsed() < limit {
                    if seen.load(Ordering::Acquire) {
                        return false;
                    }
                    std::thread::park_timeout(Duration::from_millis(500));
                }
                true
            };
            if expired(limit) {
                eprintln!("test {test} exceeded {limit:?}; its processes:");
                for pid in with_environment(&entry) {
                    eprint!("{}", describe(pid));
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
                if expired(Duration::from_secs(60)) {
                    eprintln!("test {test} does not end; still running: {:?}", running());
                    std::process::exit(101);
                }
            }
        });
        Watchdog {
            done,
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// Waits until `condition` holds; `false` if it does not within `limit`.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Whether `path` is a file that can be executed.
pub fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
