//! On btrfs: one snapshot of the subvolume under the hold, and the rest after it.
//!
//! A read-only snapshot of the whole subvolume is made inside the draft, which takes about as
//! long for a million files as for one. After the hold the files are cloned from there
//! into the ordinary tree, as they would be from the live ones, and the frozen subvolume goes. So a
//! snapshot in the store is the same whichever way it was captured.
//!
//! # What stands for the cut
//!
//! Files are not looked at one by one under the hold, so what is compared is not two looks
//! at each, but each frozen ctime with the clock. At the cut the time is taken; then we wait until the
//! clock that file systems stamp with, which moves in ticks, is past it; then the subvolume is frozen.
//! Whatever is changed from then on by somebody whom the gate does not hold bears a ctime after the
//! cut. So anything frozen with such a ctime was changed meanwhile, and what has none is
//! from before. What is changed after the freezing is not in it. (btrfs sets a file's times before the
//! first byte of a write, and puts inode and extents on disk in one transaction.)
//!
//! That leaves a call that began before the cut and was not held, for freezing does not wait for
//! the inode's lock as FICLONE does. Programs held by their sites, or stopped, have no such calls;
//! where there are others, [`Prepared::needs_locks`] goes back to clones, or the evidence names them.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_gettime};

use super::prepare::Scan;
use super::record::{self, Body, Target};
use super::walk::{Elsewhere, Paths};
use super::{Captured, Method, Moved, Prepared};
use crate::hold::sight;
use crate::store::{fault, open_below, remove_tree};
use crate::tree::seen::{Seen, nanoseconds};
use crate::tree::subvolume::{self, PLACEHOLDER};
use crate::{Error, Result};

/// What a certificate calls it.
pub(super) const NAME: &str = "subvolume";
/// The directory in the tree in which subvolumes are frozen; gone before it is published.
const PLACE: &str = ".snapshim-subvolumes";
/// From how many files on this is chosen unasked. Freezing commits a transaction, which takes as long
/// as some hundred clones, and on a disk that has other work to do longer.
pub(super) const MANY: usize = 1_000;
/// How often the clock is looked at that moves in ticks.
const LOOK: Duration = Duration::from_micros(100);
/// By how much the clock may be moved against the other while the subvolume is frozen.
const DRIFT_NS: i64 = 100_000;

/// What is done by freezing, found out before the hold.
#[derive(Debug)]
pub(super) struct Plan {
    /// [`PLACE`].
    place: OwnedFd,
    /// Nothing else was asked for.
    is_required: bool,
}

impl Plan {
    pub(super) fn is_required(&self) -> bool {
        self.is_required
    }
}

/// Finds out whether the roots can be frozen; `None` if something else is better. With a plan,
/// all that is dirty on the file system has been written back.
///
/// # Errors
///
/// Why they cannot, if it was asked for.
pub(super) fn plan(
    scan: &Scan,
    paths: &Paths,
    target: &Target,
    method: Method,
) -> Result<Option<Plan>> {
    let is_required = method == Method::Subvolume;
    if !is_required && (method != Method::Auto || scan.to_capture().count() < MANY) {
        return Ok(None);
    }
    match check(scan, paths, &*target.fd).and_then(|()| make_place(target)) {
        Ok(place) => Ok(Some(Plan { place, is_required })),
        Err(cause) if is_required => Err(cause),
        Err(_) => Ok(None),
    }
}

fn cannot(why: impl std::fmt::Display) -> Error {
    Error::new(format!(
        "cannot capture by a snapshot of a subvolume: {why}"
    ))
    .next("pass --capture auto or --capture reflink")
}

/// Whether the roots can be frozen into a store on the file system of `store`.
pub(super) fn check(scan: &Scan, paths: &Paths, store: impl AsFd) -> Result<()> {
    if !subvolume::is_btrfs(store) {
        return Err(cannot("the store is not on btrfs"));
    }
    let mut devices = Vec::new();
    for root in paths.roots() {
        let at = locate(root)?;
        may_freeze(root, &at)?;
        devices.push(at.device);
    }
    for device in &scan.devices {
        if !devices.contains(device) {
            return Err(cannot(format!(
                "{} is on a subvolume or file system of its own",
                scan.place_of(*device).display()
            )));
        }
    }
    nothing_is_mounted(paths)
}

