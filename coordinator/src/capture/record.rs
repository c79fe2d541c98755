//! Under the hold: bytes into fresh files, everything else into memory.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use snapshim_gate::table::FileId;

use super::ahead::Ahead;
use super::base::Base;
use super::prepare::{Plan, Way, no_reflink, not_written_back, other_file_system};
use super::tracker::Tracker;
use super::walk::{At, Found, Looked, Paths, Visitor, look_at, unreadable, walk};
use super::{Captured, Method, Prepared, delta, sweep};
use crate::digest::InMemory;
use crate::store::fault;
use crate::store::manifest::Kind;
use crate::tally::{Step, Tally};
use crate::tree::dirs::{Dirs, Node};
use crate::tree::metadata::{Xattr, XattrReader};
use crate::tree::seen::{Seen, now_ns};
use crate::tree::{copy, reflink};
use crate::{Error, Result};

/// The tree that is written. Its directories have the numbers of the source's.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) path: PathBuf,
    pub(super) fd: Arc<OwnedFd>,
    pub(super) id: FileId,
    pub(super) dirs: Dirs,
    /// What is above the roots, relative to the tree.
    pub(super) ancestors: Vec<PathBuf>,
    /// How far it is.
    pub(super) tally: Tally,
}

/// One name in the tree.
#[derive(Debug)]
pub(super) struct Entry {
    /// The directory it is in.
    pub(super) dir: Node,
    pub(super) name: Box<CStr>,
    pub(super) seen: Seen,
    pub(super) body: Body,
    pub(super) xattrs: Vec<Xattr>,
}

/// What an entry has besides metadata.
#[derive(Debug)]
pub(super) enum Body {
    /// A regular file, captured.
    File(How),
    /// A further name of what was captured as the entry of this index.
    HardLink(usize),
    /// A directory, and its number.
    Dir(Node),
    /// A symbolic link, and where it points.
    Symlink(Box<CStr>),
    /// FIFO, socket or device.
    Special,
    /// Nothing: it was a file before the hold, and had gone at the cut.
    Gone,
}

/// How a file's bytes were captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Reflink,
    Copy,
    /// After the cut, see [`super::sweep`].
    Guarded,
    /// Before the hold. At the cut it was what it was then.
    Ahead,
    /// Not at all: it is what it was in the previous snapshot, and shares the copy there.
    Shared,
}

/// Files up to this size, bytes, are copied before the hold, if they seem to be left alone: what
/// has changed by the time of the cut is captured after it.
const SMALL: u64 = 256 << 10;
/// For so long, ns.
pub(super) const LEFT_ALONE: i64 = 50_000_000;

/// A file that is to be captured after the cut: open, so that it stays, whatever becomes of
/// its name.
#[derive(Debug)]
pub(super) struct Pin {
    /// Its entry, by index.
    pub(super) entry: usize,
    pub(super) file: OwnedFd,
    /// Made when the capture begins, if it was pinned at the cut.
    pub(super) target: Option<sweep::Target>,
    /// If calls mark what they change of it.
    pub(super) marked: Option<delta::Marked>,
}

/// Files that are pinned, and those pinned by an earlier walk.
#[derive(Debug, Default)]
pub(super) struct Pins {
    pub(super) pins: Vec<Pin>,
    /// By identity, with the path.
    earlier: HashMap<FileId, (PathBuf, Pin)>,
    /// Files that were copied ahead, by the path.
    copied: HashMap<PathBuf, Seen>,
    /// What files were when they were first looked at, by identity. If that is what they still
    /// are, they may be copied ahead. Of a walk under a hold, none.
    known: HashMap<FileId, Seen>,
    is_late: bool,
    /// What calls have marked. Of a walk under a hold, none.
    bases: Option<delta::Bases>,
}

impl Entry {
    pub(super) fn is_file(&self) -> bool {
        self.seen.kind() == Kind::File && !matches!(self.body, Body::Gone)
    }
}

