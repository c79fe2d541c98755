//! The tables, as Markdown.

use std::fmt::Write as _;

use super::Run;
use super::bars::{self, around};
use super::figures::{Cell, Group, Row, mib, ms, ms_spread, times};
use super::method::Method;
use super::workload::{self, State, Workload};
use crate::Fs;
use crate::stats::{median, percentile};

const BEGIN: &str = "<!-- bench peers: begin -->";
const END: &str = "<!-- bench peers: end -->";

/// `document` with `report` between its two markers, if it has them.
pub fn between_markers(document: &str, report: &str) -> Option<String> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!(
        "{before}{BEGIN}\n{}\n{END}{after}",
        report.trim_end()
    ))
}

fn dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "–".into())
}

/// The cells of a part, in the order they were measured.
fn cells(run: &Run, part: &str) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for row in run.rows.iter().filter(|r| r.part == part) {
        if !cells.contains(&row.cell()) {
            cells.push(row.cell());
        }
    }
    cells
}

/// The lines of a table: no method, for either kind of writer, and each method.
fn lines(run: &Run, cell: Cell) -> Vec<(String, Group<'_>, Group<'_>)> {
    let group = |method: &str, gated| Group::of(&run.rows, cell, method, gated);
    let mut lines = Vec::new();
    for (name, gated) in [
        ("no checkpoint", false),
        ("no checkpoint, under `snapshim run`", true),
    ] {
        lines.push((name.to_owned(), group("none", gated), group("none", gated)));
    }
    for method in &run.methods {
        let ours = method.is_ours();
        lines.push((
            method.describe(),
            group(&method.name(), ours),
            group("none", ours),
        ));
    }
    lines.retain(|(_, group, _)| !group.0.is_empty());
    lines
}

/// The whole report.
pub fn markdown(run: &Run) -> String {
    let mut out = String::new();
    let o = &mut out;
    intro(run, o);
    against_the_bars(run, o);
    stalls(run, o);
    throughput(run, o);
    consistency(run, o);
    many(run, o);
    holds(run, o);
    growth(run, o);
    if !run.notes.is_empty() {
        o.push_str("\n### Left out\n\n");
        for note in &run.notes {
            let _ = writeln!(o, "- {note}");
        }
    }
    out
}

fn intro(run: &Run, o: &mut String) {
    o.push_str("## Against every other way to copy\n\n");
    o.push_str("    cargo run --release -p snapshim-tests --bin bench -- peers");
    if !run.options.line.is_empty() {
        let _ = write!(o, " {}", run.options.line);
    }
    let _ = writeln!(
        o,
        "\n\nOne run, {:.0} min, as root. Machine: {}.\n",
        (run.took.as_secs_f64() / 60.0).max(1.0),
        run.machine.join("; ")
    );
    o.push_str(
        "In each *round* every method has one window, in an order that turns, and so have both kinds of writer \
         without any: ratios in tables are medians of such pairs, those against bars of two medians. A writer has its own files, and makes its \
         calls at a fixed rate; its *stall* is the longest time from when a call was due until it was \
         done, so that a stop between two calls counts. *Noise* is the same of a thread that only sleeps. \
         *Written* is what the kernel says that the method's processes wrote (`write_bytes`), and on tmpfs, which \
         has no such account, what is allocated for the copy; *device*, what the loop device was given from the \
         beginning of the window until everything was on it (/proc/diskstats), less that of the window \
         without. Removing earlier copies is in no method's time. A copy is *inconsistent* if its files never were so together: a check of the order \
         of what was written, which knows nothing of how it was copied. restic's repository is beside the \
         data and has the earlier copies; `fsfreeze` needs root, and a copy elsewhere; snapshim's wall \
         time has the digests of the files in it.\n",
    );
}

