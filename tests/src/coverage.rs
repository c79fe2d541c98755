//! What the holds of real checkpoints see of a program that changes its files by one
//! particular way.
//!
//! # How a change in a hold is found
//!
//! A watcher outside the set looks at the directory of data all the time (names,
//! sizes, modes, times to the nanosecond, bytes), and at the gate word before and
//! after each look. The word holds the epoch, so a look with the same shut word on
//! both sides lies within that one hold, whatever the clock says. The hold lasts some
//! 50 ms because a large file beside the data is copied during it (`--capture copy`),
//! after the data: roots are captured in the order of their paths.
//!
//! From such a hold the looks count from `drain_us` (as in the certificate) after the
//! first one that saw the word shut, which is no sooner than the cut, and a
//! millisecond more, until a millisecond before the last. What a certificate claims is
//! that the capture shows one instant. A change by a writer nobody holds between the
//! cut and the first look of the coordinator at that file, or between its last look
//! and the opening, is no fault in that, and the margin keeps it out. Any other
//! difference between two looks is a change in the hold: then the certificate must say
//! that it is not verified.
//!
//! A process held from outside is stopped only after the gate is shut and drained, and
//! what it changes before is before the cut. So with each look at a shut gate goes one
//! at the program's threads, and the looks count from the first one that found every
//! process stopped that the certificate says was held from outside, or names as
//! foreign. If there is none, they count as above. From then on all of them have to
//! stay stopped until the gate opens: one that does not, under a certificate that is
//! verified, is a fault, whether or not it was seen to change anything. (A process in
//! a frozen cgroup looks like one that sleeps; nothing here is held that way.)
//!
//! What the certificate says is not vouched for is no change either: the bytes of SQLite's
//! `-shm`, which is written through a mapping also while its writer is about to wait at the
//! gate. They are looked at apart from the rest, and count if the certificate is silent.
//!
//! That the watcher would see one is shown each time: before and after every hold the
//! program must be seen to change its files while the gate is open.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Outcome, outcome};
use crate::paths::{Ready, Way};
use crate::process::{self, Proc};
use crate::{Certificate, Fs, Lab, tree};

/// How long a hold is to be.
const HOLD: Duration = Duration::from_millis(50);
/// What is left out of it at either end; see above.
const MARGIN: Duration = Duration::from_millis(1);
/// A hold in which the watcher could look less often than this shows nothing.
const LOOKS: usize = 20;
/// Where the gate word is in the gate file, and the bits of its state.
const WORD: (u64, u32) = (64, 0xf);
/// Records in the runs that are compared.
const RECORDS: usize = 100;

/// One row of the table.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The way.
    pub name: String,
    /// What is missing to run it.
    pub needs: Option<String>,
    /// `run` would not start it as such; what it said.
    pub refused: Option<String>,
    /// How the processes of the set were held, and who was outside it.
    pub layers: BTreeSet<String>,
    /// Holds that the watcher saw enough of.
    pub holds: usize,
    /// Their lengths, ms.
    pub lengths: Vec<f64>,
    /// Changes seen in them.
    pub changes: usize,
    /// Changes seen for every 50 ms that the gate was open.
    pub usual: f64,
    /// Certificates that said verified.
    pub verified: usize,
    /// Reasons why not, with their texts.
    pub reasons: BTreeMap<String, String>,
    /// Holds after which nothing was published, and the last message.
    pub unpublished: (usize, String),
    /// What makes the row wrong.
    pub faults: Vec<String>,
    /// What a run under the gate did differently.
    pub difference: Option<String>,
}

impl Row {
    /// Adds a fault, and says so at once.
    fn fault(&mut self, fault: impl Into<String>) {
        let fault = fault.into();
        eprintln!("WRONG {}: {fault}", self.name);
        self.faults.push(fault);
    }

    /// Every hold held.
    pub fn is_held(&self) -> bool {
        self.needs.is_none()
            && self.faults.is_empty()
            && self.holds > 0
            && self.verified == self.holds
            && self.changes == 0
    }

    /// Nothing was called verified that may not be: each certificate that was not says
    /// why, and so does whatever was not published.
    pub fn is_honest(&self) -> bool {
        self.faults.is_empty() && self.difference.is_none()
    }
}

