//! The gate file of a set: where it lies, making it, opening it.
//!
//! ```text
//! <place>/              0700 (0711 when a set in it is shared with another user)
//! <place>/<set>/        0700 (0770 with --gate-group)
//! <place>/<set>/gate    0600 (0660 with --gate-group): the shared memory
//! <place>/<set>/lock    whoever holds its flock is the set's coordinator
//! <place>/<set>/set.json
//! ```
//!
//! A gate must lie on tmpfs: on a disk file system a freeze of that file system
//! would stop a program at a store to its own slot, and a full one would kill it.
//! It is made under another name and renamed into place when it is complete, and
//! never truncated or rewritten afterwards: every mapping of it stays valid.
//!
//! What another user could have put in place is refused, not followed: each step
//! of the path below the place is opened without following symbolic links, and
//! owner and mode are those of the open file, not of a name.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::{Duration, Instant};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Gid, Uid};

use snapshim_gate::abi::{
    ABI_VERSION, Gate, HEADER_SIZE, Header, Invalid, MAGIC, MAX_HOLD_BOUND_MS, MAX_SLOTS,
    file_size, marks_offset,
};
use snapshim_gate::slot::Slot;
use snapshim_gate::table::FileId;
use snapshim_gate::{sys, word};

use crate::error::Context;
use crate::{Error, Result};

/// Name of the gate in a set's directory.
pub const GATE: &str = "gate";
/// Name of the lock in a set's directory.
pub const LOCK: &str = "lock";
/// Name of the configuration in a set's directory.
pub const CONFIG: &str = "set.json";

/// Longest path of a gate, bytes: what the shim has room for.
const MAX_PATH: usize = 500;

/// `f_type` of tmpfs, statfs(2).
const TMPFS_MAGIC: u32 = 0x0102_1994;

/// Where gates are looked for, in this order; the shim's default search is the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Absolute directories, each with one directory per set.
    pub dirs: Vec<PathBuf>,
    /// Whether the user chose the one place with `SNAPSHIM_DIR`.
    pub chosen: bool,
}

impl Places {
    /// The places the environment and the effective user select.
    pub fn from_env() -> Result<Places> {
        Places::choose(
            env::var_os("SNAPSHIM_DIR").as_deref(),
            env::var_os("XDG_RUNTIME_DIR").as_deref(),
            rustix::process::geteuid().as_raw(),
        )
    }

    /// The one place where the order is decided.
    fn choose(dir: Option<&OsStr>, runtime: Option<&OsStr>, uid: u32) -> Result<Places> {
        if let Some(dir) = dir.filter(|d| !d.is_empty()) {
            let dir = Path::new(dir);
            if !dir.is_absolute() {
                return Err(Error::usage(format!(
                    "SNAPSHIM_DIR is \"{}\", which is not an absolute path",
                    dir.display()
                ))
                .next("set it to an absolute path on a tmpfs, or unset it"));
            }
            return Ok(Places {
                dirs: vec![dir.into()],
                chosen: true,
            });
        }
        let usual = if uid == 0 {
            Some(PathBuf::from("/run/snapshim"))
        } else {
            runtime
                .map(Path::new)
                .filter(|d| d.is_absolute())
                .map(|d| d.join("snapshim"))
        };
        let fallback = PathBuf::from(format!("/dev/shm/snapshim-{uid}"));
        Ok(Places {
            dirs: usual.into_iter().chain([fallback]).collect(),
            chosen: false,
        })
    }

    /// The place for a new set: the first one on tmpfs that can be made. Makes it.
    pub fn for_new(&self, shared: &Sharing) -> Result<PathBuf> {
        let mut refusals = Vec::new();
        for dir in &self.dirs {
            match make_place(dir, shared) {
                Ok(()) => return Ok(dir.clone()),
                Err(error) if self.chosen => return Err(error),
                Err(error) => refusals.push(error.message),
            }
        }
        Err(Error::new(format!(
            "there is no place for a gate: {}",
            refusals.join("; ")
        ))
        .next("set SNAPSHIM_DIR to a directory of yours on a tmpfs"))
    }
}