fn against_the_bars(run: &Run, o: &mut String) {
    let bars = bars::bars(run);
    let verified: Vec<bool> = run
        .rows
        .iter()
        .flat_map(|r| &r.window.taken)
        .filter_map(|t| t.verified)
        .collect();
    if !verified.is_empty() {
        let _ = writeln!(
            o,
            "\nOf {} checkpoints in these windows {} were verified.",
            verified.len(),
            verified.iter().filter(|v| **v).count()
        );
    }
    if bars.is_empty() {
        return;
    }
    o.push_str("\n### The bars\n\n| figure | bar | here | |\n|---|---|---|---|\n");
    for bar in bars {
        let verdict = match bar.met {
            Some(true) => "met",
            Some(false) => "**missed**",
            None if bar.bar == "(printed)" => "",
            None => "not shown by this run",
        };
        let _ = writeln!(
            o,
            "| {} | {} | {} | {verdict} |",
            bar.what, bar.bar, bar.here
        );
    }
}

fn inconsistent(group: &Group) -> String {
    match group.inconsistent() {
        (_, 0) => "–".into(),
        (0, of) => format!("0 of {of}"),
        (bad, of) => format!("**{bad}** of {of}"),
    }
}

fn device(group: &Group, none: &Group) -> String {
    let of = |r: &Row| r.window.device as f64;
    match (group.median(of), none.median(of)) {
        (Some(with), Some(without)) => mib((with - without).max(0.0)),
        _ => "–".into(),
    }
}

fn stalls(run: &Run, o: &mut String) {
    for cell in cells(run, "stall") {
        let _ = writeln!(
            o,
            "\n### {}: {} of {} MiB, {}\n\n{} calls a second; {} windows of {:.1} s of snapshim (but for `--capture copy`), of SIGSTOP and without, {} of the others\n",
            cell.fs.name(),
            Workload::Pages.describe(),
            cell.mib,
            if cell.fs == Fs::Tmpfs {
                "as it is"
            } else {
                cell.state
            },
            Workload::Pages.rate(),
            run.options.amounts.rounds,
            run.options.amounts.window.as_secs_f64(),
            run.options.amounts.peer_rounds
        );
        o.push_str(
            "| method | longest stall, ms: median (extremes) | to the window without | noise, ms | SIGSTOP's stall to this | \
             hold, ms | wall, ms | written, MiB | device, MiB | inconsistent |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
        );
        let stall = |r: &Row| r.window.stall_us;
        let sigstop = Group::of(&run.rows, cell, &Method::Sigstop.name(), false).median(stall);
        for (name, group, none) in lines(run, cell) {
            let is_none = group.0.iter().all(|r| r.method == "none");
            let ratios = group.ratios(&none, stall);
            let holds: Vec<f64> = group.0.iter().filter_map(|r| r.hold_us()).collect();
            let measured = |text: String| if is_none { "–".to_owned() } else { text };
            let theirs = sigstop.zip(group.median(stall)).map(|(s, m)| times(s / m));
            let _ = writeln!(
                o,
                "| {name} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                ms_spread(&group.each(stall)),
                measured(dash((!ratios.is_empty()).then(|| times(median(&ratios))))),
                ms(group.median(|r| r.window.noise_us).unwrap_or(0.0)),
                dash(theirs),
                dash((!holds.is_empty()).then(|| ms(median(&holds)))),
                measured(format!("{:.0}", group.median(Row::wall_ms).unwrap_or(0.0))),
                measured(mib(group.median(Row::written).unwrap_or(0.0))),
                measured(match cell.fs {
                    Fs::Tmpfs => "–".into(),
                    _ => device(&group, &none),
                }),
                inconsistent(&group),
            );
        }
    }
}

fn throughput(run: &Run, o: &mut String) {
    let cells = cells(run, "throughput");
    if cells.is_empty() {
        return;
    }
    let _ = writeln!(
        o,
        "\n### Throughput of an unthrottled writer\n\n{} of {} MiB; a copy every 2 s, or as soon as the last one is done; \
         thousands of calls a second, medians of {} windows of snapshim and without, one of the others\n\n\
         | file system | method | while it works | while not | all | to the window without |\n|---|---|---|---|---|---|",
        Workload::Pages.describe(),
        run.options.amounts.mib,
        run.options.amounts.throughput_rounds
    );
    for cell in cells {
        for (name, group, none) in lines(run, cell) {
            let thousands = |of: fn(&Row) -> f64| {
                let rate = group.median(of).filter(|r| *r > 0.0);
                dash(rate.map(|r| format!("{:.0}", r / 1000.0)))
            };
            let ratios = group.ratios(&none, Row::rate);
            let is_none = group.0.iter().all(|r| r.method == "none");
            let ratio = (!is_none && !ratios.is_empty()).then(|| times(median(&ratios)));
            let _ = writeln!(
                o,
                "| {} | {name} | {} | {} | {} | {} |",
                cell.fs.name(),
                thousands(|r| r.window.during),
                thousands(|r| r.window.between),
                thousands(Row::rate),
                dash(ratio)
            );
        }
    }
}