/// When a writer that is said to be held from outside is really stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Not at all.
    Never,
    /// For the first part of the hold.
    LetGoEarly,
    /// From when the gate is shut until it opens.
    Throughout,
}

/// The surroundings in which rows are measured, one after the other.
#[derive(Debug)]
pub struct Bench {
    lab: Lab,
    /// Beside the data; its copying makes holds long.
    ballast: PathBuf,
    /// On tmpfs: nothing is to wait for a disk.
    store: PathBuf,
    rows: usize,
}

impl Bench {
    /// Surroundings named `name`, for `limit`; `None` without mounts.
    #[track_caller]
    pub fn new(name: &str, limit: Duration) -> Option<Bench> {
        let lab = Lab::new(name, Fs::Xfs, limit)?;
        let ballast = lab.beside("z-ballast");
        let store = crate::fs::shm_dir(&format!("{name}-store"));
        fs::write(&ballast, vec![7; 32 << 20]).expect("the ballast");
        let mut bench = Bench {
            lab,
            ballast,
            store,
            rows: 0,
        };
        bench.calibrate();
        Some(bench)
    }

    /// Gives the ballast the size that makes a hold as long as wanted.
    fn calibrate(&mut self) {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let set = "calibration";
        let mut idle = Proc::piped(self.run(set, &["sleep".into(), "600".into()]));
        self.wait_for_gate(set, &mut idle);
        for _ in 0..3 {
            // The shortest: a busy machine only makes them longer.
            let lengths = (0..3).map(|_| self.checkpoint(set).verified().hold_us());
            let factor = HOLD.as_micros() as f64 / lengths.fold(f64::MAX, f64::min);
            if (0.9..1.3).contains(&factor) {
                break;
            }
            self.scale_ballast(factor);
        }
        idle.end();
    }

    fn scale_ballast(&self, factor: f64) {
        let size = fs::metadata(&self.ballast).expect("the ballast").len();
        let size = (size as f64 * factor.clamp(0.2, 5.0)) as u64;
        let mut file = File::create(&self.ballast).expect("the ballast");
        let block = vec![7; 1 << 20];
        for _ in 0..size.clamp(1 << 20, 1 << 30) >> 20 {
            file.write_all(&block).expect("the ballast");
        }
    }

    /// `snapshim run` of a program.
    fn run(&self, set: &str, program: &[OsString]) -> Command {
        let mut command = self.lab.snapshim(&["run", "--name", set, "--watch"]);
        command.arg(self.lab.data()).arg("--watch");
        command.arg(&self.ballast).arg("--store").arg(&self.store);
        command.args(["--max-hold", "10s", "--"]).args(program);
        command
    }

    fn checkpoint(&self, set: &str) -> Outcome {
        let command = self.checkpoint_command(set);
        outcome(process::run(command, Duration::from_secs(60)))
    }

    fn checkpoint_command(&self, set: &str) -> Command {
        let mut command = self.lab.snapshim(&["checkpoint", set, "--json"]);
        command.args(["--capture", "copy", "--max-hold", "10s", "--keep-last", "1"]);
        // The ballast never changes.
        command.arg("--full");
        command
    }

    fn gate(&self, set: &str) -> PathBuf {
        self.lab.gates().join(set).join("gate")
    }

    fn wait_for_gate(&self, set: &str, program: &mut Proc) -> bool {
        let gate = self.gate(set);
        process::wait_until(Duration::from_secs(20), || {
            gate.exists() || !program.is_running()
        }) && program.is_running()
    }

    /// Measures one way with so many holds, and compares its output if asked.
    pub fn measure(&mut self, way: &Way, holds: usize, compare: bool) -> Row {
        self.rows += 1;
        let mut row = Row {
            name: way.name.clone(),
            ..Row::default()
        };
        let ready = match way.prepare(&self.lab) {
            Ok(ready) => ready,
            Err(missing) => {
                row.needs = Some(missing);
                return row;
            }
        };
        if let Some((set, program, watcher)) = self.start(&ready, &mut row) {
            let take = || self.checkpoint(&set);
            self.hold(&take, program, watcher, holds, &mut row);
        }
        if compare {
            row.difference = self.compare(&ready);
            if let Some(difference) = &row.difference {
                eprintln!("WRONG {}: {difference}", row.name);
            }
        }
        row
    }

