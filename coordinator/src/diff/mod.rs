//! What differs between two snapshots, or between one and the live files.
//!
//! Entries are paired by their paths. What a manifest says (kind, owner, mode, times) is
//! compared as it stands there; bytes and extended attributes in the trees themselves, and
//! of the bytes only those that the file system does not know to be shared. A file
//! that was renamed is one removed and one added.

mod content;
pub mod patch;
mod side;

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::Stat;

use crate::progress::Progress;
use crate::store::manifest::Kind;
use crate::tree::metadata::{Xattr, XattrReader, is_users};
use crate::{Error, Result};

pub use content::{BLOCK, Difference};
pub use side::{Found, Side};

use content::Comparer;

/// How an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Only in B.
    Added,
    /// Only in A.
    Removed,
    /// The bytes of a file, the target of a link, the device of a node.
    Modified,
    /// All else but these: [`Entry::metadata`].
    Metadata,
    /// It is of another kind.
    Type,
}

/// An entry that differs.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Absolute, in the live tree.
    pub path: &'a Path,
    /// How it differs.
    pub change: Change,
    /// What it is in A.
    pub a: Option<Found<'a>>,
    /// What it is in B.
    pub b: Option<Found<'a>>,
    /// Where the bytes of a file differ.
    pub content: Option<Difference>,
    /// What else differs: `mode`, `owner`, `mtime`, `xattrs`, `links` (which names are the
    /// same file), `target`, `device`.
    pub metadata: Vec<&'static str>,
    /// It was written to, or went, while it was compared.
    pub is_unstable: bool,
}

/// How much differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Entries only in B.
    pub added: u64,
    /// Entries only in A.
    pub removed: u64,
    /// Entries with another content.
    pub modified: u64,
    /// Entries with other metadata only.
    pub metadata: u64,
    /// Entries of another kind.
    pub kind: u64,
    /// Bytes in the changed ranges of files that are in both.
    pub changed_bytes: u64,
    /// Entries that could not be compared.
    pub failed: u64,
}

impl Totals {
    /// Entries that differ.
    pub fn entries(&self) -> u64 {
        self.added + self.removed + self.modified + self.metadata + self.kind
    }
}

/// What is compared, and how much of the answer is kept.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// These and what is below them; everything if there is none.
    pub paths: Vec<PathBuf>,
    /// Ranges kept for one file; of more, only count and bytes are known.
    pub keep_ranges: usize,
}

/// Compares A with B; tells `each` of every entry that differs, in the order of their paths.
///
/// A directory whose times alone differ does not: they do whenever something in it does.
///
/// # Errors
///
/// Those of `each`, which is also told of every entry that cannot be compared.
pub fn diff(
    a: &Side<'_>,
    b: &Side<'_>,
    options: &Options,
    progress: &mut dyn Progress,
    each: &mut dyn FnMut(Result<Entry<'_>>) -> Result<()>,
) -> Result<Totals> {
    let wanted = |path: &Path| {
        let below = |top: &PathBuf| path.starts_with(top);
        (options.paths.is_empty() || options.paths.iter().any(below))
            && [a, b].iter().all(|side| side.covers(path))
    };
    let (in_a, in_b) = (a.sorted(wanted), b.sorted(wanted));
    let pairs = pair(&in_a, &in_b);
    let bytes = pairs
        .iter()
        .filter_map(both_files)
        .fold(0, u64::saturating_add);
    progress.begin("comparing", bytes);
    let mut work = Work {
        a,
        b,
        links: [links(&in_a), links(&in_b)],
        comparer: Comparer::new(options.keep_ranges),
        compared: HashMap::new(),
        xattrs: XattrReader::default(),
        all_xattrs: a.has_all_xattrs() && b.has_all_xattrs(),
        totals: Totals::default(),
    };
    for pair in pairs {
        match work.compare(pair, progress) {
            Ok(Some(entry)) => {
                work.totals.add(&entry);
                each(Ok(entry))?;
            }
            Ok(None) => {}
            Err(error) => {
                work.totals.failed += 1;
                each(Err(error))?;
            }
        }
    }
    progress.end();
    Ok(work.totals)
}

impl Totals {
    fn add(&mut self, entry: &Entry<'_>) {
        *match entry.change {
            Change::Added => &mut self.added,
            Change::Removed => &mut self.removed,
            Change::Modified => &mut self.modified,
            Change::Metadata => &mut self.metadata,
            Change::Type => &mut self.kind,
        } += 1;
        if let Some(content) = &entry.content {
            self.changed_bytes = self.changed_bytes.saturating_add(content.bytes);
        }
    }
}

/// One path, in A, in B, or in both.
type Pair<'a> = (Option<Found<'a>>, Option<Found<'a>>);

/// Pairs two sorted lists by path.
fn pair<'a>(a: &[Found<'a>], b: &[Found<'a>]) -> Vec<Pair<'a>> {
    let mut pairs = Vec::with_capacity(a.len().max(b.len()));
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        let order = match (a.get(i), b.get(j)) {
            (Some(a), Some(b)) => a.path().cmp(b.path()),
            (Some(_), None) => Ordering::Less,
            _ => Ordering::Greater,
        };
        pairs.push((
            a.get(i).filter(|_| order.is_le()).copied(),
            b.get(j).filter(|_| order.is_ge()).copied(),
        ));
        i += usize::from(order.is_le());
        j += usize::from(order.is_ge());
    }
    pairs
}

