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
        let is_good = |id: &&String| self.head(id).is_ok_and(|head| head.class() == Class::Good);
        let ids = self.ids()?;
        let good = ids.iter().rev().find(is_good).cloned();
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
