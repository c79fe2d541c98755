//! After the hold: the rest of the tree, and all of it durable.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::record::{Body, Entry, How};
use super::{Captured, flush};
use crate::interrupt;
use crate::store::manifest::{FileRecord, Kind};
use crate::store::{fault, order};
use crate::tally::Step;
use crate::tree::metadata::{self, Failed};
use crate::{Error, Result};

/// Up to this many entries, each is synced by itself. More are cheaper with one `syncfs`,
/// which also writes what others have dirty on that file system.
const FEW: usize = 64;

/// See [`Captured::finish`].
pub(super) fn finish(captured: Captured) -> Result<Vec<FileRecord>> {
    captured.ahead.remove_unused(&captured.target)?;
    let tree = Tree {
        // Of frozen subvolumes only `syncfs` tells whether all was written back.
        sync_each: captured.entries.len() <= FEW && !captured.is_subvolume,
        captured: &captured,
    };
    let is_written = |entry: &&Entry| tree.is_written(entry);
    let written = captured.entries.iter().filter(is_written);
    let tally = &captured.target.tally;
    tally.begin(Step::Durable, written.map(|entry| entry.seen.size).sum());
    let is_dir = |entry: &&Entry| matches!(entry.body, Body::Dir(_));
    let files = captured.entries.iter().filter(|entry| entry.is_file());
    let others = captured
        .entries
        .iter()
        .filter(|entry| !entry.is_file() && !is_dir(entry));
    for entry in files.chain(others) {
        tree.complete(entry)?;
    }
    // A directory comes after its parent in the list, so the deepest are first from behind.
    // What is made in a directory moves its times: they are set when all is in it.
    for entry in captured.entries.iter().rev().filter(is_dir) {
        tree.complete_dir(entry)?;
    }
    let records = || records(&captured);
    let records = match tree.sync_each {
        true => {
            tree.sync_above()?;
            records()
        }
        false => {
            let (fd, path) = (&captured.target.fd, &captured.target.path);
            let sync =
                || rustix::fs::syncfs(fd).map_err(|cause| fault("write to disk", path, cause));
            // Both take their time.
            std::thread::scope(|threads| {
                let begun = std::thread::Builder::new().spawn_scoped(threads, || {
                    interrupt::leave_to_others();
                    sync()
                });
                let records = records();
                match begun.map(std::thread::ScopedJoinHandle::join) {
                    Ok(Ok(synced)) => synced?,
                    Ok(Err(_)) | Err(_) => sync()?,
                }
                Ok::<_, Error>(records)
            })?
        }
    };
    tally.end();
    Ok(records)
}

struct Tree<'a> {
    captured: &'a Captured,
    sync_each: bool,
}

