//! The project's bars, and whether this run meets them.

use super::Run;
use super::figures::{Cell, Group, Row, ms, times};
use super::method::Method;
use super::workload::{State, Workload};
use crate::Fs;
use crate::stats::median;

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Of what.
    pub what: String,
    /// The bar.
    pub bar: String,
    /// The figure of this run.
    pub here: String,
    /// Whether it is met; `None` if this run cannot say.
    pub met: Option<bool>,
}

impl Bar {
    fn new(what: String, bar: &str, here: String, met: bool) -> Bar {
        Bar {
            what,
            bar: bar.to_owned(),
            here,
            met: Some(met),
        }
    }

    fn unknown(mut self) -> Bar {
        self.met = None;
        self
    }
}

const HOLD_US: f64 = 50.0;
const SIZE_RATIO: f64 = 1.5;
const STALL_RATIO: f64 = 1.5;
const STALL_WINDOWS: usize = 10;
const GROWTH: f64 = 1.2;
const GROWTH_STEPS: usize = 500;
const MANY_HOLD: f64 = 2.0;
const MANY_WALL: f64 = 0.5;
const WAIT_US: u64 = 2_000;
const WAITS: u64 = 1_000;

/// All bars that this run has figures for.
pub fn bars(run: &Run) -> Vec<Bar> {
    // What a user gets who asks for nothing, and what the bars were set for.
    let headline = ["snapshim-auto", "snapshim-copy-before-write"];
    let mut bars = Vec::new();
    for method in headline {
        for fs in &run.fs {
            holds(run, *fs, method, &mut bars);
            stalls(run, *fs, method, &mut bars);
            throughput(run, *fs, method, &mut bars);
            growth(run, *fs, method, &mut bars);
            many(run, *fs, method, &mut bars);
        }
    }
    bars
}

fn hold(row: &Row) -> f64 {
    row.hold_us().unwrap_or(0.0)
}

fn pages(part: &'static str, fs: Fs, state: State, mib: u64) -> Cell {
    Cell {
        part,
        fs,
        workload: Workload::Pages.name(),
        state: state.name(),
        mib,
    }
}

/// Cells of random blocks in one part, in the state that the bars are for.
fn sizes(run: &Run, part: &str, fs: Fs) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for row in &run.rows {
        let cell = row.cell();
        if cell.part == part && cell.fs == fs && !cells.contains(&cell) {
            cells.push(cell);
        }
    }
    cells
}

fn holds(run: &Run, fs: Fs, method: &str, bars: &mut Vec<Bar>) {
    let mut of_size = Vec::new();
    for cell in sizes(run, "hold", fs) {
        let group = Group::of(&run.rows, cell, method, true);
        let Some(median) = group.median(hold) else {
            continue;
        };
        of_size.push((cell.mib, median));
        if cell.mib <= 1024 {
            bars.push(Bar::new(
                format!(
                    "{method}, {}, {} MiB, {}: hold, median",
                    fs.name(),
                    cell.mib,
                    cell.state
                ),
                "≤ 50 µs",
                format!("{median:.0} µs"),
                median <= HOLD_US,
            ));
        }
    }
    let of = |mib| of_size.iter().find(|(m, _)| *m == mib).map(|(_, us)| *us);
    if let (Some(small), Some(large)) = (of(256), of(4096)) {
        let ratio = large / small.max(1.0);
        bars.push(Bar::new(
            format!("{method}, {}: hold, 4 GiB to 256 MiB", fs.name()),
            "≤ 1.5 ×",
            times(ratio),
            ratio <= SIZE_RATIO,
        ));
    }
}

fn stalls(run: &Run, fs: Fs, method: &str, bars: &mut Vec<Bar>) {
    for cell in sizes(run, "stall", fs) {
        if cell.state == State::Clean.name() {
            continue;
        }
        let stall = |r: &Row| r.window.stall_us;
        let ours = Group::of(&run.rows, cell, method, true);
        let none = Group::of(&run.rows, cell, "none", true);
        let (Some(here), Some(base)) = (ours.median(stall), none.median(stall)) else {
            continue;
        };
        let what = format!(
            "{method}, {}, {} MiB, {}: longest stall",
            fs.name(),
            cell.mib,
            cell.state
        );
        let ratio = here / base;
        let windows = ours.0.len();
        let figure = format!(
            "{} ms to {} ms without, {} ({windows} windows)",
            ms(here),
            ms(base),
            times(ratio)
        );
        if fs != Fs::Btrfs {
            let bar = Bar::new(
                what,
                "≤ 1.5 × of that without",
                figure,
                ratio <= STALL_RATIO,
            );
            // Fewer windows may show that it is missed, not that it is met.
            let enough = windows >= STALL_WINDOWS || ratio > STALL_RATIO;
            bars.push(if enough { bar } else { bar.unknown() });
        } else {
            let others = run.methods.iter().filter(|m| !m.is_ours());
            let best = others
                .filter_map(|m| {
                    let median = Group::of(&run.rows, cell, &m.name(), false).median(stall)?;
                    Some((median, m.name()))
                })
                .min_by(|a, b| a.0.total_cmp(&b.0));
            if let Some((best, name)) = best {
                bars.push(Bar::new(
                    what,
                    "≤ the best other method",
                    format!("{} ms; {name} {} ms", ms(here), ms(best)),
                    here <= best,
                ));
            }
        }
        let sigstop = Group::of(&run.rows, cell, &Method::Sigstop.name(), false).median(stall);
        if let Some(theirs) = sigstop {
            bars.push(
                Bar::new(
                    format!(
                        "{method}, {}, {}: SIGSTOP + clone or copy",
                        fs.name(),
                        cell.state
                    ),
                    "(printed)",
                    format!("{} ms, {} of ours", ms(theirs), times(theirs / here)),
                    true,
                )
                .unknown(),
            );
        }
    }
}

