//! Which snapshots stay.

use std::ffi::OsStr;

use jiff::tz::TimeZone;

use super::policy::{self, Candidate, Policy};
use super::{DEL, Store, StoreLock, fault, remove};
use crate::Result;

impl Store {
    /// Removes what the policy does not keep, and returns the ids removed, oldest first. A
    /// snapshot whose manifest cannot be used stays: it may be of a later version.
    ///
    /// Each first loses its name (a rename to `.del-<id>`, made durable), so that no half
    /// removed snapshot is ever listed.
    ///
    /// # Errors
    ///
    /// One cannot be removed; those before it are.
    pub fn apply(&self, lock: &StoreLock, policy: &Policy) -> Result<Vec<String>> {
        let _ = lock;
        let history: Vec<Candidate> = self
            .heads()?
            .into_iter()
            .filter_map(|listed| {
                let head = listed.head.ok()?;
                Some(Candidate {
                    time: head.cut_at()?,
                    class: head.class(),
                    is_pinned: head.pin.is_some(),
                    id: listed.id,
                })
            })
            .collect();
        let latest = self.latest();
        let why = policy::judge(&history, latest.as_deref(), policy, &TimeZone::system());
        let judged = history.into_iter().zip(why);
        let old: Vec<String> = judged
            .filter(|(_, why)| why.is_empty())
            .map(|(candidate, _)| candidate.id)
            .collect();
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
