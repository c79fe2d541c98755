//! Putting files back as a snapshot has them: to another place, or in place.
//!
//! | step | module | what it does |
//! |---|---|---|
//! | what | `wanted` | which entries are asked for, and where each is to be |
//! | plan | `plan`, `compare`, `look` | each compared with what is there; nothing is changed |
//! | stage | `stage`, `make`, `source`, `place` | what is new is made in a staging directory on the same file system, complete and durable |
//! | journal | `journal` | what goes where, on disk before the first is replaced |
//! | swap | `swap` | one rename for each entry, then what they were in, then all of it durable |
//! | recover | `recover` | what a run that was killed has left: seen by looking, completed or undone |
//! | busy | `busy` | who writes to the files meanwhile |
//!
//! Each entry is the old or the new one at any moment, with what it holds and its metadata: it
//! is exchanged with the staged one (`RENAME_EXCHANGE`), which then is the old one. An entry that
//! is new comes, and one that has to go leaves, by one rename too. A directory that is there and
//! is to be there stays, and gets its metadata when all is in it. What was replaced is deleted
//! when all of it is durable, or is kept.
//!
//! # Staging directories
//!
//! `.snapshim-restore`, 0700, beside what was watched if that is on the same mount and can be
//! written to, else inside it; mount points and btrfs subvolumes below have their own, since
//! nothing can be renamed from one into another. The first has the journal, the others name
//! the first. A lock (flock) keeps two restores from one another. Checkpoints leave them out.
//!
//! # What is not trusted
//!
//! The live tree may belong to somebody who changes it meanwhile: it is gone through by
//! descriptors and single names, no symbolic link is followed, and what is swapped is looked at
//! after the swap. Of a store that is not this user's own, owners, modes and set-id bits are those
//! that its owner could give to files, devices are not made, and where files are restored to
//! has to be said. A journal counts only in a directory that nobody else can enter.

mod busy;
mod compare;
mod journal;
mod look;
mod make;
mod place;
mod plan;
mod recover;
mod source;
mod stage;
mod swap;
mod wanted;

use std::path::{Path, PathBuf};

use serde::Serialize;
use snapshim_gate::table::FileId;

use crate::capture::Member;
use crate::progress::Progress;
use crate::store::Snapshot;
use crate::store::manifest::{Kind, PathName};
use crate::tree::seen::Seen;
use crate::{Error, Result};

use journal::{State, name_of};
use plan::Plan;
use source::Source;
use swap::{Standing, Swap};
use wanted::Wanted;

/// What of a snapshot is restored. Everything, if nothing is named.
#[derive(Clone, Debug, Default)]
pub struct What {
    /// A file or directory of the snapshot that stands for itself: what is in it comes
    /// directly into [`Target::To`]. Absolute, as in the live tree.
    pub into: Option<PathBuf>,
    /// Further ones, which keep their absolute paths.
    pub paths: Vec<PathBuf>,
}

/// Where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Where the files were.
    InPlace,
    /// Into this directory, which is absolute and without symbolic links.
    To(PathBuf),
}

/// How.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Also while a process has the files open for writing.
    pub force: bool,
    /// Also into a directory that is not empty.
    pub overwrite: bool,
    /// Do not delete what was replaced.
    pub keep_replaced: bool,
}

/// What is done to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It is not there.
    Add,
    /// Another is there.
    Replace,
    /// It is there and not in the snapshot.
    Remove,
    /// Only metadata differs.
    Metadata,
    /// It is as in the snapshot.
    Unchanged,
    /// A device that may not be made: not root, or not one's own store.
    NotMade,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Where it is, or is to be.
    #[serde(serialize_with = "path_of")]
    #[serde(flatten)]
    pub path: PathBuf,
    /// What it is, or is to be.
    pub kind: Kind,
    /// Bytes; 0 for anything but a file.
    pub size: u64,
    /// What is done to it.
    pub action: Action,
}

fn path_of<S: serde::Serializer>(
    path: &Path,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    PathName(path.to_owned()).serialize(serializer)
}