/// Who besides the user may own or write a gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// `--gate-owner`: the gate is given to this user.
    pub owner: Option<u32>,
    /// `--gate-group`: this group may write it.
    pub group: Option<u32>,
}

impl Sharing {
    /// Whether anybody else is let in.
    pub fn is_shared(&self) -> bool {
        self.owner.is_some() || self.group.is_some()
    }

    fn dir_mode(&self) -> Mode {
        Mode::from_raw_mode(if self.group.is_some() { 0o770 } else { 0o700 })
    }

    /// Mode of the gate and of the lock.
    pub(super) fn file_mode(&self) -> Mode {
        Mode::from_raw_mode(if self.group.is_some() { 0o660 } else { 0o600 })
    }

    /// Gives an open file to the owner and the group, then sets its mode, in this
    /// order: a change of owner clears mode bits.
    pub(super) fn apply(&self, file: BorrowedFd<'_>, mode: Mode, path: &Path) -> Result<()> {
        if self.is_shared() {
            let owner = self.owner.map(Uid::from_raw);
            let group = self.group.map(Gid::from_raw);
            fs::fchown(file, owner, group).map_err(|cause| {
                Error::new(format!("cannot give {} away: {cause}", path.display())).next(
                    "--gate-owner needs root; --gate-group needs root or membership of the group",
                )
            })?;
        }
        fs::fchmod(file, mode).context(|| format!("set the mode of {}", path.display()))
    }

    /// Refuses what somebody else could have put in place or could change.
    pub(super) fn check(&self, stat: &Stat, what: &str, path: &Path) -> Result<()> {
        let me = rustix::process::geteuid().as_raw();
        let owner = stat.st_uid;
        if owner != me && owner != 0 && Some(owner) != self.owner {
            return Err(refused(
                path,
                format!("{what} belongs to uid {owner}, not to uid {me} or root"),
            )
            .next(format!(
                "run as uid {owner}, or have the set made with --gate-owner {owner}, \
                 or point SNAPSHIM_DIR elsewhere"
            )));
        }
        let by_group = stat.st_mode & 0o020 != 0 && Some(stat.st_gid) != self.group;
        if by_group || stat.st_mode & 0o002 != 0 {
            return Err(refused(
                path,
                format!(
                    "{what} can be written by others (mode {:04o})",
                    stat.st_mode & 0o7777
                ),
            )
            .next("take that permission away with chmod, or share the set with --gate-group"));
        }
        Ok(())
    }
}

/// A refusal that names the path and the cause.
fn refused(path: &Path, cause: impl fmt::Display) -> Error {
    Error::new(format!("cannot use {}: {cause}", path.display()))
}

/// Whether this file is a gate, of whatever version.
pub fn is_gate(path: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Ok(file) = fs::open(path, flags, Mode::empty()) else {
        return false;
    };
    let mut magic = [0; 8];
    let at = std::mem::offset_of!(Header, magic) as u64;
    on_tmpfs(file.as_fd()) == Ok(true)
        && rustix::io::pread(&file, &mut magic, at) == Ok(magic.len())
        && u64::from_le_bytes(magic) == MAGIC
}

/// Whether an open file lies on tmpfs.
fn on_tmpfs(file: BorrowedFd<'_>) -> std::result::Result<bool, Errno> {
    Ok(fs::fstatfs(file)?.f_type as u32 == TMPFS_MAGIC)
}

fn not_tmpfs(path: &Path) -> Error {
    Error::usage(format!(
        "cannot keep a gate in {}: it is not on a tmpfs (a frozen or full disk would stop or \
         kill the programs of the set)",
        path.display()
    ))
    .next("set SNAPSHIM_DIR to a directory on a tmpfs, such as /dev/shm/NAME, or unset it")
}

/// Opens a directory by its own name, not through a symbolic link.
fn open_dir(at: BorrowedFd<'_>, name: &Path) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(at, name, flags, Mode::empty())
}