/// The bytes to compare, if both are files.
fn both_files((a, b): &Pair<'_>) -> Option<u64> {
    let (a, b) = (a.as_ref()?.record, b.as_ref()?.record);
    (a.kind == Kind::File && b.kind == Kind::File).then(|| a.size.max(b.size))
}

/// Of each entry that has several names, the names; by the identity it had in the live tree.
type Links<'a> = HashMap<(u64, u64), Vec<&'a Path>>;

fn links<'a>(entries: &[Found<'a>]) -> Links<'a> {
    let mut links = Links::new();
    for found in entries.iter().filter(|f| f.record.kind != Kind::Dir) {
        let names = links.entry(found.identity()).or_default();
        names.push(found.path());
    }
    links.retain(|_, names| names.len() > 1);
    links
}

struct Work<'a> {
    a: &'a Side<'a>,
    b: &'a Side<'a>,
    links: [Links<'a>; 2],
    comparer: Comparer,
    /// What came of files with several names, by their identities in both trees.
    compared: HashMap<[(u64, u64); 2], Difference>,
    xattrs: XattrReader,
    all_xattrs: bool,
    totals: Totals,
}

impl<'a> Work<'a> {
    /// How a pair differs; `None` if it does not.
    fn compare(
        &mut self,
        pair: Pair<'a>,
        progress: &mut dyn Progress,
    ) -> Result<Option<Entry<'a>>> {
        let (a, b) = match pair {
            (Some(a), Some(b)) => (a, b),
            (None, Some(b)) => return Ok(Some(Entry::new(Change::Added, None, Some(b), b.path()))),
            (Some(a), None) => {
                return Ok(Some(Entry::new(Change::Removed, Some(a), None, a.path())));
            }
            (None, None) => return Ok(None),
        };
        if a.record.kind != b.record.kind {
            return Ok(Some(Entry::new(Change::Type, Some(a), Some(b), a.path())));
        }
        let mut entry = Entry::new(Change::Metadata, Some(a), Some(b), a.path());
        entry.metadata = self.metadata(a, b);
        if entry
            .metadata
            .iter()
            .any(|what| matches!(*what, "target" | "device"))
        {
            entry.change = Change::Modified;
        }
        if matches!(a.record.kind, Kind::File | Kind::Dir) {
            self.look_inside(&mut entry, a, b, progress)?;
        }
        let differs = entry.change != Change::Metadata || !entry.metadata.is_empty();
        Ok(differs.then_some(entry))
    }

    /// What the records say.
    fn metadata(&self, a: Found<'_>, b: Found<'_>) -> Vec<&'static str> {
        let names = |side: usize, found: Found<'_>| self.links[side].get(&found.identity());
        let has_links = a.record.kind != Kind::Dir;
        let (a_names, b_names) = (names(0, a), names(1, b));
        let (a, b) = (a.record, b.record);
        let has_mode = a.kind != Kind::Symlink;
        // Those of a directory move with what is in it.
        let has_times = a.kind != Kind::Dir;
        [
            ("mode", has_mode && a.mode & 0o7777 != b.mode & 0o7777),
            ("owner", (a.uid, a.gid) != (b.uid, b.gid)),
            ("mtime", has_times && a.mtime_ns != b.mtime_ns),
            ("links", has_links && a_names != b_names),
            ("target", a.target != b.target),
            // Manifests of the first form have no device numbers.
            (
                "device",
                a.device.is_some() && b.device.is_some() && a.device != b.device,
            ),
        ]
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect()
    }

    /// The bytes of files, and the attributes of files and directories.
    fn look_inside(
        &mut self,
        entry: &mut Entry<'a>,
        a: Found<'a>,
        b: Found<'a>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let bytes = both_files(&(Some(a), Some(b))).unwrap_or(0);
        let mut told = 0;
        let (file_a, file_b) = match (self.a.open(a)?, self.b.open(b)?) {
            (Some(file_a), Some(file_b)) => (file_a, file_b),
            (file_a, file_b) => {
                // Gone from a live tree since it was walked.
                entry.change = match file_a {
                    Some(_) => Change::Removed,
                    None => Change::Added,
                };
                entry.a = entry.a.filter(|_| file_a.is_some());
                entry.b = entry.b.filter(|_| file_b.is_some());
                entry.metadata.clear();
                entry.is_unstable = true;
                progress.advance(bytes);
                return Ok(());
            }
        };
        let failed = |cause| cannot_compare(a.path(), &cause);
        if self.xattrs(&file_a.0).map_err(failed)? != self.xattrs(&file_b.0).map_err(failed)? {
            entry.metadata.push("xattrs");
        }
        let has_same_digest = a.record.digest.is_some() && a.record.digest == b.record.digest;
        if a.record.kind == Kind::File && !has_same_digest {
            let difference = self.contents(&file_a, &file_b, &mut |bytes_done| {
                // Files that grow meanwhile would make it more than all.
                let more = bytes_done.min(bytes - told);
                told += more;
                progress.advance(more);
            });
            let difference = difference.map_err(failed)?;
            if difference.count > 0 {
                entry.change = Change::Modified;
                entry.content = Some(difference);
            }
        }
        progress.advance(bytes - told);
        entry.is_unstable = [(self.a, &file_a), (self.b, &file_b)]
            .into_iter()
            .any(|(side, file)| side.is_live() && has_moved(file));
        Ok(())
    }

    /// The attributes that a capture carries whoever makes it, the user's own and ACLs; where
    /// all were carried, also those that only root can set.
    fn xattrs(&mut self, file: &OwnedFd) -> rustix::io::Result<Vec<Xattr>> {
        let is_roots = |xattr: &Xattr| {
            let name = xattr.name.to_bytes();
            name.starts_with(b"security.") || name.starts_with(b"trusted.")
        };
        let mut xattrs = self.xattrs.read(file)?;
        xattrs.retain(|xattr| is_users(&xattr.name) || self.all_xattrs && is_roots(xattr));
        xattrs.sort();
        Ok(xattrs)
    }

    fn contents(
        &mut self,
        a: &(OwnedFd, Stat),
        b: &(OwnedFd, Stat),
        advance: &mut dyn FnMut(u64),
    ) -> rustix::io::Result<Difference> {
        // A file with several names is compared once.
        let key = (a.1.st_nlink > 1 && b.1.st_nlink > 1)
            .then(|| [a, b].map(|(_, stat)| (stat.st_dev, stat.st_ino)));
        if let Some(known) = key.and_then(|key| self.compared.get(&key)) {
            return Ok(known.clone());
        }
        let difference = self.comparer.compare(&a.0, &b.0, advance)?;
        if let Some(key) = key {
            self.compared.insert(key, difference.clone());
        }
        Ok(difference)
    }
}