/// What came of a restore.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Every entry, by path.
    pub entries: Vec<Entry>,
    /// Bytes of the files made, or to be made.
    pub bytes: u64,
    /// Where what was replaced is kept.
    pub kept: Option<PathBuf>,
    /// Of a restore that did not come to its end: each of its entries, and whether it was the
    /// new one (`new`), the old one (`old`) or something else (`changed`).
    pub unfinished: Vec<(PathBuf, &'static str)>,
}

/// What is never touched.
#[derive(Debug, Default)]
pub(crate) struct Excluded {
    paths: Vec<PathBuf>,
    ids: Vec<FileId>,
    /// Whether these are all that the snapshot left out.
    is_known: bool,
}

impl Excluded {
    fn new(snapshot: &Snapshot, target: &Target, also: Option<&[PathBuf]>) -> Excluded {
        let store = snapshot.path.ancestors().nth(2).map(Path::to_owned);
        let id = |path: &PathBuf| {
            let stat = rustix::fs::lstat(path.as_path()).ok()?;
            Some(Seen::of(&stat).id)
        };
        if *target != Target::InPlace {
            return Excluded {
                ids: store.iter().filter_map(id).collect(),
                paths: Vec::new(),
                is_known: true,
            };
        }
        let named = snapshot.manifest.excludes.as_deref();
        let paths = named.into_iter().flatten().map(|name| name.0.clone());
        Excluded {
            ids: store.iter().filter_map(id).collect(),
            paths: paths
                .chain(also.into_iter().flatten().cloned())
                .chain(store)
                .collect(),
            is_known: named.is_some() || also.is_some(),
        }
    }

    fn has(&self, path: &Path) -> bool {
        self.paths.iter().any(|excluded| path.starts_with(excluded))
    }

    fn is(&self, id: FileId) -> bool {
        self.ids.contains(&id)
    }

    /// Whether something that is there below `path` is excluded.
    fn is_below(&self, path: &Path) -> bool {
        let below = |excluded: &&PathBuf| excluded.starts_with(path) && excluded.as_path() != path;
        let mut below = self.paths.iter().filter(below);
        below.any(|excluded| rustix::fs::lstat(excluded.as_path()).is_ok())
    }
}