/// Says what an error of [`open_dir`] means.
fn open_dir_error(path: &Path, cause: Errno) -> Error {
    match cause {
        // With O_DIRECTORY, Linux reports a symbolic link as "not a directory" too.
        Errno::LOOP | Errno::NOTDIR if path.is_symlink() => {
            refused(path, "it is a symbolic link").next("name the directory it points to")
        }
        Errno::NOTDIR | Errno::LOOP => refused(path, "it is not a directory")
            .next("remove it, or point SNAPSHIM_DIR elsewhere"),
        Errno::ACCESS => refused(path, cause)
            .next("run as the user the set belongs to, or have it shared with --gate-group"),
        _ => refused(path, cause).next("point SNAPSHIM_DIR at a directory you can use"),
    }
}

/// Makes a place, and those of its parents that are missing, and checks it.
fn make_place(dir: &Path, shared: &Sharing) -> Result<()> {
    let existing = dir
        .ancestors()
        .find(|a| a.exists())
        .unwrap_or(Path::new("/"));
    let probe = fs::open(existing, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open {}", existing.display()))?;
    // Asked before anything is made: nothing is left behind on a disk.
    if !on_tmpfs(probe.as_fd()).context(|| format!("examine {}", existing.display()))? {
        return Err(not_tmpfs(dir));
    }
    let mut missing: Vec<&Path> = dir.ancestors().take_while(|a| *a != existing).collect();
    missing.reverse();
    for step in missing {
        match fs::mkdir(step, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(cause) => {
                return Err(
                    Error::new(format!("cannot make {}: {cause}", step.display()))
                        .next("point SNAPSHIM_DIR at a directory you can write"),
                );
            }
        }
    }
    let (fd, stat) = open_place(dir)?;
    // Others need to pass through to a set that is shared with them; the names of
    // the sets stay private.
    if shared.is_shared()
        && stat.st_mode & 0o011 != 0o011
        && stat.st_uid == rustix::process::geteuid().as_raw()
    {
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o011);
        let own =
            open_dir(fd.as_fd(), Path::new(".")).map_err(|cause| open_dir_error(dir, cause))?;
        fs::fchmod(&own, mode).context(|| format!("set the mode of {}", dir.display()))?;
    }
    Ok(())
}

/// Opens a place: ours or root's, and written by nobody else unless they cannot
/// touch each other's entries (sticky, as `/dev/shm` itself).
fn open_place(dir: &Path) -> Result<(OwnedFd, Stat)> {
    // O_PATH: of a place shared with us we may know a name without reading the others.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = fs::open(dir, flags, Mode::empty()).map_err(|cause| open_dir_error(dir, cause))?;
    let stat = fs::fstat(&fd).context(|| format!("examine {}", dir.display()))?;
    if !on_tmpfs(fd.as_fd()).context(|| format!("examine {}", dir.display()))? {
        return Err(not_tmpfs(dir));
    }
    let mut seen = stat;
    if stat.st_mode & 0o1000 != 0 {
        seen.st_mode &= !0o022;
    }
    Sharing::default().check(&seen, "it", dir)?;
    Ok((fd, stat))
}

/// The open directory of one set.
#[derive(Debug)]
pub struct SetDir {
    /// Its absolute path.
    pub path: PathBuf,
    fd: OwnedFd,
    stat: Stat,
}

impl SetDir {
    /// Opens the directory of set `name` in `place`; `None` if either is absent.
    /// Its owner is checked by [`SetDir::check`] once it is known who may own it.
    pub fn open(place: &Path, name: &str) -> Result<Option<SetDir>> {
        let path = place.join(name);
        match fs::statat(fs::CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(cause) => return Err(open_dir_error(&path, cause)),
            Ok(_) => {}
        }
        let (parent, _) = open_place(place)?;
        match open_dir(parent.as_fd(), Path::new(name)) {
            Ok(fd) => SetDir::adopt(path, fd).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(cause) => Err(open_dir_error(&path, cause)),
        }
    }

