//! The ways to copy the files of a running program that are compared.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::workload::Session;
use crate::{Certificate, Fs, Lab, process, product, tree};

/// No method may take longer than this for one copy.
const LIMIT: Duration = Duration::from_secs(120);

/// A way to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// `cp -a`, which reads and writes.
    Cp,
    /// `cp -a --reflink=always`: a clone of each file.
    Ficlone,
    /// SIGSTOP, a clone of each file or a copy where there are none, SIGCONT.
    Sigstop,
    /// `fsfreeze`, `cp -a` to a tmpfs (nothing can be written to a file system that is frozen), and
    /// `fsfreeze` again.
    Fsfreeze,
    /// `btrfs subvolume snapshot`.
    Subvolume,
    /// `rsync -a`, and once more.
    Rsync,
    /// `restic backup` of the live tree to a repository beside it.
    Restic,
    /// `snapshim checkpoint --capture …`.
    Snapshim(String),
}

/// What one copy took.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// From start to end of the command.
    pub wall: Duration,
    /// Why there is no copy.
    pub failed: Option<String>,
    /// Bytes that the method's processes wrote, by the kernel's account of each
    /// (`write_bytes` of `/proc/PID/io`); nothing for tmpfs.
    pub written: u64,
    /// Where the copy is.
    pub copy: Option<PathBuf>,
    /// What snapshim says of it: µs.
    pub hold_us: Option<f64>,
    /// From shutting the gate to the last call's return, µs.
    pub drain_us: Option<f64>,
    /// How long files were captured after the hold, µs, if they were.
    pub guard_us: Option<f64>,
    /// Pieces of files that programs waited for meanwhile.
    pub asked: Option<f64>,
    /// Whether snapshim calls it verified.
    pub verified: Option<bool>,
    /// How snapshim says it was captured.
    pub capture: String,
}

/// Methods that `snapshim checkpoint --help` offers for `--capture`.
pub fn captures() -> Vec<String> {
    let mut command = Command::new(product::snapshim());
    command.args(["checkpoint", "--help"]);
    let help = process::run(command, LIMIT)
        .ok("snapshim checkpoint --help")
        .out();
    offered(&help)
}

/// Reads them out of the help.
fn offered(help: &str) -> Vec<String> {
    let Some((_, after)) = help.split_once("--capture <") else {
        return Vec::new();
    };
    // Up to the next option.
    let part = after.split("\n      --").next().unwrap_or_default();
    if let Some((_, values)) = part.split_once("[possible values: ") {
        let values = values.split(']').next().unwrap_or_default();
        return values.split(", ").map(str::to_owned).collect();
    }
    part.lines()
        .filter_map(|line| line.trim_start().strip_prefix("- "))
        .filter_map(|line| line.split(':').next())
        .map(|name| name.trim().to_owned())
        .collect()
}

/// All methods, peers first.
pub fn all() -> Vec<Method> {
    let peers = [
        Method::Cp,
        Method::Ficlone,
        Method::Sigstop,
        Method::Fsfreeze,
        Method::Subvolume,
        Method::Rsync,
        Method::Restic,
    ];
    let ours = captures().into_iter().map(Method::Snapshim);
    peers.into_iter().chain(ours).collect()
}

impl Method {
    /// Its name on the command line and in tables.
    pub fn name(&self) -> String {
        match self {
            Method::Cp => "cp".into(),
            Method::Ficlone => "ficlone".into(),
            Method::Sigstop => "sigstop".into(),
            Method::Fsfreeze => "fsfreeze".into(),
            Method::Subvolume => "btrfs-snapshot".into(),
            Method::Rsync => "rsync".into(),
            Method::Restic => "restic".into(),
            Method::Snapshim(capture) => format!("snapshim-{capture}"),
        }
    }

    /// What it is, for the report.
    pub fn describe(&self) -> String {
        match self {
            Method::Cp => "`cp -a`".into(),
            Method::Ficlone => "`cp -a --reflink=always`".into(),
            Method::Sigstop => "SIGSTOP + clone or copy + SIGCONT".into(),
            Method::Fsfreeze => "`fsfreeze` + copy to tmpfs".into(),
            Method::Subvolume => "`btrfs subvolume snapshot`".into(),
            Method::Rsync => "`rsync -a`, twice".into(),
            Method::Restic => "restic, live tree".into(),
            Method::Snapshim(capture) => format!("**snapshim**, `--capture {capture}`"),
        }
    }

    /// Whether the writer has to run under `snapshim run`.
    pub fn is_ours(&self) -> bool {
        matches!(self, Method::Snapshim(_))
    }