impl Tree<'_> {
    fn path(&self, entry: &Entry) -> PathBuf {
        self.captured.target.path_of(&self.captured.path_of(entry))
    }

    fn dir(&self, entry: &Entry) -> Result<Arc<OwnedFd>> {
        let dirs = &self.captured.target.dirs;
        dirs.open(entry.dir)
            .map_err(|cause| fault("open", &self.path(entry), cause))
    }

    /// Whether its bytes were written and may not be on disk yet.
    fn is_written(&self, entry: &Entry) -> bool {
        matches!(
            entry.body,
            Body::File(How::Copy | How::Guarded | How::Ahead)
        )
    }

    /// Anything but a directory.
    fn complete(&self, entry: &Entry) -> Result<()> {
        // All of it is the copy's.
        if matches!(entry.body, Body::File(How::Shared)) {
            return Ok(());
        }
        let dir = self.dir(entry)?;
        match &entry.body {
            Body::File(_) => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&dir, &*entry.name, flags, Mode::empty())
                    .map_err(|cause| fault("open", &self.path(entry), cause))?;
                metadata::apply(&file, &(&entry.seen).into(), &entry.xattrs)
                    .map_err(|failed| self.not_set(entry, failed))?;
                if self.is_written(entry) {
                    let (size, tally) = (entry.seen.size, &self.captured.target.tally);
                    let before = tally.done();
                    flush::told(&file, size, tally)
                        .map_err(|cause| fault("write to disk", &self.path(entry), cause))?;
                    self.sync(&file, || self.path(entry))?;
                    tally.set(before + size);
                    return Ok(());
                }
                self.sync(&file, || self.path(entry))
            }
            // Of a socket or device, which is not made, neither is a further name.
            Body::HardLink(_) if matches!(entry.seen.kind(), Kind::Socket | Kind::Device) => Ok(()),
            Body::HardLink(first) => {
                let first = &self.captured.entries[*first];
                let from = self.dir(first)?;
                rustix::fs::linkat(&from, &*first.name, &dir, &*entry.name, AtFlags::empty())
                    .map_err(|cause| fault("link", &self.path(entry), cause))
            }
            Body::Symlink(points_to) => {
                rustix::fs::symlinkat(&**points_to, &dir, &*entry.name)
                    .map_err(|cause| fault("make", &self.path(entry), cause))?;
                self.apply_by_name(&dir, entry, false)
            }
            Body::Special if entry.seen.kind() == Kind::Fifo => {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(&dir, &*entry.name, FileType::Fifo, mode, 0)
                    .map_err(|cause| fault("make", &self.path(entry), cause))?;
                self.apply_by_name(&dir, entry, true)
            }
            // A socket or device is only recorded.
            Body::Special | Body::Dir(_) | Body::Gone => Ok(()),
        }
    }

    fn apply_by_name(&self, dir: &OwnedFd, entry: &Entry, has_mode: bool) -> Result<()> {
        let attributes = (&entry.seen).into();
        metadata::apply_by_name(dir, &entry.name, &attributes, &entry.xattrs, has_mode)
            .map_err(|failed| self.not_set(entry, failed))
    }

    fn complete_dir(&self, entry: &Entry) -> Result<()> {
        let Body::Dir(node) = entry.body else {
            return Ok(());
        };
        // By its own number: it may be open still, and what is above it is 0700 until its turn.
        let fd = self
            .captured
            .target
            .dirs
            .open(node)
            .map_err(|cause| fault("open", &self.path(entry), cause))?;
        metadata::apply(&fd, &(&entry.seen).into(), &entry.xattrs)
            .map_err(|failed| self.not_set(entry, failed))?;
        self.sync(&fd, || self.path(entry))
    }

    fn sync(&self, fd: &OwnedFd, path: impl FnOnce() -> PathBuf) -> Result<()> {
        if self.sync_each {
            return rustix::fs::fsync(fd).map_err(|cause| fault("write to disk", &path(), cause));
        }
        Ok(())
    }

    /// What is above the roots, if everything is synced one by one.
    fn sync_above(&self) -> Result<()> {
        let target = &self.captured.target;
        for below in target.ancestors.iter().rev() {
            target
                .open_below(below)
                .and_then(rustix::fs::fsync)
                .map_err(|cause| fault("write to disk", &target.path.join(below), cause))?;
        }
        rustix::fs::fsync(&target.fd).map_err(|cause| fault("write to disk", &target.path, cause))
    }

    fn not_set(&self, entry: &Entry, failed: Failed) -> Error {
        let what = format!("set {}", failed.what);
        let error = fault(&what, &self.path(entry), failed.cause);
        match failed.cause {
            Errno::OPNOTSUPP => error.next(
                "the store's file system has no such attributes: choose a store on one that has with --store",
            ),
            _ => error,
        }
    }
}

/// All of them, sorted by path.
fn records(captured: &Captured) -> Vec<FileRecord> {
    let mut namer = captured.source.namer();
    let named = captured.entries.iter();
    // Before there are records, which are large to move.
    let mut named: Vec<(PathBuf, &Entry)> = named
        .map(|entry| (namer.path(entry.dir, &entry.name), entry))
        .collect();
    named.sort_unstable_by(|(a, _), (b, _)| {
        // `Path` takes both apart each time.
        order(a.as_os_str().as_bytes(), b.as_os_str().as_bytes())
    });
    let record = |(path, entry)| record(captured, path, entry);
    named.into_iter().map(record).collect()
}

fn record(captured: &Captured, path: PathBuf, entry: &Entry) -> FileRecord {
    let capture = match entry.body {
        Body::File(How::Reflink) => Some("reflink"),
        Body::File(How::Copy) => Some("copy"),
        Body::File(How::Guarded | How::Ahead) => Some("copy-before-write"),
        Body::File(How::Shared) => Some("shared"),
        Body::HardLink(_) if entry.seen.kind() == Kind::File => Some("hardlink"),
        Body::HardLink(_) | Body::Dir(_) | Body::Symlink(_) | Body::Special | Body::Gone => None,
    };
    let first = match &entry.body {
        Body::HardLink(first) => &captured.entries[*first],
        _ => entry,
    };
    let target = match &first.body {
        Body::Symlink(points_to) => Some(&**points_to),
        _ => None,
    };
    let shared = match (&first.body, &captured.base) {
        (Body::File(How::Shared), Some(base)) => base.find(&first.seen),
        _ => None,
    };
    FileRecord {
        capture: capture.map(str::to_owned),
        digest: shared.and_then(|record| record.digest.clone()),
        ..entry.seen.record(path, target)
    }
}
