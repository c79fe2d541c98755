//! Capturing after the cut: everything but the bytes of files is read before it, and at the cut
//! only what has changed since.
//!
//! Nothing that is in a directory can have come or gone while the directory's ctime stands. If
//! one has moved, all of it is walked again, under the hold.

use std::collections::{HashMap, HashSet};

use rustix::fs::AtFlags;
use snapshim_gate::guard::{self, Guard, METADATA, NAMES};

use super::record::{Body, Entry, How, Pin, Pins, Recorded, Target};
use super::walk::{Paths, unreadable};
use super::{Captured, Member, Prepared, record, sweep};
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
    shift: u32,
    devices: Vec<u64>,
}

/// How many files can be captured after the cut: two descriptors each.
fn most_files() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Nothing of ours uses select(2), for which the soft limit is as low as it is.
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised);
    let now = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let files = now.saturating_sub(OTHER_DESCRIPTORS) / 2;
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

    /// Reads everything but the bytes of files, and opens those. To be called before the hold.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn rehearse(self) -> Result<Rehearsed> {
        let Prepared {
            scope,
            scan,
            plan,
            target,
            ahead,
            ..
        } = self;
        let sizes = scan.members.iter().map(|known| known.seen.size);
        let bytes = sizes.clone().sum();
        // Room to grow until the cut.
        let grown = sizes.map(|size| size.saturating_add(size / 8));
        let shift = guard::shift_for(grown).unwrap_or(guard::MAX_SHIFT);
        let ready = sweep::ready(shift, bytes)?;
        let devices = scan.devices.iter().copied().collect();
        let pins = Some(Pins::default());
        let expected = scan.members.len();
        let recorded = record::record(&scope, plan, target, ahead, expected, pins, &mut || true)?;
        Ok(Rehearsed {
            scope,
            recorded: Some(recorded),
            ready: Some(ready),
            shift,
            devices,
        })
    }
}

impl Rehearsed {
    /// See [`Prepared::devices`].
    pub fn devices(&self) -> Vec<u64> {
        self.devices.clone()
    }

    /// See [`Captured::members`].
    pub fn members(&self) -> Vec<Member> {
        let captured = self
            .recorded
            .as_ref()
            .map(|recorded| recorded.captured.members());
        captured.unwrap_or_default()
    }

    /// Brings everything up to date. To be called at the cut, with the gate shut and drained.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`].
    pub fn cut(&mut self, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let Some(mut recorded) = self.recorded.take() else {
            return Err(Error::new("nothing was rehearsed"));
        };
        if !recorded.captured.refresh(&recorded.pins)? {
            recorded = again(&self.scope, recorded, go_on)?;
        }
        self.recorded = Some(recorded);
        Ok(())
    }

    /// Chunks are 2 to the power of this, bytes.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// What is to be guarded, with the sizes at the cut.
    pub fn guarded(&self) -> impl Iterator<Item = guard::Member> {
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

    /// Whether one file is there twice, and not as a hard link: below a bind mount. It has one
    /// place among what is guarded.
    pub fn is_any_twice(&self) -> bool {
        let mut seen = HashSet::new();
        self.guarded().any(|member| !seen.insert(member.id))
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
        let source = |(pin, first): (Pin, u32)| {
            let entry = &captured.entries[pin.entry];
            sweep::Source {
                path: captured.path_of(entry),
                file: pin.file,
                size: entry.seen.size,
                first,
                target: pin.target,
                entry: pin.entry,
            }
        };
        let sources: Vec<sweep::Source> = pins.into_iter().zip(firsts).map(source).collect();
        let asked = sweep::Asked {
            guard: gate.guard(),
            asks: gate.used_asks(),
        };
        let mut unasked = Vec::new();
        let swept = sweep::sweep(ready, asked, &sources, goes_on, || {
            // Before programs may change everything, and need not say so.
            unasked = moved_unasked(&captured.entries, &sources, gate.guard());
            end()
        })?;
        if swept.is_short {
            let first = sources.first().map(|source| source.path.clone());
            unasked.push(super::Moved {
                path: first.unwrap_or_default(),
                what: "or another file became shorter".to_owned(),
            });
        }
        captured.unasked = unasked;
        captured.swept = Some(swept);
        Ok(captured)
    }
}

/// Walks once more, into the tree that is there.
fn again(scope: &Paths, recorded: Recorded, go_on: &mut dyn FnMut() -> bool) -> Result<Recorded> {
    let Recorded {
        captured,
        plan,
        pins,
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
    record::record(scope, plan, target, ahead, entries.len(), Some(pins), go_on)
}

impl Captured {
    /// Brings what was recorded up to date, where only files have changed; `false` if more has.
    fn refresh(&mut self, pins: &[Pin]) -> Result<bool> {
        if !self.vanished.is_empty()
            || self
                .absent_roots
                .iter()
                .any(|root| root.symlink_metadata().is_ok())
        {
            return Ok(false);
        }
        let mut xattrs = XattrReader::default();
        let pinned: HashMap<usize, &Pin> = pins.iter().map(|pin| (pin.entry, pin)).collect();
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            let is_top = self.source.place(entry.dir).is_none();
            let by_name = || {
                let dir = self.source.open(entry.dir)?;
                rustix::fs::statat(&dir, &*entry.name, AtFlags::SYMLINK_NOFOLLOW)
            };
            // Its name is what it was, as its directory has not changed.
            let pin = pinned.get(&index).filter(|_| !is_top);
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
            let is_file = matches!(entry.body, Body::File(How::Guarded));
            if now.id != entry.seen.id
                || now.mode & nix::libc::S_IFMT != entry.seen.mode & nix::libc::S_IFMT
                || !is_file
                || now.nlink != entry.seen.nlink
            {
                return Ok(false);
            }
            let Some(pin) = pinned.get(&index) else {
                return Ok(false);
            };
            let read = xattrs.read(&pin.file);
            let read =
                read.map_err(|cause| unreadable(&self.path_of(&self.entries[index]), cause))?;
            let entry = &mut self.entries[index];
            entry.seen = now;
            entry.xattrs = read;
        }
        Ok(true)
    }

    /// What changed since the cut without having asked: evidence against a capture that went on
    /// while programs ran.
    pub fn moved_unasked(&self) -> Vec<super::Moved> {
        self.unasked.clone()
    }
}

/// See [`Captured::moved_unasked`]. To be called when all is read, with the gate still guarded.
fn moved_unasked(entries: &[Entry], sources: &[sweep::Source], guard: &Guard) -> Vec<super::Moved> {
    let mut moved = Vec::new();
    for source in sources {
        let then = &entries[source.entry].seen;
        let Ok(now) = rustix::fs::fstat(&source.file).map(|stat| Seen::of(&stat)) else {
            continue;
        };
        // After the look at the file: calls say so before they change anything.
        if now.ctime_ns == then.ctime_ns || guard.was_touched(then.id) {
            continue;
        }
        let by_path = guard.changed_by_path();
        // Names and metadata that were changed by path move a ctime; only the latter an mtime.
        let has_content_moved = now.size != then.size || now.mtime_ns != then.mtime_ns;
        let is_explained = by_path & METADATA != 0 || by_path & NAMES != 0 && !has_content_moved;
        if !is_explained {
            moved.push(super::Moved {
                path: source.path.clone(),
                what: "was written to or had its metadata changed (ctime moved)".to_owned(),
            });
        }
    }
    moved
}
