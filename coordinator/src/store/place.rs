//! Where a store is, and opening it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Store, fault};
use crate::{Error, Result};

/// The name of the default store.
const NAME: &str = ".snapshim";

/// Attributes a new directory inherits from its parent's default ACL. They are
/// taken off the set's directory, or every file captured below it would be
/// given an ACL its original does not have.
pub(crate) const INHERITED: [&str; 2] = ["system.posix_acl_default", "system.posix_acl_access"];

/// A directory, and not by way of a symbolic link in the last component.
const DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// See [`Store::default_place`].
pub(super) fn default_place(roots: &[PathBuf]) -> PathBuf {
    let Some(root) = roots.first() else {
        return PathBuf::from(NAME);
    };
    let inside = root.join(NAME);
    let parent = match root.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => return inside,
    };
    let beside = parent.join(NAME);
    let is_dir = |path: &Path| rustix::fs::lstat(path).is_ok_and(|stat| kind_is_dir(&stat));
    if is_dir(&beside) {
        return beside;
    }
    if is_dir(&inside) {
        return inside;
    }
    // A file, or nothing yet, has no inside.
    let Ok(root_stat) = rustix::fs::stat(root) else {
        return beside;
    };
    if !kind_is_dir(&root_stat) {
        return beside;
    }
    let same_device = rustix::fs::stat(parent).is_ok_and(|stat| stat.st_dev == root_stat.st_dev);
    let writable = rustix::fs::accessat(CWD, parent, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
    if same_device && writable {
        beside
    } else {
        inside
    }
}

/// See [`Store::open_or_create`].
pub(super) fn open_or_create(place: &Path, set: &str) -> Result<Store> {
    let path = place.join(set);
    make_dir(CWD, place, place)?;
    let place_dir = open_dir(CWD, place, place)?;
    let made = make_dir(&place_dir, Path::new(set), &path)?;
    let dir = open_dir(&place_dir, Path::new(set), &path)?;
    check_ours(&dir, &path)?;
    if made {
        for name in INHERITED {
            // Nothing inherited, or no ACLs there at all: nothing to take off.
            let _ = rustix::fs::fremovexattr(&dir, name);
        }
        rustix::fs::fsync(&place_dir).map_err(|cause| fault("write", place, cause))?;
    }
    Ok(Store { dir, path })
}

/// Refuses to change a store that belongs to somebody else, or that others can change.
pub(super) fn check_ours(dir: &OwnedFd, path: &Path) -> Result<()> {
    let stat = rustix::fs::fstat(dir).map_err(|cause| fault("look at", path, cause))?;
    let me = rustix::process::geteuid().as_raw();
    if stat.st_uid != me {
        return Err(Error::new(format!(
            "the store {} belongs to another user (uid {}, this is {me})",
            path.display(),
            stat.st_uid
        ))
        .next("run as that user, or choose another store with --store"));
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(Error::new(format!(
            "the store {} can be changed by other users (mode {:04o})",
            path.display(),
            stat.st_mode & 0o7777
        ))
        .next(format!("chmod 700 {}", path.display())));
    }
    Ok(())
}

/// See [`Store::open`].
pub(super) fn open(place: &Path, set: &str) -> Result<Store> {
    let path = place.join(set);
    let absent = |error: Errno, what: String| {
        (error == Errno::NOENT).then(|| {
            Error::new(what)
                .next("take one with 'snapshim checkpoint', or name the store with --store")
        })
    };
    let open = |at: rustix::fd::BorrowedFd<'_>, name: &Path, path: &Path| {
        rustix::fs::openat(at, name, OFlags::RDONLY | DIRECTORY, Mode::empty()).map_err(|error| {
            absent(
                error,
                format!("there are no snapshots of '{set}' in {}", place.display()),
            )
            .unwrap_or_else(|| cannot_open(path, error))
        })
    };
    use rustix::fd::AsFd;
    let place_dir = open(CWD.as_fd(), place, place)?;
    let dir = open(place_dir.as_fd(), Path::new(set), &path)?;
    let stat = rustix::fs::fstat(&dir).map_err(|cause| fault("look at", &path, cause))?;
    let me = rustix::process::geteuid();
    if stat.st_uid != me.as_raw() && !me.is_root() {
        return Err(Error::new(format!(
            "the store {} belongs to another user (uid {})",
            path.display(),
            stat.st_uid
        ))
        .next("run as that user, or choose another store with --store"));
    }
    Ok(Store { dir, path })
}

/// Makes a directory only its owner can enter; `false` if there is something already.
fn make_dir(at: impl rustix::fd::AsFd, name: &Path, path: &Path) -> Result<bool> {
    match rustix::fs::mkdirat(at, name, Mode::RWXU) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(Errno::NOENT) => Err(Error::new(format!(
            "cannot make the store {}: the directory it would be in does not exist",
            path.display()
        ))
        .next("make that directory first, or choose another store with --store")),
        Err(Errno::NOTDIR) => Err(Error::new(format!(
            "cannot make the store {}: its parent is not a directory",
            path.display()
        ))
        .next("choose another store with --store")),
        Err(cause) => Err(fault("make the store", path, cause)),
    }
}

fn open_dir(at: impl rustix::fd::AsFd, name: &Path, path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(at, name, OFlags::RDONLY | DIRECTORY, Mode::empty())
        .map_err(|cause| cannot_open(path, cause))
}

fn cannot_open(path: &Path, cause: Errno) -> Error {
    let is_link = rustix::fs::lstat(path).is_ok_and(|stat| stat.st_mode & 0o170_000 == 0o120_000);
    match cause {
        // With O_DIRECTORY a symbolic link gives ENOTDIR, not ELOOP.
        Errno::LOOP | Errno::NOTDIR if is_link => Error::new(format!(
            "the store {} is a symbolic link, which is not followed",
            path.display()
        ))
        .next("name the directory it points to with --store"),
        Errno::NOTDIR => Error::new(format!("the store {} is not a directory", path.display()))
            .next("choose another store with --store"),
        cause => fault("open the store", path, cause),
    }
}

fn kind_is_dir(stat: &Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir()
}
