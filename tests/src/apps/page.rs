//! `docs/applications.md`.

use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use super::bench::HOT;
use super::{Application, Row};
use crate::process;
use crate::stats::{median, percentile};

/// The text of the page for these rows.
pub fn page(rows: &[(&Application, Row)], throughput: &str) -> String {
    let mut text = HEAD.to_owned();
    let _ = writeln!(text, "{}\n", machine());
    text += "## Bars\n\nHere a copy that fails would be a bug.\n\n";
    text += &table(rows.iter().filter(|(app, _)| app.is_bar));
    text += "\n## As found\n\n";
    text += &table(rows.iter().filter(|(app, _)| !app.is_bar));
    text += &controls(rows);
    if !throughput.is_empty() {
        let _ = write!(text, "\n## What it costs a writer\n\n{throughput}");
    }
    text += &details(rows);
    text
}

const HEAD: &str = "# Applications

Real programs under load, snapshots of them while they run, each restored elsewhere, opened by the
program itself, checked by its own checker and by invariants of ours: balances that add up, counters
in two places that agree, and, in most, a *ledger*, in which each writer notes in a file of its own what it was told is
committed: nothing acknowledged is missing, and at most one update is ahead. Written by

    cargo run --release -p snapshim-tests --bin applications -- --write docs/applications.md

*At*: what `--at auto --wait 2s` cut at, how often, and what `snapshim status` had counted by then.
*write* is also what is left when the program offers no point, or does not reach it in time, or when its stores
cannot be seen and it is stopped for the capture (*held by* `ptrace`). *Failed*: copies of which
the checker or an invariant complained. The scripts are in `tests/programs/apps`.

";

fn machine() -> String {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let cpu = info
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "))
        .unwrap_or("an unknown processor");
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!(
        "Machine: {cpus} × {cpu}, shared with other work; Linux {}; XFS on a loop device.",
        crate::kernel()
    )
}

fn table<'a>(rows: impl Iterator<Item = &'a (&'a Application, Row)>) -> String {
    let mut text = "| application | at | to do on opening | hold p50 / p99, ms | held by | verified | failed |\n\
                    |---|---|---|---|---|---|---|\n"
        .to_owned();
    for (app, row) in rows {
        let _ = writeln!(text, "{}", line(app, row));
    }
    text
}

/// One line of the table.
pub fn line(app: &Application, row: &Row) -> String {
    let all = |counts: &std::collections::BTreeMap<String, u64>, mark: &str| {
        let mut sorted: Vec<_> = counts.iter().collect();
        sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let words = sorted
            .into_iter()
            .map(|(what, count)| format!("{mark}{what}{mark} {count}"));
        words.collect::<Vec<String>>().join(", ")
    };
    let mut at = all(&row.points, "`");
    if row.points.is_empty() {
        at = "nothing published".to_owned();
    }
    if !row.observed.is_empty() {
        let _ = write!(at, " (seen: {})", all(&row.observed, ""));
    }
    let ms = |p| percentile(&row.holds, p) / 1000.0;
    let mut verified = format!("{} of {}", row.verified, row.taken);
    if !row.reasons.is_empty() {
        let _ = write!(verified, " ({})", all(&row.reasons, "`"));
    }
    if !row.unpublished.is_empty() {
        let missed: u64 = row.unpublished.values().sum();
        let _ = write!(verified, "; {missed} × nothing published");
    }
    format!(
        "| {} | {at} | {} | {:.1} / {:.1} | {} | {verified} | {} |",
        app.title,
        recovery(row),
        ms(50.0),
        ms(99.0),
        row.layers.keys().cloned().collect::<Vec<_>>().join(", "),
        match row.failures.len() {
            0 => format!("**0 of {}**", row.taken),
            failed => format!("**{failed} of {}**", row.taken),
        }
    )
}

/// What there was to do on opening, all in one cell.
fn recovery(row: &Row) -> String {
    let cell = |(what, values): (&String, &Vec<f64>)| {
        let with = values.iter().filter(|value| **value > 0.0).count();
        let max = percentile(values, 100.0);
        match (with, max) {
            _ if what == HOT && !row.hot.is_empty() => {
                let at: Vec<String> = row
                    .hot
                    .iter()
                    .map(|(p, n)| format!("{n} at `{p}`"))
                    .collect();
                format!("{what}: {}", at.join(", "))
            }
            (0, _) => format!("{what}: 0"),
            (_, 1.0) => format!("{what}: in {with}"),
            _ => format!("{what}: median {:.0}, at most {max:.0}", median(values)),
        }
    };
    row.recovery.iter().map(cell).collect::<Vec<_>>().join("; ")
}

fn controls(rows: &[(&Application, Row)]) -> String {
    if rows.iter().all(|(_, row)| row.controls.is_empty()) {
        return String::new();
    }
    let mut text = "\n## The same without the gate\n\n\
        Controls: the same load, its files copied one after the other as `cp` does, with 0.4 s in between in \
        all; and its processes stopped by SIGSTOP and cloned (which is one instant, too, but not one of the \
        program's own points: where the program recovers from a crash at any instant, nothing fails). *At write*: \
        snapshots with `--at write`.\n\n\
        | application | control | unsound | with a hot journal |\n|---|---|---|---|\n"
        .to_owned();
    for (app, row) in rows {
        for (name, copies, unsound, hot) in &row.controls {
            let hot = match row.recovery.contains_key(HOT) {
                true => format!("{hot} of {copies}"),
                false => String::new(),
            };
            let what = match name.as_str() {
                "plain" => "`cp`",
                "stopped" => "SIGSTOP and clone",
                _ => "snapshots at `write`",
            };
            let _ = writeln!(
                text,
                "| {} | {what} | {unsound} of {copies} | {hot} |",
                app.title
            );
        }
    }
    text
}

fn details(rows: &[(&Application, Row)]) -> String {
    let mut text = "\n## Loads and checkers\n\n| application | version | load | checker | updates meanwhile |\n\
                    |---|---|---|---|---|\n"
        .to_owned();
    for (app, row) in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            app.title,
            row.version,
            app.load,
            app.checker,
            row.units.1.saturating_sub(row.units.0)
        );
    }
    let with_failures = rows.iter().filter(|(_, row)| !row.failures.is_empty());
    let mut failed = String::new();
    for (app, row) in with_failures {
        let first = row.failures[0].lines().next().unwrap_or_default();
        let _ = writeln!(failed, "* {}: `{first}`", app.title);
    }
    if !failed.is_empty() {
        let _ = write!(
            text,
            "\nThe first failure of each that has any:\n\n{failed}"
        );
    }
    let mut why = String::new();
    for (app, row) in rows {
        for (code, said) in &row.why {
            let _ = writeln!(why, "* {}, `{code}`: {said}", app.title);
        }
    }
    if !why.is_empty() {
        let _ = write!(
            text,
            "\nWhy snapshots were not verified, the first of each:\n\n{why}"
        );
    }
    let mut missed = String::new();
    for (app, row) in rows {
        for (why, count) in &row.unpublished {
            let _ = writeln!(missed, "* {}, {count} ×: {why}", app.title);
        }
    }
    if !missed.is_empty() {
        let _ = write!(text, "\nWhere nothing was published:\n\n{missed}");
    }
    text
}

/// What an application calls itself.
pub fn version(app: &Application) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", app.version]);
    let ended = process::run(command, Duration::from_secs(20));
    ended.out().trim().to_owned()
}
