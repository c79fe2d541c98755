//! Capturing after the cut: everything but the bytes of files is read before it, and at the cut
//! only what has changed since.
//!
//! Of few files, each is looked at again; of many, what is reported (`tracker`), and brought up to
//! date in its place (`refresh`). If directories have come or gone, all of it is walked again.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::atomic::AtomicU64;

use rustix::process::{Resource, getrlimit};
use snapshim_gate::guard::{self, Guard, METADATA, NAMES};
use snapshim_gate::table::FileId;

use super::delta::{AtCut, Compared, Deltas, Outcome, compare};
use super::descriptors::{self, Raised};
use super::moved::Moved;
use super::record::{Body, Entry, Into, Pin, Pins, Recorded, Target};
use super::refresh::{Caught, Followed};
use super::tracker::Tracker;
use super::walk::Paths;
use super::{Captured, Prepared, record, sweep};
use crate::digest::Pieces;
use crate::tally::Step;
use crate::tree::dirs::Dirs;
use crate::tree::seen::{Seen, now_ns};
use crate::{Error, Result};

/// Everything read but the bytes of files, which are open.
#[derive(Debug)]
pub struct Rehearsed {
    scope: Paths,
    recorded: Option<Recorded>,
    ready: Option<sweep::Ready>,
    raised: Raised,
    shift: u32,
    /// See [`is_any_twice`].
    is_any_twice: bool,
    /// If there are many: what tells which of them have changed.
    followed: Option<Followed>,
    /// The same, if it tells nothing any more: to end it takes time, so not under the hold.
    unfollowed: Option<Followed>,
    /// Files that somebody had open for writing before.
    open: HashSet<FileId>,
    deltas: Option<Deltas>,
    /// Whether what goes through memory is hashed.
    digests: bool,
    /// Programs are held until everything is captured.
    is_under_hold: bool,
}

/// How many files can be captured after the cut: two descriptors each.
fn most_files() -> usize {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let files = limit.saturating_sub(descriptors::OTHERS) / 2;
    usize::try_from(files)
        .unwrap_or(usize::MAX)
        .min(guard::MAX_FILES)
}

/// Whether so many files of these sizes can be guarded; else why not.
pub(super) fn can_be_guarded(
    sizes: impl Iterator<Item = u64> + Clone,
) -> std::result::Result<(), String> {
    let (count, most) = (sizes.clone().count(), most_files());
    if count > most {
        return Err(format!(
            "there are {count} files, and at most {most} can be captured after the cut"
        ));
    }
    match guard::shift_for(sizes) {
        Some(_) => Ok(()),
        None => Err("the files are too large to be captured after the cut".into()),
    }
}

impl Prepared {
    /// Whether it is to be captured after the cut, if that is possible: it was asked for, or
    /// the hold would take long.
    pub fn is_to_be_guarded(&self) -> bool {
        self.guard
    }

    /// Why there is no room for what would have to be open; see [`Prepared::rehearse`]. With small files
    /// copied ahead there is.
    pub fn lacks_room(&self, settled: bool) -> Option<String> {
        let sizes = self.scan.to_capture().map(|known| known.seen.size);
        match settled {
            true => None,
            false => can_be_guarded(sizes).err(),
        }
    }

    /// Reads everything but the bytes of files, and opens those; small ones that are left alone
    /// are copied, if `settled`: every call that was in flight when this was prepared has ended. To be
    /// called before the hold.
    ///
    /// A call moves the ctime of a file once, when it begins to write. One that was in flight
    /// when the file was first looked at might write on, unseen, while it is copied; so none may be
    /// left.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn rehearse(self, settled: bool, open: HashSet<FileId>) -> Result<Rehearsed> {
        let Prepared {
            scope,
            scan,
            plan,
            target,
            ahead,
            base,
            bases,
            digests,
            ..
        } = self;
        let bytes = scan.to_capture().map(|known| known.seen.size).sum();
        // Room to grow until the cut, and for what is shared so far.
        let sizes = scan.members.iter().map(|known| known.seen.size);
        let grown = sizes.map(|size| size.saturating_add(size / 8));
        let shift = guard::shift_for(grown).unwrap_or(guard::MAX_SHIFT);
        let ready = sweep::ready(shift, bytes)?;
        let known = scan.to_capture().map(|known| (known.seen.id, known.seen));
        let known = match settled {
            true => known.collect(),
            false => HashMap::new(),
        };
        let pins = Some(Pins::first(known, bases));
        let small = scan.to_capture().filter(|k| record::is_small(&k.seen));
        let ahead_bytes = small.map(|known| known.seen.size).sum();
        target.tally.begin(Step::Ahead, ahead_bytes);
        let raised = Raised::for_files(scan.members.len().min(guard::MAX_FILES));
        let into = Into {
            plan,
            target,
            ahead,
            base,
            expected: scan.members.len(),
            tracker: tracker_for(scan.members.len()),
        };
        let mut recorded = record::record(&scope, into, pins, &mut || true)?;
        recorded.captured.target.tally.end();
        Ok(Rehearsed {
            is_any_twice: is_any_twice(&recorded.captured),
            followed: followed(&mut recorded, &open),
            unfollowed: None,
            open,
            scope,
            recorded: Some(recorded),
            ready: Some(ready),
            raised,
            shift,
            deltas: None,
            digests,
            is_under_hold: false,
        })
    }
}