fn consistency(run: &Run, o: &mut String) {
    let all = cells(run, "consistency");
    if all.is_empty() {
        return;
    }
    o.push_str("\n### Consistency\n\nInconsistent copies of those that were made, and the longest stall, ms, median\n\n");
    let workloads: Vec<Workload> = workload::ALL
        .into_iter()
        .filter(|w| all.iter().any(|c| c.workload == w.name()))
        .collect();
    for workload in &workloads {
        let _ = writeln!(
            o,
            "- {}: {}, {} calls a second",
            workload.name(),
            workload.describe(),
            workload.rate()
        );
    }
    o.push_str("\n| method |");
    let heads: Vec<&Cell> = all.iter().collect();
    for cell in &heads {
        let _ = write!(o, " {} {} |", cell.fs.name(), cell.workload);
    }
    o.push_str("\n|---|");
    o.push_str(&"---|".repeat(heads.len()));
    o.push('\n');
    let mut names: Vec<String> = Vec::new();
    for cell in &all {
        for (name, ..) in lines(run, *cell) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    // In the order of the methods, whichever cell has them.
    let order: Vec<String> = run.methods.iter().map(Method::describe).collect();
    names.sort_by_key(|n| order.iter().position(|o| o == n).map_or(0, |p| p + 1));
    for name in names {
        let _ = write!(o, "| {name} |");
        for cell in &heads {
            let found = lines(run, **cell).into_iter().find(|l| l.0 == name);
            let text = found.map(|(_, group, _)| {
                let stall = ms(group.median(|r| r.window.stall_us).unwrap_or(0.0));
                match group.inconsistent() {
                    (_, 0) => stall,
                    _ => format!("{}; {stall}", inconsistent(&group)),
                }
            });
            let _ = write!(o, " {} |", dash(text));
        }
        o.push('\n');
    }
}

fn many(run: &Run, o: &mut String) {
    let cells = cells(run, "many");
    if cells.is_empty() {
        return;
    }
    let _ = writeln!(
        o,
        "\n### 10,000 files of which 10 change\n\n\
         | file system | files | method | hold, µs | wall, ms | written, MiB | longest stall, ms | inconsistent |\n|---|---|---|---|---|---|---|---|"
    );
    for cell in cells {
        let files = if cell.workload == Workload::Few.name() {
            "10"
        } else {
            "10,000"
        };
        for (name, group, _) in lines(run, cell) {
            let is_none = group.0.iter().all(|r| r.method == "none");
            let holds: Vec<f64> = group.0.iter().filter_map(|r| r.hold_us()).collect();
            let measured = |text: String| if is_none { "–".to_owned() } else { text };
            let _ = writeln!(
                o,
                "| {} | {files} | {name} | {} | {} | {} | {} | {} |",
                cell.fs.name(),
                dash((!holds.is_empty()).then(|| format!("{:.0}", median(&holds)))),
                measured(format!("{:.0}", group.median(Row::wall_ms).unwrap_or(0.0))),
                measured(mib(group.median(Row::written).unwrap_or(0.0))),
                ms(group.median(|r| r.window.stall_us).unwrap_or(0.0)),
                inconsistent(&group)
            );
        }
    }
}

fn holds(run: &Run, o: &mut String) {
    let cells = cells(run, "hold");
    if cells.is_empty() {
        return;
    }
    o.push_str(
        "\n### The hold and the size of the file\n\nAsked for: pieces of the file that the program was about to change, \
         and waited for. Where the file is captured under the hold, nothing is done after the cut.\n\n\
         | file system | file, MiB | state | method | captured by | hold, µs: median (extremes) | drain, µs | after the cut, ms | asked for | wall, ms |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        for (name, group, _) in lines(run, cell) {
            let holds: Vec<f64> = group.0.iter().filter_map(|r| r.hold_us()).collect();
            if holds.is_empty() {
                continue;
            }
            let drain = |r: &Row| {
                r.window
                    .taken
                    .last()
                    .and_then(|t| t.drain_us)
                    .unwrap_or(0.0)
            };
            let after = |of: fn(&super::method::Taken) -> Option<f64>| {
                let taken = group.0.iter().filter_map(|r| r.window.taken.last());
                let values: Vec<f64> = taken.filter_map(of).collect();
                (!values.is_empty()).then(|| median(&values))
            };
            let capture = group.0.last().and_then(|r| r.window.taken.last());
            let _ = writeln!(
                o,
                "| {} | {} | {} | {name} | {} | {:.0} ({:.0} … {:.0}) | {:.0} | {} | {} | {:.0} |",
                cell.fs.name(),
                cell.mib,
                if cell.state == State::Dirty.name() {
                    "–"
                } else {
                    cell.state
                },
                capture.map_or("–", |t| &t.capture),
                median(&holds),
                percentile(&holds, 0.0),
                percentile(&holds, 100.0),
                group.median(drain).unwrap_or(0.0),
                dash(after(|t| t.guard_us).map(|us| format!("{:.0}", us / 1e3))),
                dash(after(|t| t.asked).map(|n| format!("{n:.0}"))),
                group.median(Row::wall_ms).unwrap_or(0.0)
            );
        }
    }
}

