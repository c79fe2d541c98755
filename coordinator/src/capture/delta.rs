//! What of a file need not be captured, because an earlier snapshot has it and calls mark what
//! they change ([`snapshim_gate::marks`]).
//!
//! | when | gate | what is done |
//! |---|---|---|
//! | `Bases::open` | open | the earlier snapshot's copy of a file goes into the new one: as a clone, or what of it is not marked yet as a copy |
//! | `Deltas::cut` | shut | decides for each file whether the marks tell all of it; begins a new number |
//! | `Delta::unmarked` | guarded | which blocks of a chunk are in place already |
//! | `compare` | open | if that is due: whether what is not marked is what the earlier snapshot has |
//!
//! The live file is never shared with a snapshot: neither does it become fragmented, nor do its
//! writers pay for copying on write.
//!
//! Marks are looked at chunk by chunk while the gate is guarded, not under the hold: those of
//! a chunk that is not captured stand still, for the calls that would set others wait.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use snapshim_gate::guard::{METADATA, NAMES};
use snapshim_gate::marks::{self, Known, Marks};
use snapshim_gate::table::FileId;

use super::record::{Entry, Pin};
use crate::store::{fault, open_below};
use crate::tree::seen::{self, Seen, now_ns};
use crate::tree::{copy, reflink};
use crate::{Error, Result};

/// Files below this size, bytes, are not marked: captured in whole, they cost as little.
pub(super) const SMALL: u64 = 256 << 10;
/// A file made that shortly before a cut, ns, could be taken for another of its number: times
/// of birth are those of a tick.
const TICKS: i64 = 100_000_000;

/// A file as an earlier snapshot has it.
#[derive(Clone, Debug)]
pub struct BaseFile {
    /// When it was made, ns since 1970: with its number, that is the same file.
    pub born_ns: i64,
    /// Its size at that cut.
    pub size: u64,
    /// Its modification time at that cut, ns since 1970.
    pub mtime_ns: i64,
    /// Its change time at that cut, ns since 1970.
    pub ctime_ns: i64,
    /// Its path in the live tree then, and so in that of the snapshot.
    pub path: PathBuf,
    /// Inode number, mtime (ns since 1970) and size of the snapshot's file when it was published.
    pub copy: (u64, i64, u64),
}

/// What calls have marked, and the earlier snapshot that can be built on.
#[derive(Debug)]
pub struct Bases {
    /// The gate's.
    pub marks: &'static Marks,
    /// That snapshot.
    pub earlier: Option<Earlier>,
    /// Whether it is to be compared this time, and everything captured.
    pub compare: bool,
}

/// An earlier snapshot.
#[derive(Debug)]
pub struct Earlier {
    /// Its tree.
    pub tree: OwnedFd,
    /// The number of its cut.
    pub number: u32,
    /// Its files that were marked since, by identity.
    pub files: HashMap<FileId, BaseFile>,
}

/// What is known at the cut of the time since the one before.
#[derive(Clone, Copy, Debug)]
pub struct AtCut {
    /// Calls have marked what they change, all the time.
    pub has_marks: bool,
    /// Calls were ignored that may go on after the hold.
    pub may_go_on: bool,
    /// Somebody may have changed something without marks.
    pub is_doubtful: bool,
}

/// Of a file that is captured after the cut.
#[derive(Debug)]
pub(super) struct Marked {
    born_ns: i64,
    base: Option<Base>,
}

/// The copy that an earlier snapshot has of it.
#[derive(Debug)]
struct Base {
    copy: File,
    then: BaseFile,
    /// What was not marked of it is in the new snapshot's file.
    is_placed: bool,
}

impl Marked {
    /// Whether bytes of an earlier snapshot are in its file.
    pub(super) fn is_placed(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.is_placed)
    }
}

impl Bases {
    /// What is known of a file that was just opened, `to` being the empty file of the new
    /// snapshot: puts into that what need not be captured. `None`: it is not worth it.
    pub(super) fn open(
        &self,
        file: &OwnedFd,
        seen: &Seen,
        to: &OwnedFd,
        put_at: &Path,
    ) -> Result<Option<Marked>> {
        if seen.size < SMALL {
            return Ok(None);
        }
        let Some(born_ns) = born_ns(file) else {
            return Ok(None);
        };
        let base = match &self.earlier {
            Some(earlier) => self.base(earlier, seen, born_ns, to, put_at)?,
            None => None,
        };
        Ok(Some(Marked { born_ns, base }))
    }

