//! Removing what is not listed: what a crash left, and what was taken out of the list.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::pace::Pace;
use super::{DEL, Store, StoreLock, TMP, remove};
use crate::{Error, Result};

/// What became of things left half done.
#[derive(Debug, Default)]
pub struct Swept {
    /// Removed.
    pub names: Vec<String>,
    /// Why others stay.
    pub failed: Vec<Error>,
}

impl Swept {
    /// A line for each.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        let removed = |name: &String| format!("removed {name}, left half done");
        let failed = self.failed.iter().map(Error::line);
        self.names.iter().map(removed).chain(failed)
    }
}

impl Store {
    /// Removes drafts that were never published, and returns their names; mends `latest` if a
    /// crash left it without its snapshot, or short of it. The lock says that nobody is at work on
    /// them.
    ///
    /// What cannot be removed is no reason to make no snapshots: it stays for the next time. What
    /// is on its way out (`.del-*`) is left to [`Store::clear`], which may take long.
    ///
    /// # Errors
    ///
    /// The store cannot be read, or `latest` not be written.
    pub fn sweep(&self, lock: &StoreLock) -> Result<Swept> {
        let mut swept = Swept::default();
        let names = self.names()?;
        for name in &names {
            if !name.to_bytes().starts_with(TMP.as_bytes()) {
                continue;
            }
            if self.is_at_work(name) {
                continue;
            }
            let name = OsStr::from_bytes(name.to_bytes());
            match remove::remove_tree(&self.dir, name) {
                Ok(()) => swept.names.push(name.to_string_lossy().into_owned()),
                Err(cause) => swept
                    .failed
                    .push(remove::cannot(&self.path.join(name), cause)),
            }
        }
        swept.names.sort_unstable();
        self.mend_latest(lock)?;
        Ok(swept)
    }

    /// Whether somebody works in this directory and has locked it.
    fn is_at_work(&self, name: &CStr) -> bool {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, name, flags, Mode::empty()).is_ok_and(|dir| {
            rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive)
                == Err(Errno::WOULDBLOCK)
        })
    }

    /// Removes what is on its way out (`.del-*`), at a pace, and returns how many of them
    /// are gone. Needs no lock of the store: nobody else has use for them. One that another
    /// process removes already, or still reads, is left to that process or the next time.
    ///
    /// # Errors
    ///
    /// One cannot be removed, the first of them; all others are.
    pub fn clear(&self, pace: &mut Pace<'_>) -> Result<usize> {
        let mut doomed = self.names()?;
        doomed.retain(|name| name.to_bytes().starts_with(DEL.as_bytes()));
        doomed.sort_unstable();
        let _idle = pace.idle();
        let mut cleared = 0;
        let mut failed = None;
        for (done, name) in doomed.iter().enumerate() {
            pace.begin(doomed.len() - done);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let dir = rustix::fs::openat(&self.dir, name, flags, Mode::empty());
            // Something else than a directory cannot be read from, nor locked.
            if let Ok(dir) = &dir
                && rustix::fs::flock(dir, FlockOperation::NonBlockingLockExclusive).is_err()
            {
                continue;
            }
            let name = OsStr::from_bytes(name.to_bytes());
            match remove::remove_paced(&self.dir, name, pace) {
                Ok(()) => cleared += 1,
                Err(Errno::CANCELED) => break,
                Err(cause) => {
                    failed = failed.or(Some(remove::cannot(&self.path.join(name), cause)))
                }
            }
        }
        failed.map_or(Ok(cleared), Err)
    }
}
