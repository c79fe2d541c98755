//! Bringing up to date what was recorded before the hold.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::path::PathBuf;

use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;
use snapshim_gate::table::FileId;

use super::Captured;
use super::moved::{self, Moved};
use super::record::{self, Body, Entry, How, Pin};
use super::sweep;
use super::tracker::{Changes, Name, Reported, Tracker};
use super::walk::{Paths, unreadable};
use crate::store::fault;
use crate::store::manifest::Kind;
use crate::tree::STAGING;
use crate::tree::dirs::{Node, as_path};
use crate::tree::metadata::{Xattr, XattrReader};
use crate::tree::seen::Seen;
use crate::{Error, Result};

/// Finds what a [`Tracker`] reports among what was recorded.
#[derive(Debug)]
pub(super) struct Followed {
    tracker: Tracker,
    entries: HashMap<(Node, Box<CStr>), usize>,
    dirs: HashMap<Node, usize>,
    /// What is not, or not certainly, reported by its name: roots, files with several names, those
    /// that were open, and those that have come since.
    always: Vec<usize>,
    /// By entry.
    pins: HashMap<usize, usize>,
    /// Reported since the cut.
    later: Changes,
    /// Pins of files that are gone: to close the last descriptor of a large one takes time.
    dropped: Vec<Pin>,
}

/// Pins that are looked at at the cut, reported or not: half a µs each.
const LOOKED_AT: usize = 2_048;

impl Followed {
    /// `open`: files that somebody had open for writing before the walk.
    pub(super) fn new(
        tracker: Tracker,
        captured: &Captured,
        pins: &[Pin],
        open: &HashSet<FileId>,
    ) -> Followed {
        let mut followed = Followed {
            tracker,
            entries: HashMap::with_capacity(captured.entries.len()),
            dirs: HashMap::new(),
            always: Vec::new(),
            pins: HashMap::new(),
            later: Changes::default(),
            dropped: Vec::new(),
        };
        for (index, entry) in captured.entries.iter().enumerate() {
            followed.enter(index, entry);
            if captured.source.place(entry.dir).is_none()
                || has_names_elsewhere(&entry.seen)
                || open.contains(&entry.seen.id)
            {
                followed.always.push(index);
            }
        }
        followed.pins = places(pins);
        followed
    }

    fn enter(&mut self, index: usize, entry: &Entry) {
        self.entries.insert((entry.dir, entry.name.clone()), index);
        if let Body::Dir(node) = entry.body {
            self.dirs.insert(node, index);
        }
    }

    /// What was reported since the last time.
    pub(super) fn take(&self) -> Changes {
        self.tracker.take()
    }
}

/// Whether it may be changed by names that nobody watches.
fn has_names_elsewhere(seen: &Seen) -> bool {
    seen.nlink > 1 && seen.kind() != Kind::Dir
}

/// Where the pins are, by entry.
fn places(pins: &[Pin]) -> HashMap<usize, usize> {
    let places = pins.iter().enumerate();
    places.map(|(at, pin)| (pin.entry, at)).collect()
}

/// What came of bringing everything up to date by what was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caught {
    /// It is up to date.
    Up,
    /// More has changed than can be mended: everything has to be walked again.
    Else,
    /// Reports were lost: everything has to be looked at.
    Lost,
}

/// What came of bringing one entry up to date.
enum Now {
    Done,
    /// More has changed than can be mended: everything has to be walked again.
    Else,
}

