//! `snapshim diff`: what differs between two snapshots, or between one and the live files.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;

use crate::capture::{Scope, look};
use crate::diff::patch::{self, MAX_SIZE, Patch};
use crate::diff::{self, Change, Entry, Found, Options, Side, Totals};
use crate::progress::Progress;
use crate::store::Snapshot;
use crate::store::manifest::{Kind, PathName, VERSION};
use crate::{Error, Exit, Result};

use super::args::DiffArgs;
use super::progress::Meter;
use super::snapshots::{self, Named, Snapshots};
use super::style;
use super::table::{Cell, Layout, Table};
use super::{output, usage};

/// Ranges of one file that are told; more are counted.
const KEEP_RANGES: usize = 10_000;

/// Runs the command.
pub fn run(args: &DiffArgs) -> Result<ExitCode> {
    let Asked { found, a, b } = understand(args)?;
    let snapshot = |named: Named<'_>| {
        let entry = found.store.find(named.snapshot)?;
        found.store.open_snapshot(entry)
    };
    let paths_named = a.path.into_iter().chain(b.and_then(|b| b.path));
    let a = snapshot(a)?;
    let b = b.map(snapshot).transpose()?;
    let mut progress = Meter::new(args.output.json);
    let live = match &b {
        Some(_) => None,
        None => {
            let begun = Instant::now();
            let live = look(&scope(&a, &found.place))?;
            progress.detail(&format!(
                "found {} live entries in {:.1?}",
                live.records().len(),
                begun.elapsed()
            ));
            Some(live)
        }
    };
    let side_a = Side::Snapshot(&a);
    let side_b = match (&b, &live) {
        (Some(b), _) => Side::Snapshot(b),
        (None, Some(live)) => Side::Live(live),
        (None, None) => return Err(Error::new("there is nothing to compare with")),
    };
    let options = Options {
        paths: paths_named
            .chain(args.path.iter().map(PathBuf::as_path))
            .map(|path| locate(path, &side_a, &side_b))
            .collect::<Result<_>>()?,
        keep_ranges: match args.ranges || args.output.json {
            true => KEEP_RANGES,
            false => 0,
        },
    };
    let names = (a.id.as_str(), b.as_ref().map(|b| b.id.as_str()));
    let mut view = View::new(args, &side_a, &side_b);
    let begun = Instant::now();
    let totals = diff::diff(&side_a, &side_b, &options, &mut progress, &mut |entry| {
        match entry {
            Ok(entry) => view.show(&entry)?,
            Err(error) => output::error(&format!("snapshim: {error}")),
        }
        Ok(())
    })?;
    progress.detail(&format!("compared them in {:.1?}", begun.elapsed()));
    view.finish(&found.set, names, totals)?;
    if totals.failed > 0 {
        return Err(Error::new(format!(
            "{} entries could not be compared; all others were",
            totals.failed
        )));
    }
    Ok(match args.exit_code && totals.entries() > 0 {
        true => ExitCode::from(Exit::Failure as u8),
        false => ExitCode::SUCCESS,
    })
}

/// What the names mean.
struct Asked<'a> {
    found: Snapshots,
    a: Named<'a>,
    /// `None`: the live files.
    b: Option<Named<'a>>,
}

