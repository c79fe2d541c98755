//! Before the gate is shut: what is there, how it can be captured, and flushing ahead.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, seek};
use rustix::io::Errno;

use super::ahead::Ahead;
use super::base::Base;
use super::mounted::mounted;
use super::predict::{self, Flush, Means};
use super::record::{self, Target};
use super::rehearse::can_be_guarded;
use super::sweep::bytes_to_spare;
use super::walk::{At, Found, Looked, Paths, Visitor, look_at, unreadable, walk};
use super::{Member, Method, Prepared, Scope, flush, subvolume};
use crate::interrupt;
use crate::store::fault;
use crate::store::manifest::Kind;
use crate::tally::{Step, Tally};
use crate::tree::dirs::{Dirs, Node, as_path};
use crate::tree::free;
use crate::tree::reflink;
use crate::tree::seen::{Seen, now_ns};
use crate::{Error, Result};

/// Members whose writeback is under way at a time.
const BATCH: usize = 64;

/// The kernel reads no more ahead at once than the device usually has read ahead, or takes in a request
/// (`force_page_cache_ra`, mm/readahead.c): no less than this as a rule, bytes.
const AHEAD: u64 = 128 << 10;

/// So many names take a while to reach the disk.
const MANY_NAMES: usize = 1_000;

/// What the walk before the hold found.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) dirs: Dirs,
    pub(super) members: Vec<Known>,
    pub(super) devices: BTreeSet<u64>,
    /// When the walk began and ended, as file systems tell the time, ns.
    pub(super) times: Range<i64>,
    /// A directory on each device.
    places: BTreeMap<u64, PathBuf>,
}

/// A member in a [`Scan`].
#[derive(Debug)]
pub(super) struct Known {
    pub(super) dir: Node,
    pub(super) name: Box<CStr>,
    pub(super) seen: Seen,
    /// Its copy is shared with the previous snapshot, unless it changes.
    pub(super) is_shared: bool,
}

/// How the files of a device are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Reflink,
    Copy,
    /// There was no file to try with: the first one decides.
    Unknown,
}

/// A [`Way`] for each device.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) method: Method,
    ways: BTreeMap<u64, Way>,
}

impl Plan {
    pub(super) fn new(method: Method) -> Plan {
        Plan {
            method,
            ways: BTreeMap::new(),
        }
    }

    pub(super) fn way(&self, dev: u64) -> Way {
        match self.method {
            Method::Copy | Method::CopyBeforeWrite => Way::Copy,
            Method::Auto | Method::Reflink | Method::Subvolume => {
                *self.ways.get(&dev).unwrap_or(&Way::Unknown)
            }
        }
    }

    pub(super) fn decide(&mut self, dev: u64, way: Way) {
        self.ways.insert(dev, way);
    }
}

impl Scan {
    pub(super) fn new() -> Scan {
        Scan {
            dirs: Dirs::new().without_atime(),
            members: Vec::new(),
            devices: BTreeSet::new(),
            times: now_ns()..i64::MAX,
            places: BTreeMap::new(),
        }
    }

    /// The walk was this.
    pub(super) fn walked(&mut self, dirs: Dirs) {
        self.dirs = dirs;
        self.times.end = now_ns();
    }

    pub(super) fn members(&self) -> Vec<Member> {
        let mut namer = self.dirs.namer();
        let member = |found: &Known| Member {
            path: namer.path(found.dir, &found.name),
            id: found.seen.id,
        };
        self.members.iter().map(member).collect()
    }

    /// The members that have to be captured, as far as it is known now.
    pub(super) fn to_capture(&self) -> impl Iterator<Item = &Known> + Clone {
        self.members.iter().filter(|known| !known.is_shared)
    }

    pub(super) fn open(&self, member: &Known) -> std::result::Result<OwnedFd, Errno> {
        let parent = self.dirs.open(member.dir)?;
        self.dirs
            .open_at(&parent, &member.name, OFlags::NONBLOCK | OFlags::NOCTTY)
    }

    pub(super) fn path(&self, member: &Known) -> PathBuf {
        self.dirs.path(member.dir).join(as_path(&member.name))
    }

