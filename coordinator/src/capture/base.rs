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
//! - a snapshot that is not verified may hold what was being written;
//! - after a crash, bytes may have outlived the ctime that told of them: the file system has to
//!   have been mounted all the time (`mounted.rs`).
//!
//! The copy in the store is looked at, too: one whose size or mtime is not what the manifest
//! says was written to.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags};
use snapshim_gate::table::FileId;

use super::delta;
use super::parts::in_parts;
use super::record::{LEFT_ALONE, shows_when_changed};
use crate::hold::rebuilt;
use crate::store::Snapshot;
use crate::store::manifest::{FileRecord, Kind, Mounted};
use crate::store::policy::Class;
use crate::tree::seen::Seen;

/// A snapshot whose files may be shared.
#[derive(Debug)]
pub struct Base {
    /// Open: it cannot be removed meanwhile.
    snapshot: Arc<Snapshot>,
    /// Records that may count, by the identity of the live file.
    by_id: HashMap<FileId, u32>,
}

/// Gives copies of a [`Base`] further names.
struct Linker<'a> {
    base: &'a Base,
    /// The directory of the snapshot that was last linked from: the next is often the same.
    last_dir: Option<(Vec<u8>, OwnedFd)>,
}

/// A further name for the copy of a file.
pub(super) struct Link<'a> {
    pub(super) record: &'a FileRecord,
    /// The directory it goes to.
    pub(super) dir: Arc<OwnedFd>,
    pub(super) name: &'a CStr,
}

impl Base {
    /// What can be shared with this snapshot; `None` if that is nothing.
    pub(crate) fn of(snapshot: Arc<Snapshot>) -> Option<Base> {
        let manifest = &snapshot.manifest;
        let is_good = manifest.class() == Class::Good && manifest.verified;
        if !snapshot.is_own || !is_good || manifest.mounted.is_none() {
            return None;
        }
        let cut_ns = manifest
            .time
            .parse::<jiff::Timestamp>()
            .ok()?
            .as_nanosecond();
        let was_anybody_stopped = manifest.stop_us.is_some();
        // Whether marks were right is only known later, by what is compared: so it is marks again that
        // it is built on by.
        let is_built_on_marks = manifest
            .marked
            .as_ref()
            .is_some_and(|marked| marked.bytes_shared > 0);
        let may_be_marked = |record: &FileRecord| {
            is_built_on_marks
                && record.size >= delta::SMALL
                && record.capture.as_deref() == Some("copy-before-write")
        };
        let counts = |record: &FileRecord| {
            let is_written_back = matches!(record.capture.as_deref(), Some("reflink" | "shared"));
            record.kind == Kind::File
                && record.capture.is_some()
                && record.capture.as_deref() != Some("hardlink")
                && !may_be_marked(record)
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
        (!by_id.is_empty()).then_some(Base { snapshot, by_id })
    }

    /// Leaves out what is on other devices than these, or has been mounted anew since: what is
    /// mounted `now` says so.
    pub(super) fn only_on(&mut self, devices: &BTreeSet<u64>, now: Option<&Mounted>) {
        let then = self.snapshot.manifest.mounted.as_ref();
        let has_stayed = |dev: &u64| match (now, then) {
            (Some(now), Some(then)) => now.has_stayed(then, *dev),
            _ => false,
        };
        let devices: BTreeSet<u64> = devices.iter().copied().filter(has_stayed).collect();
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

    /// Gives each copy its further name; whether it has it now, in their order. What has not is to be
    /// captured like any other.
    ///
    /// A link takes some 7 µs: many are made by several threads.
    pub(super) fn link(&self, links: &[Link<'_>]) -> Vec<bool> {
        let linker = || Linker {
            base: self,
            last_dir: None,
        };
        in_parts(links, linker, Linker::link)
    }
}

impl Linker<'_> {
    fn link(&mut self, link: &Link<'_>) -> bool {
        let record = link.record;
        // As manifests have paths: taking them apart properly takes longer than a lookup.
        let path = record.path.as_ref().as_os_str().as_bytes();
        let Some(slash) = path.iter().rposition(|byte| *byte == b'/') else {
            return false;
        };
        let (parent, its_name) = (&path[..slash.max(1)], &path[slash + 1..]);
        let last = self.last_dir.as_ref();
        if last.is_none_or(|(at, _)| at != parent) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let above = Path::new(OsStr::from_bytes(parent));
            let Ok(fd) = self.base.snapshot.open_at(above, flags) else {
                return false;
            };
            self.last_dir = Some((parent.to_owned(), fd));
        }
        let Some((_, from)) = &self.last_dir else {
            return false;
        };
        let copy = rustix::fs::statat(from, its_name, AtFlags::SYMLINK_NOFOLLOW);
        let is_untouched = copy.map(|stat| Seen::of(&stat)).is_ok_and(|copy| {
            copy.kind() == Kind::File
                && copy.size == record.size
                && copy.mtime_ns == record.mtime_ns
                && copy.permissions() == record.mode
        });
        let linked = || rustix::fs::linkat(from, its_name, &link.dir, link.name, AtFlags::empty());
        // EMLINK, EXDEV, …: without a further name it is captured.
        is_untouched && linked().is_ok()
    }
}

fn id_of(record: &FileRecord) -> FileId {
    FileId {
        dev: record.dev,
        ino: record.ino,
    }
}
