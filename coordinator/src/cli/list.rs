//! `snapshim list`: the snapshots of a set.

use std::process::ExitCode;

use serde::Serialize;

use crate::Result;
use crate::store::Entry;
use crate::store::manifest::{Kind, Manifest, PathName, VERSION};

use super::args::ListArgs;
use super::table::{Cell, Table};
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
}

impl From<&Manifest> for Summary {
    fn from(manifest: &Manifest) -> Summary {
        let files = || manifest.files.iter().filter(|f| f.kind == Kind::File);
        Summary {
            time: manifest.time.clone(),
            commit_point: manifest.commit_point.clone(),
            verified: manifest.verified,
            hold_us: manifest.hold_us,
            drain_us: manifest.drain_us,
            stop_us: manifest.stop_us,
            capture: manifest.capture.clone(),
            files: files().count() as u64,
            bytes: files().fold(0, |sum, f| sum.saturating_add(f.size)),
        }
    }
}

impl From<Entry> for Line {
    fn from(entry: Entry) -> Line {
        Line {
            path: PathName(entry.tree()),
            id: entry.id,
            summary: entry.manifest.as_ref().ok().map(Summary::from),
            damage: entry.manifest.err(),
        }
    }
}

/// Runs the command.
pub fn run(args: &ListArgs) -> Result<ExitCode> {
    let found = snapshots::find(args.name.as_deref(), args.store.as_deref())?;
    let report = Report {
        version: VERSION,
        latest: found.store.latest(),
        snapshots: found.store.list()?.into_iter().map(Line::from).collect(),
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
    let mut table = Table::new(&["ID", "STATE", "FILES", "SIZE", "HELD", "CAPTURE", ""]);
    for line in &report.snapshots {
        let id = Cell::new(&line.id).styled(style::NAME);
        let latest = match report.latest.as_deref() == Some(&line.id) {
            true => "latest",
            false => "",
        };
        let row = match &line.summary {
            Some(summary) => [
                id,
                state(summary.verified),
                Cell::count(summary.files),
                Cell::size(summary.bytes),
                Cell::micros(summary.hold_us),
                Cell::name(&summary.capture),
                Cell::new(latest),
            ],
            None => [
                id,
                Cell::new("damaged").styled(style::BAD),
                Cell::new(""),
                Cell::new(""),
                Cell::new(""),
                Cell::new(""),
                Cell::name(line.damage.as_deref().unwrap_or("")),
            ],
        };
        table.row(row);
    }
    table
}

/// Whether a snapshot is verified, as a cell of a table.
fn state(verified: bool) -> Cell {
    match verified {
        true => Cell::new("verified").styled(style::GOOD),
        false => Cell::new("not verified").styled(style::DOUBTFUL),
    }
}