    /// A directory on the device.
    pub(super) fn place_of(&self, dev: u64) -> PathBuf {
        self.places.get(&dev).cloned().unwrap_or_default()
    }

    /// The devices, and a directory on each; around a file that is mounted by itself, if there is
    /// nothing else of its device.
    pub(super) fn places(&self) -> impl Iterator<Item = (u64, &Path)> {
        self.places.iter().map(|(dev, place)| (*dev, &**place))
    }

    fn place(&mut self, dev: u64, path: impl FnOnce() -> PathBuf) {
        if self.devices.insert(dev) || !self.places.contains_key(&dev) {
            self.places.insert(dev, path());
        }
    }
}

/// See [`super::prepare`].
pub(super) fn prepare(
    scope: &Scope,
    tree: &Path,
    method: Method,
    base: &mut dyn FnMut() -> Option<Base>,
    tally: &Tally,
) -> Result<Prepared> {
    let mut target = Target {
        tally: tally.clone(),
        ..Target::open(tree)?
    };
    let paths = Paths::new(scope, Some(target.id))?;
    let mut scan = Scan::new();
    let mut dirs = Dirs::new().without_atime();
    walk(&paths, &mut dirs, &mut Scanner { scan: &mut scan })?;
    scan.walked(dirs);
    let plan = plan(&scan, &target, method)?;
    let mut ahead = Ahead::default();
    let showing = devices_that_show_stores(&scan);
    let mounted = mounted(&scan);
    // Before the base is asked for, which may be being read still.
    let made = ahead.make_dirs(&scan, &mut target)?;
    // What is frozen is cloned after the hold, whatever has changed of it.
    let mut base = match method {
        Method::Subvolume => None,
        _ => base(),
    };
    if let Some(base) = &mut base {
        base.only_on(&showing, mounted.as_ref());
    }
    ahead.make_files(made, &mut scan, &target, base.as_ref())?;
    if scan.members.len() >= MANY_NAMES {
        flush::begin_names(&target);
    }
    let subvolumes = subvolume::plan(&scan, &paths, &target, method)?;
    if subvolumes.is_some() {
        base = None;
    }
    let predict = |flush, appended: Option<&predict::Appended>| {
        let means = Means {
            method,
            can_freeze: subvolumes.is_some(),
            room: free(&*target.fd).ok(),
            flush,
            appended,
            fresh: record::LEFT_ALONE,
            not_guarded: &mut || fits(&scan).err(),
        };
        predict::predict(&scan, &plan, means)
    };
    let may_be_guarded = matches!(method, Method::Auto | Method::CopyBeforeWrite);
    let first = (may_be_guarded && subvolumes.is_none()).then(|| predict(Flush::ToCome, None));
    let is_guarded = first.as_ref().is_some_and(|first| first.is_guarded);
    // With a plan, everything was flushed.
    if subvolumes.is_none() {
        get_ready(&scan, scan.to_capture(), &plan, is_guarded, &target.tally)?;
    }
    let predicted = match first {
        Some(first) if is_guarded => first,
        first => predict(Flush::Done, first.as_ref().map(|first| &first.appended)),
    };
    if method == Method::CopyBeforeWrite && !predicted.is_guarded {
        fits(&scan).map_err(|why| Error::new(why).next("pass --capture auto"))?;
    }
    Ok(Prepared {
        base,
        guard: predicted.is_guarded,
        prediction: predicted.prediction,
        mounted,
        scope: paths,
        scan,
        plan,
        target,
        ahead,
        subvolumes,
        bases: None,
        digests: false,
    })
}

/// The devices on which a store into a mapping moves the ctime of a file.
pub(super) fn devices_that_show_stores(scan: &Scan) -> BTreeSet<u64> {
    let shows_stores = |place: &PathBuf| {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::open(place, flags, Mode::empty()).is_ok_and(record::shows_stores)
    };
    let places = scan.places.iter().filter(|(_, place)| shows_stores(place));
    places.map(|(dev, _)| *dev).collect()
}

