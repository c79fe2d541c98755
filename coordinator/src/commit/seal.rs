//! What all files were like when a point was judged: where a program makes calls that are only
//! noticed, not held (`symbols`), that nothing has changed until it was captured shows in ctimes alone.

use std::collections::BTreeMap;
use std::path::PathBuf;

use snapshim_gate::table::FileId;

use crate::capture::{self, Scope};

/// More take too long under a hold.
pub(super) const MAX_FILES: usize = 5_000;

/// Identity and ctime of every entry below the watched paths at one moment.
#[derive(Debug)]
pub struct Seal {
    scope: Scope,
    entries: BTreeMap<PathBuf, (FileId, i128)>,
}

impl Seal {
    /// Looks. `None` if there are too many, or some cannot be looked at.
    pub(super) fn of(scope: &Scope) -> Option<Seal> {
        let live = capture::look(scope).ok()?;
        let records = live.records();
        let entry = |file: &crate::store::manifest::FileRecord| {
            let id = FileId {
                dev: file.dev,
                ino: file.ino,
            };
            (file.path.0.clone(), (id, i128::from(file.ctime_ns)))
        };
        (records.len() <= MAX_FILES).then(|| Seal {
            scope: scope.clone(),
            entries: records.iter().map(entry).collect(),
        })
    }

    /// Whether all is as it was.
    pub fn stands(&self) -> bool {
        Seal::of(&self.scope).is_some_and(|now| now.entries == self.entries)
    }

    /// The same of an earlier look.
    pub(super) fn is_as(&self, earlier: &Seal) -> bool {
        self.entries == earlier.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_breaks_it() {
        let scratch = crate::store::scratch::Scratch::new();
        let root = scratch.join("data");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("a"), "1").unwrap();
        let scope = Scope {
            roots: vec![root.clone()],
            excludes: Vec::new(),
        };
        let seal = || Seal::of(&scope).unwrap();
        let first = seal();
        assert!(first.stands() && seal().is_as(&first));
        std::fs::write(root.join("a"), "2").unwrap();
        assert!(!first.stands());
        let second = seal();
        std::fs::write(root.join("b"), "").unwrap();
        assert!(!second.stands());
        let third = seal();
        std::fs::remove_file(root.join("b")).unwrap();
        assert!(!third.stands());
    }
}
