//! That nobody wrote to a snapshot meanwhile.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::Result;
use crate::store::{fault, names_in};
use crate::tree::dirs::{Dirs, as_path};
use crate::tree::seen::Seen;

/// What a change moves of an entry: its ctime, mostly; a new entry moves that of its directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    ino: u64,
    mode: u32,
    size: u64,
    ctime_ns: i64,
}

/// Every entry below `tree`, by its path there.
pub(super) fn look(tree: &Path) -> Result<BTreeMap<PathBuf, Stamp>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let failed = |path: &Path, cause| fault("look at", &tree.join(path), cause);
    let top = rustix::fs::open(tree, flags, Mode::empty()).map_err(|c| failed(tree, c))?;
    let mut dirs = Dirs::new();
    let mut found = BTreeMap::new();
    let mut to_do = vec![dirs.add_top(Path::new(""), top)];
    while let Some(node) = to_do.pop() {
        let here = dirs.path(node);
        let dir = dirs.open(node).map_err(|cause| failed(&here, cause))?;
        for name in names_in(&dir).map_err(|cause| failed(&here, cause))? {
            let path = here.join(as_path(&name));
            let stat = rustix::fs::statat(&dir, &*name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|cause| failed(&path, cause))?;
            let seen = Seen::of(&stat);
            if seen.kind() == crate::store::manifest::Kind::Dir {
                let fd = dirs.open_dir_at(&dir, &name);
                let fd = fd.map_err(|cause| failed(&path, cause))?;
                to_do.push(dirs.add(node, &name, Some(seen.id), &fd.into()));
            }
            let stamp = Stamp {
                ino: seen.id.ino,
                mode: seen.mode,
                size: seen.size,
                ctime_ns: seen.ctime_ns,
            };
            found.insert(path, stamp);
        }
    }
    Ok(found)
}

/// The first entry that is not as it was. A file says more than the directory it is in.
pub(super) fn difference(
    before: &BTreeMap<PathBuf, Stamp>,
    after: &BTreeMap<PathBuf, Stamp>,
) -> Option<PathBuf> {
    let gone = before.keys().find(|path| !after.contains_key(*path));
    let come = after.keys().find(|path| !before.contains_key(*path));
    let other = || {
        let differs = |(path, stamp): &(&PathBuf, &Stamp)| before.get(*path) != Some(*stamp);
        after.iter().find(differs).map(|(path, _)| path)
    };
    gone.or(come).or_else(other).cloned()
}
