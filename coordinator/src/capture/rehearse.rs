//! Capturing after the cut: everything but the bytes of files is read before it, and at the cut
//! only what has changed since.
//!
//! Nothing that is in a directory can have come or gone while the directory's ctime stands. If
//! one has moved, all of it is walked again, under the hold.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use snapshim_gate::guard::{self, Guard, METADATA, NAMES};

use super::delta::{AtCut, Compared, Deltas, Outcome, compare};
use super::moved::Moved;
use super::record::{Body, Entry, How, Pin, Pins, Recorded, Target};
use super::walk::{Paths, unreadable};
use super::{Captured, Prepared, record, sweep};
use crate::store::fault;
use crate::tree::dirs::Dirs;
use crate::tree::metadata::XattrReader;
use crate::tree::seen::Seen;
use crate::{Error, Result};

/// Descriptors left for everything else.
const OTHER_DESCRIPTORS: u64 = 700;

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
    deltas: Option<Deltas>,
}

/// How many files can be captured after the cut: two descriptors each.
fn most_files() -> usize {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let files = limit.saturating_sub(OTHER_DESCRIPTORS) / 2;
    usize::try_from(files)
        .unwrap_or(usize::MAX)
        .min(guard::MAX_FILES)
}

/// The limit of open files, raised for as long as this lives: programs that are started
/// later are to have the one they are used to.
#[derive(Debug)]
pub(super) struct Raised(Option<Rlimit>);

impl Raised {
    fn for_files(count: usize) -> Raised {
        let limit = getrlimit(Resource::Nofile);
        let needed = (2 * count as u64).saturating_add(OTHER_DESCRIPTORS);
        if limit.current.is_none_or(|current| current >= needed) {
            return Raised(None);
        }
        // Nothing here uses select(2), for which the soft limit is as low as it is.
        let raised = Rlimit {
            current: limit
                .maximum
                .map_or(Some(needed), |most| Some(needed.min(most))),
            maximum: limit.maximum,
        };
        Raised(setrlimit(Resource::Nofile, raised).is_ok().then_some(limit))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(limit) = self.0.take() {
            let _ = setrlimit(Resource::Nofile, limit);
        }
    }
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
        let sizes = self.scan.members.iter().map(|known| known.seen.size);
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
    pub fn rehearse(self, settled: bool) -> Result<Rehearsed> {
        let Prepared {
            scope,
            scan,
            plan,
            target,
            ahead,
            bases,
            ..
        } = self;
        let sizes = scan.members.iter().map(|known| known.seen.size);
        let bytes = sizes.clone().sum();
        // Room to grow until the cut.
        let grown = sizes.map(|size| size.saturating_add(size / 8));
        let shift = guard::shift_for(grown).unwrap_or(guard::MAX_SHIFT);
        let ready = sweep::ready(shift, bytes)?;
        let known = scan.members.iter().map(|known| (known.seen.id, known.seen));
        let known = match settled {
            true => known.collect(),
            false => HashMap::new(),
        };
        let pins = Some(Pins::first(known, bases));
        let raised = Raised::for_files(scan.members.len().min(guard::MAX_FILES));
        let expected = scan.members.len();
        let recorded = record::record(&scope, plan, target, ahead, expected, pins, &mut || true)?;
        Ok(Rehearsed {
            is_any_twice: is_any_twice(&recorded.captured),
            scope,
            recorded: Some(recorded),
            ready: Some(ready),
            raised,
            shift,
            deltas: None,
        })
    }
}