    /// The control of all this: certificates that say verified, of a set whose files
    /// somebody outside it changes all the time. They may say so, for that file is
    /// left out of the set; the watcher does not know. This row must have faults.
    pub fn control(&mut self, holds: usize) -> Row {
        self.rows += 1;
        let mut row = Row {
            name: "control".to_owned(),
            ..Row::default()
        };
        let ready = crate::paths::way("C: pwrite").prepare(&self.lab);
        let ready = ready.expect("the program");
        let set = format!("row-{}-control", self.rows);
        let file = self.fresh_data();
        let mut command = self.lab.snapshim(&["run", "--name", &set, "--watch"]);
        command.arg(self.lab.data()).arg("--watch");
        command.arg(&self.ballast).arg("--store").arg(&self.store);
        command
            .arg("--exclude")
            .arg(&file)
            .args(["--", "sleep", "600"]);
        let mut idle = Proc::piped(command);
        assert!(self.wait_for_gate(&set, &mut idle), "sleep");
        let arguments = ready.arguments(&file, 0);
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]);
        let outsider = Proc::piped(command);
        let watcher = Watcher::start(&self.lab.data(), &self.gate(&set), outsider.pid());
        process::wait_until(Duration::from_secs(20), || watcher.open_changes() > 5);
        let take = || self.checkpoint(&set);
        self.hold(&take, outsider, watcher, holds, &mut row);
        self.finish(idle);
        row
    }

    /// The control of how processes held from outside are judged: a writer that the shim
    /// is not in, stopped (or not) by us, and certificates that we have say that it
    /// was held from outside throughout. Only with [`Stop::Throughout`] it was.
    pub fn forged(&mut self, stop: Stop, holds: usize) -> Row {
        self.rows += 1;
        let mut row = Row {
            name: format!("control: {stop:?}"),
            ..Row::default()
        };
        let ready = crate::paths::way("C: scrubbed_env").prepare(&self.lab);
        let ready = ready.expect("the program");
        let (set, proc, watcher) = self.start(&ready, &mut row).expect("a program");
        let root = proc.pid();
        let file = self.lab.data().join("file");
        let gate = File::open(self.gate(&set)).expect("the gate file");
        let is_shut = || word(&gate).is_some_and(|w| w & WORD.1 != 0);
        let take = || {
            let writers = process::stops(root);
            let has_open = |pid: &i32| process::has_open(*pid, &file);
            let writer = writers.into_iter().map(|(pid, _)| pid).find(has_open);
            let writer = writer.expect("the writer");
            let send = |signal| {
                let _ = kill(Pid::from_raw(writer), signal);
            };
            let done = AtomicBool::new(false);
            let mut outcome = std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_shut() && !done.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    if stop == Stop::Never {
                        return;
                    }
                    send(Signal::SIGSTOP);
                    let start = Instant::now();
                    while is_shut() && (stop == Stop::Throughout || start.elapsed() < HOLD / 3) {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    send(Signal::SIGCONT);
                });
                let mut command = self.checkpoint_command(&set);
                command.args(["--outside", "none"]);
                let outcome = outcome(process::run(command, Duration::from_secs(60)));
                done.store(true, Ordering::Relaxed);
                outcome
            });
            if let Some(certificate) = &mut outcome.certificate {
                assert!(!certificate.is_verified() && certificate.blames(writer));
                certificate.0["verified"] = true.into();
                certificate.0["reasons"] = serde_json::json!([]);
                certificate.0["foreign"] = serde_json::json!([]);
                certificate.0["writers"] = serde_json::json!([{"pid": writer, "layer": "ptrace"}]);
                outcome.code = 0;
            }
            outcome
        };
        self.hold(&take, proc, watcher, holds, &mut row);
        row
    }

    fn fresh_data(&self) -> PathBuf {
        let data = self.lab.data();
        let _ = fs::remove_dir_all(&data);
        fs::create_dir(&data).expect("the directory of data");
        // Also for programs that run as somebody else.
        fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).expect("chmod");
        data.join("file")
    }

    /// Starts the program in a set of its own; behind a shell if `run` refuses it.
    fn start(&self, ready: &Ready, row: &mut Row) -> Option<(String, Proc, Watcher)> {
        for attempt in ["", "-sh"] {
            let file = self.fresh_data();
            let set = format!("row-{}{attempt}", self.rows);
            let mut program: Vec<OsString> = Vec::new();
            if !attempt.is_empty() {
                program.extend(["sh", "-c", "exec \"$@\"", "sh"].map(OsString::from));
            }
            program.extend(ready.arguments(&file, 0));
            let mut command = self.run(&set, &program);
            ready.environment(&mut command);
            // Descriptors 1 and 2 are the program's own business.
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let mut proc = Proc::start(command);
            if self.wait_for_gate(&set, &mut proc) {
                let watcher = Watcher::start(&self.lab.data(), &self.gate(&set), proc.pid());
                let began = process::wait_until(Duration::from_secs(20), || {
                    watcher.open_changes() > 5 || !proc.is_running()
                });
                if began && proc.is_running() {
                    return Some((set, proc, watcher));
                }
            }
            let (running, said) = (proc.is_running(), self.finish(proc));
            if running || !attempt.is_empty() {
                row.fault(format!("it does not write: {said}"));
                return None;
            }
            row.refused = Some(said);
        }
        None
    }

    /// Ends a program, with all it started, and says what it said.
    fn finish(&self, mut proc: Proc) -> String {
        let started: Vec<(i32, Option<u64>)> = process::descendants(proc.pid())
            .into_iter()
            .map(|pid| (pid, process::start_time(pid)))
            .collect();
        proc.signal(Signal::SIGTERM);
        process::wait_until(Duration::from_millis(500), || !proc.is_running());
        proc.end();
        for (pid, start) in started {
            if start.is_some() && process::start_time(pid) == start {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        for pid in self.lab.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let ended = proc.wait(Duration::from_secs(5));
        format!("exit {}: {}", ended.code(), ended.err().trim())
    }

    /// Judges the holds of the checkpoints that `take` takes, and ends the program.
    fn hold(
        &self,
        take: &dyn Fn() -> Outcome,
        mut proc: Proc,
        watcher: Watcher,
        holds: usize,
        row: &mut Row,
    ) {
        let goes_on = self.judge_holds(take, &mut proc, watcher, holds, row);
        let was_running = proc.is_running();
        let said = self.finish(proc);
        if !goes_on && was_running {
            row.fault("it does not go on after a hold");
        } else if !goes_on {
            row.fault(format!("it ended after a hold: {said}"));
        }
    }

    /// The same; whether the program still goes on.
    fn judge_holds(
        &self,
        take: &dyn Fn() -> Outcome,
        proc: &mut Proc,
        watcher: Watcher,
        holds: usize,
        row: &mut Row,
    ) -> bool {
        let mut goes_on = true;
        let mut patience = holds + 10;
        while row.holds + row.unpublished.0 < holds {
            let before = watcher.looks();
            let outcome = take();
            // It goes on: what was (not) seen in the hold was to be seen.
            let seen = watcher.open_changes();
            goes_on = process::wait_until(Duration::from_secs(5), || {
                watcher.open_changes() > seen + 3 || !proc.is_running()
            });
            goes_on &= proc.is_running();
            if !goes_on {
                break;
            }
            let Some(certificate) = &outcome.certificate else {
                row.unpublished.0 += 1;
                row.unpublished.1 = outcome.stderr.trim().to_owned();
                if outcome.code != 4 {
                    let fault = format!("exit {}: {}", outcome.code, outcome.stderr.trim());
                    row.fault(fault);
                    break;
                }
                continue;
            };
            let seen = watcher.hold_since(before, certificate);
            if seen.looks < LOOKS {
                // The watcher did not get to look: a busy machine.
                if patience == 0 {
                    row.fault("the watcher could not look");
                    break;
                }
                patience -= 1;
                if certificate.hold_us() < HOLD.as_micros() as f64 / 2.0 {
                    self.scale_ballast(1.5);
                }
                continue;
            }
            row.holds += 1;
            row.lengths.push(certificate.hold_us() / 1e3);
            let changes = seen.changes;
            row.changes += changes;
            row.verified += usize::from(certificate.is_verified());
            if changes > 0 && certificate.is_verified() {
                row.fault(format!("{changes} changes in a hold that is verified"));
            }
            if let Some(pid) = seen.let_go.filter(|_| certificate.is_verified()) {
                row.fault(format!("process {pid} went on in a hold that is verified"));
            }
            let reasons = certificate.reasons();
            if certificate.is_verified() != reasons.is_empty()
                || certificate.is_verified() != (outcome.code == 0)
            {
                row.fault(format!(
                    "exit {}, verified {}, and reasons {reasons:?}",
                    outcome.code,
                    certificate.is_verified()
                ));
            }
            row.reasons.extend(reasons);
            for (list, word) in [("writers", "layer"), ("foreign", "how")] {
                for entry in certificate.0[list].as_array().into_iter().flatten() {
                    let text = entry[word].as_str().unwrap_or("?");
                    row.layers.insert(match list {
                        "writers" => text.to_owned(),
                        _ => format!("none ({text})"),
                    });
                }
            }
        }
        row.usual = watcher.usual();
        goes_on
    }

    /// The same records with and without the gate.
    fn compare(&self, ready: &Ready) -> Option<String> {
        let aside = self.lab.beside("said");
        fs::create_dir_all(&aside).expect("a directory");
        let (out, err) = (aside.join("out"), aside.join("err"));
        let set = format!("row-{}-compare", self.rows);
        let effect = |mut command: Command| {
            let file = self.fresh_data();
            command
                .args(["bash", "-c", "exec >\"$1\" 2>\"$2\"; shift 2; exec \"$@\""])
                .arg("bash")
                .args([&out, &err])
                .args(ready.arguments(&file, RECORDS));
            ready.environment(&mut command);
            let ended = process::run(command, Duration::from_secs(60));
            let text =
                |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
            let files = tree::listing(&self.lab.data(), &[]);
            (ended.code(), text(&out), text(&err), files)
        };
        let without = effect(self.lab.command("env"));
        let mut run = self.lab.snapshim(&["run", "--name", &set, "--watch"]);
        run.arg(self.lab.data()).arg("--store");
        run.arg(self.lab.store()).args(["--max-hold", "10s"]);
        run.args(["--every", "50ms", "--keep-last", "1", "--"]);
        let with = effect(run);
        let _ = fs::remove_dir_all(&aside);
        let differs = |what: &str, a: &str, b: &str| format!("{what}: {a:?}, under the gate {b:?}");
        if without.0 != with.0 {
            let (a, b) = (without.0.to_string(), with.0.to_string());
            Some(differs("exit", &a, &b) + &differs("; stderr", &without.2, &with.2))
        } else if without.1 != with.1 {
            Some(differs("stdout", &without.1, &with.1))
        } else if without.2 != without_loader(&with.2) {
            Some(differs("stderr", &without.2, &with.2))
        } else if without.3 != with.3 {
            Some(format!(
                "files: {:?}, under the gate {:?}",
                without.3, with.3
            ))
        } else if !without.2.contains("records") && without.0 != 7 {
            Some(format!("it fails, with the gate or without: {}", without.2))
        } else {
            None
        }
    }
}

/// Standard error without what a dynamic linker says of a library of the other word
/// size, which nothing can keep it from.
fn without_loader(said: &str) -> String {
    let is_ours = |line: &&str| {
        !(line.starts_with("ERROR: ld.so: object") && line.contains("wrong ELF class"))
    };
    said.split_inclusive('\n').filter(is_ours).collect()
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.store);
    }
}

