//! Reading the entries of a snapshot: what they are, and whether that is what the manifest says.

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::store::manifest::{FileRecord, Kind};
use crate::store::{Snapshot, fault};
use crate::tree::metadata::{Attributes, Xattr, XattrReader};
use crate::tree::seen::Seen;
use crate::{Error, Result};

/// All metadata of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Traits {
    pub(super) attributes: Attributes,
    pub(super) xattrs: Vec<Xattr>,
}

/// The snapshot that is read.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub(super) snapshot: &'a Snapshot,
    xattrs: RefCell<XattrReader>,
    /// Of the tree itself, which the owner of the store has made.
    owner: (u32, u32),
}

impl<'a> Source<'a> {
    pub(super) fn new(snapshot: &'a Snapshot) -> Result<Source<'a>> {
        let stat = rustix::fs::fstat(snapshot.tree_fd())
            .map_err(|cause| fault("look at", &snapshot.tree(), cause))?;
        Ok(Source {
            snapshot,
            xattrs: RefCell::default(),
            owner: (stat.st_uid, stat.st_gid),
        })
    }

    /// Opens an entry of the tree: a file or directory to read it, anything else with
    /// `O_PATH`; and what it is. `None` for what has none there: sockets and devices.
    ///
    /// # Errors
    ///
    /// It is missing, or is not what the manifest says.
    pub(super) fn open(&self, record: &FileRecord) -> Result<Option<(OwnedFd, Seen)>> {
        let path = record.path.as_ref();
        let flags = match record.kind {
            Kind::File => OFlags::RDONLY | OFlags::NONBLOCK,
            Kind::Dir => OFlags::RDONLY | OFlags::DIRECTORY,
            Kind::Symlink | Kind::Fifo => OFlags::PATH,
            Kind::Socket | Kind::Device => return Ok(None),
        };
        let open = |flags| self.snapshot.open_at(path, flags | OFlags::NOFOLLOW);
        let opened = match flags.contains(OFlags::PATH) {
            // openat2 refuses the one with the other.
            true => open(flags),
            false => match open(flags | OFlags::NOATIME) {
                // Only owners may keep access times.
                Err(Errno::PERM) => open(flags),
                other => other,
            },
        };
        let place = || self.snapshot.place_of(path);
        let fd = match opened {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Err(self.differs(record, "is missing".into())),
            Err(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => {
                return Err(self.differs(record, "is something else, or leads elsewhere".into()));
            }
            Err(cause) => return Err(fault("open", &place(), cause)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|cause| fault("look at", &place(), cause))?;
        let seen = Seen::of(&stat);
        if seen.kind() != record.kind {
            return Err(self.differs(record, "is of another kind".into()));
        }
        if record.kind == Kind::File && seen.size != record.size {
            let what = format!("has {} bytes instead of {}", seen.size, record.size);
            return Err(self.differs(record, what));
        }
        Ok(Some((fd, seen)))
    }

    /// The metadata to give to an entry that is open as `opened`.
    ///
    /// That in the manifest of one's own store, which has also what the tree could not be
    /// given; of somebody else's, only what he could give to files of his own.
    ///
    /// # Errors
    ///
    /// The attributes cannot be read.
    pub(super) fn traits(
        &self,
        record: &FileRecord,
        opened: Option<&(OwnedFd, Seen)>,
    ) -> Result<Traits> {
        let attributes = match (self.snapshot.is_own, opened) {
            (true, _) => Attributes {
                mode: record.mode,
                uid: record.uid,
                gid: record.gid,
                mtime_ns: record.mtime_ns,
            },
            (false, Some((_, seen))) => seen.into(),
            (false, None) => Attributes {
                mode: record.mode & 0o777,
                uid: self.owner.0,
                gid: self.owner.1,
                mtime_ns: record.mtime_ns,
            },
        };
        let mut reader = self.xattrs.borrow_mut();
        let xattrs = match opened {
            Some((fd, _)) if matches!(record.kind, Kind::File | Kind::Dir) => reader.read(fd),
            Some((fd, _)) => reader.read_path(fd),
            None => Ok(Vec::new()),
        };
        let place = self.snapshot.place_of(record.path.as_ref());
        let mut xattrs = xattrs.map_err(|cause| fault("read the attributes of", &place, cause))?;
        xattrs.sort();
        Ok(Traits { attributes, xattrs })
    }

    /// The error of an entry that is not what the manifest says.
    pub(super) fn differs(&self, record: &FileRecord, what: String) -> Error {
        Error::new(format!(
            "{} {what}: the snapshot was changed after it was taken, or is damaged",
            self.snapshot.place_of(record.path.as_ref()).display()
        ))
        .next("nothing was replaced; use another snapshot, or leave this file out with --path")
    }
}
