//! The link `latest`, to the newest good snapshot.

use std::os::fd::AsFd;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::policy::Class;
use super::{LATEST, Store, StoreLock, TMP, fault};
use crate::Result;

impl Store {
    /// Points `latest` at the newest good snapshot, or removes it if there is none; returns
    /// that snapshot's id. To be called after a snapshot was removed or judged anew.
    ///
    /// # Errors
    ///
    /// The store cannot be read or written.
    pub fn settle_latest(&self, lock: &StoreLock) -> Result<Option<String>> {
        let _ = lock;
        self.point_to_newest(None)
    }

    /// Points `latest` away from the snapshot `id`, which is about to be removed or to be
    /// called bad: whatever ends us then, `latest` is a good one.
    ///
    /// # Errors
    ///
    /// As of [`Store::settle_latest`].
    pub(crate) fn leave_latest(&self, lock: &StoreLock, id: &str) -> Result<()> {
        let _ = lock;
        match self.latest().as_deref() == Some(id) {
            true => self.point_to_newest(Some(id)).map(|_| ()),
            false => Ok(()),
        }
    }

    /// Mends what a command that did not come to its end left: a `latest` that leads nowhere or
    /// is not good, or is not yet the snapshot that was published last.
    pub(super) fn mend_latest(&self, lock: &StoreLock) -> Result<()> {
        let latest = self.latest();
        let ids = self.ids()?;
        let is_wrong = match &latest {
            Some(latest) => !(ids.contains(latest) && self.is_good(latest)),
            None => false,
        };
        // Older ones were settled when the next was published.
        let is_late = ids
            .last()
            .is_some_and(|newest| Some(newest) != latest.as_ref() && self.is_good(newest));
        match is_wrong || is_late {
            true => self.settle_latest(lock).map(|_| ()),
            false => Ok(()),
        }
    }

    fn is_good(&self, id: &str) -> bool {
        self.head(id).is_ok_and(|head| head.class() == Class::Good)
    }

    /// Points `latest` at the newest good snapshot, except this one.
    fn point_to_newest(&self, except: Option<&str>) -> Result<Option<String>> {
        let mut ids = self.ids()?;
        ids.retain(|id| Some(id.as_str()) != except);
        let good = ids.iter().rev().find(|id| self.is_good(id)).cloned();
        let failed = |cause| fault("replace the link 'latest' in", &self.path, cause);
        match &good {
            Some(id) if self.latest().as_ref() == Some(id) => {}
            Some(id) => point(&self.dir, id).map_err(failed)?,
            None => remove(&self.dir).map_err(failed)?,
        }
        Ok(good)
    }
}

/// Makes `latest` in the set's directory point to `id`, by rename.
pub(super) fn point(set: impl AsFd, id: &str) -> rustix::io::Result<()> {
    let name = format!("{TMP}{LATEST}");
    match rustix::fs::unlinkat(&set, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(cause) => return Err(cause),
    }
    rustix::fs::symlinkat(id, &set, &name)?;
    rustix::fs::renameat(&set, &name, &set, LATEST)?;
    rustix::fs::fsync(&set)
}

fn remove(set: impl AsFd) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(&set, LATEST, AtFlags::empty()) {
        Ok(()) => rustix::fs::fsync(&set),
        Err(Errno::NOENT) => Ok(()),
        Err(cause) => Err(cause),
    }
}