impl Target {
    pub(super) fn open(tree: &Path) -> Result<Target> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(tree, flags, Mode::empty())
            .map_err(|cause| fault("open the tree", tree, cause))?;
        let stat =
            rustix::fs::fstat(&fd).map_err(|cause| fault("look at the tree", tree, cause))?;
        // By its path, of which others may own a part: what they put there is not ours.
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(Error::new(format!(
                "the directory {} was replaced by another user's",
                tree.display()
            ))
            .next("choose a store with --store that nobody else can move"));
        }
        Ok(Target {
            path: tree.to_owned(),
            fd: Arc::new(fd),
            id: Seen::of(&stat).id,
            dirs: Dirs::new(),
            ancestors: Vec::new(),
            tally: Tally::default(),
        })
    }

    /// Makes the directory that stands for `parent`, which is absolute, and those above it.
    /// They are not captured: plain, 0700.
    pub(super) fn make_ancestors(&mut self, parent: &Path) -> Result<Arc<OwnedFd>> {
        let mut fd = Arc::clone(&self.fd);
        let mut below = PathBuf::new();
        for part in parent.components() {
            let Component::Normal(name) = part else {
                continue;
            };
            below.push(name);
            fd = Arc::new(self.make_dir(&fd, name, || self.path.join(&below), true)?);
            if !self.ancestors.contains(&below) {
                self.ancestors.push(below.clone());
            }
        }
        Ok(fd)
    }

    pub(super) fn make_dir<P: rustix::path::Arg + Copy>(
        &self,
        parent: impl AsFd,
        name: P,
        path: impl Fn() -> PathBuf,
        may_exist: bool,
    ) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) if may_exist => {}
            Err(cause) => return Err(fault("make", &path(), cause)),
        }
        rustix::fs::openat(&parent, name, flags, Mode::empty())
            .map_err(|cause| fault("open", &path(), cause))
    }

    /// Opens a directory of the tree by its path there, following no symbolic link.
    pub(super) fn open_below(&self, below: &Path) -> rustix::io::Result<Arc<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut fd = Arc::clone(&self.fd);
        for name in below {
            fd = Arc::new(rustix::fs::openat(&fd, name, flags, Mode::empty())?);
        }
        Ok(fd)
    }

    /// Where an entry of the live tree is put, for messages.
    pub(super) fn path_of(&self, live: &Path) -> PathBuf {
        self.path.join(live.strip_prefix("/").unwrap_or(live))
    }

    /// Does something with an empty file in the tree that has no name any more.
    pub(super) fn with_scratch<T>(&self, work: impl FnOnce(OwnedFd) -> T) -> Result<T> {
        const NAME: &str = ".snapshim-scratch";
        let failed = |cause| fault("write to", &self.path, cause);
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(&self.fd, NAME, flags, mode).map_err(failed)?;
        rustix::fs::unlinkat(&self.fd, NAME, AtFlags::empty()).map_err(failed)?;
        Ok(work(file))
    }
}

/// See [`Prepared::capture`].
pub(super) fn capture(prepared: Prepared, go_on: &mut dyn FnMut() -> bool) -> Result<Captured> {
    let Prepared {
        scope,
        scan,
        plan,
        target,
        ahead,
        base,
        ..
    } = prepared;
    let into = Into {
        plan,
        target,
        ahead,
        base,
        expected: scan.members.len(),
        tracker: None,
    };
    let bytes = scan.to_capture().map(|known| known.seen.size);
    into.target.tally.begin(Step::Capture, bytes.sum());
    drop(scan);
    let recorded = record(&scope, into, None, go_on)?;
    recorded.captured.target.tally.end();
    Ok(recorded.captured)
}