/// Whether this process may make the snapshot and remove it again.
fn may_freeze(root: &Path, at: &Located) -> Result<()> {
    let me = rustix::process::geteuid();
    if me.is_root() {
        return Ok(());
    }
    let owner = rustix::fs::fstat(&at.top).map(|stat| stat.st_uid);
    if owner != Ok(me.as_raw()) {
        return Err(cannot(format!(
            "the subvolume that {} is in belongs to somebody else",
            root.display()
        )));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let options = sight::mount_of(root, &mounts).map(|(_, options)| options);
    if !options.is_some_and(|all| all.split(',').any(|o| o == "user_subvol_rm_allowed")) {
        return Err(cannot(
            "only root may remove one again, since the file system is not mounted with user_subvol_rm_allowed",
        ));
    }
    Ok(())
}

/// A snapshot of a subvolume has what is below a mount point, not what is mounted there.
fn nothing_is_mounted(paths: &Paths) -> Result<()> {
    let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    // proc_pid_mountinfo(5): the fifth field.
    let points = mounts
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescaped);
    for point in points {
        for root in paths.roots() {
            let real = std::fs::canonicalize(root).unwrap_or_else(|_| root.clone());
            let Ok(below) = point.strip_prefix(&real) else {
                continue;
            };
            // The root itself may be one: then that is what was located.
            if !below.as_os_str().is_empty() && !paths.is_excluded(&root.join(below)) {
                return Err(cannot(format!(
                    "something is mounted at {}",
                    point.display()
                )));
            }
        }
    }
    Ok(())
}

/// A path of mountinfo: `\040` is a space.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsStr::from_bytes(&bytes).into()
}

/// Where a root is in its subvolume.
struct Located {
    /// The top of the subvolume, open for reading.
    top: OwnedFd,
    /// `st_dev` of everything in the subvolume.
    device: u64,
    /// The way from the top to the root; empty if that is the top.
    below: PathBuf,
}

/// Finds the subvolume that a root is in, by going up from it.
fn locate(root: &Path) -> Result<Located> {
    let failed = |cause: Errno| cannot(format!("cannot look at {}: {cause}", root.display()));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let stat = rustix::fs::lstat(root).map_err(failed)?;
    let is_dir = FileType::from_raw_mode(stat.st_mode).is_dir();
    // By its parent's path, of which links are followed, as a walk does.
    let start = match (is_dir, root.parent()) {
        (true, _) => rustix::fs::open(root, flags | OFlags::NOFOLLOW, Mode::empty()),
        (false, Some(parent)) => rustix::fs::open(parent, flags, Mode::empty()),
        (false, None) => Err(Errno::NOTDIR),
    };
    let start = start.map_err(failed)?;
    if !subvolume::is_btrfs(&start) {
        return Err(cannot(format!("{} is not on btrfs", root.display())));
    }
    let mount = |fd: &OwnedFd| {
        rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map(|s| s.stx_mnt_id)
    };
    let here = mount(&start).map_err(failed)?;
    let mut at = rustix::fs::openat(&start, c".", flags, Mode::empty()).map_err(failed)?;
    while !subvolume::is_top(&at) {
        let up = rustix::fs::openat(&at, c"..", flags, Mode::empty()).map_err(failed)?;
        let id = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| Seen::of(&stat).id);
        if mount(&up) != Ok(here) || id(&up) == id(&at) {
            return Err(cannot(format!(
                "{} is mounted apart from the top of its subvolume",
                root.display()
            )));
        }
        at = up;
    }
    let path = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let below = match (path(&start), path(&at)) {
        (Ok(start), Ok(top)) => start.strip_prefix(&top).map(Path::to_owned).ok(),
        _ => None,
    };
    let mut below = below.ok_or_else(|| cannot(format!("{} is being moved", root.display())))?;
    if !is_dir {
        below.extend(root.file_name());
    }
    // An O_PATH descriptor cannot name the source of a snapshot.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::openat(&at, c".", flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&top).map_err(failed)?;
    Ok(Located {
        top,
        device: Seen::of(&stat).id.dev,
        below,
    })
}

