//! Copying the members of a set while its gate is shut.
//!
//! Three steps, and what each is for:
//!
//! | step | gate | what it does |
//! |---|---|---|
//! | [`prepare_after`] | open | walks the roots, finds out how each file system can be captured, makes empty files to clone into, or further names of copies of the previous snapshot, flushes ahead |
//! | [`Prepared::rehearse`] | open | all of that once more, with the files open, for a capture after the cut |
//! | [`Prepared::capture`] | shut | walks again; bytes, metadata, link targets, extended attributes |
//! | [`Captured::finish`] | open again | links, owners, modes, times into the tree; makes all of it durable |
//!
//! On btrfs the second may be one snapshot of the subvolume instead, from which the bytes are
//! cloned when the gate is open again ([`Prepared::take`], [`Frozen::read`]).
//!
//! Between the last two, still under the hold, [`Captured::moved`] looks for evidence
//! against the cut: anything that changed although it was held.
//!
//! A walk goes by directory descriptors and single names, and follows no symbolic
//! link: a name swapped meanwhile cannot lead it out of a root. What is captured is
//! what was opened, whatever its name leads to by then.
//!
//! # What a tree carries
//!
//! Regular files with holes, directories, symbolic links, FIFOs; hard links between captured
//! names, whatever they are; owners, modes, modification times; extended attributes, among
//! them ACLs. Sockets and device nodes are recorded, not made, and their attributes are not.
//! Owners that the capturing user may not give away are in the manifest only, and a
//! set-id bit is then left off; so are attributes only a privileged process may set
//! (`security.*`, `trusted.*`). Access times and inode flags (`chattr`) are not carried.

mod ahead;
mod base;
pub mod delta;
mod descriptors;
mod finish;
mod flush;
mod look;
mod mounted;
mod moved;
mod parts;
pub mod predict;
mod prepare;
mod record;
mod refresh;
mod rehearse;
mod subvolume;
mod sweep;
#[cfg(test)]
mod tests;
mod tracker;
mod walk;

use std::path::{Path, PathBuf};

use snapshim_gate::table::FileId;

use crate::Result;
use crate::digest::InMemory;
use crate::store::manifest::{FileRecord, Mounted};
use crate::store::prediction::Prediction;
use crate::tally::Tally;
use crate::tree::dirs;

pub use base::Base;
pub(crate) use descriptors::make_table;
pub use look::{Live, look};
pub use moved::Moved;
pub use rehearse::Rehearsed;
pub use subvolume::Frozen;
pub use sweep::Swept;

/// What is captured.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Absolute paths of files and directories. One that is absent may appear later
    /// and is nothing until then. Symbolic links above the last component are
    /// followed; a root that is one itself is an error.
    pub roots: Vec<PathBuf>,
    /// Absolute paths, component by component; these and all below them are left
    /// out. A directory is also known by its identity, in case another path leads to it.
    pub excludes: Vec<PathBuf>,
}

/// How bytes are captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// Reflink where the file system can, else copy; but never a copy to another file
    /// system, which would be a surprise under a hold. Of very many files on btrfs, a
    /// snapshot of the subvolume, if that can be made. After the cut, where that is expected to
    /// take long or would break up a file ([`predict`]).
    Auto,
    /// `FICLONE`: the file's extents are shared with the clone.
    Reflink,
    /// The bytes are read and written.
    Copy,
    /// The bytes are read and written after the cut, while programs run; what one is about to
    /// change is read before. Needs programs that the gate holds.
    CopyBeforeWrite,
    /// One snapshot of the btrfs subvolume under the hold, and clones of that after it.
    Subvolume,
}

/// A regular file under the roots.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// Absolute.
    pub path: PathBuf,
    /// What `fstat` says of it.
    pub id: FileId,
}

