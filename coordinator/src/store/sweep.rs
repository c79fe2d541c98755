//! Removing what a crash left.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::{DEL, Store, StoreLock, TMP, fault, remove};
use crate::Result;

impl Store {
    /// Removes drafts that were never published and snapshots whose removal was not
    /// completed, and returns their names. The lock says that nobody is at work on them.
    ///
    /// # Errors
    ///
    /// One cannot be removed; those before it are.
    pub fn sweep(&self, lock: &StoreLock) -> Result<Vec<String>> {
        let _ = lock;
        let mut swept = Vec::new();
        for name in self.names()? {
            let bytes = name.to_bytes();
            if !bytes.starts_with(TMP.as_bytes()) && !bytes.starts_with(DEL.as_bytes()) {
                continue;
            }
            let name = OsStr::from_bytes(bytes);
            remove::remove_tree(&self.dir, name).map_err(|cause| {
                fault("remove what a crash left,", &self.path.join(name), cause)
            })?;
            swept.push(name.to_string_lossy().into_owned());
        }
        swept.sort_unstable();
        Ok(swept)
    }
}