/// One look at the data: when, the gate word if it was the same before and after, and
/// what was there.
#[derive(Debug)]
struct Look {
    at: Instant,
    word: Option<u32>,
    what: What,
    /// While the gate was shut: the program's processes, and whether each was stopped.
    stops: Vec<(i32, bool)>,
}

/// Digests of what was there.
#[derive(Clone, Copy, Debug, PartialEq)]
struct What {
    files: u64,
    /// Of SQLite's `-shm` alone.
    shm: u64,
}

impl What {
    fn differs(&self, other: &What, shm_counts: bool) -> bool {
        self.files != other.files || (shm_counts && self.shm != other.shm)
    }
}

/// What the looks of one hold come to.
#[derive(Debug, Default)]
struct Judged {
    /// Looks that count.
    looks: usize,
    /// Differences between them.
    changes: usize,
    /// A process held from outside that was seen to run after all were stopped.
    let_go: Option<i32>,
}

#[derive(Debug, Default)]
struct Seen {
    looks: Mutex<Vec<Look>>,
    open_changes: AtomicU64,
    open_ns: AtomicU64,
    end: AtomicBool,
}

/// Looks all the time.
#[derive(Debug)]
struct Watcher {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(data: &Path, gate: &Path, root: i32) -> Watcher {
        let seen = Arc::new(Seen::default());
        let gate = File::open(gate).expect("the gate file");
        let (data, theirs) = (data.to_owned(), Arc::clone(&seen));
        let thread = std::thread::spawn(move || watch(&data, &gate, root, &theirs));
        Watcher {
            seen,
            thread: Some(thread),
        }
    }