impl<'a> Entry<'a> {
    fn new(
        change: Change,
        a: Option<Found<'a>>,
        b: Option<Found<'a>>,
        path: &'a Path,
    ) -> Entry<'a> {
        Entry {
            path,
            change,
            a,
            b,
            content: None,
            metadata: Vec::new(),
            is_unstable: false,
        }
    }
}

/// Whether an open file was changed since it was opened.
fn has_moved((file, then): &(OwnedFd, Stat)) -> bool {
    let key = |stat: &Stat| (stat.st_size, stat.st_ctime, stat.st_ctime_nsec);
    rustix::fs::fstat(file).is_ok_and(|now| key(&now) != key(then))
}

fn cannot_compare(path: &Path, cause: &dyn std::fmt::Display) -> Error {
    Error::new(format!("cannot compare {}: {cause}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::manifest::FileRecord;

    fn record(path: &str) -> FileRecord {
        serde_json::from_value(serde_json::json!({
            "path": path, "kind": "file", "size": 0, "mode": 0, "uid": 0, "gid": 0,
            "mtime_ns": 0, "ctime_ns": 0, "dev": 0, "ino": 0,
        }))
        .unwrap()
    }

    #[test]
    fn paths_are_paired() {
        let records = |paths: &[&str]| paths.iter().map(|p| record(p)).collect::<Vec<_>>();
        let found = |records: &'static [FileRecord]| {
            let found = records.iter().enumerate();
            found
                .map(|(index, record)| Found { record, index })
                .collect::<Vec<_>>()
        };
        let a = found(records(&["/a", "/b", "/d"]).leak());
        let b = found(records(&["/b", "/c", "/d", "/e"]).leak());
        let shown: Vec<(Option<&Path>, Option<&Path>)> = pair(&a, &b)
            .iter()
            .map(|(a, b)| (a.as_ref().map(Found::path), b.as_ref().map(Found::path)))
            .collect();
        let p = |text: &'static str| Some(Path::new(text));
        assert_eq!(
            shown,
            [
                (p("/a"), None),
                (p("/b"), p("/b")),
                (None, p("/c")),
                (p("/d"), p("/d")),
                (None, p("/e")),
            ]
        );
        assert!(pair(&[], &[]).is_empty());
    }
}
