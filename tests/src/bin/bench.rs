//! What the shim and the cut cost. Prints Markdown tables.
//!
//! ```text
//! cargo run --release -p snapshim-tests --bin bench [-- [--check] [--quick] [PART…]]
//! cargo run --release -p snapshim-tests --bin bench -- peers [OPTIONS]
//! ```
//!
//! `peers` is the benchmark against every other way to copy the files of a running program
//! (`peers --help`); the rest of this is about the other form.
//!
//! Parts: `calls`, `marks`, `start`, `stdio`, `cut`; all by default.
//!
//! Every comparison is made of interleaved pairs, bare and shimmed in turn; the
//! figure is the median of the paired differences or ratios, with the quartiles
//! and extremes. `--check` fails if one of the project's bars is missed.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use snapshim_tests::bench::{self, Run, method::stop, options::Options};
use snapshim_tests::process;
use snapshim_tests::stats::{median, percentile};
use snapshim_tests::{Fs, Lab, Proc, product, tree};

/// A layer of interception, and its bars.
struct Layer {
    name: &'static str,
    /// Added to a write to /dev/null, ns: one thread, two threads.
    null_bars: [f64; 2],
    /// Start-up of /bin/true, ratio.
    start_bar: f64,
}

const LAYERS: [Layer; 2] = [
    Layer {
        name: "symbols",
        null_bars: [15.0, 20.0],
        start_bar: 1.25,
    },
    Layer {
        name: "sites",
        null_bars: [30.0, f64::INFINITY],
        start_bar: 1.5,
    },
];
/// Close to drained, median, µs.
const CUT_BAR: f64 = 60.0;