/// Ready for the hold; see [`prepare`].
#[derive(Debug)]
pub struct Prepared {
    scope: walk::Paths,
    scan: prepare::Scan,
    plan: prepare::Plan,
    target: record::Target,
    ahead: ahead::Ahead,
    /// Whether it can be captured after the cut: see [`Prepared::rehearse`].
    guard: bool,
    prediction: Prediction,
    /// Where everything is mounted.
    mounted: Option<Mounted>,
    /// Whether subvolumes are to be frozen.
    subvolumes: Option<subvolume::Plan>,
    /// What unchanged files are shared with.
    base: Option<Base>,
    /// What calls have marked, if they do.
    bases: Option<delta::Bases>,
    /// Whether what goes through memory is hashed.
    digests: bool,
}

/// What a hold brought.
#[derive(Debug)]
pub enum Taken {
    /// Everything.
    Captured(Box<Captured>),
    /// Frozen subvolumes, to be read when nobody waits any more.
    Frozen(Box<Frozen>),
}

/// Everything read; see [`Prepared::capture`].
#[derive(Debug)]
pub struct Captured {
    source: dirs::Dirs,
    target: record::Target,
    ahead: ahead::Ahead,
    entries: Vec<record::Entry>,
    /// Names that were gone when they were looked at.
    vanished: Vec<PathBuf>,
    absent_roots: Vec<PathBuf>,
    /// How the capture after the cut went, if there was one, and what changed meanwhile without
    /// having asked.
    swept: Option<Swept>,
    /// What came of marks.
    delta: Option<delta::Outcome>,
    /// What is known of the files' digests.
    digests: InMemory,
    moved_unasked: Vec<Moved>,
    /// It was read from frozen subvolumes.
    is_subvolume: bool,
    /// What unchanged files are shared with.
    base: Option<Base>,
}

/// Gets ready for capturing `scope` into the directory `tree`, which exists and is empty.
///
/// Walks the roots and finds the members and their devices; tries whether those of each can be cloned into `tree`,
/// with a small one only where none of the tree's own tells the same; opens every member, so that one
/// that cannot be read is found before anything is held; makes the directories and empty
/// files of the tree; and flushes ahead.
///
/// Flushing is `sync_file_range` over each member, waiting for the writes:
/// it starts and awaits writeback of dirty pages but commits no journal and flushes no disk
/// cache (sync_file_range(2)). `FICLONE` writes back what is dirty itself, under the
/// inode's lock, so what is written back here is not waited for under the hold.
/// Where there are no clones, or none are wanted, files are read ahead instead, into an eighth of the memory to spare
/// at most. A set that is to be captured after the cut even if nothing else than small files that are being written
/// to is dirty then is neither flushed nor read.
///
/// # Errors
///
/// A path that is not absolute, contains `..` or is `/`; a root that is a symbolic link;
/// a member or directory that cannot be read, or not be written back; a store on another file system than a
/// member unless `method` is [`Method::Copy`]; [`Method::Reflink`] where the file system has none.
pub fn prepare(scope: &Scope, tree: &Path, method: Method) -> Result<Prepared> {
    prepare_after(scope, tree, method, &mut || None, &Tally::default())
}

/// The same, but files that have not changed since `base`, which is asked for once the files are known,
/// become further names of its copies; and in `tally` it can be seen from then on how far it is.
///
/// # Errors
///
/// As [`prepare`].
pub fn prepare_after(
    scope: &Scope,
    tree: &Path,
    method: Method,
    base: &mut dyn FnMut() -> Option<Base>,
    tally: &Tally,
) -> Result<Prepared> {
    prepare::prepare(scope, tree, method, base, tally)
}

impl Prepared {
    /// `st_dev` of every file and directory found under the roots, and of the directory
    /// an absent root would appear in; sorted. btrfs subvolumes have their own.
    pub fn devices(&self) -> Vec<u64> {
        self.scan.devices.iter().copied().collect()
    }

    /// What capturing is expected to take, by each method, and which was chosen.
    pub fn prediction(&self) -> &Prediction {
        &self.prediction
    }

    /// Builds on an earlier snapshot, if it is captured after the cut and calls mark what they change.
    #[must_use]
    pub fn with_bases(self, bases: Option<delta::Bases>) -> Prepared {
        Prepared { bases, ..self }
    }

