//! The live tree as a capture would find it, without capturing it.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::Scope;
use super::walk::{At, Found, Looked, Paths, Visitor, look_at, unreadable, walk};
use crate::Result;
use crate::store::manifest::{FileRecord, Kind};
use crate::tree::dirs::{Dirs, Node};
use crate::tree::seen::Seen;

/// What is under the roots of a [`Scope`] now.
#[derive(Debug)]
pub struct Live {
    dirs: Dirs,
    places: Vec<(Node, Box<CStr>)>,
    records: Vec<FileRecord>,
}

/// Walks the live tree as a capture does: what is excluded is left out, no symbolic link
/// is followed, and what vanishes meanwhile was never there.
///
/// # Errors
///
/// As [`super::prepare`], as far as looking goes.
pub fn look(scope: &Scope) -> Result<Live> {
    let paths = Paths::new(scope, None)?;
    let mut dirs = Dirs::new().without_atime();
    let mut looker = Looker {
        places: Vec::new(),
        records: Vec::new(),
    };
    walk(&paths, &mut dirs, &mut looker)?;
    Ok(Live {
        dirs,
        places: looker.places,
        records: looker.records,
    })
}

impl Live {
    /// Every entry, as the manifest would have it; in no order.
    pub fn records(&self) -> &[FileRecord] {
        &self.records
    }

    /// Opens the file or directory of [`Live::records`] with this index for reading, and
    /// what it is by now.
    ///
    /// # Errors
    ///
    /// Those of openat(2); `ESTALE`, `ENOENT` or `ELOOP` if it is not what it was.
    pub fn open(&self, index: usize) -> rustix::io::Result<(OwnedFd, Stat)> {
        let (node, name) = self.places.get(index).ok_or(Errno::NOENT)?;
        let dir = self.dirs.open(*node)?;
        // O_NONBLOCK: should it be a FIFO by now, or leased, this must not wait.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = self.dirs.open_at(&dir, name, flags)?;
        let stat = rustix::fs::fstat(&file)?;
        let was = &self.records[index];
        let seen = Seen::of(&stat);
        if (seen.id.dev, seen.id.ino, seen.kind()) != (was.dev, was.ino, was.kind) {
            return Err(Errno::STALE);
        }
        Ok((file, stat))
    }
}

struct Looker {
    places: Vec<(Node, Box<CStr>)>,
    records: Vec<FileRecord>,
}

impl Looker {
    fn push(&mut self, at: &At<'_>, name: &CStr, seen: &Seen, target: Option<&CStr>) {
        self.records.push(seen.record(at.path(name), target));
        self.places.push((at.node, name.into()));
    }
}

impl Visitor for Looker {
    fn absent(&mut self, _: &Path, _: Option<&OwnedFd>) -> Result<()> {
        Ok(())
    }

    fn top(&mut self, _: &Path, _: Node) -> Result<()> {
        Ok(())
    }

    fn entry(&mut self, at: &At<'_>, name: &CStr, _: Option<FileType>, _: Looked) -> Result<Found> {
        let seen = match look_at(at.fd, name) {
            Ok(seen) => seen,
            Err(Errno::NOENT) => return Ok(Found::Gone),
            Err(cause) => return Err(unreadable(&at.path(name), cause)),
        };
        let target = match seen.kind() {
            Kind::Dir => return Ok(Found::Dir),
            Kind::Symlink => match rustix::fs::readlinkat(at.fd, name, Vec::new()) {
                Ok(target) => Some(target),
                // Replaced since, by something that is no link.
                Err(Errno::NOENT | Errno::INVAL) => return Ok(Found::Gone),
                Err(cause) => return Err(unreadable(&at.path(name), cause)),
            },
            _ => None,
        };
        self.push(at, name, &seen, target.as_deref());
        Ok(Found::Entry)
    }

    fn dir(&mut self, at: &At<'_>, name: &CStr, _: &OwnedFd, seen: Seen) -> Result<()> {
        self.push(at, name, &seen, None);
        Ok(())
    }

    fn gone(&mut self, _: PathBuf) {}
}
