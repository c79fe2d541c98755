//! One application at work: snapshots, copies made without the gate, and what a check says
//! of either.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Application, Row};
use crate::lab::{self, Lab};
use crate::process::{self, Proc};
use crate::product;

/// What SQLite has to roll back.
pub const HOT: &str = "hot journals";

/// How long a load may take to begin, and a check to end.
const PATIENCE: Duration = Duration::from_secs(180);

/// An application under `snapshim run`, at work.
#[derive(Debug)]
pub struct Bench {
    /// Which.
    pub app: &'static Application,
    /// Where.
    pub lab: Lab,
    load: Proc,
}

/// What a check found in a copy that is sound.
#[derive(Clone, Debug, Default)]
pub struct Sound {
    /// What the program had to do to open it: how much, of what.
    pub recovery: Vec<(String, u64)>,
    /// How many updates it has seen.
    pub units: u64,
}

impl Bench {
    /// Starts the load. `None` if its file system is left out on request.
    #[track_caller]
    pub fn start(app: &'static Application, limit: Duration) -> Option<Bench> {
        Bench::start_in(app, app.script.1, true, limit)
    }

    /// The same with a mode of the script's, with the gate or without.
    #[track_caller]
    pub fn start_in(
        app: &'static Application,
        mode: &str,
        is_gated: bool,
        limit: Duration,
    ) -> Option<Bench> {
        app.must_be_there();
        let lab = Lab::new(&format!("apps-{}", app.name), app.fs, limit)?;
        let scratch = lab.stats().path().with_file_name("load");
        fs::create_dir(&scratch).expect("a scratch directory");
        let mut options = Vec::new();
        if let Some(user) = app.user {
            lab.give_to(user);
            lab::give(&scratch, user);
            options.extend(["--gate-owner", user]);
        }
        let mut command = match is_gated {
            true => lab.run_command(&options),
            false => lab.command("env"),
        };
        script(&mut command, app, mode, "load", &lab.data(), &scratch);
        let mut load = Proc::piped(command);
        let is_ready = process::wait_until(PATIENCE, || {
            scratch.join("ready").exists() || !load.is_running()
        });
        if !is_ready || !load.is_running() {
            let account = process::describe(load.pid());
            load.end();
            let ended = load.wait(Duration::from_secs(5));
            panic!(
                "{}: no load: {}{}\n{account}",
                app.name,
                ended.out(),
                ended.err()
            );
        }
        Some(Bench { app, lab, load })
    }

    /// Whether the load still works.
    #[track_caller]
    pub fn expect_running(&mut self) {
        if !self.load.is_running() {
            let said = fs::read_to_string(self.scratch("load").join("log")).unwrap_or_default();
            panic!("{}: the load has ended\n{said}", self.app.name);
        }
    }

    /// A directory for sockets and logs: short names, not watched.
    fn scratch(&self, name: &str) -> PathBuf {
        self.lab.stats().path().with_file_name(name)
    }

    /// Takes a snapshot, restores it elsewhere, has it checked, and notes all of it.
    #[track_caller]
    pub fn snapshot(&mut self, at: &[&str], row: &mut Row) {
        self.expect_running();
        let mut args = vec!["--keep-last", "2"];
        args.extend(at);
        let outcome = self.lab.checkpoint(&args);
        let Some(certificate) = &outcome.certificate else {
            let line = outcome.stderr.lines().next().unwrap_or_default();
            return row.not_published(outcome.code, line);
        };
        let restored = self.lab.beside("restored");
        let _ = fs::remove_dir_all(&restored);
        let data = self.lab.data();
        let what = format!("{}:{}", certificate.id(), data.display());
        let to = restored.to_str().expect("UTF-8 path");
        let restore = self
            .lab
            .snapshim(&["restore", self.lab.set(), &what, "--to", to]);
        process::run(restore, PATIENCE).ok("restore");
        let found = self.check(&restored);
        if found.is_err()
            && let Some(keep) = std::env::var_os("SNAPSHIM_TEST_KEEP")
        {
            let keep = Path::new(&keep).join(self.app.name).join(certificate.id());
            fs::create_dir_all(keep.parent().expect("a parent")).expect("a directory");
            let mut copy = Command::new("cp");
            copy.arg("-a").arg(certificate.copy_of(&data)).arg(keep);
            process::run(copy, PATIENCE).ok("cp");
        }
        row.published(certificate, found);
    }

    /// Copies made without the gate, and what becomes of them: the controls of a row.
    #[track_caller]
    pub fn control(&mut self, name: &str, copies: usize, row: &mut Row) {
        let mut control = Row::new(name);
        for nth in 0..copies {
            let copy = match name {
                "plain" => self.plain_copy(Duration::from_millis(400)),
                _ => self.stopped_copy(),
            };
            control.found(self.check(&copy), &format!("{name} {nth}"));
        }
        row.controls.push((
            name.to_owned(),
            copies as u64,
            control.failures.len() as u64,
            control.with(HOT),
        ));
    }