    /// Hashes what is captured after the cut and written around the page cache, while it is in memory:
    /// see [`Taken::take_digests`].
    #[must_use]
    pub fn with_digests(self, digests: bool) -> Prepared {
        Prepared { digests, ..self }
    }

    /// Where what was found is mounted; `None` if that is not known.
    pub fn mounted(&self) -> Option<&Mounted> {
        self.mounted.as_ref()
    }

    /// The regular files under the roots, as found before the hold.
    pub fn members(&self) -> Vec<Member> {
        self.scan.members()
    }

    /// Captures everything as it is now. To be called under the hold.
    ///
    /// `go_on` is asked before each entry is recorded and each chunk of a copy; a `FICLONE` cannot be
    /// interrupted, nor the look at some thousand names. Names that vanish meanwhile are left out; [`Captured::moved`] tells.
    ///
    /// # Errors
    ///
    /// `go_on` said no ([`crate::Exit::Aborted`]); a member cannot be read or cloned; the
    /// store is full or read-only. What is in the tree by then is of no use.
    pub fn capture(self, go_on: &mut dyn FnMut() -> bool) -> Result<Captured> {
        record::capture(self, go_on)
    }
}

impl Prepared {
    /// The same, or freezes what there is, to be read after the hold: see [`Method::Subvolume`].
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`]; a subvolume cannot be frozen, though nothing else was asked for.
    pub fn take(self, go_on: &mut dyn FnMut() -> bool) -> Result<Taken> {
        Ok(match subvolume::freeze(self, go_on)? {
            Ok(frozen) => Taken::Frozen(Box::new(frozen)),
            Err(prepared) => Taken::Captured(Box::new(prepared.capture(go_on)?)),
        })
    }

    /// Says that files may be changed in ways that leave no trace: nothing is shared with the
    /// previous snapshot. What was to be shared is made ready like all else, so this is for before the
    /// hold.
    ///
    /// # Errors
    ///
    /// The tree cannot be written to; a member cannot be read or not be written back.
    pub fn share_nothing(&mut self) -> Result<()> {
        prepare::share_nothing(self)
    }

    /// The same when that is found out under the hold: nothing is done ahead for what was to be shared.
    pub fn share_nothing_now(&mut self) {
        self.base = None;
    }

    /// Says that it is to be captured under the hold, although [`Prepared::is_to_be_guarded`]. What can be
    /// done ahead for that is done, so this is for before the hold.
    ///
    /// # Errors
    ///
    /// A member cannot be read or not be written back.
    pub fn stay_under_hold(&mut self) -> Result<()> {
        prepare::stay_under_hold(self)
    }

    /// Says that calls may be in flight at the cut which nothing has held up: what waits for
    /// them is a clone of each file, so only if it was asked for is a subvolume frozen.
    ///
    /// # Errors
    ///
    /// What is not needed cannot be removed from the tree.
    pub fn needs_locks(mut self) -> Result<Prepared> {
        if self
            .subvolumes
            .as_ref()
            .is_some_and(|plan| !plan.is_required())
        {
            self.subvolumes = None;
            subvolume::forget(&self.target)?;
        }
        Ok(self)
    }
}

impl Taken {
    /// The regular files it is about; of what is frozen, those there were before the hold.
    pub fn members(&self) -> Vec<Member> {
        match self {
            Taken::Captured(captured) => captured.members(),
            Taken::Frozen(frozen) => frozen.prepared().members(),
        }
    }

    /// See [`Captured::moved`]. What is frozen tells when it is read.
    pub fn moved(&self) -> Vec<Moved> {
        match self {
            Taken::Captured(captured) => captured.moved(),
            Taken::Frozen(_) => Vec::new(),
        }
    }

    /// Everything read, and what of it changed although it was held.
    ///
    /// # Errors
    ///
    /// As [`Frozen::read`].
    pub fn read(self, go_on: &mut dyn FnMut() -> bool) -> Result<(Captured, Vec<Moved>)> {
        match self {
            Taken::Captured(captured) => Ok((*captured, Vec::new())),
            Taken::Frozen(frozen) => frozen.read(go_on),
        }
    }

    /// See [`Captured::method`].
    pub fn method(&self) -> String {
        match self {
            Taken::Captured(captured) => captured.method(),
            Taken::Frozen(_) => subvolume::NAME.to_owned(),
        }
    }

    /// What came of marks, if calls have set any and the capture went on after the cut.
    pub fn delta(&self) -> Option<&delta::Outcome> {
        match self {
            Taken::Captured(captured) => captured.delta.as_ref(),
            Taken::Frozen(_) => None,
        }
    }

    /// What is known of the files' digests before they are read back: see [`Prepared::with_digests`].
    pub fn take_digests(&mut self) -> InMemory {
        match self {
            Taken::Captured(captured) => std::mem::take(&mut captured.digests),
            Taken::Frozen(_) => InMemory::default(),
        }
    }

    /// See [`Captured::finish`].
    ///
    /// # Errors
    ///
    /// As there; as [`Frozen::read`], if it was not read yet.
    pub fn finish(self) -> Result<Vec<FileRecord>> {
        self.read(&mut || true)?.0.finish()
    }
}

impl Captured {
    /// The regular files captured, each name of each.
    pub fn members(&self) -> Vec<Member> {
        let mut namer = self.source.namer();
        self.entries
            .iter()
            .filter(|entry| entry.is_file())
            .map(|entry| Member {
                path: namer.path(entry.dir, &entry.name),
                id: entry.seen.id,
            })
            .collect()
    }

    /// What changed since it was captured, by a second `fstatat` of every entry: evidence
    /// against the cut if the gate was shut all the time. To be called under the hold.
    ///
    /// An unmoved ctime is no proof: a store to a mapped page that is dirty
    /// already does not move it, and before Linux 6.13 (multigrain timestamps) neither
    /// does a second change within one timer tick.
    pub fn moved(&self) -> Vec<Moved> {
        moved::moved(self)
    }

    /// Completes the tree and makes it durable: links, FIFOs and metadata, directories
    /// last and deepest first, then `fsync` of each file and directory, or
    /// `syncfs` of the store's file system if they are many. To be called after the hold.
    ///
    /// Returns a record for each entry, sorted by path.
    ///
    /// # Errors
    ///
    /// The store cannot take it: full, read-only, no extended attributes, an I/O error.
    pub fn finish(self) -> Result<Vec<FileRecord>> {
        finish::finish(self)
    }

    /// Says that it was captured under the hold after all: copied.
    #[must_use]
    pub(crate) fn copied_under_hold(mut self) -> Captured {
        self.swept = None;
        self.delta = None;
        for entry in &mut self.entries {
            if let record::Body::File(how @ record::How::Guarded) = &mut entry.body {
                *how = record::How::Copy;
            }
        }
        self
    }

    /// What changed without having asked while it was captured after the cut: evidence against it.
    pub fn moved_unasked(&self) -> &[Moved] {
        &self.moved_unasked
    }

    /// How the capture after the cut went, if there was one.
    pub fn swept(&self) -> Option<Swept> {
        self.swept
    }

    /// `reflink`, `copy`, `copy-before-write`, `mixed`, `subvolume`, `shared` if no file has
    /// changed since the previous snapshot, or `none` if there was no file.
    pub fn method(&self) -> String {
        if self.swept.is_some() {
            return "copy-before-write".to_owned();
        }
        if self.is_subvolume {
            return subvolume::NAME.to_owned();
        }
        let used = |how| {
            self.entries
                .iter()
                .any(|entry| matches!(entry.body, record::Body::File(used) if used == how))
        };
        let name = match (used(record::How::Reflink), used(record::How::Copy)) {
            (true, true) => "mixed",
            (true, false) => "reflink",
            (false, true) => "copy",
            (false, false) if used(record::How::Shared) => "shared",
            (false, false) => "none",
        };
        name.to_owned()
    }

    fn path_of(&self, entry: &record::Entry) -> PathBuf {
        self.source.path(entry.dir).join(dirs::as_path(&entry.name))
    }
}