/// Makes [`PLACE`] and writes back what is dirty, so that little is left to do under the hold.
/// `syncfs` reports each error of writing back since the descriptor was opened, whoever else was told:
/// so does the one that makes the tree durable, of what was dirty at the cut.
fn make_place(target: &Target) -> Result<OwnedFd> {
    let at = || target.path.join(PLACE);
    let place = target.make_dir(&*target.fd, PLACE, at, false)?;
    rustix::fs::syncfs(&*target.fd).map_err(|cause| fault("write to disk", &target.path, cause))?;
    Ok(place)
}

/// Everything, frozen; see [`Frozen::read`].
#[derive(Debug)]
pub struct Frozen {
    prepared: Prepared,
    /// When everything was held, and when all was frozen, ns since 1970.
    cut_ns: i64,
    end_ns: i64,
}

fn now(clock: ClockId) -> i64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(clock);
    #[allow(clippy::unnecessary_cast)] // 32 bits elsewhere
    nanoseconds(tv_sec as i64, tv_nsec as i64)
}

/// How far the clock that can be set is ahead of the one that cannot.
fn ahead() -> i64 {
    now(ClockId::Realtime).wrapping_sub(now(ClockId::Monotonic))
}

/// Freezes what is watched. `Err` with what was prepared: it could not be done, and other means may be
/// used.
pub(super) fn freeze(
    mut prepared: Prepared,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<std::result::Result<Frozen, Prepared>> {
    let Some(plan) = prepared.subvolumes.take() else {
        return Ok(Err(prepared));
    };
    let set = ahead();
    let cut_ns = now(ClockId::Realtime);
    while now(ClockId::RealtimeCoarse) <= cut_ns {
        if !go_on() {
            return Err(
                Error::aborted("the hold was over before anything was captured")
                    .next("raise --max-hold"),
            );
        }
        std::thread::sleep(LOOK);
    }
    let elsewhere = match snapshots(&prepared.scope, &plan) {
        Ok(elsewhere) => elsewhere,
        Err(cause) if plan.is_required => return Err(cause),
        Err(_) => return Ok(Err(prepared)),
    };
    let end_ns = now(ClockId::Realtime);
    if (ahead() - set).abs() > DRIFT_NS {
        return Err(Error::by_chance("the clock was set during the hold"));
    }
    prepared.scope.read_from(elsewhere);
    Ok(Ok(Frozen {
        prepared,
        cut_ns,
        end_ns,
    }))
}

/// Makes a snapshot of each subvolume; where the roots are in them.
fn snapshots(paths: &Paths, plan: &Plan) -> Result<Elsewhere> {
    /// A subvolume and its snapshot: the directory that is in, its name there, and itself.
    struct Made {
        device: u64,
        dir: OwnedFd,
        name: CString,
        fd: OwnedFd,
    }
    let failed = |root: &Path| {
        let root = root.display().to_string();
        move |cause: Errno| cannot(format!("cannot freeze the one {root} is in: {cause}"))
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut made: Vec<Made> = Vec::new();
    let mut elsewhere = Elsewhere::default();
    for root in paths.roots() {
        let failed = failed(root);
        let at = locate(root)?;
        let is_top = at.below.as_os_str().is_empty();
        // A root that is the top is found by its own name in the directory above.
        let name = match root.file_name() {
            Some(name) if is_top => CString::new(name.as_bytes()).unwrap_or_default(),
            _ => c"top".to_owned(),
        };
        let known = made.iter().position(|m| m.device == at.device);
        let index = match known {
            Some(index) => index,
            None => {
                let number = CString::new(made.len().to_string()).unwrap_or_default();
                rustix::fs::mkdirat(&plan.place, &number, Mode::RWXU).map_err(&failed)?;
                let dir = rustix::fs::openat(&plan.place, &number, flags, Mode::empty())
                    .map_err(&failed)?;
                subvolume::snapshot(&at.top, &dir, &name).map_err(&failed)?;
                let fd = rustix::fs::openat(&dir, &name, flags, Mode::empty()).map_err(&failed)?;
                let stat = rustix::fs::fstat(&fd).map_err(&failed)?;
                elsewhere.devices.insert(Seen::of(&stat).id.dev, at.device);
                made.push(Made {
                    device: at.device,
                    dir,
                    name,
                    fd,
                });
                made.len() - 1
            }
        };
        let snapshot = &made[index];
        let parent = match (is_top, at.below.parent()) {
            (true, _)
                if root.file_name().map(OsStrExt::as_bytes) != Some(snapshot.name.to_bytes()) =>
            {
                return Err(cannot(format!(
                    "{} is the top of a subvolume that is watched by another name, too",
                    root.display()
                )));
            }
            (true, _) => snapshot.dir.try_clone(),
            (false, None) => snapshot.fd.try_clone(),
            (false, Some(parent)) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                open_below(snapshot.fd.as_fd(), parent, flags).map_err(std::io::Error::from)
            }
        };
        let parent =
            parent.map_err(|cause| failed(Errno::from_io_error(&cause).unwrap_or(Errno::IO)))?;
        elsewhere.parents.insert(root.clone(), parent);
    }
    Ok(elsewhere)
}

impl Frozen {
    /// What was prepared.
    pub(super) fn prepared(&self) -> &Prepared {
        &self.prepared
    }

    /// Clones what was frozen into the tree, and removes the frozen subvolumes. Also says what was
    /// changed while they were frozen, although it was held. To be called after the hold.
    ///
    /// # Errors
    ///
    /// As [`Prepared::capture`]; a subvolume was made or something mounted in what is watched
    /// since that was first looked at.
    pub fn read(self, go_on: &mut dyn FnMut() -> bool) -> Result<(Captured, Vec<Moved>)> {
        let Frozen {
            prepared,
            cut_ns,
            end_ns,
        } = self;
        nothing_is_mounted(&prepared.scope)?;
        let devices = prepared.scope.stands_for();
        let mut captured = record::capture(prepared, go_on)?;
        captured.is_subvolume = true;
        let mut moved = Vec::new();
        for entry in &captured.entries {
            let path = || captured.path_of(entry);
            if matches!(entry.body, Body::Dir(_)) && entry.seen.id.ino == PLACEHOLDER {
                let message = format!("{} has become a subvolume of its own", path().display());
                return Err(Error::by_chance(message));
            }
            if entry.seen.ctime_ns > cut_ns && entry.seen.ctime_ns <= end_ns {
                moved.push(Moved {
                    path: path(),
                    what: "was changed while its subvolume was frozen (its ctime is after the cut)"
                        .to_owned(),
                });
            }
        }
        // Nothing can vanish from what is frozen; if it did, there is no saying what it was.
        moved.extend(captured.vanished.iter().map(|path| Moved {
            path: path.clone(),
            what: "cannot be found in what was frozen".to_owned(),
        }));
        for entry in &mut captured.entries {
            if let Some(live) = devices.get(&entry.seen.id.dev) {
                entry.seen.id.dev = *live;
            }
        }
        let place = captured.target.path.join(PLACE);
        remove_tree(&*captured.target.fd, PLACE.as_ref())
            .map_err(|cause| fault("remove what was frozen in", &place, cause))?;
        Ok((captured, moved))
    }
}

/// Removes [`PLACE`], if nothing is frozen after all.
pub(super) fn forget(target: &Target) -> Result<()> {
    let place = target.path.join(PLACE);
    remove_tree(&*target.fd, PLACE.as_ref()).map_err(|cause| fault("remove", &place, cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mountinfo() {
        for (field, path) in [
            ("/a/b", "/a/b"),
            ("/a\\040b\\011", "/a b\t"),
            ("/a\\134040", "/a\\040"),
            ("/a\\9", "/a\\9"),
            ("\\", "\\"),
            ("", ""),
        ] {
            assert_eq!(unescaped(field.as_bytes()), Path::new(path), "{field}");
        }
    }
}
