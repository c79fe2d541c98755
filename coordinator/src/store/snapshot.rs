//! A published snapshot, open for reading: it cannot be removed meanwhile, and nothing in
//! it can lead a reader out of it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::manifest::{FileRecord, Manifest};
use super::{Entry, Store, StoreLock, TREE, fault};
use crate::{Error, Result};

/// Bytes of a path resolved in one call; the kernel takes 4095.
const STEP: usize = 2048;

/// A snapshot that somebody reads. While it is open, its directory has a shared lock
/// (flock), so that nobody removes it.
#[derive(Debug)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Its directory, `<store>/<set>/<id>`.
    pub path: PathBuf,
    /// Its certificate.
    pub manifest: Manifest,
    /// Whether the store belongs to this process's user. What somebody else's manifest
    /// says (owners, modes, devices) must not be done with this user's rights.
    pub is_own: bool,
    /// The user id of whoever owns it.
    pub(crate) owner: u32,
    dir: OwnedFd,
    tree: OwnedFd,
}

impl Store {
    /// The newest snapshot, open; `None` if there is none that can be used.
    pub(crate) fn newest(&self) -> Option<Snapshot> {
        let id = self.ids().ok()?.pop()?;
        self.open_snapshot(self.entry(id)).ok()
    }

    /// Opens a snapshot that [`Store::find`] or [`Store::list`] has found.
    ///
    /// # Errors
    ///
    /// Its manifest cannot be used; it is being removed; its directory or tree is
    /// missing or is something else.
    pub fn open_snapshot(&self, entry: Entry) -> Result<Snapshot> {
        let Entry { id, path, manifest } = entry;
        let manifest = manifest.map_err(|cause| {
            Error::new(format!("the snapshot {id} cannot be used: {cause}"))
                .next("its files may still be whole; they are not vouched for")
        })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.dir, &id, flags, Mode::empty())
            .map_err(|cause| fault("open", &path, cause))?;
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::new(format!("the snapshot {id} is being removed"))
                    .next("`snapshim list` shows what there is"));
            }
            Err(cause) => return Err(fault("lock", &path, cause)),
        }
        // Taken away between the two: the lock is on what is no longer there.
        let named = rustix::fs::statat(&self.dir, &id, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
        let stat = rustix::fs::fstat(&dir).map_err(|cause| fault("look at", &path, cause))?;
        if !named.is_ok_and(|named| (named.st_dev, named.st_ino) == (stat.st_dev, stat.st_ino)) {
            return Err(Error::new(format!("the snapshot {id} was just removed"))
                .next("`snapshim list` shows what there is"));
        }
        let tree = rustix::fs::openat(&dir, TREE, flags, Mode::empty())
            .map_err(|cause| fault("open", &path.join(TREE), cause))?;
        let me = rustix::process::geteuid().as_raw();
        Ok(Snapshot {
            is_own: stat.st_uid == me,
            owner: stat.st_uid,
            id,
            path,
            manifest,
            dir,
            tree,
        })
    }
}

impl Snapshot {
    /// The directory with its files, under their absolute paths.
    pub fn tree(&self) -> PathBuf {
        self.path.join(TREE)
    }

    /// Its directory, open.
    pub(crate) fn dir(&self) -> rustix::fd::BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The tree, open.
    pub fn tree_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.tree.as_fd()
    }

    /// Opens the entry that has the absolute path `path` in the live tree. No part of
    /// the way may be a symbolic link; the entry itself may, with `O_PATH | O_NOFOLLOW`.
    ///
    /// # Errors
    ///
    /// Those of openat2(2): `ELOOP` and `EXDEV` where something would lead astray.
    pub fn open_at(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        open_below(self.tree.as_fd(), path, flags)
    }

    /// Opens a regular file of the tree to read it, and what it is there.
    ///
    /// # Errors
    ///
    /// It is missing, or not a regular file.
    pub fn open_file(&self, record: &FileRecord) -> Result<(OwnedFd, Stat)> {
        let path = record.path.as_ref();
        let failed = |cause| fault("open", &self.place_of(path), cause);
        // O_NONBLOCK: a FIFO in its place must not make us wait for its writer.
        let fd = self
            .open_at(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)
            .map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(Error::new(format!(
                "{} is not a regular file",
                self.place_of(path).display()
            ))
            .next("the snapshot was changed after it was taken: use another"));
        }
        Ok((fd, stat))
    }

    /// Where the entry with this path in the live tree is.
    pub fn place_of(&self, path: &Path) -> PathBuf {
        self.tree().join(path.strip_prefix("/").unwrap_or(path))
    }
}

impl Store {
    /// The tree of a published snapshot, open; `None` if it cannot be opened.
    pub(crate) fn open_tree(&self, lock: &StoreLock, id: &str) -> Option<OwnedFd> {
        let _ = lock;
        let path = Path::new(id).join(TREE);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        (super::id::is_valid(id))
            .then(|| open_below(self.dir.as_fd(), &path, flags).ok())
            .flatten()
    }

    /// Whether there is a snapshot of this id.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.ids()
            .is_ok_and(|ids| ids.iter().any(|there| there == id))
    }
}

/// Opens `path`, taken relative to `top`: never above or beside it, through no symbolic link,
/// and however long it is.
pub(crate) fn open_below(
    top: rustix::fd::BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let step = |at: rustix::fd::BorrowedFd<'_>, part: &[u8], flags: OFlags| {
        let part = if part.is_empty() { b"." } else { part };
        let flags = flags | OFlags::CLOEXEC;
        rustix::fs::openat2(at, OsStr::from_bytes(part), flags, Mode::empty(), resolve)
    };
    let bytes = path.as_os_str().as_bytes();
    let mut rest = bytes.strip_prefix(b"/").unwrap_or(bytes);
    let mut at: Option<OwnedFd> = None;
    while rest.len() > STEP {
        // Names have at most 255 bytes: there is a slash, or it is no path.
        let slash = rest[..STEP].iter().rposition(|byte| *byte == b'/');
        let (part, after) = rest.split_at(slash.ok_or(Errno::NAMETOOLONG)?);
        let here = at.as_ref().map_or(top, AsFd::as_fd);
        at = Some(step(here, part, OFlags::PATH | OFlags::DIRECTORY)?);
        rest = &after[1..];
    }
    step(at.as_ref().map_or(top, AsFd::as_fd), rest, flags)
}