/// How much of everything.
struct Amounts {
    pairs: usize,
    calls: u64,
    spawns: usize,
    cuts: usize,
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("peers") {
        return peers();
    }
    let has = |flag: &str| std::env::args().any(|a| a == flag);
    let amounts = if has("--quick") {
        Amounts {
            pairs: 5,
            calls: 200_000,
            spawns: 60,
            cuts: 100,
        }
    } else {
        Amounts {
            pairs: 21,
            calls: 2_000_000,
            spawns: 400,
            cuts: 2_000,
        }
    };
    type Part = fn(&Amounts) -> Vec<String>;
    let parts: [(&str, Part); 5] = [
        ("calls", calls),
        ("marks", marks),
        ("start", start_up),
        ("stdio", stdio),
        ("cut", cut),
    ];
    let all = !parts.iter().any(|(name, _)| has(name));
    let mut missed = Vec::new();
    for (name, part) in parts {
        if all || has(name) {
            missed.extend(part(&amounts));
        }
    }
    for bar in &missed {
        eprintln!("missed: {bar}");
    }
    if has("--check") && !missed.is_empty() {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Set for the process that measures.
const MEASURES: &str = "SNAPSHIM_BENCH_MEASURES";

/// The benchmark against every other way to copy. A child measures, so that its mounts
/// are undone also if it panics (which aborts) or is killed.
fn peers() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(2).collect();
    if args.iter().any(|a| a == "--help" || a == "-h") {
        print!("{}", bench::options::USAGE);
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(args.into_iter()) {
        Ok(options) => options,
        Err(mistake) => {
            eprintln!("bench: {mistake}");
            return ExitCode::from(2);
        }
    };
    if std::env::var_os(MEASURES).is_some() {
        let run = Run::measure(options);
        print!("{}", run.publish(run.options.docs));
        return ExitCode::SUCCESS;
    }
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(std::env::args().skip(1)).env(MEASURES, "1");
    process::dies_with_us(&mut command);
    // Not killed by a ^C ourselves: we stay for what the child leaves.
    let handler = SigHandler::Handler(pass_on);
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler makes one system call, and touches one atomic.
        unsafe { nix::sys::signal::signal(signal, handler) }.expect("a signal handler");
    }
    let mut child = command.spawn().expect("this program once more");
    let pid = child.id() as i32;
    CHILD.store(pid, Ordering::SeqCst);
    let status = child.wait().expect("wait");
    CHILD.store(0, Ordering::SeqCst);
    snapshim_tests::fs::kill_users_of(pid);
    snapshim_tests::fs::sweep_leftovers();
    if status.success() {
        ExitCode::SUCCESS
    } else {
        eprintln!("bench: {status}");
        ExitCode::FAILURE
    }
}

static CHILD: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(signal: i32) {
    let pid = CHILD.load(Ordering::SeqCst);
    if pid > 0 {
        // SAFETY: takes no pointer; the child is not waited for while its id is here.
        unsafe { libc::kill(pid, signal) };
    }
}

/// "median [quartiles; extremes]".
fn spread(values: &[f64], digits: usize) -> String {
    let at = |p| format!("{:.*}", digits, percentile(values, p));
    format!(
        "{} [{} … {}; {} … {}]",
        at(50.0),
        at(25.0),
        at(75.0),
        at(0.0),
        at(100.0)
    )
}

/// The environment of a program under an open gate, by plain `LD_PRELOAD`, held by
/// `layer`: without site tables it is the symbols.
fn shimmed_environment(lab: &Lab, layer: &Layer) -> Vec<(String, String)> {
    let mut env = lab.env(&[]);
    if layer.name == "symbols" {
        env.retain(|(name, _)| name != "SNAPSHIM_SITES");
        env.push(("SNAPSHIM_SITES".into(), "/nonexistent".into()));
    }
    env
}

/// ns per call of `programs/ops.c`.
fn ops(mode: &str, path: &Path, threads: usize, count: u64, env: &[(String, String)]) -> f64 {
    let mut command = Command::new(product::program("ops"));
    command
        .arg(mode)
        .arg(path)
        .args([threads.to_string(), count.to_string(), "0".into()])
        .env_remove("LD_PRELOAD")
        .envs(env.iter().cloned());
    let ended = process::run(command, Duration::from_secs(60)).ok("ops");
    ended.out().trim().parse().expect("a number")
}

fn calls(amounts: &Amounts) -> Vec<String> {
    let lab = Lab::new("bench-calls", Fs::Tmpfs, Duration::from_secs(1200)).expect("a tmpfs");
    let file = lab.data().join("block");
    let mut missed = Vec::new();
    println!("## One call under an open gate\n");
    println!("median of {} pairs [quartiles; extremes]\n", amounts.pairs);
    println!("| layer | call | threads | bare, ns | added, ns | ratio |");
    println!("|---|---|---|---|---|---|");
    for layer in &LAYERS {
        let env = shimmed_environment(&lab, layer);
        for (what, mode, path, count) in [
            (
                "write, 1 byte, /dev/null",
                "null",
                Path::new("/dev/null"),
                amounts.calls,
            ),
            (
                "pwrite, 4 KiB, tmpfs",
                "block",
                file.as_path(),
                amounts.calls / 4,
            ),
        ] {
            for threads in [1, 2] {
                let run = |shimmed: bool| {
                    let env = if shimmed { &env[..] } else { &[] };
                    ops(mode, path, threads, count, env)
                };
                let pairs = Pairs::of(amounts.pairs, run);
                print_row(layer.name, what, threads, &pairs);
                let bar = layer.null_bars[threads - 1];
                let added = median(&pairs.added());
                if mode == "null" && added > bar {
                    missed.push(format!(
                        "{}: {what}, {threads} threads: {added:.1} ns added, bar {bar} ns",
                        layer.name
                    ));
                }
            }
        }
    }
    println!();
    missed
}

/// What `--mark-blocks` costs a call, once calls are marked: off is what [`calls`] measures.
fn marks(amounts: &Amounts) -> Vec<String> {
    let lab = Lab::new("bench-marks", Fs::Tmpfs, Duration::from_secs(1200)).expect("a tmpfs");
    let file = lab.data().join("block");
    println!("## One call while calls mark what they change\n");
    println!("median of {} pairs [quartiles; extremes]\n", amounts.pairs);
    println!("| layer | call | threads | bare, ns | added, ns | ratio |");
    println!("|---|---|---|---|---|---|");
    let mut env = lab.env(&["--mark-blocks"]);
    let checkpoint = || {
        for thread in 0..2 {
            let of_thread = format!("{}.{thread}", file.display());
            fs::write(of_thread, vec![0; 1 << 20]).expect("a file");
        }
        let outcome = lab.checkpoint(&["--capture", "copy-before-write", "--keep-last", "1"]);
        let certificate = outcome.certificate();
        assert!(certificate.0["marked"].is_object(), "{:?}", certificate.0);
    };
    for layer in &LAYERS {
        if layer.name == "sites" {
            env = lab.env(&["--mark-blocks"]);
        } else {
            env.retain(|(name, _)| name != "SNAPSHIM_SITES");
            env.push(("SNAPSHIM_SITES".into(), "/nonexistent".into()));
        }
        for (what, mode, path, count) in [
            (
                "write, 1 byte, /dev/null",
                "null",
                Path::new("/dev/null"),
                amounts.calls / 4,
            ),
            (
                "pwrite, 4 KiB, tmpfs",
                "block",
                file.as_path(),
                amounts.calls / 4,
            ),
        ] {
            for threads in [1, 2] {
                checkpoint();
                let run = |shimmed: bool| {
                    let env = if shimmed { &env[..] } else { &[] };
                    ops(mode, path, threads, count, env)
                };
                let pairs = Pairs::of(amounts.pairs, run);
                print_row(layer.name, what, threads, &pairs);
            }
        }
    }
    println!();
    Vec::new()
}

/// A row of a table of calls.
fn print_row(layer: &str, what: &str, threads: usize, pairs: &Pairs) {
    println!(
        "| {layer} | {what} | {threads} | {:.1} | {} | {} |",
        median(&pairs.bare),
        spread(&pairs.added(), 1),
        spread(&pairs.ratios(), 3)
    );
}

/// Interleaved measurements, bare and shimmed.
struct Pairs {
    bare: Vec<f64>,
    shimmed: Vec<f64>,
}

impl Pairs {
    fn of(count: usize, mut run: impl FnMut(bool) -> f64) -> Pairs {
        let mut pairs = Pairs {
            bare: Vec::new(),
            shimmed: Vec::new(),
        };
        for pair in 0..count {
            for turn in 0..2 {
                // Which of the two is first changes, so that a drift cancels.
                let is_shimmed = (pair + turn) % 2 == 1;
                let sample = run(is_shimmed);
                let samples = if is_shimmed {
                    &mut pairs.shimmed
                } else {
                    &mut pairs.bare
                };
                samples.push(sample);
            }
        }
        pairs
    }