/// Restores what is asked for. `excludes` is what the set leaves out, if it is known.
/// `go_on` is asked between entries and chunks of files: if it says no, nothing was
/// replaced, or each entry is the old or the new one, and the error says so.
///
/// # Errors
///
/// Something asked for is not in the snapshot, or the snapshot is damaged; something is in
/// the way, or a process writes to the files; there is no room or no right; an earlier
/// restore of something else did not come to its end. Nothing was replaced then, unless
/// the message says so.
pub fn restore(
    snapshot: &Snapshot,
    what: &What,
    target: &Target,
    excludes: Option<&[PathBuf]>,
    options: &Options,
    progress: &mut dyn Progress,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Outcome> {
    if !snapshot.is_own
        && *target == Target::InPlace
        && what.into.is_none()
        && what.paths.is_empty()
    {
        return Err(Error::new(format!(
            "the snapshot {} belongs to another user: where its files go is his to say",
            snapshot.id
        ))
        .next("name what to restore, as ID:PATH or with --path, or restore to another place with --to"));
    }
    let source = Source::new(snapshot)?;
    let wanted = Wanted::new(snapshot, what, target)?;
    let excluded = Excluded::new(snapshot, target, excludes);
    let mut outcome = Outcome::default();
    let mut parents: Vec<PathBuf> = wanted.bases.iter().map(|base| base.path.clone()).collect();
    if *target == Target::InPlace {
        parents.extend(snapshot.manifest.roots.iter().map(|root| root.0.clone()));
    }
    let mut completed = false;
    if let Some(found) = recover::find(&parents, options.dry_run)? {
        outcome.unfinished = standings(&found);
        let kept = found.places[0].path.clone();
        let keep = found.journal.keep;
        completed = go_on_with(found, snapshot, target, options, progress, go_on)?;
        if completed && keep {
            outcome.kept = Some(kept);
            return Ok(outcome);
        }
    }
    let arrival = arrive(target, options, completed)?;
    if arrival.is_absent {
        outcome.entries = all_new(&source, &wanted);
        outcome.bytes = outcome.entries.iter().map(|entry| entry.size).sum();
        return Ok(outcome);
    }
    let result = plan::Maker {
        source: &source,
        wanted: &wanted,
        target,
        excluded: &excluded,
        may_overwrite: *target == Target::InPlace || options.overwrite || completed,
        is_fresh: arrival.is_fresh,
        progress,
        go_on,
    }
    .make()
    .and_then(|plan| carry_out(plan, &source, &wanted, target, options, progress, go_on));
    match (result, target) {
        (Ok(done), _) => Ok(Outcome {
            unfinished: outcome.unfinished,
            ..done
        }),
        (Err(cause), Target::To(dir)) if arrival.is_made => {
            // If something is in it, it stays.
            let _ = std::fs::remove_dir(dir);
            Err(cause)
        }
        (Err(cause), _) => Err(cause),
    }
}

fn carry_out(
    plan: Plan,
    source: &Source<'_>,
    wanted: &Wanted,
    target: &Target,
    options: &Options,
    progress: &mut dyn Progress,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Outcome> {
    for note in &plan.notes {
        progress.note(note);
    }
    let mut outcome = Outcome {
        bytes: plan.bytes,
        ..Outcome::default()
    };
    let is_needed = !plan.ops.is_empty() || plan.touched.values().any(|touched| touched.differs);
    if options.dry_run || !is_needed {
        outcome.entries = plan.entries;
        return Ok(outcome);
    }
    if !options.force {
        busy::refuse_writers(&plan.members)?;
    }
    let mut swap = stage::stage(&plan, source, wanted, target, options, progress, go_on)?;
    // Making all that may have taken long.
    let begun = match options.force {
        true => Ok(()),
        false => busy::refuse_writers(&plan.members),
    };
    let begun = begun.and_then(|()| match go_on() {
        true => swap.note(State::Swapping),
        false => Err(Error::new("interrupted; nothing was replaced")),
    });
    if let Err(cause) = begun {
        let _ = swap.discard();
        return Err(cause);
    }
    swap.forward(progress, go_on)?;
    if options.keep_replaced {
        outcome.kept = Some(swap.places[0].path.clone());
    }
    swap.finish(options.keep_replaced)?;
    outcome.entries = plan.entries;
    Ok(outcome)
}

/// Deals with an earlier restore that did not come to its end; whether it was completed.
fn go_on_with(
    mut found: Swap,
    snapshot: &Snapshot,
    target: &Target,
    options: &Options,
    progress: &mut dyn Progress,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<bool> {
    let what = found.journal.describe();
    match found.journal.state {
        State::Staging => {
            progress.note(&format!(
                "{what}, had not replaced anything yet; what it had made is removed"
            ));
            if !options.dry_run {
                found.discard()?;
            }
            return Ok(false);
        }
        State::Done => {
            progress.note(&format!(
                "{what}, was complete; what it replaced is removed"
            ));
            if !options.dry_run {
                found.finish(false)?;
            }
            return Ok(false);
        }
        State::Swapping | State::Kept | State::Undoing => {}
    }
    for line in recover::account(&found) {
        progress.note(&line);
    }
    let roots: Vec<PathBuf> = snapshot
        .manifest
        .roots
        .iter()
        .map(|r| r.0.clone())
        .collect();
    let is_same = found.journal.id == snapshot.id
        && (*target != Target::InPlace || found.journal.is_about(&roots))
        && match (&found.journal.to, target) {
            (None, Target::InPlace) => true,
            (Some(dir), Target::To(other)) => dir.0 == *other,
            _ => false,
        };
    let undo = format!(
        "`snapshim restore --undo --path {}`",
        found.places[0].parent.display()
    );
    if options.dry_run {
        return Ok(is_same && found.journal.state == State::Swapping);
    }
    let place = found.places[0].path.display();
    match found.journal.state {
        State::Kept => Err(Error::new(format!("{place} keeps what {what}, replaced"))
            .next(format!("put it back with {undo}, or remove {place}"))),
        State::Undoing => Err(Error::new(format!("{what}, was being undone"))
            .next(format!("complete that with {undo}"))),
        _ if !is_same => Err(
            Error::new(format!("{what}, did not come to its end")).next(format!(
                "complete it by running it again, or put back what it replaced with {undo}"
            )),
        ),
        _ => {
            if !options.force {
                busy::refuse_writers(&members(&found))?;
            }
            found.forward(progress, go_on)?;
            let keep = found.journal.keep;
            found.finish(keep)?;
            progress.note(&format!("{what}, is complete now"));
            Ok(true)
        }
    }
}

/// What came of putting back.
#[derive(Debug)]
pub struct Undone {
    /// The snapshot that had been restored.
    pub id: String,
    /// Entries put back.
    pub count: usize,
}

/// Puts back what a restore has replaced, also one that is complete, if it kept that. It is
/// found by one of `parents`, directories beside what was restored or in it, and is one
/// of something in `about`.
///
/// # Errors
///
/// There is none; a process writes to the files; something was changed since, unless
/// `options.force`.
pub fn undo(
    parents: &[PathBuf],
    about: &[PathBuf],
    options: &Options,
    progress: &mut dyn Progress,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Undone> {
    let mut of_others = None;
    let mut found = None;
    for parent in parents {
        match recover::find(std::slice::from_ref(parent), options.dry_run)? {
            // One beside what is meant may be of something else there.
            Some(swap) if !swap.journal.is_about(about) => of_others = Some(swap.journal),
            Some(swap) => {
                found = Some(swap);
                break;
            }
            None => {}
        }
    }
    let Some(mut found) = found else {
        if let Some(journal) = of_others {
            let place = &journal.places[0].parent.0;
            return Err(Error::new(format!(
                "{}, is of other files: of {}",
                journal.describe(),
                journal.first().display()
            ))
            .next(format!(
                "to undo that one, run `snapshim restore --undo --path {}`",
                place.display()
            )));
        }
        return Err(Error::new("there is no restore to undo").next(
            "what was replaced is kept only with --keep-replaced; name what was restored with --path",
        ));
    };
    let what = found.journal.describe();
    let id = found.journal.id.clone();
    match found.journal.state {
        State::Staging => {
            progress.note(&format!("{what}, had not replaced anything yet"));
            if !options.dry_run {
                found.discard()?;
            }
            return Ok(Undone { id, count: 0 });
        }
        State::Done => {
            return Err(
                Error::new(format!("{what}, is complete: what it replaced is gone"))
                    .next("the next restore removes what is left of it"),
            );
        }
        State::Swapping | State::Kept | State::Undoing => {}
    }
    for line in recover::account(&found) {
        progress.note(&line);
    }
    if options.dry_run {
        let (count, _, _) = found.count();
        return Ok(Undone { id, count });
    }
    if !options.force {
        busy::refuse_writers(&members(&found))?;
    }
    found.settle()?;
    if let Err(cause) = found.note(State::Undoing) {
        // On a full file system, undoing may be what makes room. Killed in the middle of it, this
        // is a restore that did not come to its end, or was kept, as before.
        progress.note(&format!("{cause}; going on without"));
    }
    let undone = found.backward(options.force, progress, go_on)?;
    if let Some(first) = undone.changed.first() {
        let path = found.journal.path(&found.journal.ops[*first]);
        return Err(Error::new(format!(
            "{} entries were put back, but {} that were changed since were not, {} first",
            undone.count,
            undone.changed.len(),
            path.display()
        ))
        .next(format!(
            "what they were is in {}; --force puts that back as well",
            found.places[0].path.display()
        )));
    }
    found.finish(false)?;
    Ok(Undone {
        id,
        count: undone.count,
    })
}

/// The directories in which a restore of these watched paths may have its staging directory.
pub fn places(roots: &[PathBuf]) -> Vec<PathBuf> {
    let beside = roots.iter().filter_map(|root| root.parent());
    beside
        .map(Path::to_owned)
        .chain(roots.iter().cloned())
        .collect()
}

/// Of a restore of these watched paths that did not come to its end: one line.
pub fn unfinished(roots: &[PathBuf]) -> Option<String> {
    let found = recover::find(&places(roots), true).ok()??;
    if !found.journal.is_about(roots) {
        return None;
    }
    match found.journal.state {
        State::Staging | State::Done => None,
        _ => recover::account(&found).into_iter().next(),
    }
}

fn standings(found: &Swap) -> Vec<(PathBuf, &'static str)> {
    if matches!(found.journal.state, State::Staging | State::Done) {
        return Vec::new();
    }
    let each = found.journal.ops.iter().map(|op| {
        let word = match found.standing(op) {
            Standing::New => "new",
            Standing::Old => "old",
            Standing::Changed => "changed",
        };
        (found.journal.path(op), word)
    });
    each.collect()
}

/// The regular files at the places a restore is about.
fn members(found: &Swap) -> Vec<Member> {
    let member = |op| {
        let path = found.journal.path(op);
        let dir = look::open_dir(path.parent()?).ok()?;
        let look = look::look(dir, &name_of(&path)).ok()??;
        (look.seen.kind() == Kind::File).then_some(Member {
            path,
            id: look.seen.id,
        })
    };
    found.journal.ops.iter().filter_map(member).collect()
}

/// The directory restored to.
#[derive(Debug, Default)]
struct Arrival {
    /// It was made for this.
    is_made: bool,
    /// It was made for this, or is empty.
    is_fresh: bool,
    /// It would be made, if this were not only to be said.
    is_absent: bool,
}

fn arrive(target: &Target, options: &Options, completed: bool) -> Result<Arrival> {
    let Target::To(dir) = target else {
        return Ok(Arrival::default());
    };
    let failed = |what: &str, cause: std::io::Error| {
        Error::new(format!("cannot {what} {}: {cause}", dir.display()))
            .next("choose another directory with --to")
    };
    match std::fs::read_dir(dir) {
        Ok(mut entries) => {
            let staging = place::staging().as_os_str();
            let is_fresh = entries.all(|entry| entry.is_ok_and(|e| e.file_name() == staging));
            if !is_fresh && !options.overwrite && !completed {
                return Err(Error::new(format!("{} is not empty", dir.display())).next(
                    "choose an empty directory or a new one, or pass --overwrite to replace what is in the way",
                ));
            }
            Ok(Arrival {
                is_fresh,
                ..Arrival::default()
            })
        }
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            if options.dry_run {
                return Ok(Arrival {
                    is_absent: true,
                    ..Arrival::default()
                });
            }
            std::fs::create_dir_all(dir).map_err(|cause| failed("make", cause))?;
            Ok(Arrival {
                is_made: true,
                is_fresh: true,
                is_absent: false,
            })
        }
        Err(cause) => Err(failed("read", cause)),
    }
}

/// The entries of a restore to where nothing is.
fn all_new(source: &Source<'_>, wanted: &Wanted) -> Vec<Entry> {
    let can_make_devices = source.snapshot.is_own && make::is_root();
    let entry = |item| {
        let record = wanted.record(source.snapshot, item);
        let kind = record.map_or(Kind::Dir, |record| record.kind);
        Entry {
            path: wanted.path(item),
            kind,
            size: record.map_or(0, |record| record.size),
            action: match kind == Kind::Device && !can_make_devices {
                true => Action::NotMade,
                false => Action::Add,
            },
        }
    };
    let mut entries: Vec<Entry> = (0..wanted.items.len()).map(entry).collect();
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    entries
}
