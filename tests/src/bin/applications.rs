//! The table of `docs/applications.md`: real programs under load, and what becomes of their
//! snapshots.
//!
//! ```text
//! cargo run --release -p snapshim-tests --bin applications -- \
//!     [--quick] [--only NAME]… [--count N] [--minutes N] [--write FILE] [throughput]
//! ```
//!
//! Each row is kept in `target/applications` as soon as there is something of it, so that a table can be
//! made of several runs: `--write` takes what is kept, and `--only none` measures nothing.
//! `--quick` takes 10 snapshots of each, and keeps nothing. `--minutes` bounds a row.
//! Ends with 1 if a copy of a bar row failed.
//!
//! `throughput`: what a checkpoint every second costs a writer.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use snapshim_tests::apps::bench::HOT;
use snapshim_tests::apps::{Application, Bench, Row, page, table};
use snapshim_tests::stats::{median, percentile};
use snapshim_tests::{Fs, product};

/// What is asked of each checkpoint.
const AUTO: &[&str] = &["--at", "auto", "--wait", "2s"];

struct Asked {
    is_quick: bool,
    only: Vec<String>,
    count: Option<usize>,
    limit: Duration,
    write: Option<String>,
    throughput: bool,
}

fn asked() -> Option<Asked> {
    let mut asked = Asked {
        is_quick: false,
        only: Vec::new(),
        count: None,
        limit: Duration::from_secs(3600),
        write: None,
        throughput: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => asked.is_quick = true,
            "--only" => asked.only.push(args.next()?),
            "--count" => asked.count = Some(args.next()?.parse().ok()?),
            "--minutes" => {
                asked.limit = Duration::from_secs(args.next()?.parse::<u64>().ok()? * 60)
            }
            "--write" => asked.write = Some(args.next()?),
            "throughput" => asked.throughput = true,
            _ => return None,
        }
    }
    Some(asked)
}

