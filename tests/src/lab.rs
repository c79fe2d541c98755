//! One test's directories, set and processes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::fs::Small;
use crate::process::{self, Ended, Proc, Watchdog};
use crate::stats::{STATS, Stats};
use crate::{Fs, product};

/// One test's surroundings: a directory of data and a store on the file system
/// under test, a directory of gates on tmpfs, and a watchdog. All of it, and
/// every process that inherited its environment, goes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
    base: PathBuf,
    shm: PathBuf,
    gates: PathBuf,
    _watchdog: Watchdog,
}

/// How `snapshim checkpoint --json` ended.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; -1 if it had to be killed.
    pub code: i32,
    /// The certificate, if one was printed.
    pub certificate: Option<Certificate>,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub wall: Duration,
}

impl Outcome {
    /// The certificate; panics with the error if there is none.
    #[track_caller]
    pub fn certificate(&self) -> &Certificate {
        self.certificate.as_ref().unwrap_or_else(|| {
            panic!("no certificate: exit {}, {}", self.code, self.stderr);
        })
    }

    /// The certificate of a checkpoint that must be verified.
    #[track_caller]
    pub fn verified(&self) -> &Certificate {
        let certificate = self.certificate();
        assert!(
            self.code == 0 && certificate.is_verified(),
            "exit {}, not verified: {:?}\n{}",
            self.code,
            certificate.reasons(),
            self.stderr
        );
        certificate
    }

    /// The certificate of a checkpoint that must be captured but not verified.
    #[track_caller]
    pub fn unverified(&self) -> &Certificate {
        let certificate = self.certificate();
        assert!(
            self.code == 5 && !certificate.is_verified() && !certificate.reasons().is_empty(),
            "exit {} instead of 5 with a reason: {:?}\n{}",
            self.code,
            certificate.0,
            self.stderr
        );
        certificate
    }
}

/// What `checkpoint --json` prints, or a `manifest.json`.
#[derive(Clone, Debug)]
pub struct Certificate(pub Value);

impl Certificate {
    fn text(&self, name: &str) -> &str {
        self.0[name].as_str().unwrap_or_default()
    }

    /// Microseconds of the field `name`.
    fn micros(&self, name: &str) -> f64 {
        self.0[name].as_u64().unwrap_or(0) as f64
    }

    /// Its id.
    pub fn id(&self) -> &str {
        self.text("id")
    }

    /// Whether everything promised was proved.
    pub fn is_verified(&self) -> bool {
        self.0["verified"] == true
    }

    /// The directory with the snapshot's files.
    pub fn tree(&self) -> PathBuf {
        PathBuf::from(self.text("path"))
    }

    /// Where the file or directory that is `live` in the live tree is in the snapshot.
    pub fn copy_of(&self, live: &Path) -> PathBuf {
        self.tree()
            .join(live.strip_prefix("/").expect("an absolute path"))
    }

    /// How it was captured.
    pub fn capture(&self) -> &str {
        self.text("capture")
    }

    /// From shutting the gate to opening it, µs.
    pub fn hold_us(&self) -> f64 {
        self.micros("hold_us")
    }

    /// From shutting the gate to the last call having returned, µs.
    pub fn drain_us(&self) -> f64 {
        self.micros("drain_us")
    }

    /// Why it is not verified: code and text.
    pub fn reasons(&self) -> Vec<(String, String)> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let reasons = self.0["reasons"].as_array();
        reasons
            .into_iter()
            .flatten()
            .map(|r| (text(&r["code"]), text(&r["text"])))
            .collect()
    }

    /// Whether a reason, or the list of foreign writers, names process `pid`.
    pub fn blames(&self, pid: i32) -> bool {
        ["reasons", "foreign"].iter().any(|list| {
            let list = self.0[*list].as_array();
            list.into_iter().flatten().any(|r| r["pid"] == pid)
        })
    }
}

#[track_caller]
fn user_named(name: &str) -> nix::unistd::User {
    let found = nix::unistd::User::from_name(name).ok().flatten();
    found.unwrap_or_else(|| panic!("no user {name}"))
}

/// Gives a directory to a user.
#[track_caller]
pub fn give(dir: &Path, user: &str) {
    let user = user_named(user);
    nix::unistd::chown(dir, Some(user.uid), Some(user.gid)).expect("chown");
}

