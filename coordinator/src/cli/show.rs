//! `snapshim show`: one snapshot and what is guaranteed of it.

use std::process::ExitCode;

use crate::store::manifest::{FileRecord, Kind, Manifest, PathName};
use crate::{Error, Result};

use super::args::ShowArgs;
use super::checkpoint::Report;
use super::table::{Cell, Table};
use super::{output, snapshots};

/// Runs the command.
pub fn run(args: &ShowArgs) -> Result<ExitCode> {
    let (name, id) = args.target.set_and_id();
    let found = snapshots::find(name, args.target.store.as_deref())?;
    let entry = found.store.find(id)?;
    let path = entry.tree();
    let manifest = entry.manifest.map_err(|cause| {
        Error::new(format!("the snapshot {} cannot be used: {cause}", entry.id))
            .next("its files may still be whole; they are not vouched for")
    })?;
    if args.output.json {
        output::json(&Report {
            manifest: &manifest,
            path: PathName(path),
            pruned: None,
        })?;
    } else {
        let tree = output::name(&path.to_string_lossy());
        output::text(&describe(&manifest, &tree))?;
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
