//! One side of a comparison.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{OFlags, Stat};
use rustix::io::Errno;

use super::cannot_compare;
use crate::Result;
use crate::capture::Live;
use crate::store::Snapshot;
use crate::store::manifest::{FileRecord, Kind};

/// A snapshot, or what is there now.
#[derive(Debug)]
pub enum Side<'a> {
    /// A snapshot.
    Snapshot(&'a Snapshot),
    /// The live files.
    Live(&'a Live),
}

/// An entry of a side.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// What is known of it.
    pub record: &'a FileRecord,
    pub(super) index: usize,
}

impl<'a> Found<'a> {
    /// Its path in the live tree.
    pub fn path(&self) -> &'a Path {
        self.record.path.as_ref()
    }

    /// What it was in the live tree.
    pub(super) fn identity(&self) -> (u64, u64) {
        (self.record.dev, self.record.ino)
    }
}

impl<'a> Side<'a> {
    fn records(&self) -> &'a [FileRecord] {
        match self {
            Side::Snapshot(snapshot) => &snapshot.manifest.files,
            Side::Live(live) => live.records(),
        }
    }

    /// Whether it says anything of a path: a snapshot of one file does not of any other.
    pub fn covers(&self, path: &Path) -> bool {
        match self {
            Side::Snapshot(snapshot) => {
                let only = snapshot.manifest.only.as_ref();
                only.is_none_or(|only| path.starts_with(only.as_ref()))
            }
            Side::Live(_) => true,
        }
    }

    /// Whether it has this path, or something below it.
    pub fn has(&self, path: &Path) -> bool {
        self.records()
            .iter()
            .any(|record| record.path.as_ref().starts_with(path))
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self, Side::Live(_))
    }

    /// Whether attributes that only root can carry are there if the original had them.
    pub(super) fn has_all_xattrs(&self) -> bool {
        let is_root = rustix::process::geteuid().is_root();
        is_root
            && match self {
                Side::Snapshot(snapshot) => snapshot.is_own,
                Side::Live(_) => true,
            }
    }

    /// The entries that are wanted, by path.
    pub(super) fn sorted(&self, wanted: impl Fn(&Path) -> bool) -> Vec<Found<'a>> {
        let mut found: Vec<Found<'a>> = self
            .records()
            .iter()
            .enumerate()
            .map(|(index, record)| Found { record, index })
            .filter(|found| wanted(found.path()))
            .collect();
        found.sort_by(|a, b| a.path().cmp(b.path()));
        // A path that stands twice in a manifest is one entry of the tree.
        found.dedup_by(|a, b| a.path() == b.path());
        found
    }

    /// Opens a file or directory of this side for reading, and what it is. `None`: it was
    /// live, and is gone or replaced since.
    ///
    /// # Errors
    ///
    /// It cannot be opened; in a snapshot, it is not what the manifest says.
    pub fn open(&self, found: Found<'_>) -> Result<Option<(OwnedFd, Stat)>> {
        match self {
            Side::Snapshot(snapshot) if found.record.kind == Kind::File => {
                snapshot.open_file(found.record).map(Some)
            }
            Side::Snapshot(snapshot) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
                let open = || {
                    let fd = snapshot.open_at(found.path(), flags)?;
                    let stat = rustix::fs::fstat(&fd)?;
                    Ok((fd, stat))
                };
                open().map(Some).map_err(|cause: Errno| {
                    cannot_compare(&snapshot.place_of(found.path()), &cause)
                })
            }
            Side::Live(live) => match live.open(found.index) {
                Ok(open) => Ok(Some(open)),
                // ENXIO: a socket has its name now.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::NXIO) => {
                    Ok(None)
                }
                Err(cause) => Err(cannot_compare(found.path(), &cause)),
            },
        }
    }
}