/// Whether there is room for all of it in the gate's table; else why not.
pub(super) fn fits(scan: &Scan) -> std::result::Result<(), String> {
    let ahead = devices_that_show_stores(scan);
    // The others are copied before the hold.
    let is_guarded =
        |known: &&Known| !record::is_small(&known.seen) || !ahead.contains(&known.seen.id.dev);
    let guarded = scan.to_capture().filter(is_guarded);
    can_be_guarded(guarded.map(|known| known.seen.size))
}

pub(super) struct Scanner<'a> {
    pub(super) scan: &'a mut Scan,
}

impl Visitor for Scanner<'_> {
    fn absent(&mut self, root: &Path, parent: Option<&OwnedFd>) -> Result<()> {
        let existing = |path: &Path| rustix::fs::stat(path).ok();
        let stat = match parent {
            Some(parent) => rustix::fs::fstat(parent).ok(),
            None => root.ancestors().skip(1).find_map(existing),
        };
        if let Some(stat) = stat {
            let place = || {
                root.ancestors()
                    .skip(1)
                    .find(|path| path.exists())
                    .unwrap_or(root)
                    .to_owned()
            };
            self.scan.place(Seen::of(&stat).id.dev, place);
        }
        Ok(())
    }

    fn top(&mut self, _: &Path, _: Node) -> Result<()> {
        Ok(())
    }

    fn entry(&mut self, at: &At<'_>, name: &CStr, _: Option<FileType>, _: Looked) -> Result<Found> {
        let seen = match look_at(at.fd, name) {
            Ok(seen) => seen,
            Err(Errno::NOENT) => return Ok(Found::Gone),
            Err(cause) => return Err(unreadable(&at.path(name), cause)),
        };
        match seen.kind() {
            Kind::Dir => return Ok(Found::Dir),
            Kind::File => {}
            _ => return Ok(Found::Entry),
        }
        // A file can be a mount point of its own.
        self.scan.place(seen.id.dev, || at.dirs.path(at.node));
        self.scan.members.push(Known {
            dir: at.node,
            name: name.into(),
            seen,
            is_shared: false,
        });
        Ok(Found::Entry)
    }

    fn dir(&mut self, at: &At<'_>, name: &CStr, _: &OwnedFd, seen: Seen) -> Result<()> {
        self.scan.place(seen.id.dev, || at.path(name));
        Ok(())
    }

    /// What is gone before the hold was never part of the cut.
    fn gone(&mut self, _: PathBuf) {}
}

/// Finds out how each device can be captured.
fn plan(scan: &Scan, target: &Target, method: Method) -> Result<Plan> {
    let mut plan = Plan::new(method);
    if matches!(method, Method::Copy | Method::CopyBeforeWrite) {
        return Ok(plan);
    }
    // The smallest file of each, because trying means cloning some of it.
    let mut smallest: BTreeMap<u64, &Known> = BTreeMap::new();
    for member in &scan.members {
        let known = smallest.entry(member.seen.id.dev).or_insert(member);
        if member.seen.size < known.seen.size {
            *known = member;
        }
    }
    for (dev, place) in &scan.places {
        let way = match smallest.get(dev) {
            // A file that is written to is not touched where another tells the same.
            Some(member) if !is_beside(scan, member, target) => {
                try_member(scan, member, target, method)?
            }
            _ => try_place(*dev, place, target, method)?,
        };
        plan.ways.insert(*dev, way);
    }
    Ok(plan)
}

/// Whether a member is on the same mount of the same file system as the tree: between two mounts there were no clones
/// before Linux 5.18.
fn is_beside(scan: &Scan, member: &Known, target: &Target) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    let mount = |at: &OwnedFd, name: &CStr| {
        let stat = rustix::fs::statx(at, name, flags, StatxFlags::MNT_ID).ok()?;
        (stat.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(stat.stx_mnt_id)
    };
    let its = || mount(&*scan.dirs.open(member.dir).ok()?, &member.name);
    member.seen.id.dev == target.id.dev
        && its().is_some_and(|its| mount(&target.fd, c"") == Some(its))
}