impl Rehearsed {
    /// Brings everything up to date. To be called at the cut, with the gate shut and drained.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn cut(&mut self, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let Some(mut recorded) = self.recorded.take() else {
            return Err(Error::new("nothing was rehearsed"));
        };
        if !recorded.captured.refresh(&mut recorded.pins)? {
            recorded = again(&self.scope, recorded, go_on)?;
            self.is_any_twice = is_any_twice(&recorded.captured);
        }
        self.recorded = Some(recorded);
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
        self,
        gate: &snapshim_gate::abi::Gate,
        firsts: Vec<u32>,
        goes_on: &mut dyn FnMut() -> bool,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<Captured> {
        let (Some(recorded), Some(ready)) = (self.recorded, self.ready) else {
            return Err(Error::new("nothing was rehearsed"));
        };
        let Recorded {
            mut captured, pins, ..
        } = recorded;
        let (mut deltas, mut is_compared) = (Vec::new(), false);
        let mut outcome = self.deltas.map(|mut all| {
            (deltas, is_compared) = all.take();
            Outcome {
                number: all.number(),
                files: all.to_build_on(&captured.entries, &pins),
                unexplained: all.unexplained().map(Into::into),
                ..Outcome::default()
            }
        });
        let mut copies = Vec::new();
        deltas.resize_with(pins.len(), || None);
        let mut deltas = deltas.into_iter();
        let source = |(pin, first): (Pin, u32)| {
            let entry = &captured.entries[pin.entry];
            copies.push(Pin::into_copy(pin.marked));
            sweep::Source {
                path: captured.path_of(entry),
                file: pin.file,
                size: entry.seen.size,
                first,
                target: pin.target,
                entry: pin.entry,
                delta: deltas.next().flatten(),
            }
        };
        let sources: Vec<sweep::Source> = pins.into_iter().zip(firsts).map(source).collect();
        let asked = sweep::Asked {
            guard: gate.guard(),
            asks: gate.used_asks(),
        };
        let mut moved = Vec::new();
        let (swept, unmarked) = sweep::sweep(ready, asked, &sources, is_compared, goes_on, || {
            moved = moved_unasked(&captured.entries, &sources, gate.guard());
            end()
        })?;
        if let Some(source) = swept.short.and_then(|index| sources.get(index)) {
            moved.push(Moved {
                path: source.path.clone(),
                what: "became shorter".to_owned(),
            });
        }
        if let Some(outcome) = &mut outcome {
            outcome.captured = swept.bytes;
            outcome.shared = swept.in_place;
            if is_compared {
                compare_all(outcome, &sources, &copies, self.shift, &unmarked)?;
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
    copies: &[Option<OwnedFd>],
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

/// Walks once more, into the tree that is there.
fn again(scope: &Paths, recorded: Recorded, go_on: &mut dyn FnMut() -> bool) -> Result<Recorded> {
    let Recorded {
        captured,
        plan,
        pins,
        bases,
    } = recorded;
    let pins = Pins::again(pins, &captured);
    let Captured {
        target,
        mut ahead,
        entries,
        ..
    } = captured;
    ahead.begin_again();
    let target = Target {
        dirs: Dirs::new(),
        ..target
    };
    let again = record::record(scope, plan, target, ahead, entries.len(), Some(pins), go_on)?;
    Ok(Recorded { bases, ..again })
}

impl Captured {
    /// Brings what was recorded up to date, where only files have changed; `false` if more has.
    fn refresh(&mut self, pins: &mut Vec<Pin>) -> Result<bool> {
        if !self.vanished.is_empty()
            || self
                .absent_roots
                .iter()
                .any(|root| root.symlink_metadata().is_ok())
            || !self.are_tops_in_place()
        {
            return Ok(false);
        }
        let mut xattrs = XattrReader::default();
        let mut late = Vec::new();
        // In the order of their entries.
        let mut pinned_files = pins.iter().peekable();
        for index in 0..self.entries.len() {
            let pinned = pinned_files.next_if(|pin| pin.entry == index);
            let entry = &self.entries[index];
            let is_top = self.source.place(entry.dir).is_none();
            let by_name = || {
                let dir = self.source.open(entry.dir)?;
                rustix::fs::statat(&dir, &*entry.name, AtFlags::SYMLINK_NOFOLLOW)
            };
            // Its name is what it was, as its directory has not changed.
            let pin = pinned.filter(|_| !is_top);
            let stat = match pin {
                Some(pin) => rustix::fs::fstat(&pin.file),
                None => by_name(),
            };
            let Ok(now) = stat.map(|stat| Seen::of(&stat)) else {
                return Ok(false);
            };
            if now == entry.seen {
                continue;
            }
            let is_file = matches!(entry.body, Body::File(How::Guarded | How::Ahead));
            if now.id != entry.seen.id
                || now.mode & nix::libc::S_IFMT != entry.seen.mode & nix::libc::S_IFMT
                || !is_file
                || now.nlink != entry.seen.nlink
            {
                return Ok(false);
            }
            let pin = match pinned {
                Some(pin) => pin,
                None => match self.pin_late(index)? {
                    Some(pin) => {
                        late.push(pin);
                        &late[late.len() - 1]
                    }
                    None => return Ok(false),
                },
            };
            let read = xattrs.read(&pin.file);
            let read =
                read.map_err(|cause| unreadable(&self.path_of(&self.entries[index]), cause))?;
            let entry = &mut self.entries[index];
            entry.seen = now;
            entry.xattrs = read;
            entry.body = Body::File(How::Guarded);
        }
        pins.extend(late);
        Ok(true)
    }

    /// Whether the paths to the roots still lead where they did: links above a root are followed, and may have
    /// been replaced, as may directories.
    fn are_tops_in_place(&self) -> bool {
        let mut tops = self
            .source
            .nodes()
            .filter(|node| self.source.place(*node).is_none());
        tops.all(|node| {
            let there = rustix::fs::stat(self.source.path(node));
            let here = self.source.open(node).and_then(rustix::fs::fstat);
            let id = |stat| Seen::of(&stat).id;
            there.is_ok_and(|there| here.is_ok_and(|here| id(there) == id(here)))
        })
    }

    /// Pins a file that was copied ahead: what was copied is not what it is. `None`: its name
    /// leads to something else.
    fn pin_late(&self, index: usize) -> Result<Option<Pin>> {
        let entry = &self.entries[index];
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = self.source.open(entry.dir).and_then(|dir| {
            let file = self.source.open_at(&dir, &entry.name, flags)?;
            let stat = rustix::fs::fstat(&file)?;
            Ok((file, stat))
        });
        let (file, stat) = match opened {
            Ok((file, stat)) if Seen::of(&stat).id == entry.seen.id => (file, stat),
            _ => return Ok(None),
        };
        let put_at = self.target.path_of(&self.path_of(entry));
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let to = self
            .target
            .dirs
            .open(entry.dir)
            .and_then(|dir| rustix::fs::openat(&dir, &*entry.name, flags, Mode::empty()));
        let to = to.map_err(|cause| fault("open", &put_at, cause))?;
        let size = Seen::of(&stat).size;
        let target = sweep::Target::new(put_at, to, size, record::allocated(&stat), false)?;
        Ok(Some(Pin {
            entry: index,
            file,
            target,
            marked: None,
        }))
    }

    /// Pins everything that was copied ahead: it is not sure that it is what it was.
    fn pin_all(&mut self, pins: &mut Vec<Pin>) -> Result<()> {
        for index in 0..self.entries.len() {
            if !matches!(self.entries[index].body, Body::File(How::Ahead)) {
                continue;
            }
            if let Some(pin) = self.pin_late(index)? {
                pins.push(pin);
                self.entries[index].body = Body::File(How::Guarded);
            } else {
                let path = self.path_of(&self.entries[index]);
                return Err(Error::by_chance(format!(
                    "{} was replaced while it was captured",
                    path.display()
                )));
            }
        }
        Ok(())
    }
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
