//! What was measured, as rows that are kept in a file, and what is computed of them.

use std::fmt::Write as _;

use super::window::Window;
use crate::Fs;
use crate::stats::{median, percentile};

/// One window as it is kept.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which part of the run.
    pub part: &'static str,
    /// File system.
    pub fs: Fs,
    /// Workload.
    pub workload: &'static str,
    /// State of the files.
    pub state: &'static str,
    /// Size of the file, MiB; 0 if it is not one file.
    pub mib: u64,
    /// Round: windows of one round belong together.
    pub round: usize,
    /// `none`, or a method.
    pub method: String,
    /// Whether the writer ran under `snapshim run`.
    pub gated: bool,
    /// What was measured.
    pub window: Window,
}

/// Names of the columns of [`Row::line`].
pub const COLUMNS: &str = "part\tfs\tworkload\tstate\tmib\tround\tmethod\tgated\tstall_us\tnoise_us\t\
seconds\tcalls\tduring_per_s\tbetween_per_s\tcopies\twall_ms\twritten\tdevice\tspace\tallocated\thold_us\t\
drain_us\tguard_us\tasked\tverified\tcapture\tlooked\tinconsistent\tfailed";

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.collect();
    values.iter().fold(0.0, |sum, v| sum + v) / values.len().max(1) as f64
}

impl Row {
    /// Wall time of a copy, ms: the mean of those in the window.
    pub fn wall_ms(&self) -> f64 {
        mean(self.window.taken.iter().map(|t| t.wall.as_secs_f64() * 1e3))
    }

    /// Bytes that the method wrote for a copy, by the kernel's account of its processes; for
    /// tmpfs, which has no such account, what is allocated for the copy.
    pub fn written(&self) -> f64 {
        match self.fs {
            Fs::Tmpfs => self.window.allocated as f64,
            _ => mean(self.window.taken.iter().map(|t| t.written as f64)),
        }
    }

    /// The hold, µs.
    pub fn hold_us(&self) -> Option<f64> {
        let holds: Vec<f64> = self.window.taken.iter().filter_map(|t| t.hold_us).collect();
        (!holds.is_empty()).then(|| median(&holds))
    }

    /// Calls a second in the whole window.
    pub fn rate(&self) -> f64 {
        self.window.calls as f64 / self.window.seconds
    }

    /// One line, tab-separated.
    pub fn line(&self) -> String {
        let w = &self.window;
        let last = w.taken.last();
        let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.0}"));
        let mut line = format!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
            self.part,
            self.fs.name(),
            self.workload,
            self.state,
            self.mib,
            self.round,
            self.method,
            self.gated
        );
        let _ = write!(
            line,
            "\t{:.0}\t{:.0}\t{:.3}\t{}\t{}\t{}\t{:.0}\t{:.0}\t{}\t{:.1}\t{:.0}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
            w.stall_us,
            w.noise_us,
            w.seconds,
            w.calls,
            w.during,
            w.between,
            w.taken.len(),
            self.wall_ms(),
            self.written(),
            w.device,
            w.space,
            w.allocated,
            number(self.hold_us()),
            number(last.and_then(|t| t.drain_us)),
            number(last.and_then(|t| t.guard_us)),
            number(last.and_then(|t| t.asked)),
            last.and_then(|t| t.verified)
                .map_or("-".into(), |v| v.to_string()),
            last.map_or("-", |t| if t.capture.is_empty() {
                "-"
            } else {
                &t.capture
            }),
            w.looked,
            w.inconsistent,
            w.failed().unwrap_or("-").replace(['\t', '\n'], " "),
        );
        line
    }
}

/// Rows that belong to one line of a table.
#[derive(Clone, Debug, Default)]
pub struct Group<'a>(pub Vec<&'a Row>);

/// Which rows.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// See [`Row`].
    pub part: &'static str,
    /// See [`Row`].
    pub fs: Fs,
    /// See [`Row`].
    pub workload: &'static str,
    /// See [`Row`].
    pub state: &'static str,
    /// See [`Row`].
    pub mib: u64,
}

impl Row {
    /// The table it belongs to.
    pub fn cell(&self) -> Cell {
        Cell {
            part: self.part,
            fs: self.fs,
            workload: self.workload,
            state: self.state,
            mib: self.mib,
        }
    }
}

impl PartialEq for Cell {
    fn eq(&self, other: &Cell) -> bool {
        let key = |c: &Cell| (c.part, c.fs, c.workload, c.state, c.mib);
        key(self) == key(other)
    }
}