impl Rehearsed {
    /// Brings everything up to date. To be called at the cut, with the gate shut and drained.
    /// `is_told`: nobody may have changed a file without its being reported.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn cut(&mut self, is_told: bool, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let Some(mut recorded) = self.recorded.take() else {
            return Err(Error::new("nothing was rehearsed"));
        };
        let caught = match &mut self.followed {
            Some(followed) if is_told => {
                let (captured, pins) = (&mut recorded.captured, &mut recorded.pins);
                captured.follow(&self.scope, followed, pins)?
            }
            _ => Caught::Lost,
        };
        // It may have been renamed during the walk, and been met by both names.
        if self.is_any_twice && caught == Caught::Up {
            self.is_any_twice = is_any_twice(&recorded.captured);
        }
        let is_current = match caught {
            Caught::Up => true,
            Caught::Else => false,
            Caught::Lost => {
                self.stop_following();
                recorded.captured.refresh(&mut recorded.pins)?
            }
        };
        if !is_current {
            self.stop_following();
            recorded = again(&self.scope, recorded, None, go_on)?;
            self.is_any_twice = is_any_twice(&recorded.captured);
        }
        self.recorded = Some(recorded);
        Ok(())
    }

    /// From now on the gate is shut until everything is captured.
    pub fn stay_under_hold(&mut self) {
        self.is_under_hold = true;
        self.stop_following();
    }

    /// What is reported is of no use any more.
    fn stop_following(&mut self) {
        self.unfollowed = self.followed.take().or(self.unfollowed.take());
    }

    /// Brings everything up to date so far, so that less is left for the cut. To be called just
    /// before the gate is shut.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn catch_up(&mut self) -> Result<()> {
        /// How often everything is walked again because directories came and went.
        const WALKS: usize = 3;
        let mut was_lost = false;
        for _ in 0..WALKS {
            let Some(followed) = &mut self.followed else {
                return Ok(());
            };
            let Some(mut recorded) = self.recorded.take() else {
                return Ok(());
            };
            let (captured, pins) = (&mut recorded.captured, &mut recorded.pins);
            let caught = captured.follow(&self.scope, followed, pins)?;
            // What was reported, and could not be made use of, is not reported again.
            let is_new = caught == Caught::Else || caught == Caught::Lost && !was_lost;
            if is_new {
                let tracker = tracker_for(recorded.captured.entries.len());
                recorded = again(&self.scope, recorded, tracker, &mut || true)?;
                self.followed = self::followed(&mut recorded, &self.open);
            }
            if self.is_any_twice || is_new {
                self.is_any_twice = is_any_twice(&recorded.captured);
            }
            self.recorded = Some(recorded);
            match caught {
                Caught::Up => break,
                Caught::Lost if was_lost => self.stop_following(),
                Caught::Else | Caught::Lost => {}
            }
            was_lost |= caught == Caught::Lost;
        }
        Ok(())
    }

    /// Nothing that was copied before the hold counts: somebody may change files without a trace. To
    /// be called under the hold.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn trust_nothing(&mut self) -> Result<()> {
        match &mut self.recorded {
            Some(recorded) => recorded.captured.pin_all(&mut recorded.pins),
            None => Ok(()),
        }
    }

    /// Why what is to be guarded has no place in the gate's table.
    pub fn does_not_fit(&self) -> Option<&'static str> {
        let pins = self
            .recorded
            .as_ref()
            .map_or(0, |recorded| recorded.pins.len());
        let shift = guard::shift_for(self.guarded().map(|member| member.size));
        if self.is_any_twice {
            Some("a file is there twice, below a bind mount")
        } else if pins > guard::MAX_FILES || shift.is_none_or(|shift| shift > self.shift) {
            Some("there is more than the gate has room for")
        } else {
            None
        }
    }

    /// Chunks are 2 to the power of this, bytes.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// What is to be guarded, with the sizes at the cut.
    pub fn guarded(&self) -> std::vec::IntoIter<guard::Member> {
        let pinned = |recorded: &'_ Recorded| {
            let entries = &recorded.captured.entries;
            let member = |pin: &Pin| {
                let seen = &entries[pin.entry].seen;
                guard::Member {
                    id: seen.id,
                    size: seen.size,
                }
            };
            recorded.pins.iter().map(member).collect::<Vec<_>>()
        };
        self.recorded
            .as_ref()
            .map(pinned)
            .unwrap_or_default()
            .into_iter()
    }

    /// Looks at what calls have marked since the cut before; whether they go on to mark what they
    /// change. To be called under the hold, when it is sure that the cut will be guarded.
    pub fn mark(&mut self, at: AtCut) -> bool {
        self.deltas = self.recorded.as_ref().and_then(|recorded| {
            let captured = &recorded.captured;
            let bases = recorded.bases.as_ref()?;
            let path_of = |entry: &Entry| captured.path_of(entry);
            Deltas::cut(bases, &captured.entries, &recorded.pins, path_of, at)
        });
        self.deltas.is_some()
    }

    /// Captures the bytes, of which `firsts` says the number of each file's first chunk. To be
    /// called with the gate guarded; `end` opens it when all bytes are in memory.
    ///
    /// # Errors
    ///
    /// `end`'s; `goes_on` said no; a member cannot be read, the snapshot not be written.
    pub fn sweep(
        mut self,
        gate: &snapshim_gate::abi::Gate,
        firsts: Vec<u32>,
        goes_on: &mut dyn FnMut() -> bool,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<Captured> {
        let (Some(recorded), Some(ready)) = (self.recorded, self.ready) else {
            return Err(Error::new("nothing was rehearsed"));
        };
        let Recorded {
            mut captured,
            mut pins,
            ..
        } = recorded;
        let cut_ns = now_ns();
        let (mut deltas, mut is_compared) = (Vec::new(), false);
        let mut outcome = self.deltas.map(|mut all| {
            (deltas, is_compared) = all.take();
            Outcome {
                number: all.number(),
                files: all.to_build_on(&captured.entries, &pins),
                unexplained: all.unexplained().map(ToOwned::to_owned),
                ..Outcome::default()
            }
        });
        let mut copies = Vec::new();
        deltas.resize_with(pins.len(), || None);
        let mut deltas = deltas.into_iter();
        let mut targets = Vec::with_capacity(pins.len());
        for (pin, first) in pins.iter_mut().zip(firsts) {
            let target = match pin.target.take() {
                Some(target) => target,
                None => captured.target_of(pin)?,
            };
            targets.push((first, target));
        }
        let (digests, shift) = (self.digests, self.shift);
        // Nobody is to be held for that.
        let is_hashed =
            |target: &sweep::Target| digests && !self.is_under_hold && target.is_direct();
        let source = |(pin, (first, target)): (Pin, (u32, sweep::Target))| {
            let entry = &captured.entries[pin.entry];
            copies.push(Pin::into_copy(pin.marked));
            sweep::Source {
                path: captured.path_of(entry),
                file: pin.file,
                size: entry.seen.size,
                first,
                // What is in the page cache is read back for little, when nobody waits.
                pieces: is_hashed(&target)
                    .then(|| Pieces::new(entry.seen.size, shift))
                    .flatten(),
                target,
                entry: pin.entry,
                delta: deltas.next().flatten(),
            }
        };
        let sources: Vec<sweep::Source> = pins.into_iter().zip(targets).map(source).collect();
        let tally = captured.target.tally.clone();
        let asked = sweep::Asked {
            guard: gate.guard(),
            asks: gate.used_asks(),
            tally: &tally,
        };
        let mut moved = Vec::new();
        let how = sweep::How {
            is_compared,
            is_under_hold: self.is_under_hold,
        };
        let (swept, unmarked) = sweep::sweep(ready, asked, &sources, how, goes_on, || {
            moved = moved_unasked(&captured.entries, &sources, gate.guard());
            end()
        })?;
        if let Some(source) = swept.short.and_then(|index| sources.get(index)) {
            moved.push(Moved {
                path: source.path.clone(),
                what: "became shorter".to_owned(),
            });
        }
        if let Some(followed) = &mut self.followed {
            let pinned = sources.iter().map(|source| source.entry).collect();
            moved.extend(captured.moved_unreported(followed, &pinned, cut_ns));
        }
        captured.forget_gone();
        if let Some(outcome) = &mut outcome {
            outcome.captured = swept.bytes;
            outcome.shared = swept.in_place;
            if is_compared {
                compare_all(outcome, &sources, &copies, self.shift, &unmarked)?;
            }
        }
        for source in &sources {
            if let Some(pieces) = &source.pieces {
                captured.digests.add(source.path.clone(), pieces);
            }
        }
        captured.delta = outcome;
        captured.moved_unasked = moved;
        captured.swept = Some(swept);
        // Once the files are closed.
        drop(sources);
        drop(self.raised);
        Ok(captured)
    }
}