/// The id of a user's group, as text.
#[track_caller]
pub fn group_of(user: &str) -> String {
    user_named(user).gid.to_string()
}

static SERIAL: Mutex<()> = Mutex::new(());

/// Keeps other tests of this binary that ask for it from running meanwhile: for
/// tests that measure time.
pub fn serial() -> MutexGuard<'static, ()> {
    SERIAL.lock().unwrap_or_else(|e| e.into_inner())
}

impl Lab {
    /// Surroundings for the test `name` on `fs`; the test may take `limit`.
    ///
    /// `None` if this file system is left out on request.
    #[track_caller]
    pub fn new(name: &str, fs: Fs, limit: Duration) -> Option<Lab> {
        Some(Lab::at(&fs.mount()?, name, fs.name(), limit))
    }

    /// Surroundings for the test `name` on a file system of its own; the test may take `limit`.
    #[track_caller]
    pub fn on_small(small: &Small, name: &str, limit: Duration) -> Lab {
        Lab::at(small.path(), name, "small", limit)
    }

    #[track_caller]
    fn at(mount: &Path, name: &str, kind: &str, limit: Duration) -> Lab {
        let base = mount.join(name);
        assert!(!base.exists(), "two tests are named {name}");
        let shm = crate::fs::shm_dir(&format!("{name}-{kind}"));
        let gates = shm.join("gates");
        fs::create_dir_all(base.join("data")).expect("a directory for data");
        let entry = format!("SNAPSHIM_DIR={}", gates.display());
        Lab {
            name: name.to_owned(),
            _watchdog: Watchdog::new(name, entry, limit),
            base,
            shm,
            gates,
        }
    }

    /// The directory to watch.
    pub fn data(&self) -> PathBuf {
        self.base.join("data")
    }

    /// Where snapshots go.
    pub fn store(&self) -> PathBuf {
        self.base.join("store")
    }

