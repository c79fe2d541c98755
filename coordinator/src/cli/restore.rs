//! `snapshim restore`: files as a snapshot has them, elsewhere or in place.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::Result;
use crate::hold::evidence::attached_here;
use crate::hold::set::{self, Set};
use crate::interrupt;
use crate::progress::Progress;
use crate::restore::{Action, Entry, Options, Outcome, Target, What, restore, undo};
use crate::store::Snapshot;
use crate::store::manifest::{Kind, Manifest, PathName, VERSION};

use super::args::RestoreArgs;
use super::progress::Meter;
use super::table::{Cell, Table};
use super::{output, snapshots, usage};

/// How long a checkpoint of the set is waited for.
const WAIT: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Report {
    version: u32,
    set: String,
    id: String,
    /// `in-place`, or the directory.
    #[serde(serialize_with = "output::plain")]
    target: PathName,
    dry_run: bool,
    /// Of the files made, or to be made.
    bytes: u64,
    entries: Vec<Entry>,
    /// Where what was replaced is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<KeptAt>,
    /// An earlier restore that did not come to its end, as it was found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unfinished: Vec<Unfinished>,
}

#[derive(Serialize)]
struct KeptAt {
    #[serde(flatten)]
    path: PathName,
}

#[derive(Serialize)]
struct Unfinished {
    #[serde(flatten)]
    path: PathName,
    state: &'static str,
}

#[derive(Serialize)]
struct UndoReport {
    version: u32,
    id: String,
    dry_run: bool,
    /// Entries put back.
    undone: usize,
}

/// Runs the command.
pub fn run(args: &RestoreArgs) -> Result<ExitCode> {
    interrupt::note_signals();
    let options = Options {
        dry_run: args.dry_run,
        force: args.force,
        overwrite: args.overwrite,
        keep_replaced: args.keep_replaced,
    };
    if args.undo {
        return run_undo(args, &options);
    }
    let (name, id, into) = names(&args.names)?;
    let found = snapshots::find(name.as_deref(), args.store.as_deref())?;
    let snapshot = found.store.open_snapshot(found.store.find(&id)?)?;
    if into.is_some() && !args.path.is_empty() {
        return Err(usage(
            "a path is named both as ID:PATH and with --path",
            "use one of them",
        ));
    }
    let target = match &args.to {
        Some(dir) => Target::To(set::resolve(dir)?),
        None => Target::InPlace,
    };
    if let Target::To(dir) = &target
        && dir.starts_with(&found.place)
    {
        return Err(usage(
            format!("{} is inside the store", dir.display()),
            "choose another directory with --to",
        ));
    }
    let manifest = &snapshot.manifest;
    let paths: Result<Vec<PathBuf>> = args.path.iter().map(|p| named(p, manifest)).collect();
    let what = What {
        into: into.as_deref().map(|p| named(p, manifest)).transpose()?,
        paths: paths?,
    };
    if !manifest.verified {
        output::note(&format!(
            "snapshim: the snapshot {} is not verified; `snapshim show` says why",
            snapshot.id
        ));
    }
    let set = Set::open(Some(&found.set))
        .ok()
        .filter(|set| set.config.store == found.place);
    let mut meter = Meter::new(args.output.json);
    if let Some(set) = &set
        && target == Target::InPlace
    {
        note_attached(set, &mut meter);
    }
    // A checkpoint in the middle of it would have some files old and some new.
    let _lock = match &set {
        Some(set) if target == Target::InPlace && !args.dry_run => Some(set.lock(WAIT)?),
        _ => None,
    };
    let excludes = set.as_ref().map(|set| set.config.excludes.as_slice());
    let outcome = restore(
        &snapshot,
        &what,
        &target,
        excludes,
        &options,
        &mut meter,
        &mut || !interrupt::is_asked(),
    );
    meter.end();
    let outcome = outcome?;
    report(args, found.set, &snapshot, &target, outcome)?;
    Ok(ExitCode::SUCCESS)
}

