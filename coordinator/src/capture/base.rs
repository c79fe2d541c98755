//! Files that have not changed since the previous snapshot: each becomes a further name of its
//! copy there.
//!
//! What says so is the file's ctime, which every change of its bytes or metadata moves, and which
//! no program can set back. Where that is not so, nothing is shared:
//!
//! - on tmpfs, and file systems not known here, a store into a mapping may leave no trace;
//! - before Linux 6.13 two changes within one tick of the clock have one ctime: a file counts only
//!   if it was left alone for a while when the previous snapshot was cut;
//! - a page that was mapped and dirty at that cut can be stored into without a trace. A clone
//!   writes it back first, and write-protects it with that; whatever was only read is not shared
//!   if anybody was stopped because he had a file mapped;
//! - a snapshot that is not verified may hold what was being written.
//!
//! The copy in the store is looked at, too: one whose size or mtime is not what the manifest
//! says was written to.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, OFlags};
use snapshim_gate::table::FileId;

use super::record::{LEFT_ALONE, shows_when_changed};
use crate::hold::rebuilt;
use crate::store::Snapshot;
use crate::store::manifest::{FileRecord, Kind};
use crate::store::policy::Class;
use crate::tree::seen::Seen;

/// A snapshot whose files may be shared.
#[derive(Debug)]
pub struct Base {
    /// Open: it cannot be removed meanwhile.
    snapshot: Snapshot,
    /// Records that may count, by the identity of the live file.
    by_id: HashMap<FileId, u32>,
    /// The directory of the snapshot that was last linked from: the next is often the same.
    last_dir: RefCell<Option<(PathBuf, OwnedFd)>>,
}

impl Base {
    /// What can be shared with this snapshot; `None` if that is nothing.
    pub(crate) fn of(snapshot: Snapshot) -> Option<Base> {
        let manifest = &snapshot.manifest;
        if !snapshot.is_own || manifest.class() != Class::Good || !manifest.verified {
            return None;
        }
        let cut_ns = manifest
            .time
            .parse::<jiff::Timestamp>()
            .ok()?
            .as_nanosecond();
        let was_anybody_stopped = manifest.stop_us.is_some();
        let counts = |record: &FileRecord| {
            let is_written_back = matches!(record.capture.as_deref(), Some("reflink" | "shared"));
            record.kind == Kind::File
                && record.capture.is_some()
                && record.capture.as_deref() != Some("hardlink")
                && (is_written_back || !was_anybody_stopped)
                && i128::from(record.ctime_ns) + i128::from(LEFT_ALONE) <= cut_ns
                && shows_when_changed(record.ctime_ns)
                && !rebuilt::is_rebuilt(record.path.as_ref())
        };
        let by_id: HashMap<FileId, u32> = (0u32..)
            .zip(&manifest.files)
            .filter(|(_, record)| counts(record))
            .map(|(index, record)| (id_of(record), index))
            .collect();
        (!by_id.is_empty()).then_some(Base {
            snapshot,
            by_id,
            last_dir: RefCell::new(None),
        })
    }

    /// Leaves out what is on other devices than these.
    pub(super) fn only_on(&mut self, devices: &BTreeSet<u64>) {
        self.by_id.retain(|id, _| devices.contains(&id.dev));
    }

    /// The record of a live file that is what it was then.
    pub(super) fn find(&self, seen: &Seen) -> Option<&FileRecord> {
        let index = *self.by_id.get(&seen.id)?;
        let record = self.snapshot.manifest.files.get(index as usize)?;
        let is_same = seen.kind() == Kind::File
            && record.size == seen.size
            && record.ctime_ns == seen.ctime_ns
            && record.mtime_ns == seen.mtime_ns
            && record.mode == seen.permissions()
            && record.uid == seen.uid
            && record.gid == seen.gid;
        is_same.then_some(record)
    }

    /// Gives the copy of a live file, if that is what it was then, a further name; whether it has
    /// it now. If not, it is to be captured like any other.
    pub(super) fn link(&self, seen: &Seen, dir: impl AsFd, name: &CStr) -> bool {
        let Some(record) = self.find(seen) else {
            return false;
        };
        let path: &Path = record.path.as_ref();
        let (Some(parent), Some(its_name)) = (path.parent(), path.file_name()) else {
            return false;
        };
        let mut last = self.last_dir.borrow_mut();
        if last
            .as_ref()
            .is_none_or(|(at, _)| at.as_os_str() != parent.as_os_str())
        {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let Ok(fd) = self.snapshot.open_at(parent, flags) else {
                return false;
            };
            *last = Some((parent.to_owned(), fd));
        }
        let Some((_, from)) = last.as_ref() else {
            return false;
        };
        let its_name = its_name.as_bytes();
        let copy = rustix::fs::statat(from, its_name, AtFlags::SYMLINK_NOFOLLOW);
        let is_untouched = copy.map(|stat| Seen::of(&stat)).is_ok_and(|copy| {
            copy.kind() == Kind::File
                && copy.size == record.size
                && copy.mtime_ns == record.mtime_ns
                && copy.permissions() == record.mode
        });
        // EMLINK, EXDEV, …: without a further name it is captured.
        is_untouched && rustix::fs::linkat(from, its_name, dir, name, AtFlags::empty()).is_ok()
    }
}

fn id_of(record: &FileRecord) -> FileId {
    FileId {
        dev: record.dev,
        ino: record.ino,
    }
}