fn main() -> ExitCode {
    let Some(asked) = asked() else {
        eprintln!(
            "usage: applications [--quick] [--only NAME]… [--count N] [--minutes N] [--write FILE] [throughput]"
        );
        return ExitCode::from(2);
    };
    let kept = product::target_dir().join("applications");
    fs::create_dir_all(&kept).expect("a directory for rows");
    let file = |app: &Application| kept.join(format!("{}.json", app.name));
    let prose = kept.join("throughput.md");
    if asked.throughput {
        let text = throughput(asked.is_quick);
        println!("{text}");
        fs::write(&prose, text).expect("a file");
    }
    let mut failed = 0;
    let wanted =
        |app: &&Application| asked.only.is_empty() || asked.only.iter().any(|n| n == app.name);
    for app in table::ALL
        .iter()
        .filter(wanted)
        .filter(|_| !asked.throughput)
    {
        if let Some(package) = app.missing() {
            println!("{}: not run: needs {package}", app.name);
            failed += usize::from(app.is_bar);
            continue;
        }
        let row = measure(app, &asked, &file(app));
        println!("{}", page::line(app, &row));
        for failure in row.failures.iter().take(3) {
            println!("    {failure}");
        }
        for (why, count) in &row.unpublished {
            println!("    {count} × {why}");
        }
        println!("    controls {:?}; {:.0} s", row.controls, row.seconds);
        failed += if app.is_bar { row.failures.len() } else { 0 };
    }
    if let Some(name) = &asked.write {
        let rows: Vec<(&Application, Row)> = table::ALL
            .iter()
            .filter_map(|app| Some((app, Row::load(&file(app))?)))
            .collect();
        let text = page::page(&rows, &fs::read_to_string(&prose).unwrap_or_default());
        fs::write(name, text).expect("the page");
    }
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn measure(app: &'static Application, asked: &Asked, file: &Path) -> Row {
    let begun = Instant::now();
    let count = asked
        .count
        .unwrap_or(if asked.is_quick { 10 } else { app.full });
    let mut bench = Bench::start(app, asked.limit + Duration::from_secs(1200)).expect("mounts");
    let mut row = Row::new(app.name);
    row.version = page::version(app);
    let keep = |row: &mut Row, bench: &Bench| {
        row.observed = bench.observed().into_iter().collect();
        row.seconds = begun.elapsed().as_secs_f64();
        if !asked.is_quick {
            row.save(file).expect("the row");
        }
    };
    // Those that published nothing are counted, but no snapshots.
    for nth in 1..=count * 2 {
        bench.snapshot(AUTO, &mut row);
        if nth % 25 == 0 {
            keep(&mut row, &bench);
        }
        if row.taken >= count as u64 || begun.elapsed() > asked.limit {
            break;
        }
    }
    keep(&mut row, &bench);
    // Where a check takes seconds, fewer copies do.
    let per_copy = row.seconds / row.taken.max(1) as f64;
    let copies = match (asked.is_quick, per_copy > 1.5) {
        (true, _) => 3,
        (false, true) => 10,
        (false, false) => 30,
    };
    if row.recovery.contains_key(HOT) {
        let many = if asked.is_quick { 20 } else { 200 };
        let mut at_write = Row::new(app.name);
        for _ in 0..many {
            bench.snapshot(&["--at", "write"], &mut at_write);
        }
        let (bad, hot) = (at_write.failures.len() as u64, at_write.with(HOT));
        row.controls
            .push(("write".to_owned(), at_write.taken, bad, hot));
        bench.control("stopped", many, &mut row);
    } else {
        bench.control("stopped", copies, &mut row);
    }
    bench.control("plain", copies, &mut row);
    keep(&mut row, &bench);
    bench.end();
    row
}

/// What a checkpoint every second costs SQLite, in interleaved pairs of times with and without.
fn throughput(is_quick: bool) -> String {
    let (pairs, window) = match is_quick {
        true => (2, Duration::from_secs(2)),
        false => (9, Duration::from_secs(5)),
    };
    let mut text = format!(
        "Transactions a second of one writer that commits as fast as it can, with a checkpoint \
         (`--at auto`) every second and without: {pairs} interleaved pairs of {} s, medians; the ratio is the \
         median of the pairs [extremes]. By\n\n    cargo run --release -p snapshim-tests --bin applications -- throughput\n\n\
         | SQLite | on | without | with | ratio |\n|---|---|---|---|---|\n",
        window.as_secs()
    );
    for (fs, name) in [(Fs::Tmpfs, "tmpfs"), (Fs::Xfs, "XFS")] {
        for mode in ["rollback", "wal"] {
            let app = Application {
                name: if mode == "wal" {
                    "throughput-wal"
                } else {
                    "throughput-rollback"
                },
                fs,
                ..*table::named("sqlite-wal")
            };
            let app: &'static Application = Box::leak(Box::new(app));
            let limit = window * (pairs * 2 + 60);
            let mut bench =
                Bench::start_in(app, &format!("{mode}-bench"), true, limit).expect("mounts");
            let (mut without, mut with) = (Vec::new(), Vec::new());
            for pair in 0..pairs {
                for turn in 0..2 {
                    // Which of the two is first changes, so that a drift cancels.
                    let is_with = (pair + turn) % 2 == 1;
                    let rate = rate(&mut bench, window, is_with);
                    if is_with {
                        with.push(rate)
                    } else {
                        without.push(rate)
                    }
                }
            }
            bench.end();
            let ratios: Vec<f64> = with.iter().zip(&without).map(|(a, b)| a / b).collect();
            text += &format!(
                "| {mode} | {name} | {:.0} | {:.0} | {:.3} [{:.3} … {:.3}] |\n",
                median(&without),
                median(&with),
                median(&ratios),
                percentile(&ratios, 0.0),
                percentile(&ratios, 100.0)
            );
        }
    }
    text
}

/// Transactions a second in a window.
fn rate(bench: &mut Bench, window: Duration, is_with: bool) -> f64 {
    bench.expect_running();
    let ledger = bench.lab.data().join("ledger-0");
    let count = || -> u64 {
        let bytes = fs::read(&ledger).expect("the ledger");
        u64::from_le_bytes(bytes.try_into().expect("a number"))
    };
    let (begun, before) = (Instant::now(), count());
    let mut next = Duration::from_millis(200);
    while begun.elapsed() < window {
        if is_with && begun.elapsed() >= next {
            next += Duration::from_secs(1);
            let outcome = bench.lab.checkpoint(&["--at", "auto", "--keep-last", "2"]);
            // Also one that was given up, on a busy machine, has cost what it has.
            assert!(matches!(outcome.code, 0 | 4 | 5), "{}", outcome.stderr);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    (count() - before) as f64 / begun.elapsed().as_secs_f64()
}