fn report(
    args: &RestoreArgs,
    set: String,
    snapshot: &Snapshot,
    target: &Target,
    outcome: Outcome,
) -> Result<()> {
    let unmade = count(&outcome.entries, Action::NotMade);
    if unmade > 0 {
        output::note(&format!(
            "snapshim: {unmade} device nodes are not made: that takes root, and a store of root's own"
        ));
    }
    if args.output.json {
        let unfinished = |(path, state)| Unfinished {
            path: PathName(path),
            state,
        };
        return output::json(&Report {
            version: VERSION,
            set,
            id: snapshot.id.clone(),
            target: PathName(match target {
                Target::To(dir) => dir.clone(),
                Target::InPlace => "in-place".into(),
            }),
            dry_run: args.dry_run,
            bytes: outcome.bytes,
            entries: outcome.entries,
            kept: outcome.kept.map(|path| KeptAt {
                path: PathName(path),
            }),
            unfinished: outcome.unfinished.into_iter().map(unfinished).collect(),
        });
    }
    if args.dry_run {
        table(&outcome.entries).print()?;
    }
    let would = if args.dry_run { "would restore " } else { "" };
    let mut parts = Vec::new();
    for (action, word) in [
        (Action::Add, "added"),
        (Action::Replace, "replaced"),
        (Action::Metadata, "with other metadata"),
        (Action::Remove, "removed"),
        (Action::Unchanged, "unchanged"),
    ] {
        match count(&outcome.entries, action) {
            0 => {}
            n => parts.push(format!("{n} {word}")),
        }
    }
    if parts.is_empty() {
        parts.push("nothing to do".into());
    }
    output::note(&format!(
        "snapshim: {would}{}: {}; {} in new files",
        snapshot.id,
        parts.join(", "),
        output::size(outcome.bytes)
    ));
    if let Some(kept) = &outcome.kept {
        output::note(&format!(
            "snapshim: what was replaced is in {}; `snapshim restore --undo --path {}` puts it back",
            output::name(&kept.to_string_lossy()),
            output::name(&kept.parent().unwrap_or(kept).to_string_lossy()),
        ));
    }
    Ok(())
}

fn count(entries: &[Entry], action: Action) -> usize {
    entries.iter().filter(|e| e.action == action).count()
}

/// What is done to each entry that does not stay as it is.
fn table(entries: &[Entry]) -> Table {
    let mut table = Table::new(&["ACTION", "SIZE", "PATH"]);
    for entry in entries.iter().filter(|e| e.action != Action::Unchanged) {
        let action = match entry.action {
            Action::Add => "add",
            Action::Replace => "replace",
            Action::Remove => "remove",
            Action::Metadata => "metadata",
            Action::Unchanged => "unchanged",
            Action::NotMade => "not-made",
        };
        table.row([
            Cell::new(action),
            match entry.kind {
                Kind::File => Cell::size(entry.size),
                _ => Cell::new(""),
            },
            Cell::name(&entry.path.to_string_lossy()),
        ]);
    }
    table
}

