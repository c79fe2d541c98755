//! Removing a tree that is not trusted: relative to directory descriptors,
//! following no symbolic link, at any depth, with two descriptors open; large files
//! piece by piece.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::libc;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::fault;
use super::pace::Pace;
use super::read::names_in;
use crate::Error;
use crate::tree::subvolume;

/// Bytes of a file that go at once: what is freed by one unlink is one transaction of
/// the file system, and everybody's fsync may have to wait for it.
const PIECE: u64 = 256 << 20;
/// Most pieces of one file.
const PIECES: u64 = 4096;

/// Removes `name` in `parent`, whatever it is, and all below it. Absent is fine.
///
/// Depth costs neither stack nor descriptors: each subdirectory is moved up to the
/// top, under a name that is free there, and emptied in its turn. A crash leaves a tree
/// that is shallower than before, under its old name, for the next sweep.
pub(crate) fn remove_tree(parent: impl AsFd, name: &std::ffi::OsStr) -> rustix::io::Result<()> {
    remove_paced(parent, name, &mut Pace::brisk())
}

/// The same, at a pace. Stopped, it leaves what a crash leaves.
///
/// # Errors
///
/// `ECANCELED` if it was stopped.
pub(super) fn remove_paced(
    parent: impl AsFd,
    name: &std::ffi::OsStr,
    pace: &mut Pace<'_>,
) -> rustix::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(name.as_bytes()).map_err(|_| Errno::INVAL)?;
    let parent = parent.as_fd();
    if !remove_if_file(parent, &name, pace)? || remove_if_subvolume(parent, &name) {
        return Ok(());
    }
    let top = open_to_empty(parent, &name)?;
    let mut moved_up = 0_u64;
    // Emptying the top directory may bring new ones into it: until none is left.
    loop {
        let names = names_in(&top)?;
        if names.is_empty() {
            break;
        }
        for entry in &names {
            remove_entry(&top, entry, &mut moved_up, pace)?;
        }
    }
    drop(top);
    rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR)
}

/// The error that something of the store cannot be removed.
pub(super) fn cannot(path: &Path, cause: Errno) -> Error {
    match cause {
        Errno::XDEV | Errno::BUSY => Error::new(format!(
            "cannot remove {}: something is mounted in it",
            path.display()
        ))
        .next("`findmnt` shows what; unmount it"),
        cause => fault("remove", path, cause),
    }
}

/// Removes one entry of `top`; the directories in it move up to `top`.
fn remove_entry(
    top: &OwnedFd,
    name: &CStr,
    moved_up: &mut u64,
    pace: &mut Pace<'_>,
) -> rustix::io::Result<()> {
    if !remove_if_file(top.as_fd(), name, pace)? || remove_if_subvolume(top.as_fd(), name) {
        return Ok(());
    }
    let dir = open_to_empty(top.as_fd(), name)?;
    for entry in names_in(&dir)? {
        if !remove_if_file(dir.as_fd(), &entry, pace)? {
            continue;
        }
        if rustix::fs::unlinkat(&dir, &entry, AtFlags::REMOVEDIR).is_ok()
            || remove_if_subvolume(dir.as_fd(), &entry)
        {
            continue;
        }
        move_up(&dir, &entry, top, moved_up)?;
    }
    rustix::fs::unlinkat(top, name, AtFlags::REMOVEDIR)
}

/// Removes `name` unless it is a directory; whether it is one.
fn remove_if_file(
    dir: rustix::fd::BorrowedFd<'_>,
    name: &CStr,
    pace: &mut Pace<'_>,
) -> rustix::io::Result<bool> {
    let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(false),
        Err(cause) => return Err(cause),
    };
    if is_large(&stat) {
        cut_down(dir, name, pace)?;
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => pace.step().map(|()| false),
        // What Linux says of a directory.
        Err(Errno::ISDIR) => Ok(true),
        Err(cause) => Err(cause),
    }
}