    /// Makes the directory of set `name` in `place`, or opens it if it is there.
    pub fn create(place: &Path, name: &str, shared: &Sharing) -> Result<SetDir> {
        let path = place.join(name);
        if path.as_os_str().len() > MAX_PATH - GATE.len() {
            return Err(Error::usage(format!(
                "the path of the gate would be too long: {}",
                path.display()
            ))
            .next("set SNAPSHIM_DIR to a shorter path"));
        }
        let (parent, _) = open_place(place)?;
        let made = match fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(cause) => {
                return Err(
                    Error::new(format!("cannot make {}: {cause}", path.display()))
                        .next("point SNAPSHIM_DIR at a directory you can write"),
                );
            }
        };
        let fd = open_dir(parent.as_fd(), Path::new(name))
            .map_err(|cause| open_dir_error(&path, cause))?;
        if made {
            shared.apply(fd.as_fd(), shared.dir_mode(), &path)?;
        }
        let dir = SetDir::adopt(path, fd)?;
        dir.check(shared)?;
        Ok(dir)
    }

    fn adopt(path: PathBuf, fd: OwnedFd) -> Result<SetDir> {
        let stat = fs::fstat(&fd).context(|| format!("examine {}", path.display()))?;
        Ok(SetDir { path, fd, stat })
    }

    /// Refuses a directory somebody else could change.
    pub fn check(&self, shared: &Sharing) -> Result<()> {
        shared.check(&self.stat, "it", &self.path)
    }

    /// The directory, for calls relative to it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether there is a gate (of any kind).
    pub fn has_gate(&self) -> bool {
        fs::statat(&self.fd, GATE, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }
}

/// A gate file, mapped and checked.
#[derive(Debug)]
pub struct OpenGate {
    /// The mapping; it lasts as long as the process.
    pub gate: Gate,
    /// The file's device and inode, which programs are told, so that they refuse another one.
    pub id: FileId,
}

/// Makes the gate of the set in `dir`; `false` if there is one already, which is
/// then left exactly as it is.
pub fn create(dir: &SetDir, slots: u32, bound_ms: u32, shared: &Sharing) -> Result<bool> {
    if dir.has_gate() {
        return Ok(false);
    }
    let temporary = format!(".gate.{:016x}", random()?);
    let path = dir.path.join(&temporary);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = fs::openat(dir.fd(), &temporary, flags, Mode::from_raw_mode(0o600))
        .context(|| format!("make {}", path.display()))?;
    let made = fill(&file, &path, slots, bound_ms, shared).and_then(|()| {
        // Not a plain rename: a gate that programs have mapped is never replaced.
        let renamed =
            fs::renameat_with(dir.fd(), &temporary, dir.fd(), GATE, RenameFlags::NOREPLACE);
        match renamed {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(cause) => Err(Error::new(format!(
                "cannot put {} in place: {cause}",
                path.display()
            ))),
        }
    });
    if !matches!(made, Ok(true)) {
        // Best effort: what stays behind is a file nobody opens.
        let _ = fs::unlinkat(dir.fd(), &temporary, AtFlags::empty());
    }
    made
}