    /// What the program itself and its checker say of a copy, which they may change.
    #[track_caller]
    pub fn check(&self, copy: &Path) -> Result<Sound, String> {
        let scratch = self.scratch("check");
        let _ = fs::remove_dir_all(&scratch);
        fs::create_dir(&scratch).expect("a scratch directory");
        if let Some(user) = self.app.user {
            lab::give(&scratch, user);
        }
        // With a mark of its own, so that what it leaves can be found and ended.
        let mut command = Command::new("env");
        let mode = self.app.script.1;
        script(&mut command, self.app, mode, "check", copy, &scratch);
        let mark = format!("SNAPSHIM_TEST_CHECK={}", scratch.display());
        command
            .env("LC_ALL", "C.UTF-8")
            .env_remove("LD_PRELOAD")
            .env("SNAPSHIM_TEST_CHECK", &scratch);
        let ended = process::run(command, PATIENCE);
        for pid in process::with_environment(&mark) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if ended.code() != 0 {
            let text = match ended.code() {
                -1 => "the check did not end".to_owned(),
                _ => format!("{}{}", ended.out(), ended.err()),
            };
            let lines: Vec<&str> = text.lines().filter(|l| !is_finding(l)).collect();
            return Err(lines.join("\n"));
        }
        let mut sound = Sound::default();
        for line in ended.out().lines() {
            let mut words = line.splitn(3, ' ');
            let (kind, number) = (words.next(), words.next().and_then(|n| n.parse().ok()));
            match (kind, number, words.next()) {
                (Some("recovery"), Some(n), Some(what)) => {
                    sound.recovery.push((what.to_owned(), n));
                }
                (Some("units"), Some(n), None) => sound.units = n,
                _ => {}
            }
        }
        Ok(sound)
    }

    /// A copy without the gate, file by file as `cp` makes it, a while in the middle: of a
    /// larger database, it would take as long.
    #[track_caller]
    pub fn plain_copy(&mut self, pause: Duration) -> PathBuf {
        self.expect_running();
        let copy = self.fresh("plain");
        let data = self.lab.data();
        let mut names: Vec<PathBuf> = fs::read_dir(&data)
            .expect("the data")
            .flatten()
            .map(|entry| entry.path())
            .collect();
        names.sort();
        for (nth, name) in names.iter().enumerate() {
            if nth > 0 {
                std::thread::sleep(pause / names.len() as u32);
            }
            let mut cp = Command::new("cp");
            cp.args(["-a", "--reflink=never"]).arg(name).arg(&copy);
            // Files may go meanwhile: so they do for whoever copies plainly.
            process::run(cp, PATIENCE);
        }
        copy
    }

    /// The program stopped by signals, and its files cloned.
    #[track_caller]
    pub fn stopped_copy(&mut self) -> PathBuf {
        self.expect_running();
        let copy = self.fresh("stopped");
        let all = process::descendants(self.load.pid());
        for pid in &all {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGSTOP);
        }
        let settle = Instant::now();
        let is_stopped = |pid: &i32| !matches!(process::state(*pid), Some('R' | 'S' | 'D'));
        while !all.iter().all(is_stopped) && settle.elapsed() < Duration::from_secs(2) {
            std::thread::yield_now();
        }
        let mut clone = Command::new("cp");
        clone.args(["-a", "--reflink=auto", "-T"]);
        clone.arg(self.lab.data()).arg(&copy);
        process::run(clone, PATIENCE);
        // Also the one that started them, which stops when they do.
        for pid in all.iter().chain([&self.load.pid()]) {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
        }
        copy
    }

    fn fresh(&self, name: &str) -> PathBuf {
        let copy = self.lab.beside(name);
        let _ = fs::remove_dir_all(&copy);
        fs::create_dir(&copy).expect("a directory for a copy");
        if let Some(user) = self.app.user {
            lab::give(&copy, user);
        }
        copy
    }

    /// What `status` has counted of the program's calls so far.
    pub fn observed(&self) -> Vec<(String, u64)> {
        let status = self.lab.snapshim(&["status", self.lab.set(), "--json"]);
        let status = process::run(status, PATIENCE).ok("status");
        let status: Value = serde_json::from_str(&status.out()).expect("JSON");
        let mut counts: Vec<(String, u64)> = Vec::new();
        for writer in status["writers"].as_array().into_iter().flatten() {
            for (name, count) in writer["seen"].as_object().into_iter().flatten() {
                let count = count.as_u64().unwrap_or(0);
                match counts.iter_mut().find(|(n, _)| n == name) {
                    Some((_, sum)) => *sum += count,
                    None => counts.push((name.clone(), count)),
                }
            }
        }
        counts.retain(|(_, count)| *count > 0);
        counts
    }

    /// Ends the load.
    pub fn end(mut self) {
        self.load.end();
    }
}

fn is_finding(line: &str) -> bool {
    line.starts_with("recovery ") || line.starts_with("units ")
}

/// Adds the script and its arguments to a command that runs what follows.
fn script(
    command: &mut Command,
    app: &Application,
    mode: &str,
    verb: &str,
    data: &Path,
    scratch: &Path,
) {
    if let Some(user) = app.user {
        command.args(["setpriv", "--init-groups", "--reuid", user]);
        command.args(["--regid", &lab::group_of(user), "--"]);
    }
    // Debian's own, for which its packages are made.
    command.arg("/usr/bin/python3");
    let name = app.script.0;
    command.arg(product::sources().join("apps").join(format!("{name}.py")));
    command.arg(verb).arg(data).arg(scratch).arg(mode);
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HOME", scratch);
}