fn throughput(run: &Run, fs: Fs, method: &str, bars: &mut Vec<Bar>) {
    for cell in sizes(run, "throughput", fs) {
        let ours = Group::of(&run.rows, cell, method, true);
        let none = Group::of(&run.rows, cell, "none", true);
        let ratios = ours.ratios(&none, Row::rate);
        if ratios.is_empty() {
            continue;
        }
        let ratio = median(&ratios);
        let bar = match fs {
            Fs::Tmpfs => 0.8,
            Fs::Xfs | Fs::Ext4 => 0.7,
            Fs::Btrfs => 0.0,
        };
        let text = if bar > 0.0 {
            format!("≥ {bar} ×")
        } else {
            "(printed)".into()
        };
        let row = Bar::new(
            format!(
                "{method}, {}: throughput with a checkpoint every 2 s",
                fs.name()
            ),
            &text,
            times(ratio),
            ratio >= bar,
        );
        bars.push(if bar > 0.0 { row } else { row.unknown() });
    }
}

/// The median of the wall times around the `number`-th copy: one alone is mostly noise.
pub fn around(run: &Run, fs: Fs, method: &str, number: usize) -> Option<f64> {
    let near: Vec<f64> = run
        .steps
        .iter()
        .filter(|s| s.fs == fs && s.method == method && s.number.abs_diff(number) <= 4)
        .map(|s| s.wall_ms)
        .collect();
    (!near.is_empty()).then(|| median(&near))
}

fn growth(run: &Run, fs: Fs, method: &str, bars: &mut Vec<Bar>) {
    let of = |s: &&super::figures::Step| s.fs == fs && s.method == method;
    let steps: Vec<_> = run.steps.iter().filter(of).collect();
    let Some(last) = steps.last() else { return };
    let number = last.number;
    if let (true, Some(tenth), Some(end)) = (
        number > 20,
        around(run, fs, method, 10),
        around(run, fs, method, number),
    ) {
        let ratio = end / tenth;
        let bar = Bar::new(
            format!(
                "{method}, {}: the {number}th checkpoint to the 10th",
                fs.name()
            ),
            "≤ 1.2 × at the 500th",
            times(ratio),
            ratio <= GROWTH,
        );
        let enough = number >= GROWTH_STEPS || ratio > GROWTH;
        bars.push(if enough { bar } else { bar.unknown() });
    }
    let first = steps.first().and_then(|s| s.extents);
    if let (Some(first), Some(end)) = (first, last.extents) {
        // btrfs writes nothing in place: its own files grow extents without any snapshot.
        let bar = Bar::new(
            format!(
                "{method}, {}: extents of the live file, 1st to {number}th",
                fs.name()
            ),
            "do not grow",
            format!("{first} to {end}"),
            end <= first + first / 20,
        );
        bars.push(if fs == Fs::Btrfs { bar.unknown() } else { bar });
    }
    let waits = run.waits.iter().find(|w| w.fs == fs && w.method == method);
    if let Some(waits) = waits {
        let mean = waits.total_us as f64 / waits.count.max(1) as f64;
        let bar = Bar::new(
            format!(
                "{method}, {}: waits at the gate, by the shim's counters",
                fs.name()
            ),
            "p99 ≤ 2 ms of ≥ 1,000",
            format!(
                "{} waits, mean {mean:.0} µs, p99 {} ms, longest {} ms",
                waits.count,
                ms(waits.p99_us as f64),
                ms(waits.longest_us as f64)
            ),
            waits.p99_us <= WAIT_US,
        );
        bars.push(if waits.count >= WAITS {
            bar
        } else {
            bar.unknown()
        });
    }
}

fn many(run: &Run, fs: Fs, method: &str, bars: &mut Vec<Bar>) {
    let cell = |workload: Workload| Cell {
        workload: workload.name(),
        ..pages("many", fs, State::Clean, 0)
    };
    let group = |w, m: &str, gated| Group::of(&run.rows, cell(w), m, gated);
    let ours = group(Workload::Many, method, true);
    let Some(many) = ours.median(hold) else {
        return;
    };
    if let Some(few) = group(Workload::Few, method, true).median(hold) {
        let ratio = many / few.max(1.0);
        bars.push(Bar::new(
            format!(
                "{method}, {}: hold, 10,000 files to 10, 10 changed",
                fs.name()
            ),
            "≤ 2 ×",
            format!("{many:.0} µs to {few:.0} µs, {}", times(ratio)),
            ratio <= MANY_HOLD,
        ));
    }
    let clones = group(Workload::Many, &Method::Ficlone.name(), false);
    if let (Some(here), Some(theirs)) = (ours.median(Row::wall_ms), clones.median(Row::wall_ms)) {
        let ratio = here / theirs;
        bars.push(Bar::new(
            format!(
                "{method}, {}: wall time, 10,000 files, to `cp -a --reflink`",
                fs.name()
            ),
            "≤ 0.5 ×",
            format!("{here:.0} ms to {theirs:.0} ms, {}", times(ratio)),
            ratio <= MANY_WALL,
        ));
    }
}
