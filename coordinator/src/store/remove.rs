//! Removing a tree that is not trusted: relative to directory descriptors,
//! following no symbolic link, at any depth, with two descriptors open.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::read::names_in;

/// Removes `name` in `parent`, whatever it is, and all below it. Absent is fine.
///
/// Depth costs neither stack nor descriptors: each subdirectory is moved up to the
/// top, under a name that is free there, and emptied in its turn. A crash leaves a tree
/// that is shallower than before, under its old name, for the next sweep.
pub(crate) fn remove_tree(parent: impl AsFd, name: &std::ffi::OsStr) -> rustix::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(name.as_bytes()).map_err(|_| Errno::INVAL)?;
    let parent = parent.as_fd();
    match rustix::fs::unlinkat(parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // What Linux says of a directory; POSIX has EPERM.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(cause) => return Err(cause),
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
            remove_entry(&top, entry, &mut moved_up)?;
        }
    }
    drop(top);
    rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR)
}

/// Removes one entry of `top`; the directories in it move up to `top`.
fn remove_entry(top: &OwnedFd, name: &CStr, moved_up: &mut u64) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(top, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(cause) => return Err(cause),
    }
    let dir = open_to_empty(top.as_fd(), name)?;
    for entry in names_in(&dir)? {
        match rustix::fs::unlinkat(&dir, &entry, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(cause) => return Err(cause),
        }
        if rustix::fs::unlinkat(&dir, &entry, AtFlags::REMOVEDIR).is_ok() {
            continue;
        }
        move_up(&dir, &entry, top, moved_up)?;
    }
    rustix::fs::unlinkat(top, name, AtFlags::REMOVEDIR)
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

/// Opens a directory, first giving its owner all rights on it, if need be.
fn open_to_empty(parent: rustix::fd::BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path_fd = rustix::fs::openat(parent, name, flags | OFlags::PATH, Mode::empty())?;
    let stat = rustix::fs::fstat(&path_fd)?;
    if stat.st_mode & 0o700 != 0o700 {
        // By way of /proc, because fchmod refuses an O_PATH descriptor and chmod by
        // name would follow a symbolic link put there meanwhile.
        let path = format!("/proc/self/fd/{}", path_fd.as_raw_fd());
        rustix::fs::chmod(path, Mode::RWXU)?;
    }
    rustix::fs::openat(&path_fd, ".", OFlags::RDONLY | flags, Mode::empty())
}