    fn each(&self, of: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        let pairs = self.bare.iter().zip(&self.shimmed);
        pairs.map(|(bare, shimmed)| of(*bare, *shimmed)).collect()
    }

    fn added(&self) -> Vec<f64> {
        self.each(|bare, shimmed| shimmed - bare)
    }

    fn ratios(&self) -> Vec<f64> {
        self.each(|bare, shimmed| shimmed / bare)
    }
}

fn start_up(amounts: &Amounts) -> Vec<String> {
    let lab = Lab::new("bench-start", Fs::Tmpfs, Duration::from_secs(600)).expect("a tmpfs");
    println!("## Start-up of /bin/true\n");
    println!("{} spawns of each, interleaved\n", amounts.spawns);
    println!("| layer | bare, µs | shimmed, µs | ratio, median of pairs |");
    println!("|---|---|---|---|");
    let mut missed = Vec::new();
    for layer in &LAYERS {
        let env = shimmed_environment(&lab, layer);
        let pairs = Pairs::of(amounts.spawns, |shimmed| {
            let mut command = Command::new("/bin/true");
            command.env_clear().stdin(Stdio::null());
            if shimmed {
                command.envs(env.iter().cloned());
            }
            let start = Instant::now();
            assert!(command.status().expect("/bin/true").success());
            start.elapsed().as_secs_f64() * 1e6
        });
        let ratio = median(&pairs.ratios());
        println!(
            "| {} | {:.0} | {:.0} | {} |",
            layer.name,
            median(&pairs.bare),
            median(&pairs.shimmed),
            spread(&pairs.ratios(), 3)
        );
        if ratio > layer.start_bar {
            missed.push(format!(
                "{}: start-up {ratio:.3} ×, bar {} ×",
                layer.name, layer.start_bar
            ));
        }
    }
    println!();
    missed
}

/// What `--stdio-records` costs a program that prints lines of some 200 bytes.
fn stdio(amounts: &Amounts) -> Vec<String> {
    let lines = amounts.calls / 10;
    println!("## Printing records\n");
    println!(
        "fprintf of lines of 214 bytes on average, tmpfs; median of {} pairs [quartiles; extremes]\n",
        amounts.pairs
    );
    println!("| | bare, ns a line | added, ns | ratio |");
    println!("|---|---|---|---|");
    for (what, options) in [("held", &[][..]), ("--stdio-records", &["--stdio-records"])] {
        let name = format!("bench-stdio-{}", options.len());
        let lab = Lab::new(&name, Fs::Tmpfs, Duration::from_secs(600)).expect("a tmpfs");
        let env = lab.env(options);
        let file = lab.data().join("lines");
        let pairs = Pairs::of(amounts.pairs, |shimmed| {
            let mut command = Command::new(product::program("recorder"));
            command.arg(&file).args(["fprintf", &lines.to_string()]);
            if shimmed {
                command.envs(env.iter().cloned());
            }
            let start = Instant::now();
            process::run(command, Duration::from_secs(60)).ok("recorder");
            start.elapsed().as_secs_f64() * 1e9 / lines as f64
        });
        println!(
            "| {what} | {:.0} | {} | {} |",
            median(&pairs.bare),
            spread(&pairs.added(), 1),
            spread(&pairs.ratios(), 3)
        );
    }
    println!();
    Vec::new()
}

fn cut(amounts: &Amounts) -> Vec<String> {
    const FILES: usize = 2;
    let Some(lab) = Lab::new("bench-cut", Fs::Xfs, Duration::from_secs(3600)) else {
        return vec!["the cut was not measured".into()];
    };
    let data = lab.data();
    let args = [data.to_str().unwrap(), "2", "1", "4", "4096", "0", "3600"];
    let mut writer = lab.run(&["--keep-last", "2"], &product::program("ordered"), &args);
    lab.wait_for_beats(&mut writer, 10);
    let pids = lab.processes_named("ordered");
    assert_eq!(pids.len(), 4, "four writing processes");
    let copies = lab.beside("copies");
    nix::unistd::mkdir(&copies, Mode::S_IRWXU).expect("a directory");
    let (mut drains, mut holds, mut pauses) = (Vec::new(), Vec::new(), Vec::new());
    let (mut not_verified, mut aborted) = (0, 0);
    while drains.len() < amounts.cuts {
        let outcome = lab.checkpoint(&[]);
        match outcome.code {
            0 => {}
            5 => not_verified += 1,
            4 if aborted < amounts.cuts / 100 => {
                aborted += 1;
                continue;
            }
            code => panic!("exit {code}: {}", outcome.stderr),
        }
        let certificate = outcome.certificate();
        drains.push(certificate.drain_us());
        holds.push(certificate.hold_us());

        // The same writers, paused by signals, the same files cloned.
        let start = Instant::now();
        stop(&pids);
        for index in 0..FILES {
            let name = format!("f{index:04}");
            tree::copy_plainly(&data.join(&name), &copies.join(&name)).expect("a clone");
        }
        for pid in &pids {
            kill(Pid::from_raw(*pid), Signal::SIGCONT).expect("SIGCONT");
        }
        pauses.push(start.elapsed().as_secs_f64() * 1e6);
        for index in 0..FILES {
            let _ = fs::remove_file(copies.join(format!("f{index:04}")));
        }
    }
    writer.signal(Signal::SIGTERM);
    Proc::wait(writer, Duration::from_secs(30)).ok("the writers");
    println!("## The cut\n");
    println!(
        "{} cuts of 4 processes that write 2 files on XFS without a pause, in turn with SIGSTOP of the same \
         processes; {not_verified} not verified, {aborted} aborted\n",
        drains.len()
    );
    println!("| | median, µs | p90 | p99 | max |");
    println!("|---|---|---|---|---|");
    for (what, values) in [
        ("close → drained", &drains),
        ("hold: close → captured → open", &holds),
        ("SIGSTOP + clone + SIGCONT", &pauses),
    ] {
        let at = |p| percentile(values, p);
        println!(
            "| {what} | {:.0} | {:.0} | {:.0} | {:.0} |",
            at(50.0),
            at(90.0),
            at(99.0),
            at(100.0)
        );
    }
    println!();
    let mut missed = Vec::new();
    if median(&drains) > CUT_BAR {
        missed.push(format!(
            "cut: median {:.0} µs, bar {CUT_BAR} µs",
            median(&drains)
        ));
    }
    let (ours, theirs) = (percentile(&drains, 99.0), percentile(&pauses, 99.0));
    if ours > theirs {
        missed.push(format!("cut: p99 {ours:.0} µs, SIGSTOP p99 {theirs:.0} µs"));
    }
    missed
}