    /// Changes seen while the gate was open.
    fn open_changes(&self) -> u64 {
        self.seen.open_changes.load(Ordering::Relaxed)
    }

    /// The same for every 50 ms.
    fn usual(&self) -> f64 {
        let ns = self.seen.open_ns.load(Ordering::Relaxed).max(1);
        self.open_changes() as f64 * HOLD.as_nanos() as f64 / ns as f64
    }

    /// How often it looked.
    fn looks(&self) -> usize {
        self.seen.looks.lock().expect("the looks").len()
    }

    /// What the looks since `from` saw in the last hold among them, whose certificate
    /// this is.
    fn hold_since(&self, from: usize, certificate: &Certificate) -> Judged {
        let looks = self.seen.looks.lock().expect("the looks");
        let shut = |look: &&Look| look.word.is_some_and(|w| w & WORD.1 != 0);
        let Some(last) = looks[from..].iter().rfind(shut) else {
            return Judged::default();
        };
        let hold: Vec<&Look> = looks[from..]
            .iter()
            .filter(|look| look.word == last.word)
            .collect();
        judge(&hold, certificate)
    }
}

/// Judges the looks that lie within one hold; see above.
fn judge(hold: &[&Look], certificate: &Certificate) -> Judged {
    let outside = outside(certificate);
    let is_of = |(pid, _): &&(i32, bool)| outside.contains(pid);
    let runs = |look: &Look| look.stops.iter().filter(is_of).find(|s| !s.1).map(|s| s.0);
    // Until the last of them was seen for the first time, not all are stopped.
    let first_seen = outside
        .iter()
        .filter_map(|pid| {
            hold.iter()
                .position(|look| look.stops.iter().any(|s| s.0 == *pid))
        })
        .max();
    let stopped = first_seen.and_then(|first| {
        let mut rest = hold[first..].iter();
        rest.find(|look| runs(look).is_none()).map(|look| look.at)
    });
    let drained = hold[0].at + Duration::from_micros(certificate.drain_us() as u64);
    let begin = stopped.map_or(drained, |at| at.max(drained)) + MARGIN;
    let end = hold[hold.len() - 1].at - MARGIN;
    let inside = hold.iter().filter(|l| l.at >= begin && l.at <= end);
    let inside: Vec<&Look> = inside.copied().collect();
    let shm_counts = !disclaims_shm(certificate);
    let differ = |w: &&[&Look]| w[0].what.differs(&w[1].what, shm_counts);
    Judged {
        looks: inside.len(),
        changes: inside.windows(2).filter(differ).count(),
        let_go: match stopped {
            Some(_) => inside.iter().find_map(|look| runs(look)),
            None => None,
        },
    }
}