    fn base(
        &self,
        earlier: &Earlier,
        seen: &Seen,
        born_ns: i64,
        to: &OwnedFd,
        put_at: &Path,
    ) -> Result<Option<Base>> {
        let Some(then) = earlier.files.get(&seen.id) else {
            return Ok(None);
        };
        let known = self.marks.find(seen.id);
        let Some(known) = known.filter(|known| {
            then.born_ns == born_ns && !known.is_whole_since(earlier.number) && then.size > 0
        }) else {
            return Ok(None);
        };
        let Some(copy) = open_copy(earlier.tree.as_fd(), then) else {
            return Ok(None);
        };
        let delta = Delta::new(known, then, earlier.number);
        let is_placed = !self.compare && delta.place(&copy, to, seen.size, put_at)?;
        if !is_placed {
            // Nothing of it may be left where the live file has a hole.
            rustix::fs::ftruncate(to, 0).map_err(|cause| fault("write to", put_at, cause))?;
        }
        Ok(Some(Base {
            copy,
            then: then.clone(),
            is_placed,
        }))
    }
}

/// When a file was made, ns since 1970, where that can be relied on.
fn born_ns(file: &OwnedFd) -> Option<i64> {
    if !matches!(
        reflink::file_system(file).as_str(),
        "xfs" | "btrfs" | "ext4" | "tmpfs"
    ) {
        return None;
    }
    seen::born_ns(file)
}

/// Opens a file of an earlier snapshot, if nobody has changed that since it was published.
fn open_copy(tree: BorrowedFd<'_>, then: &BaseFile) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = open_below(tree, &then.path, flags).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let is_it =
        FileType::from_raw_mode(stat.st_mode).is_file() && identity(&Seen::of(&stat)) == then.copy;
    is_it.then(|| File::from(file))
}

/// As what a snapshot's file is known again.
fn identity(seen: &Seen) -> (u64, i64, u64) {
    // Not by its ctime, which moves with names that later snapshots share.
    (seen.id.ino, seen.mtime_ns, seen.size)
}

/// As what the file with this path in the live tree is known again in the snapshot's `tree`.
pub fn identity_of(tree: BorrowedFd<'_>, path: &Path) -> Option<(u64, i64, u64)> {
    let file = open_below(tree, path, OFlags::PATH | OFlags::NOFOLLOW).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    Some(identity(&Seen::of(&stat)))
}

/// What of a file an earlier snapshot has.
#[derive(Debug)]
pub(super) struct Delta {
    known: Known<'static>,
    /// The number of that snapshot's cut.
    number: u32,
    /// Blocks from this one on it does not have, or not in whole.
    blocks: u64,
}

impl Delta {
    fn new(known: Known<'static>, then: &BaseFile, number: u32) -> Delta {
        Delta {
            known,
            number,
            blocks: then.size >> known.shift(),
        }
    }

    /// Pieces of a chunk, of 2 to the power of `shift` bytes, are 2 to the power of this: at
    /// most 64 of them, and each some blocks.
    pub(super) fn piece_shift(&self, shift: u32) -> u32 {
        self.known.shift().max(shift.saturating_sub(6))
    }

    fn is_changed(&self, block: u64) -> bool {
        block >= self.blocks || self.known.is_changed_since(block, self.number)
    }

    /// The pieces, a bit for each, of a chunk of 2 to the power of `shift` bytes from `offset` on,
    /// that are as the earlier snapshot has them. To be asked before the chunk counts as
    /// captured.
    pub(super) fn unmarked(&self, offset: u64, shift: u32) -> u64 {
        let piece_shift = self.piece_shift(shift);
        let blocks = 1u64 << (piece_shift - self.known.shift());
        let first = offset >> self.known.shift();
        let mut unmarked = 0;
        for piece in 0..1u64 << (shift - piece_shift) {
            let begin = first + piece * blocks;
            if (begin..begin + blocks).all(|block| !self.is_changed(block)) {
                unmarked |= 1 << piece;
            }
        }
        unmarked
    }