/// What a walk captures into, and how.
#[derive(Debug)]
pub(super) struct Into {
    pub(super) plan: Plan,
    pub(super) target: Target,
    pub(super) ahead: Ahead,
    pub(super) base: Option<Base>,
    /// How many files there were the last time.
    pub(super) expected: usize,
    /// What watches the directories from now on.
    pub(super) tracker: Option<Tracker>,
}

/// What a walk brought.
#[derive(Debug)]
pub(super) struct Recorded {
    pub(super) captured: Captured,
    pub(super) plan: Plan,
    pub(super) pins: Vec<Pin>,
    pub(super) tracker: Option<Tracker>,
    pub(super) bases: Option<delta::Bases>,
}

/// Walks, and records everything; files are captured, or pinned if there are `pins`.
pub(super) fn record(
    scope: &Paths,
    into: Into,
    pins: Option<Pins>,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Recorded> {
    let Into {
        plan,
        target,
        ahead,
        base,
        expected,
        tracker,
    } = into;
    let mut source = Dirs::new().without_atime();
    let mut recorder = Recorder {
        plan,
        target,
        ahead,
        base,
        entries: Vec::with_capacity(expected + expected / 8 + 16),
        names: HashMap::new(),
        xattrs: XattrReader::default(),
        buffer: Vec::new(),
        vanished: Vec::new(),
        absent_roots: Vec::new(),
        pins,
        tracker,
        go_on,
    };
    walk(scope, &mut source, &mut recorder)?;
    let pins = recorder.pins.unwrap_or_default();
    Ok(Recorded {
        captured: Captured {
            source,
            target: recorder.target,
            ahead: recorder.ahead,
            entries: recorder.entries,
            vanished: recorder.vanished,
            absent_roots: recorder.absent_roots,
            swept: None,
            delta: None,
            digests: InMemory::default(),
            moved_unasked: Vec::new(),
            is_subvolume: false,
            base: recorder.base,
        },
        plan: recorder.plan,
        pins: pins.pins,
        bases: pins.bases,
        tracker: recorder.tracker,
    })
}

impl Pins {
    /// Pins files, and copies such as are what is `known` of them.
    pub(super) fn first(known: HashMap<FileId, Seen>, bases: Option<delta::Bases>) -> Pins {
        Pins {
            known,
            bases,
            ..Pins::default()
        }
    }

    /// Pins files of a tree that has been walked before; those in the same place stay pinned.
    pub(super) fn again(pins: Vec<Pin>, captured: &Captured) -> Pins {
        let earlier = pins.into_iter().map(|pin| {
            let entry = &captured.entries[pin.entry];
            (entry.seen.id, (captured.path_of(entry), pin))
        });
        let is_copied = |entry: &&Entry| matches!(entry.body, Body::File(How::Ahead));
        let copied = captured.entries.iter().filter(is_copied);
        Pins {
            pins: Vec::new(),
            earlier: earlier.collect(),
            copied: copied
                .map(|entry| (captured.path_of(entry), entry.seen))
                .collect(),
            known: HashMap::new(),
            is_late: true,
            bases: None,
        }
    }
}

struct Recorder<'a> {
    plan: Plan,
    target: Target,
    ahead: Ahead,
    base: Option<Base>,
    entries: Vec<Entry>,
    /// The first name of each file that has several, by index.
    names: HashMap<FileId, usize>,
    xattrs: XattrReader,
    /// For copies; made when first needed.
    buffer: Vec<u8>,
    vanished: Vec<PathBuf>,
    absent_roots: Vec<PathBuf>,
    /// If files are only pinned.
    pins: Option<Pins>,
    tracker: Option<Tracker>,
    go_on: &'a mut dyn FnMut() -> bool,
}