/// Gives a new file its size, in real blocks, and its contents.
fn fill(file: &OwnedFd, path: &Path, slots: u32, bound_ms: u32, shared: &Sharing) -> Result<()> {
    let slots = slots.clamp(1, MAX_SLOTS);
    let size = file_size(slots);
    if !on_tmpfs(file.as_fd()).context(|| format!("examine {}", path.display()))? {
        return Err(not_tmpfs(path));
    }
    // With blocks reserved now, a tmpfs that fills up later cannot kill a program
    // at a store to its slot.
    reserve(file, path, 0, marks_offset(slots))?;
    fs::ftruncate(file, size as u64).context(|| format!("make {}", path.display()))?;
    let base = map(file, size).context(|| format!("map {}", path.display()))?;
    // SAFETY: just mapped, shared and writable, page-aligned, `size` ≥ a header,
    // never unmapped; the fields are atomics, for which zero is a value.
    let header: &'static Header = unsafe { &*base.cast::<Header>() };
    header.version.store(ABI_VERSION, Relaxed);
    header.header_size.store(HEADER_SIZE as u32, Relaxed);
    header.slot_size.store(size_of::<Slot>() as u32, Relaxed);
    header.slot_count.store(slots, Relaxed);
    header.gate_id.store(random()?, Relaxed);
    header.word.store(word::OPEN, Relaxed);
    header
        .hold_bound_ms
        .store(bound_ms.clamp(1, MAX_HOLD_BOUND_MS), Relaxed);
    header.ticks_per_us.store(ticks_per_us(), Relaxed);
    // Last: a file without it is not a gate.
    header.magic.store(MAGIC, Release);
    shared.apply(file.as_fd(), shared.file_mode(), path)
}

/// Reserves blocks for a part of a gate.
fn reserve(file: &OwnedFd, path: &Path, from: usize, size: usize) -> Result<()> {
    let reserved = fs::fallocate(file, fs::FallocateFlags::empty(), from as u64, size as u64);
    reserved.map_err(|cause| {
        Error::new(format!(
            "cannot reserve {size} bytes for {}: {cause}",
            path.display()
        ))
        .next("free space on that tmpfs, or set SNAPSHIM_DIR to a directory on another one")
    })
}

/// Reserves blocks for the marks of the gate of the set in `dir`, which has so many slots.
pub fn reserve_marks(dir: &SetDir, slots: u32) -> Result<()> {
    let path = dir.path.join(GATE);
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = fs::openat(dir.fd(), GATE, flags, Mode::empty())
        .context(|| format!("open {}", path.display()))?;
    let from = marks_offset(slots);
    reserve(&file, &path, from, file_size(slots) - from)
}

/// Opens the gate of the set in `dir`.
pub fn open(dir: &SetDir, shared: &Sharing) -> Result<OpenGate> {
    let path = dir.path.join(GATE);
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = fs::openat(dir.fd(), GATE, flags, Mode::empty()).map_err(|cause| match cause {
        Errno::LOOP => refused(&path, "it is a symbolic link")
            .next("remove it; the next `snapshim run` makes a new gate"),
        Errno::ISDIR => refused(&path, "it is a directory")
            .next("remove it; the next `snapshim run` makes a new gate"),
        Errno::ACCESS => refused(&path, cause)
            .next("run as the user the set belongs to, or have it shared with --gate-group"),
        Errno::NOENT => refused(&path, "there is no gate")
            .next("start a program in the set with `snapshim run`"),
        _ => refused(&path, cause),
    })?;
    let stat = fs::fstat(&file).context(|| format!("examine {}", path.display()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refused(&path, "it is not a regular file")
            .next("remove it; the next `snapshim run` makes a new gate"));
    }
    shared.check(&stat, "it", &path)?;
    if !on_tmpfs(file.as_fd()).context(|| format!("examine {}", path.display()))? {
        return Err(not_tmpfs(&path));
    }
    let broken = |cause: Invalid| {
        let error = refused(&path, cause);
        match cause {
            Invalid::Version(_) => error.next(format!(
                "use the snapshim its programs were started with, or end them and remove {}",
                dir.path.display()
            )),
            _ => error.next(format!(
                "it is damaged: end the programs of the set, remove {} and start them again",
                dir.path.display()
            )),
        }
    };
    let size = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
    if size < HEADER_SIZE {
        return Err(broken(Invalid::Truncated));
    }
    if size > file_size(MAX_SLOTS) {
        return Err(broken(Invalid::Geometry));
    }
    let base = map(&file, size).context(|| format!("map {}", path.display()))?;
    // SAFETY: mapped shared, readable and writable, for `size` bytes, and never unmapped.
    let gate = unsafe { Gate::attach(base, size) }.map_err(broken)?;
    Ok(OpenGate {
        gate,
        id: FileId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        },
    })
}