fn run_undo(args: &RestoreArgs, options: &Options) -> Result<ExitCode> {
    let mut parents = Vec::new();
    let mut about = Vec::new();
    let mut lock = None;
    for path in &args.path {
        let path = set::resolve(path)?;
        parents.extend(path.ancestors().map(Path::to_owned));
        about.push(path);
    }
    if parents.is_empty() {
        let name =
            match args.names.as_slice() {
                [] => None,
                [name] => Some(name.to_str().ok_or_else(|| {
                    usage("that is not the name of a set", "see `snapshim status`")
                })?),
                _ => {
                    return Err(usage(
                        "--undo takes a set, and no snapshot",
                        "see `snapshim restore --help`",
                    ));
                }
            };
        let roots = match (Set::open(name), &args.store) {
            (Ok(set), None) => {
                lock = (!args.dry_run).then(|| set.lock(WAIT)).transpose()?;
                set.config.roots
            }
            // The set is long gone; its newest snapshot says what was watched.
            (_, store) => {
                let found = snapshots::find(name, store.as_deref())?;
                let manifests = found.store.list()?.into_iter().rev();
                let newest = manifests.filter_map(|entry| entry.manifest.ok()).next();
                let roots = newest.map(|manifest| manifest.roots).unwrap_or_default();
                roots.into_iter().map(|root| root.0).collect()
            }
        };
        parents = crate::restore::places(&roots);
        about = roots;
    }
    let mut meter = Meter::new(args.output.json);
    let undone = undo(&parents, &about, options, &mut meter, &mut || {
        !interrupt::is_asked()
    });
    meter.end();
    let undone = undone?;
    drop(lock);
    if args.output.json {
        output::json(&UndoReport {
            version: VERSION,
            id: undone.id,
            dry_run: args.dry_run,
            undone: undone.count,
        })?;
    } else {
        let would = if args.dry_run { "would be " } else { "" };
        output::note(&format!(
            "snapshim: {} entries that the restore of {} had replaced {would}put back",
            undone.count, undone.id
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The set, the snapshot, and the path in it.
fn names(names: &[OsString]) -> Result<(Option<String>, String, Option<PathBuf>)> {
    let text = |name: &OsStr| {
        name.to_str().map(str::to_owned).ok_or_else(|| {
            usage(
                "that is neither the name of a set nor a snapshot's id",
                "`snapshim list` shows them",
            )
        })
    };
    let (name, last) = match names {
        [name, last, ..] => (Some(text(name)?), last),
        [last] => (None, last),
        [] => return Err(usage("no snapshot is named", "`snapshim list` shows them")),
    };
    let bytes = last.as_bytes();
    let Some(colon) = bytes.iter().position(|b| *b == b':') else {
        return Ok((name, text(last)?, None));
    };
    let (id, path) = (&bytes[..colon], &bytes[colon + 1..]);
    let path = (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)));
    Ok((name, text(OsStr::from_bytes(id))?, path))
}

/// The path of the snapshot that `path` stands for: itself, or, if it is relative, below
/// the current directory, or else below the one directory that was watched.
fn named(path: &Path, manifest: &Manifest) -> Result<PathBuf> {
    let is_plain = |path: &Path| {
        path.components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
    };
    let is_there = |path: &Path| {
        let files = manifest.files.iter().map(|file| &file.path);
        let mut all = files.chain(&manifest.roots);
        all.any(|known| known.0.starts_with(path))
    };
    let mut candidates = Vec::new();
    if let Ok(absolute) = std::path::absolute(path)
        && is_plain(&absolute)
    {
        candidates.push(absolute.components().collect());
    }
    // Reached by way of symbolic links; the last component may be one that is asked for.
    let resolved = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => {
            set::resolve(parent).map(|parent| parent.join(name))
        }
        _ => set::resolve(path),
    };
    candidates.extend(resolved);
    if let ([root], true) = (manifest.roots.as_slice(), path.is_relative()) {
        let below: PathBuf = root.0.join(path).components().collect();
        if is_plain(&below) {
            candidates.push(below);
        }
    }
    let found = candidates.iter().position(|path| is_there(path));
    match candidates.into_iter().nth(found.unwrap_or(0)) {
        Some(path) => Ok(path),
        None => Err(usage(
            format!("{} cannot be a path in a snapshot", path.display()),
            "name an absolute path without '..'",
        )),
    }
}

/// Says which processes of the set run: they may open the files any moment.
fn note_attached(set: &Set, progress: &mut dyn Progress) {
    let pids = attached_here(&set.gate);
    if !pids.is_empty() {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        progress.note(&format!(
            "programs of the set {} are running ({}): they may have read what is replaced now",
            set.name,
            pids.join(", ")
        ));
    }
}