impl Visitor for Recorder<'_> {
    fn absent(&mut self, root: &Path, _: Option<&OwnedFd>) -> Result<()> {
        self.absent_roots.push(root.to_owned());
        Ok(())
    }

    fn top(&mut self, parent: &Path, _: Node) -> Result<()> {
        // Made by prepare, unless the root has appeared since.
        let fd = self.target.make_ancestors(parent)?;
        let fd = rustix::io::dup(&fd).map_err(|cause| fault("open", &self.target.path, cause))?;
        let node = self.target.dirs.add_top(parent, fd);
        self.ahead.enter(node, parent);
        Ok(())
    }

    fn entry(
        &mut self,
        at: &At<'_>,
        name: &CStr,
        kind: Option<FileType>,
        looked: Looked,
    ) -> Result<Found> {
        if !(self.go_on)() {
            return Err(self.stopped());
        }
        if let Some(id) = self.ahead.shared(at.node, name) {
            let looked = looked.unwrap_or_else(|| look_at(at.fd, name));
            if self.is_shared(at, name, id, looked)? {
                return Ok(Found::Entry);
            }
        }
        self.own(at, name, kind)
    }

    fn shares_looks(&self) -> bool {
        self.base.is_some()
    }

    fn dir(&mut self, at: &At<'_>, name: &CStr, fd: &OwnedFd, seen: Seen) -> Result<()> {
        if !(self.go_on)() {
            return Err(self.stopped());
        }
        let live = at.path(name);
        let target = &self.target;
        let put_at = || target.path_of(&live);
        let parent = target
            .dirs
            .open(at.node)
            .map_err(|cause| fault("open", &put_at(), cause))?;
        let exists = self.ahead.dir(at.node, &parent, name);
        let exists = exists.map_err(|cause| fault("make", &put_at(), cause))?;
        let made = Arc::new(target.make_dir(&parent, name, put_at, exists)?);
        let node = self.target.dirs.add(at.node, name, None, &made);
        self.ahead.enter(node, &live);
        let mut seen = seen;
        if let Some(tracker) = &self.tracker {
            tracker.watch(node, fd);
            // As it was when it was watched already.
            let stat = rustix::fs::fstat(fd).map_err(|cause| unreadable(&live, cause))?;
            seen = Seen::of(&stat);
        }
        let read = self.xattrs.read(fd);
        let xattrs = read.map_err(|cause| unreadable(&live, cause))?;
        self.push(at.node, name, seen, Body::Dir(node), xattrs);
        Ok(())
    }

    fn gone(&mut self, path: PathBuf) {
        self.vanished.push(path);
    }

    fn follows_changes(&self) -> bool {
        self.pins.is_some()
    }
}

impl Recorder<'_> {
    /// What is not shared with the previous snapshot.
    fn own(&mut self, at: &At<'_>, name: &CStr, kind: Option<FileType>) -> Result<Found> {
        let known_file = kind == Some(FileType::RegularFile);
        if known_file && let Some(file) = open_file(at, name)? {
            return self.file(at, name, file);
        }
        let seen = match look_at(at.fd, name) {
            Ok(seen) => seen,
            Err(Errno::NOENT) => return Ok(Found::Gone),
            Err(cause) => return Err(unreadable(&at.path(name), cause)),
        };
        if !matches!(seen.kind(), Kind::Dir | Kind::File) && self.is_further_name(at, name, seen) {
            return Ok(Found::Entry);
        }
        let body = match seen.kind() {
            Kind::Dir => return Ok(Found::Dir),
            // Of a kind the listing did not say, or that has just become a file. If
            // it is none any more, it changes faster than it can be looked at.
            Kind::File => {
                return match open_file(at, name)? {
                    Some(file) => self.file(at, name, file),
                    None => Ok(Found::Gone),
                };
            }
            Kind::Symlink => match rustix::fs::readlinkat(at.fd, name, Vec::new()) {
                Ok(points_to) => Body::Symlink(points_to.into_boxed_c_str()),
                // Replaced since, by something that is no link.
                Err(Errno::NOENT | Errno::INVAL) => return Ok(Found::Gone),
                Err(cause) => return Err(unreadable(&at.path(name), cause)),
            },
            Kind::Fifo | Kind::Socket | Kind::Device => Body::Special,
        };
        let xattrs = self.xattrs_by_name(at, name)?;
        self.push(at.node, name, seen, body, xattrs);
        Ok(Found::Entry)
    }
}