/// Maps `size` bytes of a gate file, for as long as the process lasts.
fn map(file: &OwnedFd, size: usize) -> std::result::Result<*const u8, Errno> {
    // SAFETY: a fresh mapping at an address the kernel picks.
    let base = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            size,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            file,
            0,
        )
    }?;
    Ok(base.cast_const().cast())
}

/// A random number.
pub(crate) fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context(|| "get a random number".into())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The rate of [`sys::ticks`], at least 1.
#[cfg(target_arch = "aarch64")]
fn ticks_per_us() -> u32 {
    let hz: u64;
    // SAFETY: CNTFRQ_EL0 is readable from user space on Linux.
    unsafe { core::arch::asm!("mrs {}, cntfrq_el0", out(reg) hz, options(nomem, nostack)) };
    (hz / 1_000_000).clamp(1, u64::from(u32::MAX)) as u32
}

/// The rate of [`sys::ticks`], at least 1: measured, for no instruction tells it
/// on every machine. A waiter's deadline needs it to a few per cent only.
#[cfg(not(target_arch = "aarch64"))]
fn ticks_per_us() -> u32 {
    let start = (sys::monotonic_ns(), sys::ticks());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let ticks = sys::ticks().saturating_sub(start.1);
    let us = (sys::monotonic_ns().saturating_sub(start.0) / 1_000).max(1);
    (ticks / us).clamp(1, u64::from(u32::MAX)) as u32
}

/// Removes characters of no use in a file name; for a set's name made of a path.
pub(crate) fn sanitise(name: &OsStr) -> String {
    let mut clean: String = name
        .as_bytes()
        .iter()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => char::from(*b),
            _ => '_',
        })
        .skip_while(|c| *c == '.')
        .take(64)
        .collect();
    if clean.is_empty() {
        clean.push_str("set");
    }
    clean
}

#[cfg(test)]
mod tests {
    use std::fs as stdfs;
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

    use super::*;

