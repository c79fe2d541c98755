//! The benchmark against every other way to copy the files of a running program.
//!
//! | module | what it holds |
//! |---|---|
//! | [`workload`] | the programs whose files are copied |
//! | [`pgbench`] | one of them |
//! | [`control`] | steering a writer, and its latencies |
//! | [`method`] | the ways to copy |
//! | [`window`] | one measurement |
//! | [`check`] | whether a copy could be of one instant |
//! | [`noise`], [`disk`] | the machine |
//! | [`figures`], [`bars`] | rows, what is computed of them, what they should be |
//! | [`report`], [`svg`] | tables and pictures |

pub mod bars;
pub mod check;
pub mod control;
pub mod disk;
pub mod figures;
pub mod machine;
pub mod method;
pub mod noise;
pub mod options;
pub mod pgbench;
pub mod report;
pub mod svg;
pub mod window;
pub mod workload;

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::figures::{COLUMNS, Row, STEP_COLUMNS, Step, Waits};
use self::method::Method;
use self::noise::Noise;
use self::options::{Options, Part};
use self::window::Plan;
use self::workload::{Session, State, Workload};
use crate::{Fs, Lab, process};

/// Everything a run measured.
#[derive(Debug)]
pub struct Run {
    /// What was asked for.
    pub options: Options,
    /// File systems.
    pub fs: Vec<Fs>,
    /// Methods.
    pub methods: Vec<Method>,
    /// Windows.
    pub rows: Vec<Row>,
    /// Copies in a row.
    pub steps: Vec<Step>,
    /// Waits of writers.
    pub waits: Vec<Waits>,
    /// What was left out, and why; each once.
    pub notes: Vec<String>,
    /// The machine at the beginning.
    pub machine: Vec<String>,
    /// How long it took.
    pub took: Duration,
    files: Files,
}

/// The raw data, written as it comes.
#[derive(Debug)]
struct Files {
    windows: File,
    steps: File,
}

/// A limit for a laboratory: the watchdog is for programs that hang.
const LIMIT: Duration = Duration::from_secs(3 * 3600);