    /// Whether it is worth trying on this file system; if not, why.
    pub fn missing(&self, fs: Fs) -> Option<String> {
        let needs =
            |tool: &str| (!process::installed(tool)).then(|| format!("no {tool} is installed"));
        match self {
            Method::Ficlone if !fs.has_reflink() => Some("no clones here".into()),
            Method::Subvolume if fs != Fs::Btrfs => Some("btrfs only".into()),
            Method::Fsfreeze if fs == Fs::Tmpfs => Some("tmpfs cannot be frozen".into()),
            Method::Snapshim(capture) if capture == "reflink" && !fs.has_reflink() => {
                Some("no clones here".into())
            }
            Method::Snapshim(capture) if capture == "subvolume" && fs != Fs::Btrfs => {
                Some("btrfs only".into())
            }
            Method::Fsfreeze => needs("fsfreeze"),
            Method::Subvolume => needs("btrfs"),
            Method::Rsync => needs("rsync"),
            Method::Restic => needs("restic"),
            _ => None,
        }
    }

    /// Makes a copy of the files of `session` now.
    pub fn take(&self, lab: &Lab, session: &Session) -> Taken {
        let from = &session.data;
        let to = copy_at(lab);
        let start = Instant::now();
        let mut taken = match self {
            Method::Cp => copy(from, &to, "never"),
            Method::Ficlone => copy(from, &to, "always"),
            Method::Sigstop => stopped(&session.writers(), from, &to),
            Method::Fsfreeze => frozen(from, &lab.shm().join("frozen-copy")),
            Method::Subvolume => {
                let mut command = Command::new("btrfs");
                command.args(["-q", "subvolume", "snapshot", "-r"]);
                command.arg(from).arg(&to);
                outcome(command, &to)
            }
            Method::Rsync => {
                let pass = || {
                    let mut command = Command::new("rsync");
                    command.arg("-a").arg(from.join("")).arg(to.join(""));
                    ran(command)
                };
                // 24: a file vanished meanwhile, which live trees do.
                let (first, second) = (pass(), pass());
                Taken {
                    failed: [&first, &second]
                        .into_iter()
                        .find_map(|r| r.unless(&[0, 24])),
                    written: first.written + second.written,
                    copy: Some(to.clone()),
                    ..Taken::default()
                }
            }
            Method::Restic => {
                let mut command = restic(lab);
                command.args(["backup", "--quiet"]).arg(from);
                let mut taken = outcome(command, &to);
                // It is got out of the repository when it is looked at.
                taken.copy = None;
                taken
            }
            Method::Snapshim(capture) => checkpoint(lab, capture, from),
        };
        // Unless the method knows better: what it said is read after it has ended.
        if taken.wall == Duration::ZERO {
            taken.wall = start.elapsed();
        }
        taken
    }

    /// Where the copy that was just made can be looked at.
    pub fn look(&self, lab: &Lab, session: &Session, taken: &Taken) -> Option<PathBuf> {
        if *self != Method::Restic {
            return taken.copy.clone();
        }
        let to = lab.shm().join("restored");
        let _ = fs::remove_dir_all(&to);
        let mut command = restic(lab);
        command
            .args(["restore", "latest", "--quiet", "--target"])
            .arg(&to);
        let ended = process::run(command, LIMIT);
        if ended.code() != 0 {
            eprintln!("restic restore: {}", ended.err());
        }
        Some(to.join(session.data.strip_prefix("/").expect("an absolute path")))
    }

    /// Removes the copy, and of snapshim those before the last two: that is in no method's time.
    pub fn discard(&self, lab: &Lab) {
        let to = copy_at(lab);
        match self {
            Method::Subvolume if to.exists() => {
                let mut command = Command::new("btrfs");
                command.args(["-q", "subvolume", "delete"]).arg(&to);
                process::run(command, LIMIT);
            }
            // The next one builds on the last.
            Method::Snapshim(_) => {
                let pruned = lab.snapshim(&["prune", lab.set(), "--quiet", "--keep-last", "2"]);
                process::run(pruned, LIMIT);
            }
            _ => {
                for dir in [
                    to,
                    lab.shm().join("frozen-copy"),
                    lab.shm().join("restored"),
                ] {
                    let _ = fs::remove_dir_all(dir);
                }
            }
        }
    }
}

fn copy_at(lab: &Lab) -> PathBuf {
    lab.beside("copy")
}

/// A command that was run.
struct Ran {
    status: Option<ExitStatus>,
    written: u64,
    stderr: String,
    stdout: String,
}

