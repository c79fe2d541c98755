//! `snapshim list`: the snapshots of a set.

use std::process::ExitCode;

use serde::Serialize;

use crate::Result;
use crate::store::manifest::{PathName, Pin, VERSION};
use crate::store::{Head, Listed};

use super::args::ListArgs;
use super::table::{Cell, Layout, Table};
use super::{output, snapshots, style};

#[derive(Serialize)]
struct Report {
    version: u32,
    set: String,
    #[serde(serialize_with = "output::plain")]
    store: PathName,
    latest: Option<String>,
    snapshots: Vec<Line>,
}

/// One snapshot; of a damaged one, what is wrong with it.
#[derive(Serialize)]
struct Line {
    id: String,
    #[serde(flatten)]
    path: PathName,
    #[serde(flatten)]
    summary: Option<Summary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

#[derive(Serialize)]
struct Summary {
    time: String,
    commit_point: String,
    verified: bool,
    hold_us: u64,
    drain_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_us: Option<u64>,
    capture: String,
    files: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pin: Option<Pin>,
}

impl From<Head> for Summary {
    fn from(head: Head) -> Summary {
        Summary {
            time: head.time,
            commit_point: head.commit_point,
            verified: head.verified,
            hold_us: head.hold_us,
            drain_us: head.drain_us,
            stop_us: head.stop_us,
            capture: head.capture,
            files: head.totals.files,
            bytes: head.totals.bytes,
            pin: head.pin,
        }
    }
}

/// Runs the command.
pub fn run(args: &ListArgs) -> Result<ExitCode> {
    let found = snapshots::find(args.name.as_deref(), args.store.as_deref())?;
    let line = |Listed { id, head }| {
        let (summary, damage) = match head {
            Ok(head) => (Some(Summary::from(head)), None),
            Err(damage) => (None, Some(damage)),
        };
        Line {
            path: PathName(found.store.tree_of(&id)),
            id,
            summary,
            damage,
        }
    };
    let report = Report {
        version: VERSION,
        latest: found.store.latest(),
        snapshots: found.store.heads()?.into_iter().map(line).collect(),
        set: found.set,
        store: PathName(found.place),
    };
    if args.output.json {
        output::json(&report)?;
    } else if report.snapshots.is_empty() {
        output::note(&format!(
            "snapshim: the set {} has no snapshots yet",
            report.set
        ));
    } else {
        table(&report).print()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(report: &Report) -> Table {
    let mut head = vec!["ID", "STATE", "FILES", "SIZE", "HELD", "CAPTURE", ""];
    let pin = |line: &Line| Some(pin_mark(line.summary.as_ref()?.pin.as_ref()?));
    // People are spared an empty column; programs count on it.
    let has_pins = Layout::of_stdout() == Layout::Lines
        || report.snapshots.iter().any(|line| pin(line).is_some());
    if has_pins {
        head.push("PIN");
    }
    let mut table = Table::new(&head);
    for line in &report.snapshots {
        let id = Cell::new(&line.id).styled(style::NAME);
        let latest = match report.latest.as_deref() == Some(&line.id) {
            true => "latest",
            false => "",
        };
        let mut row = match &line.summary {
            Some(summary) => vec![
                id,
                state(summary.verified),
                Cell::count(summary.files),
                Cell::size(summary.bytes),
                Cell::micros(summary.hold_us),
                Cell::name(&summary.capture),
                Cell::new(latest),
            ],
            None => vec![
                id,
                Cell::new("damaged").styled(style::BAD),
                Cell::new(""),
                Cell::new(""),
                Cell::new(""),
                Cell::new(""),
                Cell::name(line.damage.as_deref().unwrap_or("")),
            ],
        };
        if has_pins {
            row.push(Cell::new(pin(line).unwrap_or_default()));
        }
        table.row(row);
    }
    table
}

/// That a snapshot is pinned, with the note.
pub(super) fn pin_mark(pin: &Pin) -> String {
    match pin.note.as_str() {
        "" => "pinned".into(),
        note => format!("pinned: {}", output::name(note)),
    }
}

/// Whether a snapshot is verified, as a cell of a table.
pub(super) fn state(verified: bool) -> Cell {
    match verified {
        true => Cell::new("verified").styled(style::GOOD),
        false => Cell::new("not verified").styled(style::DOUBTFUL),
    }
}