impl Run {
    /// Measures all that `options` ask for.
    pub fn measure(options: Options) -> Run {
        let begun = Instant::now();
        fs::create_dir_all(&options.out).expect("a directory for results");
        let file = |name: &str, head: &str| {
            let mut file = File::create(options.out.join(name)).expect("a file of results");
            writeln!(file, "{head}").expect("a file of results");
            file
        };
        let files = Files {
            windows: file("windows.tsv", COLUMNS),
            steps: file("growth.tsv", STEP_COLUMNS),
        };
        crate::fs::set_image_bytes(options.image_bytes());
        if !options.buffered_loops {
            crate::fs::set_like_disks();
        }
        let wanted = |m: &Method| options.methods.is_empty() || options.methods.contains(&m.name());
        let mut run = Run {
            fs: options.fs.clone(),
            methods: method::all().into_iter().filter(wanted).collect(),
            rows: Vec::new(),
            steps: Vec::new(),
            waits: Vec::new(),
            notes: Vec::new(),
            machine: machine::describe(options.buffered_loops),
            took: Duration::ZERO,
            files,
            options,
        };
        for fs in run.fs.clone() {
            run.on(fs);
            crate::fs::unmount_all();
            run.took = begun.elapsed();
            // So that a run that is ended later leaves what it has.
            run.publish(false);
        }
        run
    }

    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            eprintln!("{note}");
            self.notes.push(note);
        }
    }

    fn wants(&self, part: Part, workload: Workload) -> bool {
        let options = &self.options;
        options.parts.contains(&part)
            && (options.workloads.is_empty() || options.workloads.contains(&workload))
    }

    /// The methods that can work on a file system; the others are noted.
    fn methods_on(&mut self, fs: Fs) -> Vec<Method> {
        let mut methods = Vec::new();
        for method in self.methods.clone() {
            match method.missing(fs) {
                None => methods.push(method),
                Some(why) => self.note(format!("{} is not on {}: {why}", method.name(), fs.name())),
            }
        }
        methods
    }

    fn on(&mut self, fs: Fs) {
        let begun = Instant::now();
        let amounts = self.options.amounts.clone();
        let methods = self.methods_on(fs);
        let ours = |m: &Method| m.is_ours();
        // Reading a large file under the hold says nothing new.
        let quick = |m: &Method| m.is_ours() && *m != Method::Snapshim("copy".into());

        if self.wants(Part::Stall, Workload::Pages) {
            // A tmpfs has no extents, and nothing that is dirty.
            let states: Vec<State> = match fs {
                Fs::Tmpfs => vec![State::Dirty],
                _ => amounts.states.clone(),
            };
            for state in states {
                let shape = Shape {
                    part: "stall",
                    workload: Workload::Pages,
                    state,
                    mib: amounts.mib,
                    rate: Workload::Pages.rate(),
                    length: amounts.window,
                    every: None,
                };
                self.cell(fs, shape, &methods, &|m| match m {
                    Some(m) if !quick(m) && *m != Method::Sigstop => amounts.peer_rounds,
                    _ => amounts.rounds,
                });
            }
        }
        if self.wants(Part::Throughput, Workload::Pages) {
            let shape = Shape {
                part: "throughput",
                workload: Workload::Pages,
                state: State::Clean,
                mib: amounts.mib,
                rate: 0,
                length: amounts.throughput_window,
                every: Some(Duration::from_secs(2)),
            };
            self.cell(fs, shape, &methods, &|m| match m {
                None => amounts.throughput_rounds,
                Some(m) if quick(m) => amounts.throughput_rounds,
                Some(_) => 1,
            });
        }
        let is_main = fs == self.options.main_fs() || self.options.full;
        if self.wants(Part::Hold, Workload::Pages) && is_main {
            let methods: Vec<Method> = methods.iter().filter(|m| quick(m)).cloned().collect();
            for mib in amounts.sizes.clone() {
                if !self.fits(fs, mib) {
                    self.note(format!("a file of {mib} MiB does not fit on {}", fs.name()));
                    continue;
                }
                let state = match fs {
                    Fs::Tmpfs => State::Dirty,
                    _ => State::Fragmented,
                };
                let shape = Shape {
                    part: "hold",
                    workload: Workload::Pages,
                    state,
                    mib,
                    rate: Workload::Pages.rate(),
                    length: Duration::from_secs(1),
                    every: None,
                };
                // A large one takes its time; what is asked is only whether that matters.
                let rounds = match mib {
                    0..=1024 => amounts.hold_rounds,
                    _ => amounts.hold_rounds.div_ceil(2),
                };
                self.cell(fs, shape, &methods, &|m| m.map_or(0, |_| rounds));
            }
        }
        for workload in [
            Workload::Ordered,
            Workload::Log,
            Workload::Sqlite,
            Workload::Pgbench,
        ] {
            let here = is_main || workload == Workload::Ordered;
            if !self.wants(Part::Consistency, workload) || !here {
                continue;
            }
            let shape = Shape {
                part: "consistency",
                workload,
                state: State::Clean,
                mib: 0,
                rate: workload.rate(),
                length: Duration::from_millis(500),
                every: None,
            };
            // A server has to be started on each copy.
            let rounds = match workload {
                Workload::Pgbench => amounts.consistency_rounds.div_ceil(2),
                _ => amounts.consistency_rounds,
            };
            self.cell(fs, shape, &methods, &|_| rounds);
        }
        if is_main {
            for (workload, methods) in [
                (Workload::Many, methods.clone()),
                (
                    Workload::Few,
                    methods.iter().filter(|m| ours(m)).cloned().collect(),
                ),
            ] {
                if self.wants(Part::Many, workload) {
                    let shape = Shape {
                        part: "many",
                        workload,
                        state: State::Clean,
                        mib: 0,
                        rate: workload.rate(),
                        length: Duration::from_millis(500),
                        every: None,
                    };
                    self.cell(fs, shape, &methods, &|_| amounts.many_rounds);
                }
            }
        }
        if self.wants(Part::Growth, Workload::Pages) && is_main {
            for method in methods
                .iter()
                .filter(|m| quick(m) || **m == Method::Ficlone)
            {
                self.growth(fs, method);
            }
        }
        eprintln!("{}: {:.0} s", fs.name(), begun.elapsed().as_secs_f64());
    }

    /// Whether there is room for a file, a dirty copy of it and two snapshots.
    fn fits(&self, fs: Fs, mib: u64) -> bool {
        let image = self.options.image_bytes() >> 20;
        let room = if fs == Fs::Tmpfs { image / 2 } else { image };
        mib * 4 < room
    }

    fn lab(&self, name: &str, fs: Fs) -> Lab {
        let lab = Lab::new(&format!("peers-{name}"), fs, LIMIT);
        lab.expect("SNAPSHIM_TEST_NO_MOUNTS leaves the benchmark nothing to measure")
    }

    /// One line of tables: all methods in turn, round after round, on one workload.
    fn cell(
        &mut self,
        fs: Fs,
        shape: Shape,
        methods: &[Method],
        rounds: &dyn Fn(Option<&Method>) -> usize,
    ) {
        if let Some(why) = shape.workload.missing() {
            self.note(format!("{} was left out: {why}", shape.workload.name()));
            return;
        }
        eprintln!(
            "{}: {}, {}, {}{}",
            fs.name(),
            shape.part,
            shape.workload.name(),
            shape.state.name(),
            if shape.mib > 0 {
                format!(", {} MiB", shape.mib)
            } else {
                String::new()
            }
        );
        let name = format!("{}-{}-{}", shape.part, shape.workload.name(), shape.mib);
        let lab = self.lab(&format!("{name}-{:?}", shape.state).to_lowercase(), fs);
        method::prepare(methods, &lab);
        // Each kind of writer has files of its own, and sleeps while the other is measured.
        let mut sessions: Vec<Session> = [false, true]
            .into_iter()
            .filter(|gated| methods.iter().any(|m| m.is_ours() == *gated))
            .map(|gated| Session::start(&lab, fs, shape.workload, gated, shape.state, shape.mib))
            .collect();
        let noise = Noise::start();
        let plan = Plan {
            rate: shape.rate,
            length: shape.length,
            every: shape.every,
            state: shape.state,
            // Many times what there is to copy has to fit into memory.
            look: shape.mib <= 1024,
        };
        let mut turns: Vec<(Option<&Method>, usize)> =
            (0..sessions.len()).map(|s| (None, s)).collect();
        for method in methods {
            let of = |s: &Session| s.gated == method.is_ours();
            let session = sessions.iter().position(of).expect("a writer");
            turns.push((Some(method), session));
        }
        let mut failures = vec![0; turns.len()];
        let most = turns.iter().map(|(m, _)| rounds(*m)).max().unwrap_or(0);
        for round in 0..most {
            for turn in 0..turns.len() {
                // Who is first changes, so that a drift cancels.
                let at = (turn + round * 3) % turns.len();
                let (method, session) = turns[at];
                if round >= rounds(method) || failures[at] > 1 {
                    continue;
                }
                let session = &mut sessions[session];
                let window = window::measure(&lab, session, method, plan, &noise);
                if let Some(failed) = window.failed() {
                    failures[at] += 1;
                    let name = method.map_or("none".into(), Method::name);
                    self.note(format!(
                        "{name} failed on {} ({}, {}): {failed}",
                        fs.name(),
                        shape.part,
                        shape.workload.name()
                    ));
                }
                let row = Row {
                    part: shape.part,
                    fs,
                    workload: shape.workload.name(),
                    state: shape.state.name(),
                    mib: shape.mib,
                    round,
                    method: method.map_or_else(|| "none".into(), Method::name),
                    gated: session.gated,
                    window,
                };
                writeln!(self.files.windows, "{}", row.line()).expect("a file of results");
                self.rows.push(row);
            }
        }
    }

    /// Many copies in a row, the last two kept, of a file that is written to at random.
    fn growth(&mut self, fs: Fs, method: &Method) {
        let count = self.options.amounts.checkpoints;
        eprintln!("{}: growth, {}, {count} copies", fs.name(), method.name());
        let lab = self.lab(&format!("growth-{}", method.name()), fs);
        let (state, mib) = (State::Clean, self.options.amounts.growth_mib);
        let mut session = Session::start(&lab, fs, Workload::Pages, method.is_ours(), state, mib);
        let file = session.data.join("pages");
        session.go(Workload::Pages.rate());
        let old = lab.beside("copy-before");
        for number in 1..=count {
            // A clone is kept until the next is there, as by anybody who keeps the newest.
            if let Method::Ficlone = method {
                let _ = fs::remove_dir_all(&old);
                let _ = fs::rename(lab.beside("copy"), &old);
            }
            let taken = method.take(&lab, &session);
            if let Some(failed) = &taken.failed {
                self.note(format!(
                    "{} failed on {} (growth, the {number}th copy): {failed}",
                    method.name(),
                    fs.name()
                ));
                break;
            }
            let step = Step {
                fs,
                method: method.name(),
                number,
                wall_ms: taken.wall.as_secs_f64() * 1e3,
                hold_us: taken.hold_us,
                written: taken.written,
                extents: disk::extents(&file),
            };
            writeln!(self.files.steps, "{}", step.line()).expect("a file of results");
            self.steps.push(step);
            if method.is_ours() {
                method.discard(&lab);
            }
            // So that something changes between two.
            std::thread::sleep(self.options.amounts.growth_pause);
        }
        if method.is_ours()
            && let Some(waits) = waits(&lab, fs, &method.name())
        {
            self.waits.push(waits);
        }
        session.pause(control::now_ns());
    }

    /// Writes the report, the pictures and the timelines, into docs/, too, if `docs`; returns
    /// the report.
    pub fn publish(&self, docs_too: bool) -> String {
        let out = &self.options.out;
        let mut report = report::markdown(self);
        let text = svg::timelines(self);
        fs::write(out.join("timelines.tsv"), text).expect("a file of results");
        for (fs, picture) in svg::pictures(self) {
            let name = format!("benchmarks-{}.svg", fs.name());
            fs::write(out.join(&name), &picture).expect("a picture");
            report.push_str(&format!(
                "\n![Latency of the writer over a window on {}, for each method]({name})\n",
                fs.name()
            ));
            if docs_too {
                fs::write(docs().join(&name), &picture).expect("a picture");
            }
        }
        let waits = self.waits.iter().map(Waits::line);
        let waits: Vec<String> = std::iter::once(Waits::COLUMNS.to_owned())
            .chain(waits)
            .collect();
        fs::write(out.join("waits.tsv"), waits.join("\n") + "\n").expect("a file of results");
        fs::write(out.join("machine.txt"), self.machine.join("\n") + "\n")
            .expect("a file of results");
        fs::write(out.join("report.md"), &report).expect("the report");
        if docs_too {
            let path = docs().join("benchmarks.md");
            let before = fs::read_to_string(&path).expect("docs/benchmarks.md");
            let after = report::between_markers(&before, &report)
                .expect("docs/benchmarks.md has the two markers");
            fs::write(&path, after).expect("docs/benchmarks.md");
        }
        report
    }
}

fn docs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// What the shim counted of the waits of this set's writers.
fn waits(lab: &Lab, fs: Fs, method: &str) -> Option<Waits> {
    let command = lab.snapshim(&["status", lab.set(), "--json"]);
    let ended = process::run(command, Duration::from_secs(30));
    let status: serde_json::Value = serde_json::from_str(&ended.out()).ok()?;
    let writers = status["writers"].as_array()?;
    let sum = |name: &str| writers.iter().filter_map(|w| w[name].as_u64()).sum();
    let longest = writers
        .iter()
        .filter_map(|w| w["longest_wait_us"].as_u64())
        .max();
    Some(Waits {
        fs,
        method: method.to_owned(),
        count: sum("waits"),
        total_us: sum("waited_us"),
        p99_us: status["waits"]["p99_us"].as_u64().unwrap_or(0),
        longest_us: longest.unwrap_or(0),
    })
}

/// One line of tables.
#[derive(Clone, Copy, Debug)]
struct Shape {
    part: &'static str,
    workload: Workload,
    state: State,
    mib: u64,
    rate: u64,
    length: Duration,
    every: Option<Duration>,
}
