//! Evidence against the cut: what changed although it was held.

use std::path::PathBuf;

use rustix::fs::{AtFlags, Stat};
use rustix::io::Errno;

use super::Captured;
use super::parts::in_parts;
use super::record::Entry;
use crate::store::manifest::Kind;
use crate::tree::dirs::Dirs;
use crate::tree::seen::Seen;

/// Something that changed while it was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Absolute, in the live tree.
    pub path: PathBuf,
    /// What happened, to follow the path: "was written to (ctime moved)".
    pub what: String,
}

/// See [`Captured::moved`].
pub(super) fn moved(captured: &Captured) -> Vec<Moved> {
    let mut found = Vec::new();
    for entry in &captured.entries {
        if let Some(what) = difference(entry, captured.look_up(entry)) {
            let path = captured.path_of(entry);
            found.push(Moved { path, what });
        }
    }
    for path in &captured.vanished {
        let what = "vanished or was replaced while it was captured".to_owned();
        found.push(Moved {
            path: path.clone(),
            what,
        });
    }
    for path in &captured.absent_roots {
        if rustix::fs::lstat(path).is_ok() {
            let what = "appeared".to_owned();
            found.push(Moved {
                path: path.clone(),
                what,
            });
        }
    }
    found
}

impl Captured {
    /// What its name leads to now.
    pub(super) fn look_up(&self, entry: &Entry) -> rustix::io::Result<Stat> {
        look_up(&self.source, entry)
    }
}

fn look_up(source: &Dirs, entry: &Entry) -> rustix::io::Result<Stat> {
    let dir = source.open(entry.dir)?;
    rustix::fs::statat(&dir, &*entry.name, AtFlags::SYMLINK_NOFOLLOW)
}

/// What has become of such entries of those as `counts`, by index. Threads share the work.
pub(super) fn differences(
    source: &Dirs,
    entries: &[Entry],
    counts: impl Fn(usize, &Entry) -> bool,
) -> Vec<(usize, String)> {
    let indices = 0..entries.len();
    let counting: Vec<usize> = indices.filter(|i| counts(*i, &entries[*i])).collect();
    let difference = |source: &mut Dirs, index: &usize| {
        let entry = &entries[*index];
        Some((*index, difference(entry, look_up(source, entry))?))
    };
    let all = in_parts(&counting, || source.apart(), difference);
    all.into_iter().flatten().collect()
}

fn difference(entry: &Entry, stat: rustix::io::Result<Stat>) -> Option<String> {
    let now = match stat {
        Ok(stat) => Seen::of(&stat),
        // ESTALE and ENOTDIR: a directory above it was moved away or replaced.
        Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR | Errno::LOOP) => {
            return Some("was removed or renamed".to_owned());
        }
        Err(cause) => return Some(format!("cannot be looked at again: {cause}")),
    };
    let then = &entry.seen;
    let kind = then.kind();
    if now.id != then.id || now.kind() != kind {
        Some("was replaced by another".to_owned())
    } else if kind == Kind::File && now.size != then.size {
        Some(format!(
            "changed its size from {} to {} bytes",
            then.size, now.size
        ))
    } else if now.ctime_ns != then.ctime_ns && kind == Kind::Dir {
        Some(
            "had an entry made, removed or renamed, or its metadata changed (ctime moved)"
                .to_owned(),
        )
    } else if now.ctime_ns != then.ctime_ns {
        Some("was written to or had its metadata changed (ctime moved)".to_owned())
    } else {
        None
    }
}