fn growth(run: &Run, o: &mut String) {
    let mut pairs: Vec<(Fs, &str)> = Vec::new();
    for step in &run.steps {
        if !pairs.contains(&(step.fs, step.method.as_str())) {
            pairs.push((step.fs, &step.method));
        }
    }
    if pairs.is_empty() {
        return;
    }
    let amounts = &run.options.amounts;
    let _ = writeln!(
        o,
        "\n### {} copies in a row\n\n{} of {} MiB, {} calls a second, a copy every {} ms; wall time is the median \
         of the nine around each; the last two copies are kept\n\n\
         | file system | method | 1st, ms | 10th, ms | last, ms | last to 10th | written by the last, MiB | extents of the live file, 1st, 10th, last |\n|---|---|---|---|---|---|---|---|",
        amounts.checkpoints,
        Workload::Pages.describe(),
        amounts.growth_mib,
        Workload::Pages.rate(),
        amounts.growth_pause.as_millis()
    );
    for (fs, method) in pairs {
        let steps: Vec<_> = run
            .steps
            .iter()
            .filter(|s| s.fs == fs && s.method == method)
            .collect();
        let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
            continue;
        };
        let tenth = around(run, fs, method, 10);
        let end = around(run, fs, method, last.number);
        let extents = |n: usize| {
            let step = steps.get(n.min(steps.len()) - 1);
            dash(step.and_then(|s| s.extents).map(|e| e.to_string()))
        };
        let named = run.methods.iter().find(|m| m.name() == method);
        let _ = writeln!(
            o,
            "| {} | {} | {:.0} | {} | {} | {} | {} | {}, {}, {} |",
            fs.name(),
            named.map_or(method.to_owned(), Method::describe),
            first.wall_ms,
            dash(tenth.map(|t| format!("{t:.0}"))),
            dash(end.map(|t| format!("{t:.0}"))),
            dash(tenth.zip(end).map(|(t, e)| times(e / t))),
            mib(last.written as f64),
            extents(1),
            extents(10),
            extents(last.number)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_outside_the_markers_stays() {
        let document = format!("before\n\n{BEGIN}\nold\n{END}\n\nafter\n");
        let new = between_markers(&document, "new\n\n").unwrap();
        assert_eq!(new, format!("before\n\n{BEGIN}\nnew\n{END}\n\nafter\n"));
        assert_eq!(between_markers("no markers", "new"), None);
    }
}