fn understand(args: &DiffArgs) -> Result<Asked<'_>> {
    let find = |name: Option<&OsString>| {
        let name = name.map(|name| name.to_string_lossy());
        snapshots::find(name.as_deref(), args.store.as_deref())
    };
    let (name, a, b): (_, &OsStr, Option<&OsString>) = match (args.names.as_slice(), args.live) {
        ([a], _) => (None, a, None),
        ([name, a], true) => (Some(name), a, None),
        ([first, second], false) => {
            let named = Named::parse(first)?;
            // A is in the one set there is, or the first name is that of a set.
            match find(None) {
                Ok(found) if found.store.resolve(named.snapshot).is_ok() => {
                    let b = Some(Named::parse(second)?);
                    return Ok(Asked { found, a: named, b });
                }
                _ => {}
            }
            let found = find(Some(first)).map_err(|error| {
                let next = error.next.clone().unwrap_or_default();
                error.next(format!(
                    "{next}\n  {} was taken for the name of a set, as it is no snapshot that could be found without \
                     one: `snapshim diff N A B` names all three",
                    output::name(&first.to_string_lossy())
                ))
            })?;
            let a = Named::parse(second)?;
            return Ok(Asked { found, a, b: None });
        }
        ([name, a, b], false) => (Some(name), a, Some(b)),
        _ => {
            return Err(usage(
                "with --live there is no B",
                "write snapshim diff --live [N] A, or snapshim diff [N] A B",
            ));
        }
    };
    let (a, b) = (Named::parse(a)?, b.map(|b| Named::parse(b)).transpose()?);
    Ok(Asked {
        found: find(name)?,
        a,
        b,
    })
}

/// What the snapshot was taken of, as it is captured.
fn scope(snapshot: &Snapshot, store: &Path) -> Scope {
    let manifest = &snapshot.manifest;
    let paths = |names: &[PathName]| names.iter().map(|name| name.0.clone()).collect();
    let mut excludes: Vec<PathBuf> = paths(manifest.excludes.as_deref().unwrap_or_default());
    excludes.push(store.to_owned());
    Scope {
        roots: match &manifest.only {
            Some(only) => vec![only.0.clone()],
            None => paths(&manifest.roots),
        },
        excludes,
    }
}

fn locate(path: &Path, a: &Side<'_>, b: &Side<'_>) -> Result<PathBuf> {
    let known = |path: &Path| a.has(path) || b.has(path);
    snapshots::locate(path, known).ok_or_else(|| {
        let path = output::name(&path.to_string_lossy());
        Error::new(format!("neither side has {path}"))
            .next("name a file or directory under what is watched; `snapshim show ID` lists them")
    })
}

/// How what differs is shown.
struct View<'a> {
    args: &'a DiffArgs,
    a: &'a Side<'a>,
    b: &'a Side<'a>,
    layout: Layout,
    table: Table,
    entries: Vec<EntryReport>,
}

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    set: &'a str,
    a: &'a str,
    /// Null: the live files.
    b: Option<&'a str>,
    entries: Vec<EntryReport>,
    totals: TotalsReport,
}

#[derive(Serialize)]
struct EntryReport {
    #[serde(flatten)]
    path: PathName,
    change: &'static str,
    kind_a: Option<Kind>,
    kind_b: Option<Kind>,
    size_a: Option<u64>,
    size_b: Option<u64>,
    /// Offset and length.
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<Vec<(u64, u64)>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    range_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    changed_bytes: Option<u64>,
    metadata: Vec<&'static str>,
    unstable: bool,
}

#[derive(Serialize)]
struct TotalsReport {
    added: u64,
    removed: u64,
    modified: u64,
    metadata: u64,
    r#type: u64,
    changed_bytes: u64,
    failed: u64,
}

/// The word of a change in `--json`, its letter, and its style.
fn form(change: Change) -> (&'static str, &'static str, anstyle::Style) {
    match change {
        Change::Added => ("added", "+", style::GOOD),
        Change::Removed => ("removed", "-", style::BAD),
        Change::Modified => ("modified", "M", style::DOUBTFUL),
        Change::Metadata => ("metadata", "U", style::PLAIN),
        Change::Type => ("type", "T", style::DOUBTFUL),
    }
}