/// Whether a certificate says that the bytes of SQLite's `-shm` are not vouched for.
fn disclaims_shm(certificate: &Certificate) -> bool {
    let said = certificate.0["assumptions"].as_array();
    let mut said = said.into_iter().flatten().filter_map(|a| a.as_str());
    said.any(|a| a.contains("-shm is made anew by SQLite") && a.contains("not vouched for"))
}

/// The processes that a certificate says were held from outside, or were not of the set.
fn outside(certificate: &Certificate) -> BTreeSet<i32> {
    let entries = |list: &str| {
        let entries = certificate.0[list].as_array();
        entries.cloned().unwrap_or_default()
    };
    let is_outside = |w: &serde_json::Value| w["layer"] != "sites" && w["layer"] != "symbols";
    let mut all = entries("writers");
    all.retain(is_outside);
    all.extend(entries("foreign"));
    let pid = |entry: &serde_json::Value| entry["pid"].as_i64().map(|pid| pid as i32);
    all.iter().filter_map(pid).collect()
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.seen.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The gate word.
fn word(gate: &File) -> Option<u32> {
    let mut bytes = [0; 4];
    let read = gate.read_exact_at(&mut bytes, WORD.0);
    read.is_ok().then(|| u32::from_le_bytes(bytes))
}

/// Looks at the data, and at the processes below `root` while the gate is shut.
fn watch(data: &Path, gate: &File, root: i32, seen: &Seen) {
    let mut buffer = vec![0; 1 << 14];
    let mut last: Option<(Instant, Option<u32>, What)> = None;
    while !seen.end.load(Ordering::Relaxed) {
        let before = word(gate);
        // First: what was stopped then is so when the data are looked at.
        let stops = match before {
            Some(w) if w & WORD.1 != 0 => process::stops(root),
            _ => Vec::new(),
        };
        let what = look_at(data, &mut buffer);
        let look = Look {
            at: Instant::now(),
            word: before.filter(|_| before == word(gate)),
            what,
            stops,
        };
        let is_open = look.word.is_some_and(|w| w & WORD.1 == 0);
        if let Some((at, _, what)) = last.filter(|last| is_open && last.1 == look.word) {
            let ns = (look.at - at).as_nanos() as u64;
            seen.open_ns.fetch_add(ns, Ordering::Relaxed);
            let changed = u64::from(what.differs(&look.what, false));
            seen.open_changes.fetch_add(changed, Ordering::Relaxed);
        }
        last = Some((look.at, look.word, look.what));
        seen.looks.lock().expect("the looks").push(look);
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Digests of what is in `dir`, and of the directory itself: of long files the first
/// and the last bytes.
fn look_at(dir: &Path, buffer: &mut [u8]) -> What {
    let (mut files, mut shm) = (DefaultHasher::new(), DefaultHasher::new());
    add(dir, buffer, &mut files);
    let mut names: Vec<PathBuf> = fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|e| e.path()).collect())
        .unwrap_or_default();
    names.sort();
    for name in &names {
        let is_shm = name.as_os_str().as_encoded_bytes().ends_with(b"-shm");
        add(name, buffer, if is_shm { &mut shm } else { &mut files });
    }
    names.hash(&mut files);
    What {
        files: files.finish(),
        shm: shm.finish(),
    }
}

/// Adds what is at `path`, unless there is nothing any more.
fn add(path: &Path, buffer: &mut [u8], digest: &mut DefaultHasher) -> Option<()> {
    let meta = fs::symlink_metadata(path).ok()?;
    // Not the access time: we read.
    let owner = (meta.uid(), meta.gid());
    (meta.ino(), meta.mode(), meta.nlink(), owner).hash(digest);
    (meta.size(), meta.mtime(), meta.mtime_nsec()).hash(digest);
    (meta.ctime(), meta.ctime_nsec()).hash(digest);
    if meta.is_file() {
        let file = File::open(path).ok()?;
        let n = file.read_at(buffer, 0).ok()?;
        buffer[..n].hash(digest);
        if meta.size() > buffer.len() as u64 {
            let n = file.read_at(buffer, meta.size() - 4096).ok()?;
            buffer[..n].hash(digest);
        }
    }
    Some(())
}