    /// Puts what need not be captured into a file of the new snapshot; whether that was worth it.
    fn place(&self, from: &File, to: &OwnedFd, size: u64, put_at: &Path) -> Result<bool> {
        let all = size.div_ceil(1 << self.known.shift()).max(1);
        let changed = (0..all).filter(|block| self.is_changed(*block)).count() as u64;
        if changed > all / 2 {
            return Ok(false);
        }
        match reflink::clone(to, from) {
            Ok(()) => return Ok(true),
            Err(cause) if reflink::is_unsupported(cause) => {}
            Err(cause @ (Errno::NOSPC | Errno::DQUOT)) => {
                return Err(fault("clone to", put_at, cause));
            }
            // Whatever it is, there is another way.
            Err(_) => return Ok(false),
        }
        let mut buffer = vec![0; copy::CHUNK];
        let mut block = 0;
        while block < self.blocks.min(all) {
            let end = (block..self.blocks.min(all))
                .find(|block| self.is_changed(*block))
                .unwrap_or(self.blocks.min(all));
            let range = block << self.known.shift()..end << self.known.shift();
            match copy::copy_range(to, from, range, &mut buffer, &mut || true) {
                Ok(Some(_)) => {}
                Err(copy::Failed::Write(cause)) => return Err(fault("write to", put_at, cause)),
                // Then all of it is captured.
                Ok(None) | Err(_) => return Ok(false),
            }
            block = end + 1;
        }
        Ok(true)
    }
}

/// What the marks say of a cut.
#[derive(Debug)]
pub(super) struct Deltas {
    marks: &'static Marks,
    /// Of each pinned file, in their order: what need not be captured; `None` for those that
    /// are captured in whole.
    files: Vec<Option<Delta>>,
    /// The number of this cut.
    number: u32,
    /// What is not marked is captured all the same, and compared.
    compare: bool,
    /// Files that have changed without a mark.
    unexplained: Vec<PathBuf>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The number of the cut.
    pub number: u32,
    /// Bytes that were captured.
    pub captured: u64,
    /// Bytes that were taken from the earlier snapshot.
    pub shared: u64,
    /// Bytes that were compared with it; `None` if that was not to be.
    pub compared: Option<u64>,
    /// A file that shows to have changed, though nothing is marked of it: therefore everything was
    /// compared.
    pub unexplained: Option<PathBuf>,
    /// What was changed without a mark.
    pub refuted: Option<String>,
    /// What can be built on: identity and time of birth (ns since 1970).
    pub files: Vec<(FileId, i64)>,
}

impl Deltas {
    /// Decides what the marks tell of the pinned files, and begins a new number. To be called with
    /// the gate shut and drained. `None`: no marks are set from now on.
    pub(super) fn cut(
        bases: &Bases,
        entries: &[Entry],
        pins: &[Pin],
        path_of: impl Fn(&Entry) -> PathBuf,
        at: AtCut,
    ) -> Option<Deltas> {
        let marks = bases.marks;
        if at.is_doubtful {
            marks.set_blind();
        }
        let mut unexplained = Vec::new();
        let earlier = bases
            .earlier
            .as_ref()
            .filter(|earlier| at.has_marks && !marks.is_blind_since(earlier.number));
        let mut files: Vec<Option<Delta>> = pins
            .iter()
            .map(|pin| {
                let (earlier, base) = (earlier?, pin.marked.as_ref()?.base.as_ref()?);
                let seen = &entries[pin.entry].seen;
                let known = marks.find(seen.id)?;
                if known.is_whole_since(earlier.number) {
                    return None;
                }
                if !is_explained(marks, &known, earlier.number, &base.then, seen) {
                    unexplained.push(path_of(&entries[pin.entry]));
                }
                Some(Delta::new(known, &base.then, earlier.number))
            })
            .collect();
        let compare = bases.compare || !unexplained.is_empty();
        for (file, pin) in files.iter_mut().zip(pins) {
            // What is not in place has to be captured.
            if !compare && !pin.marked.as_ref().is_some_and(Marked::is_placed) {
                *file = None;
            }
        }
        let worth = || {
            let marked = pins.iter().filter(|pin| pin.marked.is_some());
            marked.map(|pin| entries[pin.entry].seen)
        };
        // Marks of files that are gone are in the way.
        let fit = |seen: Seen| {
            let has_room = |known: Known<'_>| known.room() >= seen.size;
            marks.find(seen.id).is_some_and(has_room)
                || marks.enter(seen.id, marks::room_for(seen.size))
        };
        if !at.has_marks || !worth().all(fit) {
            let sizes = worth().map(|seen| seen.size).collect::<Vec<_>>();
            marks.reset(marks::shift_for(sizes.into_iter()).unwrap_or(marks::MAX_SHIFT));
            // Those without room are captured in whole the next time as well.
            for seen in worth() {
                fit(seen);
            }
        }
        let number = marks.next()?;
        if at.may_go_on {
            marks.set_blind();
        }
        Some(Deltas {
            marks,
            files,
            number,
            compare,
            unexplained,
        })
    }

