//! A directory of the store for work that is thrown away.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::{Store, TMP, fault, remove, remove_tree};
use crate::{Error, Result};

/// Names tried, where a sweep takes one away before it is locked.
const TRIES: u32 = 100;

/// `.tmp-verify-<id>-<pid>-<n>`. While it is open it has a lock (flock), so that no sweep takes
/// it away; what a crash leaves has none. Removed when dropped, as far as that goes.
#[derive(Debug)]
pub(crate) struct ScratchDir {
    set: OwnedFd,
    name: String,
    path: PathBuf,
    _lock: OwnedFd,
    removed: bool,
}

impl Store {
    /// Makes one, for work on the snapshot `id`. Needs no lock of the store.
    ///
    /// # Errors
    ///
    /// The store cannot be written.
    pub(crate) fn scratch_dir(&self, id: &str) -> Result<ScratchDir> {
        for number in 0..TRIES {
            let name = format!("{TMP}verify-{id}-{}-{number}", std::process::id());
            let path = self.path.join(&name);
            let failed = |cause| fault("make", &path, cause);
            match rustix::fs::mkdirat(&self.dir, &name, Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(cause) => return Err(failed(cause)),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let locked =
                rustix::fs::openat(&self.dir, &name, flags, Mode::empty()).and_then(|dir| {
                    rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
                    let named = rustix::fs::statat(&self.dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                    let stat = rustix::fs::fstat(&dir)?;
                    let is_there = (named.st_dev, named.st_ino) == (stat.st_dev, stat.st_ino);
                    Ok(is_there.then_some(dir))
                });
            let lock = match locked {
                Ok(Some(dir)) => dir,
                // A sweep was faster.
                Ok(None) | Err(Errno::NOENT | Errno::WOULDBLOCK) => continue,
                Err(cause) => return Err(failed(cause)),
            };
            let set =
                rustix::io::dup(&self.dir).map_err(|cause| fault("open", &self.path, cause))?;
            return Ok(ScratchDir {
                set,
                name,
                path,
                _lock: lock,
                removed: false,
            });
        }
        Err(Error::new(format!(
            "cannot make a directory for work in {}",
            self.path.display()
        ))
        .next("another snapshim command takes them away: try again"))
    }
}

impl ScratchDir {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it with all that is in it.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.removed = true;
        remove_tree(&self.set, OsStr::new(&self.name))
            .map_err(|cause| remove::cannot(&self.path, cause))
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if !self.removed {
            // Best effort: a sweep removes what stays.
            let _ = remove_tree(&self.set, OsStr::new(&self.name));
        }
    }
}