impl Ran {
    fn code(&self) -> i32 {
        let status = self.status;
        status.map_or(-1, |s| {
            s.code().unwrap_or_else(|| 128 + s.signal().unwrap_or(0))
        })
    }

    /// What went wrong, unless it ended with one of `codes`.
    fn unless(&self, codes: &[i32]) -> Option<String> {
        let code = self.code();
        (!codes.contains(&code)).then(|| format!("exit {code}: {}", self.stderr.trim()))
    }
}

/// Runs a command to its end, without looking at it meanwhile: no pause between looks is
/// short enough to time a clone, and long enough not to disturb it.
fn ran(mut command: Command) -> Ran {
    // Files, because a pipe would have to be emptied meanwhile.
    let scratch = |name: &str| {
        let path = crate::fs::shm_dir("output").join(name);
        let file = File::create(&path).expect("a file for output");
        (path, file)
    };
    let (stdout, out) = scratch("stdout");
    let (stderr, err) = scratch("stderr");
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    // Nothing is done in the child before it executes: then it is made without copying this process, which may be
    // large, and keep a processor from the writer for ms. It ends by itself, or, as long as this one lives, at the deadline.
    let child = command
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {:?}: {e}", command.get_program()));
    let (status, written) = wait(child);
    let text = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    Ran {
        status,
        written,
        stderr: text(stderr),
        stdout: text(stdout),
    }
}

/// Waits for a child, which is killed at the deadline; the bytes that it and those it waited
/// for wrote.
fn wait(child: Child) -> (Option<ExitStatus>, u64) {
    let pid = child.id() as libc::pid_t;
    // SAFETY: takes no pointer; the child is ours and not waited for yet, so the id is its.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made, and is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut poll = libc::pollfd {
        fd: std::os::fd::AsRawFd::as_raw_fd(&fd),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the pointer is to one structure of ours.
    let ready = unsafe { libc::poll(&mut poll, 1, LIMIT.as_millis() as i32) };
    if ready != 1 {
        for descendant in process::descendants(pid) {
            let _ = kill(Pid::from_raw(descendant), Signal::SIGKILL);
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let mut status = 0;
    // SAFETY: a structure of numbers, for which zeros are values.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to variables of ours; nobody else waits for this child.
    let got = unsafe { libc::wait4(pid, &mut status, 0, &mut usage) };
    assert_eq!(got, pid, "wait4: {}", std::io::Error::last_os_error());
    let status = (ready == 1).then(|| ExitStatus::from_raw(status));
    // The kernel counts in blocks of 512 bytes.
    (status, usage.ru_oublock as u64 * 512)
}

fn outcome(command: Command, to: &Path) -> Taken {
    let ran = ran(command);
    Taken {
        failed: ran.unless(&[0]),
        written: ran.written,
        copy: Some(to.to_owned()),
        ..Taken::default()
    }
}

fn copy(from: &Path, to: &Path, reflink: &str) -> Taken {
    let mut command = Command::new("cp");
    command.arg("-a").arg(format!("--reflink={reflink}"));
    command.arg(from).arg(to);
    outcome(command, to)
}

/// Stops processes with signals and waits until they stand.
pub fn stop(pids: &[i32]) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGSTOP);
    }
    for pid in pids {
        let until = Instant::now() + Duration::from_secs(10);
        while process::state(*pid).is_some_and(|s| s != 'T') && Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

/// Lets stopped processes go on when it is dropped. They are killed when this process dies.
struct Stopped<'a>(&'a [i32]);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        for pid in self.0 {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
        }
    }
}

/// Made by this process itself, to be fair: the start of a command would count as stall.
fn stopped(pids: &[i32], from: &Path, to: &Path) -> Taken {
    let before = own_written();
    stop(pids);
    let stopped = Stopped(pids);
    let done = copy_tree(from, to);
    drop(stopped);
    Taken {
        failed: done.err().map(|e| e.to_string()),
        written: own_written() - before,
        copy: Some(to.to_owned()),
        ..Taken::default()
    }
}

/// `write_bytes` of this process.
fn own_written() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = io.lines().find_map(|l| l.strip_prefix("write_bytes: "));
    line.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Files and directories: there is nothing else in the trees of the benchmark.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, to) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            copy_tree(&entry.path(), &to)?;
        } else if kind.is_file() {
            tree::copy_plainly(&entry.path(), &to)?;
        }
    }
    Ok(())
}

/// Thaws a file system whatever happens: when it is dropped, when this process dies, and after
/// 20 s at the latest.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    at: PathBuf,
}

