//! Which snapshots stay.

use std::ffi::OsStr;

use super::{DEL, Store, StoreLock, fault, remove};
use crate::Result;

impl Store {
    /// Removes all but the newest `n` snapshots and returns the ids removed, oldest first.
    /// The one `latest` points to stays, even if it is older than these.
    ///
    /// Each first loses its name (a rename to `.del-<id>`, made durable), so that no half
    /// removed snapshot is ever listed.
    ///
    /// # Errors
    ///
    /// One cannot be removed; those before it are.
    pub fn keep_last(&self, lock: &StoreLock, n: usize) -> Result<Vec<String>> {
        let _ = lock;
        let latest = self.latest();
        let mut old = self.ids()?;
        old.truncate(old.len().saturating_sub(n));
        old.retain(|id| Some(id) != latest.as_ref());
        for id in &old {
            let path = self.path.join(id);
            let doomed = format!("{DEL}{id}");
            // Left by a crash between two renames; in the way of this one.
            remove::remove_tree(&self.dir, OsStr::new(&doomed))
                .and_then(|()| rustix::fs::renameat(&self.dir, id, &self.dir, &doomed))
                .and_then(|()| rustix::fs::fsync(&self.dir))
                .and_then(|()| remove::remove_tree(&self.dir, OsStr::new(&doomed)))
                .map_err(|cause| fault("remove the snapshot", &path, cause))?;
        }
        Ok(old)
    }
}