    /// For the sweep, once: see [`Delta`]; and whether they are only compared.
    pub(super) fn take(&mut self) -> (Vec<Option<Delta>>, bool) {
        (std::mem::take(&mut self.files), self.compare)
    }

    /// The files that can be built on. A clock of ticks tells nothing of those that were just made.
    pub(super) fn to_build_on(&self, entries: &[Entry], pins: &[Pin]) -> Vec<(FileId, i64)> {
        let now_ns = now_ns();
        let file = |pin: &Pin| {
            let id = entries[pin.entry].seen.id;
            let born_ns = pin.marked.as_ref()?.born_ns;
            let is_known = now_ns.saturating_sub(born_ns) > TICKS && self.marks.find(id).is_some();
            is_known.then_some((id, born_ns))
        };
        pins.iter().filter_map(file).collect()
    }

    /// The number of the cut.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// A file that shows to have changed, though nothing is marked of it.
    pub(super) fn unexplained(&self) -> Option<&Path> {
        self.unexplained.first().map(PathBuf::as_path)
    }
}

/// Whether what a file shows to have changed since a cut was marked, or changed by path.
fn is_explained(
    marks: &Marks,
    known: &Known<'_>,
    number: u32,
    then: &BaseFile,
    now: &Seen,
) -> bool {
    if now.ctime_ns == then.ctime_ns || known.is_touched_since(number) {
        return true;
    }
    let by_path = marks.changed_by_path_since(number);
    let has_content_moved = now.size != then.size || now.mtime_ns != then.mtime_ns;
    by_path & METADATA != 0 || by_path & NAMES != 0 && !has_content_moved
}

/// A file of a sweep with the pieces of its chunks that were not marked, a bit for each.
pub(super) struct Compared<'a> {
    pub(super) delta: &'a Delta,
    pub(super) target: BorrowedFd<'a>,
    pub(super) copy: &'a File,
    pub(super) size: u64,
    pub(super) shift: u32,
    pub(super) unmarked: &'a [AtomicU64],
}

/// Whether what was not marked is as the earlier snapshot has it: how many bytes, and where the first
/// one is that is not.
pub(super) fn compare(file: &Compared<'_>) -> Result<(u64, Option<u64>)> {
    let target = File::open(format!("/proc/self/fd/{}", file.target.as_raw_fd()))
        .map_err(|cause| Error::new(format!("cannot compare what was captured: {cause}")))?;
    let piece_shift = file.delta.piece_shift(file.shift);
    let len = 1usize << piece_shift;
    let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
    let mut bytes = 0;
    for (chunk, unmarked) in file.unmarked.iter().enumerate() {
        let unmarked = unmarked.load(Relaxed);
        for piece in (0..64).filter(|piece| unmarked & 1 << piece != 0) {
            let at = ((chunk as u64) << file.shift) + (piece << piece_shift);
            if at >= file.size {
                break;
            }
            let len = usize::try_from(file.size - at).map_or(len, |rest| rest.min(len));
            let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
            bytes += len as u64;
            let is_read = target.read_exact_at(ours, at).is_ok()
                && file.copy.read_exact_at(theirs, at).is_ok();
            if !is_read || ours != theirs {
                let first = (0..len).find(|i| ours[*i] != theirs[*i]).unwrap_or(0);
                return Ok((bytes, Some(at + first as u64)));
            }
        }
    }
    Ok((bytes, None))
}

impl Pin {
    /// The copy of it in an earlier snapshot.
    pub(super) fn into_copy(marked: Option<Marked>) -> Option<File> {
        marked?.base.map(|base| base.copy)
    }
}