    /// A place of its own on tmpfs, removed with the value.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Scratch {
            let dir = format!("/dev/shm/snapshim-test-{:016x}", random().unwrap());
            make_place(Path::new(&dir), &Sharing::default()).unwrap();
            Scratch(dir.into())
        }

        fn set(&self, name: &str) -> SetDir {
            let dir = SetDir::create(&self.0, name, &Sharing::default()).unwrap();
            assert!(create(&dir, 64, 1_000, &Sharing::default()).unwrap());
            dir
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = stdfs::remove_dir_all(&self.0);
        }
    }

    fn opened(dir: &SetDir) -> Result<OpenGate> {
        open(dir, &Sharing::default())
    }

    /// The refusal names the file, says `cause` and what to do next.
    #[track_caller]
    fn assert_refused(dir: &SetDir, cause: &str) {
        let error = opened(dir).expect_err(cause);
        assert!(error.message.contains(cause), "{}", error.message);
        assert!(
            error.message.contains(&dir.path.display().to_string()),
            "{}",
            error.message
        );
        assert!(error.next.is_some());
    }

    #[test]
    fn a_new_gate_opens_and_is_never_replaced() {
        let scratch = Scratch::new();
        let dir = scratch.set("a");
        let first = opened(&dir).unwrap();
        assert_eq!(first.gate.slots().len(), 64);
        assert_eq!(first.gate.hold_bound_ns(), 1_000_000_000);
        assert!(first.gate.header().ticks_per_us.load(Relaxed) > 0);
        assert!(word::is_open(first.gate.header().word.load(Relaxed)));
        assert!(!create(&dir, 64, 1_000, &Sharing::default()).unwrap());
        assert_eq!(opened(&dir).unwrap().id, first.id);
        let mode = |path: &Path| stdfs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&dir.path), 0o700);
        assert_eq!(mode(&dir.path.join(GATE)), 0o600);
        let blocks = fs::stat(dir.path.join(GATE)).unwrap().st_blocks as usize;
        assert!(blocks * 512 >= marks_offset(64), "the blocks are reserved");
        // Marks are only for those who ask for them.
        assert!(blocks * 512 < file_size(64));
        reserve_marks(&dir, 64).unwrap();
        let blocks = fs::stat(dir.path.join(GATE)).unwrap().st_blocks as usize;
        assert!(blocks * 512 >= file_size(64));
        assert!(!first.gate.wants_marks() && first.gate.marks().number() == 0);
    }

    #[test]
    fn a_damaged_gate_is_refused() {
        let scratch = Scratch::new();
        let write = |dir: &SetDir, at: u64, bytes: &[u8]| {
            let file = stdfs::OpenOptions::new()
                .write(true)
                .open(dir.path.join(GATE))
                .unwrap();
            file.write_all_at(bytes, at).unwrap();
        };
        let cut = |dir: &SetDir, len: u64| {
            let file = stdfs::OpenOptions::new()
                .write(true)
                .open(dir.path.join(GATE))
                .unwrap();
            file.set_len(len).unwrap();
        };
        let dir = scratch.set("magic");
        write(&dir, 0, b"nonsense");
        assert_refused(&dir, "it is not a gate file");

        let dir = scratch.set("version");
        write(&dir, 8, &7_u32.to_le_bytes());
        assert_refused(&dir, "it has layout version 7");

        let dir = scratch.set("count");
        write(&dir, 20, &u32::MAX.to_le_bytes());
        assert_refused(&dir, "its sizes contradict each other");

        for (len, cause) in [
            (0, "it is too short"),
            (100, "it is too short"),
            (HEADER_SIZE as u64, "its sizes contradict each other"),
            (
                file_size(64) as u64 - 4096,
                "its sizes contradict each other",
            ),
            (1 << 40, "its sizes contradict each other"),
        ] {
            let dir = scratch.set(&format!("length{len}"));
            cut(&dir, len);
            assert_refused(&dir, cause);
        }
    }

    #[test]
    fn what_is_no_plain_file_of_ours_is_refused() {
        let scratch = Scratch::new();
        let good = scratch.set("good").path.join(GATE);

        let dir = scratch.set("link");
        stdfs::remove_file(dir.path.join(GATE)).unwrap();
        symlink(&good, dir.path.join(GATE)).unwrap();
        assert_refused(&dir, "it is a symbolic link");

        let dir = scratch.set("directory");
        stdfs::remove_file(dir.path.join(GATE)).unwrap();
        stdfs::create_dir(dir.path.join(GATE)).unwrap();
        assert_refused(&dir, "it is a directory");

        let dir = scratch.set("fifo");
        stdfs::remove_file(dir.path.join(GATE)).unwrap();
        nix::unistd::mkfifo(&dir.path.join(GATE), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_refused(&dir, "it is not a regular file");

        let dir = scratch.set("absent");
        stdfs::remove_file(dir.path.join(GATE)).unwrap();
        assert_refused(&dir, "there is no gate");

        let dir = scratch.set("mode");
        let others = stdfs::Permissions::from_mode(0o602);
        stdfs::set_permissions(dir.path.join(GATE), others).unwrap();
        assert_refused(&dir, "can be written by others");

        let link = scratch.0.join("linked");
        symlink(scratch.0.join("good"), &link).unwrap();
        let error = SetDir::open(&scratch.0, "linked").unwrap_err();
        assert!(error.message.contains("it is a symbolic link"), "{error}");

        if rustix::process::geteuid().is_root() {
            let dir = scratch.set("foreign");
            fs::chown(dir.path.join(GATE), Some(Uid::from_raw(12345)), None).unwrap();
            assert_refused(&dir, "it belongs to uid 12345");
            let theirs = Sharing {
                owner: Some(12345),
                group: None,
            };
            assert!(open(&dir, &theirs).is_ok());
        }
    }

    #[test]
    fn a_gate_must_lie_on_tmpfs() {
        let disk = env::temp_dir().join(format!("snapshim-test-{:016x}", random().unwrap()));
        stdfs::create_dir(&disk).unwrap();
        let probe = fs::open(&disk, OFlags::PATH, Mode::empty()).unwrap();
        if !on_tmpfs(probe.as_fd()).unwrap() {
            let error = make_place(&disk.join("deeper"), &Sharing::default()).unwrap_err();
            assert!(error.message.contains("not on a tmpfs"), "{error}");
            assert!(!disk.join("deeper").exists());
            let error = SetDir::create(&disk, "a", &Sharing::default()).unwrap_err();
            assert!(error.message.contains("not on a tmpfs"), "{error}");
        }
        stdfs::remove_dir_all(&disk).unwrap();
    }

    #[test]
    fn random_bytes_never_get_past_the_checks_or_harm() {
        let scratch = Scratch::new();
        let dir = scratch.set("a");
        let path = dir.path.join(GATE);
        let whole = stdfs::read(&path).unwrap();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            // xorshift64: any sequence will do, the same one every time.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for round in 0..500 {
            let mut bytes = whole.clone();
            if round % 2 == 0 {
                // A valid head before noise: everything that is read later.
                let noise = 64..marks_offset(64) + 4096;
                bytes[noise].iter_mut().for_each(|b| *b = next() as u8);
            } else {
                let changes = 1 + next() % 40;
                for _ in 0..changes {
                    let at = next() as usize % if next() % 2 == 0 { 64 } else { bytes.len() };
                    bytes[at] = next() as u8;
                }
            }
            if next() % 8 == 0 {
                bytes.truncate(next() as usize % bytes.len());
            }
            // A new file each time: a mapped one must not be truncated.
            stdfs::remove_file(&path).unwrap();
            stdfs::write(&path, &bytes).unwrap();
            stdfs::set_permissions(&path, stdfs::Permissions::from_mode(0o600)).unwrap();
            if let Ok(found) = opened(&dir) {
                assert!(found.gate.slots().len() <= MAX_SLOTS as usize);
                assert!(found.gate.used_slots().len() <= found.gate.slots().len());
                assert!(found.gate.hold_bound_ns() <= u64::from(MAX_HOLD_BOUND_MS) * 1_000_000);
                let id = FileId {
                    dev: next(),
                    ino: next(),
                };
                found.gate.table(next() as usize).shuts(id);
            }
        }
    }

    #[test]
    fn the_order_of_places() {
        let choose = |dir: Option<&str>, runtime: Option<&str>, uid| {
            Places::choose(dir.map(OsStr::new), runtime.map(OsStr::new), uid)
        };
        let dirs = |places: Result<Places>| {
            let dirs = places.unwrap().dirs;
            dirs.iter()
                .map(|d| d.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(dirs(choose(Some("/x"), Some("/y"), 7)), ["/x"]);
        assert_eq!(
            dirs(choose(None, Some("/y"), 7)),
            ["/y/snapshim", "/dev/shm/snapshim-7"]
        );
        assert_eq!(dirs(choose(Some(""), None, 7)), ["/dev/shm/snapshim-7"]);
        assert_eq!(
            dirs(choose(None, Some("/y"), 0)),
            ["/run/snapshim", "/dev/shm/snapshim-0"]
        );
        assert!(
            choose(Some("x"), None, 7)
                .unwrap_err()
                .message
                .contains("not an absolute path")
        );
    }

    #[test]
    fn names_made_of_file_names() {
        for (name, expected) in [
            ("data", "data"),
            ("a b/c", "a_b_c"),
            ("..x", "x"),
            ("", "set"),
            ("...", "set"),
        ] {
            assert_eq!(sanitise(OsStr::new(name)), expected);
        }
        assert_eq!(sanitise(OsStr::from_bytes(b"\xff.db")), "_.db");
        assert_eq!(sanitise(OsStr::new(&"x".repeat(300))).len(), 64);
    }
}