/// Opens a regular file; `None` if it is gone or something else by now.
fn open_file(at: &At<'_>, name: &CStr) -> Result<Option<OwnedFd>> {
    // O_NONBLOCK: should it be a FIFO by now, or leased, this must not wait.
    match at
        .dirs
        .open_at(at.fd, name, OFlags::NONBLOCK | OFlags::NOCTTY)
    {
        Ok(file) => Ok(Some(file)),
        // A symbolic link by now, or a socket or device without driver.
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::NODEV) => Ok(None),
        Err(cause) => Err(unreadable(&at.path(name), cause)),
    }
}

/// Bytes that a file takes.
pub(super) fn allocated(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512)
}

/// Whether a file may be copied ahead, by what was seen of it.
pub(super) fn is_small(seen: &Seen) -> bool {
    seen.size <= SMALL && shows_when_changed(seen.ctime_ns)
}

/// With a ctime in whole seconds, what is changed in a second that has begun already shows nothing.
pub(super) fn shows_when_changed(ctime_ns: i64) -> bool {
    ctime_ns % 1_000_000_000 != 0
}

/// Whether the first store into each page of a mapping moves the ctime of a file. On tmpfs a page that was
/// only read is writable already: who maps a file, reads it, stores into it and unmaps it, all between
/// two looks, leaves no trace.
pub(super) fn shows_stores(fd: impl AsFd) -> bool {
    matches!(reflink::file_system(fd).as_str(), "xfs" | "btrfs" | "ext4")
}

/// Copies a file before the hold, if that is worth it; whether it was the same all the time.
/// No call may be in flight that began before it was `seen`.
fn copy_ahead(
    to: &OwnedFd,
    file: &OwnedFd,
    seen: &Seen,
    buffer: &mut Vec<u8>,
    put_at: &Path,
) -> Result<bool> {
    let age = now_ns().saturating_sub(seen.ctime_ns);
    if !is_small(seen) || age < LEFT_ALONE || !shows_stores(file) {
        return Ok(false);
    }
    buffer.resize(copy::CHUNK, 0);
    let copied = copy::copy(to, file, seen.size, buffer, &mut || true);
    match copied {
        Ok(()) => {}
        Err(copy::Failed::Write(cause)) => return Err(fault("write to", put_at, cause)),
        // The capture itself will say what is wrong with it.
        Err(copy::Failed::Stopped | copy::Failed::Read(_)) => return empty(to, put_at),
    }
    match rustix::fs::fstat(file).map(|stat| Seen::of(&stat)) {
        Ok(now) if now == *seen => Ok(true),
        _ => empty(to, put_at),
    }
}

fn empty(to: &OwnedFd, put_at: &Path) -> Result<bool> {
    rustix::fs::ftruncate(to, 0).map_err(|cause| fault("write to", put_at, cause))?;
    Ok(false)
}