/// Compares what was not marked with the copies that there are of it.
fn compare_all(
    outcome: &mut Outcome,
    sources: &[sweep::Source],
    copies: &[Option<File>],
    shift: u32,
    unmarked: &[AtomicU64],
) -> Result<()> {
    let mut bytes = 0;
    for (source, copy) in sources.iter().zip(copies) {
        let (Some(delta), Some(copy)) = (&source.delta, copy) else {
            continue;
        };
        let first = source.first as usize;
        let chunks = guard::chunks_of(source.size, shift) as usize;
        let compared = Compared {
            delta,
            target: source.target.fd(),
            copy,
            size: source.size,
            shift,
            unmarked: unmarked.get(first..first + chunks).unwrap_or_default(),
        };
        let (count, differs_at) = compare(&compared)?;
        bytes += count;
        if let Some(at) = differs_at {
            outcome.refuted = Some(format!(
                "byte {at} of {} was changed, and not marked",
                source.path.display()
            ));
            break;
        }
    }
    outcome.compared = Some(bytes);
    Ok(())
}

/// Whether one file is there twice, and not as a hard link: below a bind mount. It has one
/// place among what is guarded. (Before the hold it may also have been renamed while the tree
/// was walked.)
fn is_any_twice(captured: &Captured) -> bool {
    let mut seen = HashSet::new();
    let files = captured
        .entries
        .iter()
        .filter(|entry| matches!(entry.body, Body::File(_)));
    files.map(|entry| entry.seen.id).any(|id| !seen.insert(id))
}

