//! The table of `docs/coverage.md`: each way to change a file, as a program under
//! `snapshim run`, and what holds of real checkpoints see of it.
//!
//!     cargo run --release -p snapshim-tests --bin coverage -- [--quick] [--only TEXT] [--write FILE]
//!
//! 20 holds each; 3 with `--quick`. Ends with 1 if a row is wrong: a change in a hold
//! whose certificate says verified, a certificate without a reason, a program that
//! does not go on, or output that is not what it is without the gate.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use snapshim_tests::coverage::{Bench, Row};
use snapshim_tests::paths::{self, Way};
use snapshim_tests::stats::median;

/// Rows measured at once: one for each processor, two at most.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(2))
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (mut holds, mut only, mut write) = (20, String::new(), None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => holds = 3,
            "--only" => only = args.next().unwrap_or_default(),
            "--write" => write = args.next(),
            _ => {
                eprintln!("usage: coverage [--quick] [--only TEXT] [--write FILE]");
                return ExitCode::from(2);
            }
        }
    }
    let start = Instant::now();
    let mut ways = paths::all();
    ways.retain(|way| way.name.contains(&only));
    let rows = measure(&ways, holds);
    let table = table(&rows, holds);
    println!("{table}");
    println!("{:.0} s", start.elapsed().as_secs_f64());
    if let Some(file) = write
        && let Err(e) = std::fs::write(&file, page(&table))
    {
        eprintln!("{file}: {e}");
        return ExitCode::FAILURE;
    }
    let wrong: Vec<&Row> = rows.iter().filter(|row| !row.is_honest()).collect();
    for row in &wrong {
        eprintln!("WRONG {}: {}", row.name, faults(row));
    }
    if rows.is_empty() || !wrong.is_empty() {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn measure(ways: &[Way], holds: usize) -> Vec<Row> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Row)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for worker in 0..workers() {
            let (next, done) = (&next, &done);
            scope.spawn(move || {
                let limit = Duration::from_secs(3600);
                let mut bench = Bench::new(&format!("coverage-{worker}"), limit)
                    .expect("the table needs mounts");
                while let Some((index, way)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    ways.get(index).map(|way| (index, way))
                } {
                    let row = bench.measure(way, holds, true);
                    eprintln!("{}", line(&row));
                    for (code, text) in &row.reasons {
                        eprintln!("  {code}: {text}");
                    }
                    done.lock().expect("the rows").push((index, row));
                }
            });
        }
    });
    let mut rows = done.into_inner().expect("the rows");
    rows.sort_by_key(|(index, _)| *index);
    rows.into_iter().map(|(_, row)| row).collect()
}

fn faults(row: &Row) -> String {
    let mut all = row.faults.clone();
    all.dedup();
    all.extend(row.difference.clone());
    all.join("; ")
}

/// How a row ends.
fn verdict(row: &Row) -> &'static str {
    if row.needs.is_some() {
        "not run"
    } else if !row.is_honest() {
        "WRONG"
    } else if row.is_held() {
        "held"
    } else {
        "not verified"
    }
}

fn line(row: &Row) -> String {
    if let Some(needs) = &row.needs {
        return format!("| {} | | | | | not run: needs {needs} | |", row.name);
    }
    let mut why: Vec<String> = row.reasons.keys().map(|code| format!("`{code}`")).collect();
    if row.unpublished.0 > 0 {
        why.push(format!("{} × nothing published", row.unpublished.0));
    }
    if row.refused.is_some() {
        why.push("`run` refuses it; run by a shell".to_owned());
    }
    let layers: Vec<&str> = row.layers.iter().map(String::as_str).collect();
    format!(
        "| {} | {} | {} | {:.0} | {} of {} | {} | {} | {} |",
        row.name,
        layers.join(", "),
        row.changes,
        row.usual,
        row.verified,
        row.holds + row.unpublished.0,
        verdict(row),
        why.join(", "),
        match &row.difference {
            None => "yes",
            Some(_) => "NO",
        }
    )
}

fn table(rows: &[Row], holds: usize) -> String {
    let mut text = String::new();
    let lengths: Vec<f64> = rows
        .iter()
        .flat_map(|r| r.lengths.iter().copied())
        .collect();
    let _ = writeln!(
        text,
        "| program: way | layer | changes in {holds} holds | in 50 ms of open gate | verified | \
         verdict | reasons | output as without |\n|---|---|---|---|---|---|---|---|"
    );
    for row in rows {
        let _ = writeln!(text, "{}", line(row));
    }
    let count = |word: &str| rows.iter().filter(|row| verdict(row) == word).count();
    let _ = write!(
        text,
        "\n{} ways: {} held, {} not verified (with the reason), {} not run, {} wrong. \
         Holds: median {:.0} ms.",
        rows.len(),
        count("held"),
        count("not verified"),
        count("not run"),
        count("WRONG"),
        median(&lengths),
    );
    text
}

fn page(table: &str) -> String {
    format!(
        "# Coverage\n\n\
         Each way by which a program can change a file, as a program that does it all the time\n\
         (`tests/programs/paths`) under `snapshim run`, on XFS, Linux {}. Written by\n\n\
         \x20   cargo run --release -p snapshim-tests --bin coverage -- --write docs/coverage.md\n\n\
         A watcher outside the set looks at the files all the time; holds last some 50 ms, for\n\
         the sake of this table. *Held*: every certificate says verified, and no hold saw a\n\
         change. *Not verified*: the certificate said so, with a reason. A change in a hold that\n\
         is verified, or output that differs from a run without the gate, is *WRONG*, and the\n\
         command fails. *Layer*: by what the certificates say the processes were held; *none*: a\n\
         process outside, and what it did. How changes are found: `tests/src/coverage.rs`.\n\n\
         {table}\n",
        snapshim_tests::kernel()
    )
}