impl Captured {
    /// Looks at everything again, and brings it up to date where only files have changed; `false`
    /// if more has.
    pub(super) fn refresh(&mut self, pins: &mut Vec<Pin>) -> Result<bool> {
        if !self.vanished.is_empty() || !self.are_roots_in_place() {
            return Ok(false);
        }
        let mut xattrs = XattrReader::default();
        let mut places = places(pins);
        for index in 0..self.entries.len() {
            if let Now::Else = self.look_again(index, pins, &mut places, &mut xattrs)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Looks at what was reported to have changed, and brings that up to date.
    pub(super) fn follow(
        &mut self,
        scope: &Paths,
        followed: &mut Followed,
        pins: &mut Vec<Pin>,
    ) -> Result<Caught> {
        let changes = followed.take();
        if changes.is_lost {
            return Ok(Caught::Lost);
        }
        if changes.is_dir_gone || !self.are_roots_in_place() {
            return Ok(Caught::Else);
        }
        // What was gone during the walk, and came again, is reported.
        self.vanished.clear();
        let mut xattrs = XattrReader::default();
        for at in 0..followed.always.len() {
            let index = followed.always[at];
            if !self.look_at_name(index, pins, followed, &mut xattrs)? {
                return Ok(Caught::Else);
            }
        }
        let has_changed = |pin: &&Pin| {
            let seen = &self.entries[pin.entry].seen;
            !rustix::fs::fstat(&pin.file).is_ok_and(|stat| Seen::of(&stat) == *seen)
        };
        let changed = pins.iter().take(LOOKED_AT).filter(has_changed);
        for index in changed.map(|pin| pin.entry).collect::<Vec<_>>() {
            if !self.look_at_name(index, pins, followed, &mut xattrs)? {
                return Ok(Caught::Else);
            }
        }
        for node in &changes.dirs {
            let done = match followed.dirs.get(node) {
                Some(index) => self.look_at_dir(*index, *node, &mut xattrs)?,
                None => false,
            };
            if !done {
                return Ok(Caught::Else);
            }
        }
        for (name, reported) in changes.names {
            let caught = match followed.entries.get(&name).copied() {
                Some(index) => match self.look_at_name(index, pins, followed, &mut xattrs)? {
                    true => Caught::Up,
                    false => Caught::Else,
                },
                None => self.appear(scope, &name, reported, pins, followed, &mut xattrs)?,
            };
            if caught != Caught::Up {
                return Ok(caught);
            }
        }
        Ok(Caught::Up)
    }

    fn look_at_name(
        &mut self,
        index: usize,
        pins: &mut Vec<Pin>,
        followed: &mut Followed,
        xattrs: &mut XattrReader,
    ) -> Result<bool> {
        if let Body::Dir(node) = self.entries[index].body {
            return self.look_at_dir(index, node, xattrs);
        }
        match self.look_again(index, pins, &mut followed.pins, xattrs)? {
            Now::Done => Ok(true),
            Now::Else => self.replace(index, pins, followed, xattrs),
        }
    }

    fn are_roots_in_place(&self) -> bool {
        let is_there = |root: &PathBuf| root.symlink_metadata().is_ok();
        !self.absent_roots.iter().any(is_there) && self.are_tops_in_place()
    }

    /// Brings an entry up to date if nothing but a file's bytes and metadata has changed.
    fn look_again(
        &mut self,
        index: usize,
        pins: &mut Vec<Pin>,
        places: &mut HashMap<usize, usize>,
        xattrs: &mut XattrReader,
    ) -> Result<Now> {
        let entry = &self.entries[index];
        let pinned = places.get(&index).and_then(|at| pins.get(*at));
        let now = self.look_up(entry);
        let now = match now {
            Err(Errno::NOENT) if matches!(entry.body, Body::Gone) => return Ok(Now::Done),
            Ok(stat) if !matches!(entry.body, Body::Gone) => Seen::of(&stat),
            _ => return Ok(Now::Else),
        };
        if now == entry.seen {
            return Ok(Now::Done);
        }
        let is_captured = matches!(
            entry.body,
            Body::File(How::Guarded | How::Ahead | How::Shared)
        );
        if now.id != entry.seen.id
            || now.mode & nix::libc::S_IFMT != entry.seen.mode & nix::libc::S_IFMT
            || !is_captured
            || now.nlink != entry.seen.nlink
        {
            return Ok(Now::Else);
        }
        if pinned.is_none() {
            let Some(pin) = self.pin_late(index)? else {
                return Ok(Now::Else);
            };
            places.insert(index, pins.len());
            pins.push(pin);
        }
        let Some(pin) = places.get(&index).and_then(|at| pins.get(*at)) else {
            return Ok(Now::Else);
        };
        let read = xattrs.read(&pin.file);
        let read = read.map_err(|cause| unreadable(&self.path_of(&self.entries[index]), cause))?;
        let entry = &mut self.entries[index];
        entry.seen = now;
        entry.xattrs = read;
        entry.body = Body::File(How::Guarded);
        Ok(Now::Done)
    }

    /// Brings a directory up to date itself; `false` if it is not in its place.
    fn look_at_dir(&mut self, index: usize, node: Node, xattrs: &mut XattrReader) -> Result<bool> {
        let entry = &self.entries[index];
        let by_name = self.look_up(entry);
        let (Ok(now), Ok(dir)) = (by_name, self.source.open(node)) else {
            return Ok(false);
        };
        let now = Seen::of(&now);
        if now.id != entry.seen.id || now.kind() != Kind::Dir {
            return Ok(false);
        }
        let read = xattrs.read(&*dir);
        let read = read.map_err(|cause| unreadable(&self.path_of(entry), cause))?;
        let entry = &mut self.entries[index];
        entry.seen = now;
        entry.xattrs = read;
        Ok(true)
    }

    /// A file has gone, or another is there by its name.
    fn replace(
        &mut self,
        index: usize,
        pins: &mut Vec<Pin>,
        followed: &mut Followed,
        xattrs: &mut XattrReader,
    ) -> Result<bool> {
        let entry = &self.entries[index];
        let is_simple = match entry.body {
            Body::File(_) => entry.seen.nlink == 1,
            Body::Gone => true,
            _ => false,
        };
        if !is_simple {
            return Ok(false);
        }
        if let Some(at) = followed.pins.remove(&index) {
            followed.dropped.push(pins.swap_remove(at));
            if let Some(moved) = pins.get(at) {
                followed.pins.insert(moved.entry, at);
            }
        }
        let (dir, name) = (entry.dir, entry.name.clone());
        let was_gone = matches!(entry.body, Body::Gone);
        match self.new_file(dir, &name, xattrs)? {
            New::None => {
                if !was_gone {
                    self.entries[index].body = Body::Gone;
                    self.ahead.unuse(dir, &name);
                }
                Ok(true)
            }
            New::File(found) => {
                let (seen, pin, read) = *found;
                let entry = &mut self.entries[index];
                entry.seen = seen;
                entry.xattrs = read;
                entry.body = Body::File(How::Guarded);
                followed.pins.insert(index, pins.len());
                followed.always.push(index);
                pins.push(Pin {
                    entry: index,
                    ..pin
                });
                Ok(true)
            }
            New::Else => Ok(false),
        }
    }

    /// Something is reported by a name that was not known.
    fn appear(
        &mut self,
        scope: &Paths,
        name: &Name,
        reported: Reported,
        pins: &mut Vec<Pin>,
        followed: &mut Followed,
        xattrs: &mut XattrReader,
    ) -> Result<Caught> {
        let (dir, name) = (name.0, &*name.1);
        let path = || self.source.path(dir).join(as_path(name));
        if name.to_bytes() == STAGING || scope.is_excluded(&path()) {
            return Ok(Caught::Up);
        }
        match self.new_file(dir, name, xattrs)? {
            // It came and went.
            New::None if reported.has_come || !reported.has_changed => Ok(Caught::Up),
            // It had gone before: a file that was opened by this name has another now, or none.
            New::None => Ok(Caught::Lost),
            New::File(found) => {
                let (seen, pin, read) = *found;
                let entry = Entry {
                    dir,
                    name: name.into(),
                    seen,
                    body: Body::File(How::Guarded),
                    xattrs: read,
                };
                let index = self.entries.len();
                followed.enter(index, &entry);
                followed.pins.insert(index, pins.len());
                followed.always.push(index);
                self.entries.push(entry);
                pins.push(Pin {
                    entry: index,
                    ..pin
                });
                Ok(Caught::Up)
            }
            New::Else => Ok(Caught::Else),
        }
    }

    /// Looks at a name that leads to a file that was not known.
    fn new_file(&self, dir: Node, name: &CStr, xattrs: &mut XattrReader) -> Result<New> {
        let Ok(parent) = self.source.open(dir) else {
            return Ok(New::Else);
        };
        // Opening a FIFO, or a device, would be noticed.
        match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if Seen::of(&stat).kind() == Kind::File => {}
            Err(Errno::NOENT) => return Ok(New::None),
            Ok(_) | Err(_) => return Ok(New::Else),
        }
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match self.source.open_at(&parent, name, flags) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(New::None),
            Err(_) => return Ok(New::Else),
        };
        let stats =
            rustix::fs::fstat(&file).and_then(|stat| Ok((stat, rustix::fs::fstat(&*parent)?)));
        let Ok((stat, its_dir)) = stats else {
            return Ok(New::Else);
        };
        let seen = Seen::of(&stat);
        let is_plain = seen.kind() == Kind::File
            && seen.nlink == 1
            && seen.id.dev == Seen::of(&its_dir).id.dev;
        if !is_plain {
            return Ok(New::Else);
        }
        let path = || self.source.path(dir).join(as_path(name));
        let read = xattrs
            .read(&file)
            .map_err(|cause| unreadable(&path(), cause))?;
        let pin = Pin {
            entry: 0,
            file,
            target: None,
            marked: None,
        };
        Ok(New::File(Box::new((seen, pin, read))))
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

    /// Pins a file that was copied ahead or shared: its copy is not what it is. `None`: its name
    /// leads to something else.
    fn pin_late(&self, index: usize) -> Result<Option<Pin>> {
        let entry = &self.entries[index];
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = self.source.open(entry.dir).and_then(|dir| {
            let file = self.source.open_at(&dir, &entry.name, flags)?;
            let stat = rustix::fs::fstat(&file)?;
            Ok((file, stat))
        });
        match opened {
            Ok((file, stat)) if Seen::of(&stat).id == entry.seen.id => Ok(Some(Pin {
                entry: index,
                file,
                target: None,
                marked: None,
            })),
            _ => Ok(None),
        }
    }

    /// An empty file of the tree for what was pinned under the hold, where nothing is made.
    pub(super) fn target_of(&mut self, pin: &Pin) -> Result<sweep::Target> {
        let entry = &self.entries[pin.entry];
        let put_at = self.target.path_of(&self.path_of(entry));
        // Never by writing to what is there: that may be shared.
        let dir = self.target.dirs.open(entry.dir);
        let to = dir.and_then(|dir| self.ahead.file_instead(entry.dir, &dir, &entry.name));
        let to = to.map_err(|cause| fault("make", &put_at, cause))?;
        let allocated = rustix::fs::fstat(&pin.file).map_or(0, |stat| record::allocated(&stat));
        sweep::Target::new(
            put_at,
            to,
            self.entries[pin.entry].seen.size,
            allocated,
            false,
        )
    }

    /// Pins everything that was copied ahead or shared: it is not sure that it is what it was.
    pub(super) fn pin_all(&mut self, pins: &mut Vec<Pin>) -> Result<()> {
        let mut xattrs = XattrReader::default();
        for index in 0..self.entries.len() {
            if !matches!(
                self.entries[index].body,
                Body::File(How::Ahead | How::Shared)
            ) {
                continue;
            }
            if let Some(pin) = self.pin_late(index)? {
                let read = xattrs.read(&pin.file);
                let read =
                    read.map_err(|cause| unreadable(&self.path_of(&self.entries[index]), cause))?;
                self.entries[index].xattrs = read;
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

    /// Takes out what has gone since it was recorded.
    pub(super) fn forget_gone(&mut self) {
        let is_gone = |entry: &Entry| matches!(entry.body, Body::Gone);
        if !self.entries.iter().any(is_gone) {
            return;
        }
        let mut numbers = Vec::with_capacity(self.entries.len());
        let mut next = 0;
        for entry in &self.entries {
            numbers.push(next);
            next += usize::from(!is_gone(entry));
        }
        self.entries.retain(|entry| !is_gone(entry));
        for entry in &mut self.entries {
            if let Body::HardLink(first) = &mut entry.body {
                *first = numbers[*first];
            }
        }
    }

    /// What has changed and was not reported: evidence against a cut that relied on that. To be called
    /// when the capture is over, whatever programs do now. `pinned`: entries whose changes are
    /// told otherwise. `cut_ns`: a time after the cut.
    pub(super) fn moved_unreported(
        &self,
        followed: &mut Followed,
        pinned: &HashSet<usize>,
        cut_ns: i64,
    ) -> Vec<Moved> {
        /// A call moves a ctime first and is reported when it returns.
        const PATIENCE: usize = 50;
        let mut suspects = moved::differences(&self.source, &self.entries, |index, entry| {
            !pinned.contains(&index)
                && !matches!(entry.body, Body::Gone)
                && self.source.place(entry.dir).is_some()
        });
        for _ in 0..PATIENCE {
            let more = followed.take();
            followed.later.extend(more);
            let later = &followed.later;
            suspects.retain(|(index, _)| !self.is_explained(&self.entries[*index], later, cut_ns));
            if suspects.is_empty() {
                return Vec::new();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let moved = suspects.into_iter().map(|(index, what)| Moved {
            path: self.path_of(&self.entries[index]),
            what,
        });
        moved.collect()
    }

    /// Whether a change is one of after the cut.
    fn is_explained(&self, entry: &Entry, later: &Changes, cut_ns: i64) -> bool {
        let is_reported = match entry.body {
            Body::Dir(node) if later.dirs.contains(&node) => true,
            _ => later.names.contains_key(&(entry.dir, entry.name.clone())),
        };
        if is_reported {
            return true;
        }
        let stat = self.look_up(entry);
        match stat.map(|stat| Seen::of(&stat)) {
            // Of lost reports, its own may have been one.
            Ok(now) if now.id == entry.seen.id => later.is_lost && now.ctime_ns >= cut_ns,
            // By way of a directory above it.
            Ok(_) | Err(_) => !later.dirs.is_empty() || later.is_lost,
        }
    }
}

/// What a name leads to.
enum New {
    /// Nothing.
    None,
    /// A regular file, with no other name.
    File(Box<(Seen, Pin, Vec<Xattr>)>),
    Else,
}