/// Removes the directory `name` at once if it is a btrfs subvolume: what a capture froze is
/// read-only, and cannot be emptied. Whether it is gone; one that may not be removed so is
/// writable now, if it is this user's, and is emptied like any directory.
fn remove_if_subvolume(dir: rustix::fd::BorrowedFd<'_>, name: &CStr) -> bool {
    let is_top = |stat: Stat| stat.st_ino == subvolume::TOP;
    if !rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_top) {
        return false;
    }
    // A mount point may have that number, too.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::BENEATH;
    let opened = rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve);
    opened.is_ok_and(subvolume::is_top) && subvolume::destroy(dir, name).is_ok()
}

/// Whether this is a file of many bytes on disk, and this its only name: by another name
/// somebody may want to keep it.
fn is_large(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode).is_file()
        && stat.st_nlink == 1
        && (stat.st_blocks as u64).saturating_mul(512) > PIECE
}

/// Makes a large file shorter, piece by piece, until the rest can go at once. Whoever has it open
/// goes on reading all of it: then it is left as it is. So it is if it cannot be written.
fn cut_down(
    dir: rustix::fd::BorrowedFd<'_>,
    name: &CStr,
    pace: &mut Pace<'_>,
) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::openat(dir, name, flags, Mode::empty()) else {
        return Ok(());
    };
    let stat = rustix::fs::fstat(&file)?;
    if !is_large(&stat) || is_open_elsewhere(&file) {
        return Ok(());
    }
    let mut length = stat.st_size as u64;
    // Of a file with holes a piece may be longer: it has only so many bytes on disk.
    let piece = PIECE.max(length / PIECES);
    while length > piece {
        length -= piece;
        rustix::fs::ftruncate(&file, length)?;
        pace.step()?;
    }
    Ok(())
}

/// Whether anybody else has the file open or mapped, or that cannot be known.
fn is_open_elsewhere(file: &OwnedFd) -> bool {
    let fd = file.as_raw_fd();
    // A write lease is granted only to the one who has the file open alone. If somebody opens it
    // in this very moment, the signal is one that is ignored by default.
    const F_SETSIG: libc::c_int = 10;
    // SAFETY: changes nothing but the state of this descriptor.
    unsafe {
        libc::fcntl(fd, F_SETSIG, libc::SIGURG);
        let is_alone = libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) == 0;
        libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK);
        !is_alone
    }
}

fn move_up(
    dir: &OwnedFd,
    name: &CStr,
    top: &OwnedFd,
    moved_up: &mut u64,
) -> rustix::io::Result<()> {
    // Renaming a directory changes its "..", which takes write permission on itself.
    drop(open_to_empty(dir.as_fd(), name)?);
    loop {
        *moved_up += 1;
        let free = format!(".snapshim-remove-{moved_up}");
        // A name that is taken is one of this tree: never replaced, the next is tried.
        match rustix::fs::statat(top, &free, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return rustix::fs::renameat(dir, name, top, &free),
            Ok(_) => {}
            Err(cause) => return Err(cause),
        }
    }
}

/// Opens a directory, first giving its owner all rights on it, if need be. `EXDEV` for a mount
/// point: what is mounted there is not part of the tree.
fn open_to_empty(parent: rustix::fd::BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::BENEATH;
    let path_fd = rustix::fs::openat2(parent, name, flags | OFlags::PATH, Mode::empty(), resolve)?;
    let stat = rustix::fs::fstat(&path_fd)?;
    if stat.st_mode & 0o700 != 0o700 {
        // By way of /proc, because fchmod refuses an O_PATH descriptor and chmod by
        // name would follow a symbolic link put there meanwhile.
        let path = format!("/proc/self/fd/{}", path_fd.as_raw_fd());
        rustix::fs::chmod(path, Mode::RWXU)?;
    }
    rustix::fs::openat(&path_fd, ".", OFlags::RDONLY | flags, Mode::empty())
}