impl<'a> Group<'a> {
    /// The rows of a method (`none` among them) in a cell that did not fail.
    pub fn of(rows: &'a [Row], cell: Cell, method: &str, gated: bool) -> Group<'a> {
        let belongs = |r: &&Row| {
            r.cell() == cell
                && r.method == method
                && r.gated == gated
                && r.window.failed().is_none()
        };
        Group(rows.iter().filter(belongs).collect())
    }

    /// A figure of each.
    pub fn each(&self, of: impl Fn(&Row) -> f64) -> Vec<f64> {
        self.0.iter().map(|r| of(r)).collect()
    }

    /// The median of a figure.
    pub fn median(&self, of: impl Fn(&Row) -> f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| median(&self.each(of)))
    }

    /// A figure's ratio to another method's in the same round, for each round that has both.
    pub fn ratios(&self, other: &Group, of: impl Fn(&Row) -> f64) -> Vec<f64> {
        let pair = |row: &&Row| {
            let same = other.0.iter().find(|o| o.round == row.round)?;
            let base = of(same);
            (base > 0.0).then(|| of(row) / base)
        };
        self.0.iter().filter_map(pair).collect()
    }

    /// Inconsistent copies, of how many.
    pub fn inconsistent(&self) -> (usize, usize) {
        let sum = |of: fn(&Row) -> usize| self.0.iter().map(|r| of(r)).sum();
        (sum(|r| r.window.inconsistent), sum(|r| r.window.looked))
    }

    /// The window whose stall is the median.
    pub fn typical(&self) -> Option<&'a Row> {
        let mut rows = self.0.clone();
        rows.sort_by(|a, b| a.window.stall_us.total_cmp(&b.window.stall_us));
        rows.get(rows.len().saturating_sub(1) / 2).copied()
    }
}

/// One of many copies in a row.
#[derive(Clone, Debug)]
pub struct Step {
    /// File system.
    pub fs: Fs,
    /// Method.
    pub method: String,
    /// The how-manieth, from 1.
    pub number: usize,
    /// Its wall time, ms.
    pub wall_ms: f64,
    /// Its hold, µs.
    pub hold_us: Option<f64>,
    /// Bytes that the method wrote.
    pub written: u64,
    /// Extents of the live file after it.
    pub extents: Option<u64>,
}

/// Names of the columns of [`Step::line`].
pub const STEP_COLUMNS: &str = "fs\tmethod\tnumber\twall_ms\thold_us\twritten\textents";

impl Waits {
    /// Names of the columns of [`Waits::line`].
    pub const COLUMNS: &str = "fs\tmethod\twaits\ttotal_us\tp99_us\tlongest_us";

    /// One line, tab-separated.
    pub fn line(&self) -> String {
        format!(
            "{}\t{}\t{}\t{}\t{}\t{}",
            self.fs.name(),
            self.method,
            self.count,
            self.total_us,
            self.p99_us,
            self.longest_us
        )
    }
}

impl Step {
    /// One line, tab-separated.
    pub fn line(&self) -> String {
        let number = |v: Option<f64>| v.map_or_else(|| "-".into(), |v| format!("{v:.0}"));
        format!(
            "{}\t{}\t{}\t{:.1}\t{}\t{}\t{}",
            self.fs.name(),
            self.method,
            self.number,
            self.wall_ms,
            number(self.hold_us),
            self.written,
            number(self.extents.map(|e| e as f64))
        )
    }
}

/// The waits of a writer under snapshim, by the shim's own counters.
#[derive(Clone, Debug)]
pub struct Waits {
    /// File system.
    pub fs: Fs,
    /// The method, the only one that was used on this writer.
    pub method: String,
    /// How many.
    pub count: u64,
    /// Together, µs.
    pub total_us: u64,
    /// 99 in 100 did not exceed this, µs.
    pub p99_us: u64,
    /// The longest, µs.
    pub longest_us: u64,
}

/// "median (lowest … highest)" of ms given in µs.
pub fn ms_spread(us: &[f64]) -> String {
    if us.is_empty() {
        return "–".into();
    }
    let at = |p| ms(percentile(us, p));
    format!("{} ({} … {})", at(50.0), at(0.0), at(100.0))
}

/// ms of µs, with as many digits as mean something.
pub fn ms(us: f64) -> String {
    let ms = us / 1000.0;
    match ms {
        m if m >= 100.0 => format!("{m:.0}"),
        m if m >= 1.0 => format!("{m:.1}"),
        m => format!("{m:.3}"),
    }
}

/// A ratio.
pub fn times(ratio: f64) -> String {
    match ratio {
        r if r >= 100.0 => format!("{r:.0} ×"),
        r if r >= 10.0 => format!("{r:.1} ×"),
        r => format!("{r:.2} ×"),
    }
}

/// Bytes, as MiB.
pub fn mib(bytes: f64) -> String {
    let mib = bytes / f64::from(1 << 20);
    if mib >= 10.0 || mib == 0.0 {
        format!("{mib:.0}")
    } else {
        format!("{mib:.2}")
    }
}
