//! That nobody wrote to a snapshot meanwhile.
//!
//! Of a draft each ctime counts. The files of a published snapshot get and lose names meanwhile,
//! as other snapshots that share them are made and removed, which moves their ctimes; a name that has come
//! and gone leaves no other trace. So of these counts what a write moves else.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::Result;
use crate::store::manifest::Kind;
use crate::store::{fault, names_in};
use crate::tree::dirs::{Dirs, as_path};
use crate::tree::seen::Seen;

/// What a change moves of an entry: its ctime, mostly; a new entry moves that of its directory.
#[derive(Debug)]
pub(super) struct Stamp(Seen);

/// Who else may have to do with the files of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// Nobody: it is a draft.
    Own,
    /// Other snapshots, which share files with it.
    Shared,
}

impl Stamp {
    fn is_same(&self, other: &Stamp, names: Names) -> bool {
        let (one, other) = (&self.0, &other.0);
        let may_ctime_move = names == Names::Shared && one.kind() == Kind::File;
        one.id == other.id
            && one.mode == other.mode
            && one.uid == other.uid
            && one.gid == other.gid
            && one.size == other.size
            && one.mtime_ns == other.mtime_ns
            && (may_ctime_move || one.ctime_ns == other.ctime_ns)
    }
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
            if seen.kind() == Kind::Dir {
                let fd = dirs.open_dir_at(&dir, &name);
                let fd = fd.map_err(|cause| failed(&path, cause))?;
                to_do.push(dirs.add(node, &name, Some(seen.id), &fd.into()));
            }
            found.insert(path, Stamp(seen));
        }
    }
    Ok(found)
}

/// The first file that has names elsewhere: whoever writes to it alters something else, too.
pub(super) fn shared(found: &BTreeMap<PathBuf, Stamp>) -> Option<&Path> {
    let is_linked = |stamp: &&Stamp| stamp.0.kind() == Kind::File && stamp.0.nlink > 1;
    let mut names = HashMap::new();
    for stamp in found.values().filter(is_linked) {
        *names.entry(stamp.0.id).or_insert(0) += 1;
    }
    let has_others = |(_, stamp): &(&PathBuf, &Stamp)| {
        names
            .get(&stamp.0.id)
            .is_some_and(|here| stamp.0.nlink > *here)
    };
    found.iter().find(has_others).map(|(path, _)| &**path)
}

/// The first entry that is not as it was. A file says more than the directory it is in.
pub(super) fn difference(
    before: &BTreeMap<PathBuf, Stamp>,
    after: &BTreeMap<PathBuf, Stamp>,
    names: Names,
) -> Option<PathBuf> {
    let gone = before.keys().find(|path| !after.contains_key(*path));
    let come = after.keys().find(|path| !before.contains_key(*path));
    let other = || {
        let differs = |(path, stamp): &(&PathBuf, &Stamp)| {
            let then = before.get(*path);
            !then.is_some_and(|then| then.is_same(stamp, names))
        };
        after.iter().find(differs).map(|(path, _)| path)
    };
    gone.or(come).or_else(other).cloned()
}