/// Tries to clone a member into the tree.
fn try_member(scan: &Scan, member: &Known, target: &Target, method: Method) -> Result<Way> {
    let file = match scan.open(member) {
        Ok(file) => file,
        Err(cause @ (Errno::ACCESS | Errno::PERM)) => {
            return Err(unreadable(&scan.path(member), cause));
        }
        Err(_) => return Ok(Way::Unknown),
    };
    match target.with_scratch(|scratch| reflink::try_clone(scratch, &file))? {
        Ok(()) => Ok(Way::Reflink),
        Err(Errno::XDEV) => Err(other_file_system(&scan.path(member), target, method)),
        Err(cause) if reflink::is_unsupported(cause) => match method {
            Method::Reflink => Err(no_reflink(&scan.path(member), &file)),
            _ => Ok(Way::Copy),
        },
        Err(cause @ (Errno::NOSPC | Errno::DQUOT | Errno::ROFS)) => {
            Err(fault("write to", &target.path, cause))
        }
        // This file may be special (a swap file, an I/O error): the capture will
        // fail if it is, naming it, and else find out.
        Err(_) => Ok(Way::Unknown),
    }
}

/// Decides for a device that has no file yet, by what is known of its file system.
fn try_place(dev: u64, place: &Path, target: &Target, method: Method) -> Result<Way> {
    if dev == target.id.dev {
        let tried = target.with_scratch(|first| {
            // The name is free again: the first has lost it.
            target.with_scratch(|second| reflink::clone(second, &first))
        })??;
        return match tried {
            Ok(()) => Ok(Way::Reflink),
            Err(cause) if reflink::is_unsupported(cause) && method == Method::Reflink => {
                Err(no_reflink(place, &*target.fd))
            }
            Err(cause) if reflink::is_unsupported(cause) => Ok(Way::Copy),
            Err(_) => Ok(Way::Unknown),
        };
    }
    let open = rustix::fs::open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let Ok(fd) = open else {
        return Ok(Way::Unknown);
    };
    let (theirs, ours) = (reflink::file_system(&fd), reflink::file_system(&*target.fd));
    // Only these have one device number for all of a file system.
    if theirs != ours || matches!(theirs.as_str(), "xfs" | "ext4" | "tmpfs" | "f2fs") {
        return Err(other_file_system(place, target, method));
    }
    Ok(Way::Unknown)
}

pub(super) fn other_file_system(path: &Path, target: &Target, method: Method) -> Error {
    let cannot = match method {
        Method::Reflink => "cannot be cloned",
        _ => "can only be copied, which holds the program for longer",
    };
    // The tree is `<store>/<set>/<draft>/tree`.
    let store = target.path.ancestors().nth(3).unwrap_or(&target.path);
    let message = format!(
        "{} is on another file system than the store {} (or mounted apart from it) and {cannot}",
        path.display(),
        store.display(),
    );
    Error::new(message).next(
        "put the store on the same file system with --store, or pass --capture copy if the files are few and small",
    )
}

pub(super) fn no_reflink(path: &Path, file: impl std::os::fd::AsFd) -> Error {
    Error::new(format!(
        "{} cannot be cloned: its file system ({}) has no reflink",
        path.display(),
        reflink::file_system(file)
    ))
    .next("pass --capture auto or --capture copy, or keep the files on XFS or btrfs")
}

/// See [`Prepared::share_nothing`].
pub(super) fn share_nothing(prepared: &mut Prepared) -> Result<()> {
    prepared.base = None;
    // What is frozen is not captured one by one.
    if prepared.subvolumes.is_some() {
        return Ok(());
    }
    let Prepared {
        scan,
        plan,
        target,
        ahead,
        guard,
        ..
    } = prepared;
    let shared = ahead.share_nothing(scan, target)?;
    if shared.is_empty() {
        return Ok(());
    }
    let members = shared.iter().filter_map(|index| scan.members.get(*index));
    get_ready(scan, members, plan, *guard, &target.tally)
}

/// See [`Prepared::stay_under_hold`].
pub(super) fn stay_under_hold(prepared: &mut Prepared) -> Result<()> {
    if !std::mem::take(&mut prepared.guard) {
        return Ok(());
    }
    let Prepared {
        scan, plan, target, ..
    } = prepared;
    get_ready(scan, scan.to_capture(), plan, false, &target.tally)
}