impl Recorder<'_> {
    /// Whether this is the file `id` as it was in the previous snapshot, and is shared with
    /// that. Then it is recorded as such.
    fn is_shared(
        &mut self,
        at: &At<'_>,
        name: &CStr,
        id: FileId,
        looked: rustix::io::Result<Seen>,
    ) -> Result<bool> {
        let Some(base) = &self.base else {
            return Ok(false);
        };
        let seen = match looked {
            Ok(seen) => seen,
            Err(Errno::NOENT) => return Ok(false),
            Err(cause) => return Err(unreadable(&at.path(name), cause)),
        };
        if seen.id != id || base.find(&seen).is_none() || self.names.contains_key(&id) {
            return Ok(false);
        }
        self.ahead.take(at.node, name);
        if seen.nlink > 1 {
            self.names.insert(id, self.entries.len());
        }
        // Its attributes are those of the copy.
        self.push(at.node, name, seen, Body::File(How::Shared), Vec::new());
        Ok(true)
    }

    /// Captures an open file. What was opened counts, whatever the name leads to by now.
    fn file(&mut self, at: &At<'_>, name: &CStr, file: OwnedFd) -> Result<Found> {
        let stat = rustix::fs::fstat(&file).map_err(|cause| unreadable(&at.path(name), cause))?;
        let seen = Seen::of(&stat);
        match seen.kind() {
            Kind::File => {}
            Kind::Dir => return Ok(Found::Dir),
            // Became something else between listing and opening.
            _ => return Ok(Found::Gone),
        }
        if self.is_further_name(at, name, seen) {
            return Ok(Found::Entry);
        }
        let xattrs = self
            .xattrs
            .read(&file)
            .map_err(|cause| unreadable(&at.path(name), cause))?;
        let how = match self.pins.is_some() {
            true => self.pin(at, name, file, &stat)?,
            false => self.bytes(at, name, &file, &seen)?,
        };
        self.push(at.node, name, seen, Body::File(how), xattrs);
        Ok(Found::Entry)
    }

    /// Keeps an open file for later.
    fn pin(&mut self, at: &At<'_>, name: &CStr, file: OwnedFd, stat: &Stat) -> Result<How> {
        let seen = Seen::of(stat);
        let live = at.path(name);
        let put_at = self.target.path_of(&live);
        let entry = self.entries.len();
        let Some(pins) = &mut self.pins else {
            return Ok(How::Guarded);
        };
        // Its copy is in place, and still what it is.
        if pins.copied.get(&live) == Some(&seen) && self.ahead.take_own(at.node, name) {
            return Ok(How::Ahead);
        }
        let pin = match pins.earlier.remove(&seen.id) {
            // Its empty file is in place.
            Some((path, pin)) if path == live && self.ahead.take_own(at.node, name) => {
                Pin { entry, ..pin }
            }
            _ => {
                let dirs = &self.target.dirs;
                let dir = dirs
                    .open(at.node)
                    .map_err(|cause| fault("open", &put_at, cause))?;
                let to = self.ahead.file(at.node, &dir, name);
                let to = to.map_err(|cause| fault("make", &put_at, cause))?;
                if pins.is_late {
                    // It may have been copied into.
                    rustix::fs::ftruncate(&to, 0)
                        .map_err(|cause| fault("write to", &put_at, cause))?;
                } else if pins.known.get(&seen.id) == Some(&seen)
                    && copy_ahead(&to, &file, &seen, &mut self.buffer, &put_at)?
                {
                    self.target.tally.add(seen.size);
                    return Ok(How::Ahead);
                }
                let marked = match pins.bases.as_ref().filter(|_| !pins.is_late) {
                    Some(bases) => bases.open(&file, &seen, &to, &put_at)?,
                    None => None,
                };
                // What is in place already needs no room, and zeros have to be written over it.
                let is_placed = marked.as_ref().is_some_and(delta::Marked::is_placed);
                Pin {
                    entry,
                    file,
                    target: Some(sweep::Target::new(
                        put_at,
                        to,
                        seen.size,
                        allocated(stat),
                        is_placed,
                    )?),
                    marked,
                }
            }
        };
        pins.pins.push(pin);
        Ok(How::Guarded)
    }

    /// Whether this is a further name of something captured already: then it is
    /// recorded as such. If it has further names, its first is remembered.
    fn is_further_name(&mut self, at: &At<'_>, name: &CStr, seen: Seen) -> bool {
        if seen.nlink < 2 {
            return false;
        }
        if let Some(first) = self.names.get(&seen.id) {
            let body = Body::HardLink(*first);
            self.push(at.node, name, seen, body, Vec::new());
            return true;
        }
        self.names.insert(seen.id, self.entries.len());
        false
    }

    /// The extended attributes of what cannot be opened to read it. What was replaced in
    /// between shows when ctimes are compared.
    fn xattrs_by_name(&mut self, at: &At<'_>, name: &CStr) -> Result<Vec<Xattr>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let read = rustix::fs::openat(at.fd, name, flags, Mode::empty())
            .and_then(|fd| self.xattrs.read_path(fd));
        match read {
            Ok(xattrs) => Ok(xattrs),
            Err(Errno::NOENT) => Ok(Vec::new()),
            Err(cause) => Err(unreadable(&at.path(name), cause)),
        }
    }

    fn bytes(&mut self, at: &At<'_>, name: &CStr, file: &OwnedFd, seen: &Seen) -> Result<How> {
        let target = &self.target;
        let put_at = || target.path_of(&at.path(name));
        let dir = target
            .dirs
            .open(at.node)
            .map_err(|cause| fault("open", &put_at(), cause))?;
        let to = self.ahead.file(at.node, &dir, name);
        let to = to.map_err(|cause| fault("make", &put_at(), cause))?;
        let way = self.plan.way(seen.id.dev);
        if way != Way::Copy {
            match reflink::clone(&to, file) {
                Ok(()) => {
                    if way == Way::Unknown {
                        self.plan.decide(seen.id.dev, Way::Reflink);
                    }
                    target.tally.add(seen.size);
                    return Ok(How::Reflink);
                }
                // Nothing of this device has been cloned yet: a property of the file
                // system, not a failure.
                Err(cause) if way == Way::Unknown && reflink::is_unsupported(cause) => {
                    if self.plan.method == Method::Reflink {
                        return Err(no_reflink(&at.path(name), file));
                    }
                    self.plan.decide(seen.id.dev, Way::Copy);
                }
                Err(cause) => return Err(self.not_cloned(&at.path(name), cause)),
            }
        }
        self.buffer.resize(copy::CHUNK, 0);
        let (tally, before) = (&target.tally, target.tally.done());
        let mut go_on = || {
            tally.add(copy::CHUNK as u64);
            (self.go_on)()
        };
        let copied = copy::copy(&to, file, seen.size, &mut self.buffer, &mut go_on);
        tally.set(before + seen.size);
        match copied {
            Ok(()) => Ok(How::Copy),
            Err(copy::Failed::Stopped) => Err(self.stopped()),
            Err(copy::Failed::Read(cause)) => Err(unreadable(&at.path(name), cause)),
            Err(copy::Failed::Write(cause)) => Err(fault("write", &put_at(), cause)),
        }
    }

    /// A clone that failed. Never made good by a copy: after an error in
    /// writing back, a file's cached bytes and its extents can differ, and a later clone
    /// of it "succeeds" with zeros.
    fn not_cloned(&self, live: &Path, cause: Errno) -> Error {
        let message = format!("cannot clone {}: {cause}", live.display());
        match cause {
            Errno::NOSPC | Errno::DQUOT | Errno::ROFS => {
                fault("clone to", &self.target.path_of(live), cause)
            }
            Errno::XDEV => other_file_system(live, &self.target, self.plan.method),
            Errno::IO => not_written_back(live, cause),
            Errno::TXTBSY => {
                Error::new(message).next("it is a swap file: leave it out with --exclude")
            }
            _ => Error::new(message).next("leave it out with --exclude, or pass --capture copy"),
        }
    }

    fn stopped(&self) -> Error {
        Error::aborted(format!(
            "the hold was over after {} entries, before all were captured",
            self.entries.len()
        ))
        .next("watch fewer or smaller files, keep them on XFS or btrfs, or raise --max-hold")
    }

    fn push(&mut self, dir: Node, name: &CStr, seen: Seen, body: Body, xattrs: Vec<Xattr>) {
        self.entries.push(Entry {
            dir,
            name: name.into(),
            seen,
            body,
            xattrs,
        });
    }
}
