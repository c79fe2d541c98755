//! `snapshim show`: one snapshot and what is guaranteed of it, or one of its files.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::store::Snapshot;
use crate::store::manifest::{FileRecord, Kind, Manifest, PathName, VERSION};
use crate::{Error, Result};

use super::args::ShowArgs;
use super::checkpoint::Report;
use super::snapshots::Named;
use super::table::{Cell, Table};
use super::{forecast, output, snapshots};

/// Runs the command.
pub fn run(args: &ShowArgs) -> Result<ExitCode> {
    let (name, wanted) = match args.names.as_slice() {
        [name, wanted, ..] => (Some(name), wanted.as_os_str()),
        [wanted] => (None, wanted.as_os_str()),
        [] => (None, OsStr::new("")),
    };
    let name = name.map(|name| name.to_string_lossy());
    let named = Named::parse(wanted)?;
    let found = snapshots::find(name.as_deref(), args.store.as_deref())?;
    let snapshot = found
        .store
        .open_snapshot(found.store.find(named.snapshot)?)?;
    if let Some(path) = named.path {
        return inside(&snapshot, path, args.output.json);
    }
    let manifest = &snapshot.manifest;
    if args.output.json {
        output::json(&Report {
            manifest,
            path: PathName(snapshot.tree()),
            pruned: None,
        })?;
    } else {
        let tree = output::name(&snapshot.tree().to_string_lossy());
        output::text(&describe(manifest, &tree))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What `--json` says of one path in a snapshot.
#[derive(Serialize)]
struct Inside<'a> {
    version: u32,
    id: &'a str,
    set: &'a str,
    /// The tree, as in the snapshot's own object.
    #[serde(flatten)]
    path: PathName,
    files: Vec<&'a FileRecord>,
}

/// One path: a file's bytes, a directory's entries, a link's target.
fn inside(snapshot: &Snapshot, path: &Path, json: bool) -> Result<ExitCode> {
    let files = &snapshot.manifest.files;
    let has = |path: &Path| files.iter().any(|f| f.path.as_ref().starts_with(path));
    let Some(path) = snapshots::locate(path, has) else {
        let roots: Vec<String> = snapshot.manifest.roots.iter().map(self::path).collect();
        let path = output::name(&path.to_string_lossy());
        return Err(
            Error::new(format!("the snapshot {} has no {path}", snapshot.id))
                .next(format!("it is of {}", roots.join(", "))),
        );
    };
    let record = files.iter().find(|file| file.path.as_ref() == path);
    let listed: Vec<&FileRecord> = match record {
        Some(record) if record.kind != Kind::Dir => vec![record],
        Some(_) => files
            .iter()
            .filter(|file| file.path.as_ref().parent() == Some(&path))
            .collect(),
        // Above what was watched: what is below it.
        None => {
            let roots: Vec<&Path> = snapshot.manifest.roots.iter().map(AsRef::as_ref).collect();
            files
                .iter()
                .filter(|file| roots.contains(&file.path.as_ref()))
                .filter(|file| file.path.as_ref().starts_with(&path))
                .collect()
        }
    };
    if json {
        output::json(&Inside {
            version: VERSION,
            id: &snapshot.id,
            set: &snapshot.manifest.set,
            path: PathName(snapshot.tree()),
            files: listed,
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    match record {
        Some(file) if file.kind == Kind::File => {
            let (open, _) = snapshot.open_file(file)?;
            let place = snapshot.place_of(&path);
            output::stream(open.into(), &place)?;
        }
        Some(FileRecord {
            kind: Kind::Symlink,
            target: Some(target),
            ..
        }) => {
            let mut line = target.0.as_os_str().as_bytes().to_vec();
            line.push(b'\n');
            output::bytes(&line)?;
        }
        _ => entries(listed).print()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(manifest: &Manifest, tree: &str) -> String {
    let mut rows = Vec::new();
    let mut row = |label: &str, value: String| rows.push(vec![label.to_owned(), value]);
    row("snapshot", manifest.id.clone());
    row("set", output::name(&manifest.set));
    row("files", tree.to_owned());
    row("cut at", output::name(&manifest.time));
    row("commit point", output::name(&manifest.commit_point));
    row("state", output::state(manifest.verified));
    if let Some(pin) = &manifest.pin {
        let since = output::name(&pin.time);
        row(
            "pinned",
            format!("since {since}  {}", output::name(&pin.note)),
        );
    }
    for reason in &manifest.reasons {
        row(
            "",
            format!(
                "{}: {}",
                output::name(&reason.code),
                output::name(&reason.text)
            ),
        );
    }
    for check in &manifest.checks {
        let what = check.command.as_deref().unwrap_or(&check.kind);
        let (time, state) = (output::name(&check.time), check.passed);
        let state = if state { "passed" } else { "failed" };
        row("checked", format!("{state} {time}  {}", output::name(what)));
    }
    for assumption in &manifest.assumptions {
        row("assumes", output::name(assumption));
    }
    row(
        "held",
        format!(
            "{} (drained in {})",
            output::micros(manifest.hold_us),
            output::micros(manifest.drain_us)
        ),
    );
    if let Some(stop) = manifest.stop_us {
        row("stopped", format!("{} from outside", output::micros(stop)));
    }
    row("capture", output::name(&manifest.capture));
    if let Some(prediction) = &manifest.prediction {
        rows.extend(forecast::rows_of(prediction));
    }
    let mut row = |label: &str, value: String| rows.push(vec![label.to_owned(), value]);
    for root in &manifest.roots {
        row("watched", path(root));
    }
    for writer in &manifest.writers {
        let (name, layer) = (output::name(&writer.name), output::name(&writer.layer));
        row(
            "writer",
            format!(
                "{} {name} ({} threads, held by {layer})",
                writer.pid, writer.threads
            ),
        );
    }
    for foreign in &manifest.foreign {
        let (name, how) = (output::name(&foreign.name), output::name(&foreign.how));
        row(
            "foreign",
            format!(
                "{} {name}: {} ({how}{})",
                foreign.pid,
                path(&foreign.path),
                foreign
                    .held_by
                    .as_deref()
                    .map_or(String::new(), |l| format!(", held by {}", output::name(l)))
            ),
        );
    }
    let mut text = output::table(&rows);
    text.push('\n');
    text.push_str(&entries(&manifest.files).to_text());
    text
}

/// What a snapshot holds, a row each.
fn entries<'a>(files: impl IntoIterator<Item = &'a FileRecord>) -> Table {
    let mut table = Table::new(&["MODE", "OWNER", "SIZE", "CAPTURE", "PATH", ""]);
    for file in files {
        let kind = match file.kind {
            Kind::File => '-',
            Kind::Dir => 'd',
            Kind::Symlink => 'l',
            Kind::Fifo => 'p',
            Kind::Socket => 's',
            Kind::Device => 'b',
        };
        let target = file
            .target
            .as_ref()
            .map_or(String::new(), |target| format!("-> {}", path(target)));
        table.row([
            Cell::new(format!("{kind}{:04o}", file.mode & 0o7777)),
            Cell::new(format!("{}:{}", file.uid, file.gid)),
            match file.kind {
                Kind::File => Cell::size(file.size),
                _ => Cell::new(""),
            },
            Cell::name(file.capture.as_deref().unwrap_or("")),
            Cell::new(path(&file.path)),
            Cell::new(target),
        ]);
    }
    table
}

fn path(name: &PathName) -> String {
    output::name(&name.0.to_string_lossy())
}