/// Opens the members, which fails for one that may not be read; reads ahead those to be copied, and starts and
/// awaits the writeback of those to be cloned. With `is_guarded` neither: nobody is held while they are copied, and what
/// programs write to, or want to read, would only have to wait.
fn get_ready<'a>(
    scan: &Scan,
    members: impl Iterator<Item = &'a Known>,
    plan: &Plan,
    is_guarded: bool,
    tally: &Tally,
) -> Result<()> {
    let is_copied = |member: &Known| is_guarded || plan.way(member.seen.id.dev) == Way::Copy;
    let (copied, cloned): (Vec<_>, Vec<_>) = members.partition(|member| is_copied(member));
    // More would only push out of memory what the program needs, or what was read first.
    let mut most = match is_guarded {
        true => 0,
        false => bytes_to_spare() as u64,
    };
    for member in copied {
        if let Some(file) = open_member(scan, member)?
            && most > 0
        {
            most = most.saturating_sub(read_ahead(&file, member.seen.size, most));
        }
    }
    match is_guarded {
        true => Ok(()),
        false => write_back(scan, &cloned, tally),
    }
}

/// Opens a member, if it is there still.
fn open_member(scan: &Scan, member: &Known) -> Result<Option<OwnedFd>> {
    match scan.open(member) {
        Ok(file) => Ok(Some(file)),
        Err(cause @ (Errno::ACCESS | Errno::PERM | Errno::MFILE | Errno::NFILE)) => {
            Err(unreadable(&scan.path(member), cause))
        }
        Err(_) => Ok(None),
    }
}

/// Begins to read what is no hole of a file into memory, up to `most` bytes; how many that were.
fn read_ahead(file: &OwnedFd, size: u64, most: u64) -> u64 {
    // To look for holes may keep its writers waiting.
    let is_dense = rustix::fs::fstat(file).is_ok_and(|stat| record::allocated(&stat) >= size);
    let (mut at, mut done) = (0, 0);
    while at < size && done < most && !interrupt::is_asked() {
        let (data, hole) = match is_dense {
            true => (at, size),
            false => match seek(file, SeekFrom::Data(at)) {
                Ok(data) => (data, seek(file, SeekFrom::Hole(data)).unwrap_or(size)),
                // It does not know holes.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => (at, size),
                Err(_) => break,
            },
        };
        // Never backwards, or a file system with a fault would keep us here.
        let end = hole.max(data.saturating_add(1)).min(size);
        at = data.max(at);
        while at < end && done < most && !interrupt::is_asked() {
            let length = AHEAD.min(end - at);
            let _ = rustix::fs::fadvise(file, at, NonZeroU64::new(length), Advice::WillNeed);
            at += length;
            done += length;
        }
    }
    done
}

/// Starts and awaits the writeback of members.
fn write_back(scan: &Scan, members: &[&Known], tally: &Tally) -> Result<()> {
    // Not known before it was looked at; that is done as it is begun.
    tally.begin(Step::Flush, 0);
    let failed = |member| move |cause| not_written_back(&scan.path(member), cause);
    for batch in members.chunks(BATCH) {
        let mut started = Vec::with_capacity(BATCH);
        for member in batch {
            let size = member.seen.size;
            if let Some(file) = open_member(scan, member)?.filter(|_| size > 0) {
                let dirty = flush::begin(&file, size).map_err(failed(member))?;
                started.push((member, file, dirty));
            }
        }
        if scan.members.len() <= BATCH {
            let all = started.iter().map(|(_, _, dirty)| dirty).sum();
            tally.begin(Step::Flush, all);
        }
        for (member, file, dirty) in started {
            flush::wait(&file, member.seen.size, dirty, tally).map_err(failed(member))?;
        }
    }
    tally.end();
    Ok(())
}

/// The error of a member whose data has not reached its file system.
pub(super) fn not_written_back(path: &Path, cause: Errno) -> Error {
    Error::new(format!(
        "{} could not be written back to its file system: {cause}",
        path.display()
    ))
    .next("check the kernel log and the space there; a snapshot of this file cannot be relied on before it was rewritten")
}