impl Guard {
    /// Stands ready for the file system mounted at `at`, before it is frozen.
    pub fn new(at: &Path) -> Guard {
        let mut command = Command::new("bash");
        // The pipe ends when we do. Not killed with us, unlike all other children.
        command
            .args([
                "-c",
                "read -r -t 20; exec fsfreeze --unfreeze \"$1\"",
                "bash",
            ])
            .arg(at)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Guard {
            child: command.spawn().expect("bash"),
            at: at.to_owned(),
        }
    }

    /// Closes its pipe, as the end of this process would.
    pub fn lose(&mut self) {
        drop(self.child.stdin.take());
    }

    fn thaw(&self) -> Ran {
        let mut command = Command::new("fsfreeze");
        command.arg("--unfreeze").arg(&self.at);
        ran(command)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            let _ = pipe.write_all(b"\n");
        }
        let _ = self.child.wait();
    }
}

fn frozen(from: &Path, to: &Path) -> Taken {
    let at = mount_of(from);
    let guard = Guard::new(&at);
    let mut command = Command::new("fsfreeze");
    command.arg("--freeze").arg(&at);
    let froze = ran(command);
    if let Some(failed) = froze.unless(&[0]) {
        return Taken {
            failed: Some(failed),
            ..Taken::default()
        };
    }
    let mut taken = copy(from, to, "never");
    let thawed = guard.thaw();
    taken.failed = taken.failed.or(thawed.unless(&[0]));
    taken
}

/// The mount point that `path` is below; not a subvolume, which has a device number of its own.
pub fn mount_of(path: &Path) -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let above = points
        .map(PathBuf::from)
        .filter(|point| path.starts_with(point));
    above
        .max_by_key(|p| p.as_os_str().len())
        .unwrap_or_else(|| "/".into())
}

fn restic(lab: &Lab) -> Command {
    let repository = lab.beside("restic");
    let command = || {
        let mut command = Command::new("restic");
        command
            .env("RESTIC_REPOSITORY", &repository)
            .env("RESTIC_PASSWORD", "benchmark")
            .env("RESTIC_CACHE_DIR", lab.shm().join("restic-cache"));
        command
    };
    if !repository.exists() {
        let mut init = command();
        init.args(["init", "--quiet"]);
        process::run(init, LIMIT).ok("restic init");
    }
    command()
}

/// Prepares what a method needs only once, before anything is timed.
pub fn prepare(methods: &[Method], lab: &Lab) {
    if methods.contains(&Method::Restic) {
        restic(lab);
    }
}

fn checkpoint(lab: &Lab, capture: &str, from: &Path) -> Taken {
    let command = lab.snapshim(&[
        "checkpoint",
        lab.set(),
        "--capture",
        capture,
        // A loss is to be seen, not to be cut short.
        "--max-hold",
        "10s",
    ]);
    let start = Instant::now();
    let ran = ran(command);
    let wall = start.elapsed();
    let value = manifest_of(&ran.stdout).unwrap_or_default();
    let mut taken = Taken {
        wall,
        failed: ran.unless(&[0, 5]),
        written: ran.written,
        verified: Some(ran.code() == 0),
        ..Taken::default()
    };
    if value["id"].is_string() {
        taken.guard_us = value["guard_us"].as_f64();
        taken.asked = value["guard_asked"].as_f64();
        let certificate = Certificate(value);
        taken.hold_us = Some(certificate.hold_us());
        taken.drain_us = Some(certificate.drain_us());
        taken.capture = certificate.capture().to_owned();
        taken.copy = Some(certificate.copy_of(from));
        if ran.code() == 5 {
            eprintln!("not verified: {:?}", certificate.reasons());
        }
    }
    taken
}

/// The certificate of the snapshot whose tree a checkpoint named in its last line.
fn manifest_of(said: &str) -> Option<Value> {
    let tree = Path::new(said.lines().last()?);
    let text = fs::read(tree.parent()?.join("manifest.json")).ok()?;
    let mut value: Value = serde_json::from_slice(&text).ok()?;
    value["path"] = tree.to_str()?.into();
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captures_are_read_from_either_form_of_help() {
        let long = "      --capture <METHOD>\n          How [default: auto]\n\n          Possible \
                    values:\n          - auto:    As it is\n          - copy-before-write: Later\n\n\
                    \x20     --outside <HOW>\n          - none: x\n";
        assert_eq!(offered(long), ["auto", "copy-before-write"]);
        let short = "  --capture <M>  How [default: auto] [possible values: auto, copy]\n";
        assert_eq!(offered(short), ["auto", "copy"]);
        assert!(offered("").is_empty());
    }
}
