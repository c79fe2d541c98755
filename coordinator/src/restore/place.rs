//! Staging directories: `.snapshim-restore`, on the file system of what they serve.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::journal::UNFINISHED;
use super::look::{names_in, open_dir};
use crate::store::{INHERITED, fault};
use crate::tree::STAGING;
use crate::tree::dirs::as_path;
use crate::{Error, Result};

/// How long another restore is waited for.
const PATIENCE: Duration = Duration::from_millis(300);

/// The name, as a path.
pub(super) fn staging() -> &'static Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(STAGING))
}

/// A staging directory, locked: no other restore uses it meanwhile.
#[derive(Debug)]
pub(super) struct Place {
    /// The directory it is in.
    pub(super) parent: PathBuf,
    pub(super) path: PathBuf,
    pub(super) fd: OwnedFd,
}

impl Place {
    /// Opens that in `parent`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// It is not ours alone; another restore uses it.
    pub(super) fn open(parent: &Path) -> Result<Option<Place>> {
        match open_dir(parent) {
            Ok(dir) => Place::open_in(&dir, parent),
            // Nothing can be in what is not there, or is reached through a link.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => Ok(None),
            Err(cause) => Err(fault("open", parent, cause)),
        }
    }

    fn open_in(dir: &OwnedFd, parent: &Path) -> Result<Option<Place>> {
        let path = parent.join(staging());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(dir, staging(), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(strange(&path, "is no directory")),
            Err(Errno::ACCESS) => return Err(strange(&path, "is not accessible")),
            Err(cause) => return Err(fault("open", &path, cause)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|cause| fault("look at", &path, cause))?;
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(strange(&path, "belongs to another user"));
        }
        if stat.st_mode & 0o077 != 0 {
            return Err(strange(&path, "is open to other users"));
        }
        // `status` looks in, too, and has it only for a moment.
        let until = Instant::now() + PATIENCE;
        loop {
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::new(format!(
                        "another restore is at work in {}",
                        parent.display()
                    ))
                    .next("wait until it has ended"));
                }
                Err(Errno::INTR) => {}
                Err(cause) => return Err(fault("lock", &path, cause)),
            }
        }
        // Removed between the two by the one that had the lock.
        let named = rustix::fs::statat(dir, staging(), AtFlags::SYMLINK_NOFOLLOW);
        if !named.is_ok_and(|n| (n.st_dev, n.st_ino) == (stat.st_dev, stat.st_ino)) {
            return Ok(None);
        }
        Ok(Some(Place {
            parent: parent.to_owned(),
            path,
            fd,
        }))
    }

    /// Makes one in `parent`.
    ///
    /// # Errors
    ///
    /// `parent` cannot be written to; there is one already that is in use.
    pub(super) fn make(parent: &Path) -> Result<Place> {
        let path = parent.join(staging());
        let dir = open_dir(parent).map_err(|cause| fault("open", parent, cause))?;
        match rustix::fs::mkdirat(&dir, staging(), Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(cause) => return Err(full("make", &path, cause)),
        }
        let place = Place::open_in(&dir, parent)?
            .ok_or_else(|| strange(&path, "was removed by another restore"))?;
        if !place.is_unused()? {
            return Err(strange(&path, "holds something"));
        }
        for name in INHERITED {
            // Nothing inherited, or no ACLs there at all: nothing to take off.
            let _ = rustix::fs::fremovexattr(&place.fd, name);
        }
        rustix::fs::fsync(&dir).map_err(|cause| full("write", parent, cause))?;
        Ok(place)
    }

    /// Whether nothing is in it but, at most, a journal that was never finished.
    pub(super) fn is_unused(&self) -> Result<bool> {
        let names = names_in(&self.fd).map_err(|cause| fault("read", &self.path, cause))?;
        Ok(names.iter().all(|n| n.to_bytes() == UNFINISHED.as_bytes()))
    }

    /// Removes all that is staged, whatever it is.
    pub(super) fn clear(&self) -> Result<()> {
        let names = names_in(&self.fd).map_err(|cause| fault("read", &self.path, cause))?;
        for name in names.iter().filter(|n| !n.to_bytes().ends_with(b".json")) {
            let name = as_path(name);
            crate::store::remove_tree(&self.fd, name.as_os_str())
                .map_err(|cause| fault("remove", &self.path.join(name), cause))?;
        }
        Ok(())
    }

    /// Removes the directory itself, which is empty.
    pub(super) fn remove(&self) -> Result<()> {
        let failed = |cause| fault("remove", &self.path, cause);
        let dir = open_dir(&self.parent).map_err(failed)?;
        rustix::fs::unlinkat(&dir, staging(), AtFlags::REMOVEDIR).map_err(failed)?;
        // It is gone from this run's view; after a crash it is there again, and empty.
        let _ = rustix::fs::fsync(&dir);
        Ok(())
    }
}

/// The error of a staging directory that is not as we make it.
fn strange(path: &Path, what: &str) -> Error {
    Error::new(format!(
        "{} {what}: it is not one that this user's restores have made",
        path.display()
    ))
    .next("look at what it holds, move that elsewhere, and remove it")
}

/// What an error of the file system that is restored to means to the user.
pub(super) fn full(what: &str, path: &Path, cause: Errno) -> Error {
    let message = |reason: &str| format!("cannot {what} {}: {reason}", path.display());
    match cause {
        Errno::NOSPC => Error::new(message("the file system is full")),
        Errno::DQUOT => Error::new(message("the disk quota is used up")),
        Errno::ROFS => Error::new(message("the file system is read-only"))
            .next("mount it writable, or restore to another place with --to"),
        Errno::ACCESS | Errno::PERM => Error::new(message(&cause.to_string())).next(
            "run as the owner of these files or as root, or restore to another place with --to",
        ),
        _ => Error::new(message(&cause.to_string())),
    }
}