    /// A path beside the data, on the same file system.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.base.join(name)
    }

    /// `$SNAPSHIM_DIR`.
    pub fn gates(&self) -> &Path {
        &self.gates
    }

    /// A directory on tmpfs for what is not to be on the file system under test.
    pub fn shm(&self) -> &Path {
        &self.shm
    }

    /// The gate file of the set.
    pub fn gate(&self) -> PathBuf {
        self.gates.join(self.set()).join("gate")
    }

    /// The set's name.
    pub fn set(&self) -> &str {
        &self.name
    }

    /// Where a program of this test measures itself.
    pub fn stats(&self) -> Stats {
        Stats::at(&self.shm.join("stats"))
    }

    /// Gives the directory of data to a user, and lets everybody get at the gates.
    #[track_caller]
    pub fn give_to(&self, user: &str) {
        fs::create_dir_all(&self.gates).expect("a directory for gates");
        for dir in [&self.shm, &self.gates] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        give(&self.data(), user);
    }

    /// Gives a command the environment of this test.
    pub fn environment(&self, command: &mut Command) {
        command
            .env("SNAPSHIM_DIR", &self.gates)
            .env(STATS, self.stats().path())
            .env("LC_ALL", "C.UTF-8")
            .env_remove("LD_PRELOAD");
    }

    /// A command in the environment of this test, not under the shim.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.environment(&mut command);
        command
    }

    /// The same, with arguments.
    pub fn command_with(&self, program: &str, args: &[&str]) -> Command {
        let mut command = self.command(program);
        command.args(args);
        command
    }

    /// `snapshim` with `args`.
    pub fn snapshim(&self, args: &[&str]) -> Command {
        let mut command = self.command(product::snapshim());
        command.args(args);
        command
    }

    /// Reads every snapshot that is kept, and compares it with its digests.
    #[track_caller]
    pub fn check_digests(&self) {
        let mut command = self.snapshim(&["verify", self.set(), "--all", "--store"]);
        command.arg(self.store());
        process::run(command, Duration::from_secs(120)).ok("verify");
    }

    /// `snapshim run` of a program over this test's data, `options` before the
    /// `--`; the caller adds the program and its arguments.
    pub fn run_command(&self, options: &[&str]) -> Command {
        let mut command = self.snapshim(&["run", "--name", self.set()]);
        command
            .arg("--watch")
            .arg(self.data())
            .arg("--store")
            .arg(self.store())
            .args(options)
            .arg("--");
        command
    }

    /// Starts a program under `snapshim run`.
    #[track_caller]
    pub fn run(&self, options: &[&str], program: &Path, args: &[&str]) -> Proc {
        let mut command = self.run_command(options);
        command.arg(program).args(args);
        Proc::piped(command)
    }

    /// Waits until the program under test has written something.
    #[track_caller]
    pub fn wait_for_beats(&self, proc: &mut Proc, beats: u64) {
        let stats = self.stats();
        let came = process::wait_until(Duration::from_secs(30), || {
            stats.beats() >= beats || !proc.is_running()
        });
        if !came || stats.beats() < beats {
            let running = proc.is_running();
            let account = process::describe(proc.pid());
            proc.end();
            panic!("the program wrote nothing (running: {running})\n{account}");
        }
    }

    /// Takes a checkpoint, `options` after the name.
    #[track_caller]
    pub fn checkpoint(&self, options: &[&str]) -> Outcome {
        let mut command = self.snapshim(&["checkpoint", self.set(), "--json"]);
        command.args(options);
        outcome(process::run(command, Duration::from_secs(30)))
    }

    /// What `snapshim env` prints for this test's data: variables for plain
    /// `LD_PRELOAD` use.
    #[track_caller]
    pub fn env(&self, options: &[&str]) -> Vec<(String, String)> {
        let mut command = self.snapshim(&["env", "--name", self.set()]);
        command.arg("--watch").arg(self.data());
        command.arg("--store").arg(self.store()).args(options);
        let ended = process::run(command, Duration::from_secs(30)).ok("snapshim env");
        // As a shell reads it.
        let mut shell = self.command("bash");
        shell
            .args(["-c", "eval \"$1\"; env -0", "bash"])
            .arg(ended.out());
        let before = ["LD_PRELOAD", "SNAPSHIM_"];
        process::run(shell, Duration::from_secs(30))
            .ok("bash")
            .out()
            .split('\0')
            .filter_map(|entry| entry.split_once('='))
            .filter(|(name, _)| before.iter().any(|b| name.starts_with(b)))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// The manifests in the store, with the directories they are in; also of
    /// what is there by mistake.
    pub fn stored(&self) -> Vec<(PathBuf, Certificate)> {
        let dir = self.store().join(self.set());
        let entries = fs::read_dir(dir).map(|d| d.flatten().collect::<Vec<_>>());
        let mut found: Vec<(PathBuf, Certificate)> = entries
            .unwrap_or_default()
            .into_iter()
            .filter(|e| !e.file_type().is_ok_and(|t| t.is_symlink()))
            .filter_map(|e| {
                let text = fs::read(e.path().join("manifest.json")).ok()?;
                Some((e.path(), Certificate(serde_json::from_slice(&text).ok()?)))
            })
            .collect();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// Processes of this test.
    pub fn processes(&self) -> Vec<i32> {
        process::with_environment(&format!("SNAPSHIM_DIR={}", self.gates.display()))
    }

    /// Processes of this test that run the program `name`.
    pub fn processes_named(&self, name: &str) -> Vec<i32> {
        let comm = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm"));
        let mut pids = self.processes();
        pids.retain(|pid| comm(pid).is_ok_and(|c| c.trim() == &name[..name.len().min(15)]));
        pids
    }
}

/// Reads what `checkpoint --json` printed.
#[track_caller]
pub fn outcome(ended: Ended) -> Outcome {
    let (code, stderr) = (ended.code(), ended.err());
    assert!(
        code != -1,
        "a checkpoint did not end within its deadline: {stderr}"
    );
    let out = ended.out();
    let value: Option<Value> = (!out.trim().is_empty()).then(|| {
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("not one JSON object: {e}\n{out}"))
    });
    // On failure the object may be an error report; only a certificate has an id.
    let certificate = value.filter(|v| v["id"].is_string()).map(Certificate);
    Outcome {
        code,
        certificate,
        stderr,
        wall: ended.wall,
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let pids: Vec<Pid> = self.processes().into_iter().map(Pid::from_raw).collect();
        for pid in &pids {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        process::wait_until(Duration::from_secs(5), || self.processes().is_empty());
        // Orphans among them are our children by now.
        for pid in pids {
            if !process::is_managed(pid.as_raw()) {
                let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            }
        }
        let _ = fs::remove_dir_all(&self.base);
        let _ = fs::remove_dir_all(&self.shm);
    }
}