impl<'a> View<'a> {
    fn new(args: &'a DiffArgs, a: &'a Side<'a>, b: &'a Side<'a>) -> View<'a> {
        View {
            args,
            a,
            b,
            layout: Layout::of_stdout(),
            table: Table::default(),
            entries: Vec::new(),
        }
    }

    fn show(&mut self, entry: &Entry<'_>) -> Result<()> {
        if self.args.output.json {
            self.entries.push(report(entry));
            return Ok(());
        }
        if self.args.patch {
            return self.patch(entry);
        }
        match self.layout {
            Layout::Aligned => self.row_for_people(entry),
            Layout::Lines => self.row_for_programs(entry),
        }
        Ok(())
    }

    fn row_for_people(&mut self, entry: &Entry<'_>) {
        let (_, letter, style) = form(entry.change);
        self.table.row([
            Cell::new(letter).styled(style),
            Cell::name(&entry.path.to_string_lossy()),
            Cell::new(in_words(entry)),
        ]);
        for (offset, length) in self.ranges(entry) {
            self.table
                .row([Cell::new(""), Cell::new(format!("  {offset}+{length}"))]);
        }
    }

    fn row_for_programs(&mut self, entry: &Entry<'_>) {
        let (_, letter, style) = form(entry.change);
        let number = |number: Option<u64>| number.map_or(Cell::new(""), Cell::count);
        let content = entry.content.as_ref();
        let path = || Cell::name(&entry.path.to_string_lossy());
        self.table.row([
            Cell::new(letter).styled(style),
            path(),
            number(size(entry.a)),
            number(size(entry.b)),
            number(content.map(|content| content.count)),
            number(content.map(|content| content.bytes)),
            Cell::new(entry.metadata.join(",")),
            Cell::new(entry.a.map_or("", kind)),
            Cell::new(entry.b.map_or("", kind)),
        ]);
        for (offset, length) in self.ranges(entry) {
            self.table.row([
                Cell::new("@"),
                path(),
                Cell::count(offset),
                Cell::count(length),
            ]);
        }
    }

    fn ranges(&self, entry: &Entry<'_>) -> Vec<(u64, u64)> {
        match (&entry.content, self.args.ranges) {
            (Some(content), true) => content.ranges.clone(),
            _ => Vec::new(),
        }
    }

    /// Text as a patch; all else in a line that patch(1) passes over.
    fn patch(&self, entry: &Entry<'_>) -> Result<()> {
        let has_text = |found: Option<Found<'_>>| found.is_none_or(|f| f.record.kind == Kind::File);
        let bytes_differ = entry.content.is_some() || entry.a.is_none() || entry.b.is_none();
        let (_, letter, _) = form(entry.change);
        let line = |words: &str| {
            let path = output::name(&entry.path.to_string_lossy());
            format!("{letter} {path}: {words}\n")
        };
        if !(bytes_differ && has_text(entry.a) && has_text(entry.b)) {
            return output::text(&line(&in_words(entry)));
        }
        let side = |side: &'a Side<'a>| move |found| (side, found);
        match patch::patch(
            entry.path,
            entry.a.map(side(self.a)),
            entry.b.map(side(self.b)),
        )? {
            Patch::Text(patch) => output::bytes(&colored(patch, style::on_stdout())),
            Patch::Binary => output::text(&line(&format!("binary, {}", in_words(entry)))),
            Patch::TooLarge => output::text(&line(&format!(
                "longer than {}, {}",
                output::size(MAX_SIZE),
                in_words(entry)
            ))),
        }
    }

    fn finish(self, set: &str, (a, b): (&str, Option<&str>), totals: Totals) -> Result<()> {
        if self.args.output.json {
            return output::json(&Report {
                version: VERSION,
                set,
                a,
                b,
                entries: self.entries,
                totals: TotalsReport {
                    added: totals.added,
                    removed: totals.removed,
                    modified: totals.modified,
                    metadata: totals.metadata,
                    r#type: totals.kind,
                    changed_bytes: totals.changed_bytes,
                    failed: totals.failed,
                },
            });
        }
        self.table.print()?;
        let b = b.unwrap_or("the live files");
        if totals.entries() == 0 {
            output::note(&format!("snapshim: {a} and {b} are the same"));
        } else if self.layout == Layout::Aligned {
            output::text(&format!(
                "\n{a} to {b}: {} added, {} removed, {} changed ({}), {} with other metadata, {} of another type\n",
                totals.added,
                totals.removed,
                totals.modified,
                output::size(totals.changed_bytes),
                totals.metadata,
                totals.kind
            ))?;
        }
        Ok(())
    }
}

fn report(entry: &Entry<'_>) -> EntryReport {
    let content = entry.content.as_ref();
    EntryReport {
        path: PathName(entry.path.to_owned()),
        change: form(entry.change).0,
        kind_a: entry.a.map(|found| found.record.kind),
        kind_b: entry.b.map(|found| found.record.kind),
        size_a: size(entry.a),
        size_b: size(entry.b),
        ranges: content.map(|content| content.ranges.clone()),
        range_count: content.map(|content| content.count),
        changed_bytes: content.map(|content| content.bytes),
        metadata: entry.metadata.clone(),
        unstable: entry.is_unstable,
    }
}

/// The size of a file; nothing else has one.
fn size(found: Option<Found<'_>>) -> Option<u64> {
    let record = found?.record;
    (record.kind == Kind::File).then_some(record.size)
}

fn kind(found: Found<'_>) -> &'static str {
    match found.record.kind {
        Kind::File => "file",
        Kind::Dir => "dir",
        Kind::Symlink => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::Device => "device",
    }
}

/// How an entry differs, for people.
fn in_words(entry: &Entry<'_>) -> String {
    let one = |found: Found<'_>| match size(Some(found)) {
        Some(bytes) => output::size(bytes),
        None => kind(found).to_owned(),
    };
    let mut words = Vec::new();
    match (entry.a, entry.b) {
        (Some(a), Some(b)) if entry.change == Change::Type => {
            words.push(format!("{} → {}", kind(a), kind(b)));
        }
        (Some(a), Some(b)) => {
            if size(Some(a)) != size(Some(b)) {
                words.push(format!("{} → {}", one(a), one(b)));
            }
            if let Some(content) = &entry.content {
                let whole = size(Some(a)).max(size(Some(b))).unwrap_or(0);
                words.push(format!(
                    "{} {}, {} of {}",
                    content.count,
                    if content.count == 1 {
                        "range"
                    } else {
                        "ranges"
                    },
                    output::size(content.bytes),
                    output::size(whole)
                ));
            }
            // A file that was written to has another time.
            let told = |what: &&&str| entry.change == Change::Metadata || **what != "mtime";
            words.extend(
                entry
                    .metadata
                    .iter()
                    .filter(told)
                    .map(|what| (*what).to_owned()),
            );
        }
        (Some(found), None) | (None, Some(found)) => words.push(one(found)),
        (None, None) => {}
    }
    if entry.is_unstable {
        words.push("written to while it was compared".into());
    }
    words.join(", ")
}

/// A patch in the colours that git made usual.
fn colored(patch: Vec<u8>, is_colored: bool) -> Vec<u8> {
    if !is_colored {
        return patch;
    }
    let mut text = Vec::with_capacity(patch.len() * 2);
    for (i, line) in patch.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let style = match line.first() {
            // The names of both files come first.
            _ if i < 2 => style::HEAD,
            Some(b'+') => style::GOOD,
            Some(b'-') => style::BAD,
            Some(b'@') => style::DOUBTFUL,
            _ => style::PLAIN,
        };
        let (line, end) = match line.strip_suffix(b"\n") {
            Some(line) => (line, &b"\n"[..]),
            None => (line, &b""[..]),
        };
        let [before, after] = match style.is_plain() {
            true => [String::new(), String::new()],
            false => [style.render().to_string(), style.render_reset().to_string()],
        };
        for part in [before.as_bytes(), line, after.as_bytes(), end] {
            text.extend_from_slice(part);
        }
    }
    text
}