/// Looking at fewer files than this at the cut costs less than being told which have changed.
pub(super) const MANY: usize = 64;

fn tracker_for(files: usize) -> Option<Tracker> {
    match files > MANY {
        true => Tracker::new(),
        false => None,
    }
}

fn followed(recorded: &mut Recorded, open: &HashSet<FileId>) -> Option<Followed> {
    let tracker = recorded.tracker.take()?;
    let (captured, pins) = (&recorded.captured, &recorded.pins);
    Some(Followed::new(tracker, captured, pins, open))
}

/// Walks once more, into the tree that is there.
fn again(
    scope: &Paths,
    recorded: Recorded,
    tracker: Option<Tracker>,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Recorded> {
    let Recorded {
        captured,
        plan,
        pins,
        bases,
        ..
    } = recorded;
    let pins = Pins::again(pins, &captured);
    let Captured {
        target,
        mut ahead,
        entries,
        base,
        ..
    } = captured;
    ahead.begin_again();
    let into = Into {
        plan,
        target: Target {
            dirs: Dirs::new(),
            ..target
        },
        ahead,
        base,
        expected: entries.len(),
        tracker,
    };
    let again = record::record(scope, into, Some(pins), go_on)?;
    Ok(Recorded { bases, ..again })
}

/// What has changed since the cut without having asked: evidence against a capture that went on
/// while programs ran. To be called while the gate is guarded still, for afterwards nobody asks.
fn moved_unasked(entries: &[Entry], sources: &[sweep::Source], guard: &Guard) -> Vec<Moved> {
    let mut moved = Vec::new();
    for source in sources {
        let then = &entries[source.entry].seen;
        // First the file, then what is noted: a call is noted before it changes anything.
        let Ok(now) = rustix::fs::fstat(&source.file).map(|stat| Seen::of(&stat)) else {
            continue;
        };
        if now.ctime_ns == then.ctime_ns || guard.was_touched(then.id) {
            continue;
        }
        // Names and metadata that were changed by path move a ctime; only the latter an mtime.
        let by_path = guard.changed_by_path();
        let has_content_moved = now.size != then.size || now.mtime_ns != then.mtime_ns;
        let is_explained = by_path & METADATA != 0 || by_path & NAMES != 0 && !has_content_moved;
        if !is_explained {
            moved.push(Moved {
                path: source.path.clone(),
                what: "was written to or had its metadata changed (ctime moved)".to_owned(),
            });
        }
    }
    moved
}
