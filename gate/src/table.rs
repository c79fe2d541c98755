//! The member table of one hold: which files the closed gate shuts.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Most devices a table can name; with more, every regular file is a member.
pub const MAX_DEVICES: usize = 32;
/// Most files a table can name one by one.
pub const MAX_FILES: usize = 126;

/// Every regular file on one of the devices is a member, except the files listed.
pub const KIND_DEVICES: u32 = 0;
/// Only the files listed are members.
pub const KIND_ONLY: u32 = 1;
/// Every regular file is a member, except the files listed.
pub const KIND_ALL: u32 = 2;

/// A file as `fstat` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

/// Shared form of a [`FileId`].
#[repr(C)]
#[derive(Debug)]
pub struct SharedFileId {
    dev: AtomicU64,
    ino: AtomicU64,
}

/// One of the two member tables. Written by the coordinator while the gate is
/// open and the other table was the last one used; read by shims while closed.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct MemberTable {
    kind: AtomicU32,
    device_count: AtomicU32,
    file_count: AtomicU32,
    _reserved: AtomicU32,
    devices: [AtomicU64; MAX_DEVICES],
    files: [SharedFileId; MAX_FILES],
}

impl MemberTable {
    /// Fills the table. Lists that do not fit make it coarser, never blind: more
    /// devices than fit means every regular file; exceptions that do not fit are
    /// members. Returns `false` if a [`KIND_ONLY`] list does not fit.
    pub fn write(&self, kind: u32, devices: &[u64], files: &[FileId]) -> bool {
        if kind == KIND_ONLY && files.len() > MAX_FILES {
            return false;
        }
        let kind = match kind {
            KIND_DEVICES if devices.len() > MAX_DEVICES => KIND_ALL,
            other => other,
        };
        self.kind.store(kind, Ordering::Relaxed);
        for (cell, dev) in self.devices.iter().zip(devices) {
            cell.store(*dev, Ordering::Relaxed);
        }
        for (cell, id) in self.files.iter().zip(files) {
            cell.dev.store(id.dev, Ordering::Relaxed);
            cell.ino.store(id.ino, Ordering::Relaxed);
        }
        self.device_count
            .store(devices.len().min(MAX_DEVICES) as u32, Ordering::Relaxed);
        self.file_count
            .store(files.len().min(MAX_FILES) as u32, Ordering::Release);
        true
    }

    /// Whether the regular file `id` is shut. The counts and the kind are
    /// untrusted: out of range means "everything".
    pub fn shuts(&self, id: FileId) -> bool {
        let listed = || {
            let count = (self.file_count.load(Ordering::Relaxed) as usize).min(MAX_FILES);
            self.files.iter().take(count).any(|f| {
                f.dev.load(Ordering::Relaxed) == id.dev && f.ino.load(Ordering::Relaxed) == id.ino
            })
        };
        match self.kind.load(Ordering::Relaxed) {
            KIND_ONLY => listed(),
            KIND_DEVICES => {
                let count = (self.device_count.load(Ordering::Relaxed) as usize).min(MAX_DEVICES);
                self.devices
                    .iter()
                    .take(count)
                    .any(|d| d.load(Ordering::Relaxed) == id.dev)
                    && !listed()
            }
            _ => !listed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> MemberTable {
        // SAFETY: a table is made of atomics, for which all-zero is a value.
        unsafe { core::mem::zeroed() }
    }

    fn id(dev: u64, ino: u64) -> FileId {
        FileId { dev, ino }
    }

    #[test]
    fn kinds() {
        let t = table();
        assert!(t.write(KIND_DEVICES, &[7, 9], &[id(7, 1)]));
        assert!(t.shuts(id(7, 2)) && t.shuts(id(9, 1)));
        assert!(!t.shuts(id(7, 1)) && !t.shuts(id(8, 2)));
        assert!(t.write(KIND_ONLY, &[], &[id(7, 1)]));
        assert!(t.shuts(id(7, 1)) && !t.shuts(id(7, 2)));
        assert!(t.write(KIND_ALL, &[], &[id(7, 1)]));
        assert!(!t.shuts(id(7, 1)) && t.shuts(id(1, 2)));
    }

    #[test]
    fn too_many_devices_shut_everything_and_too_many_files_are_refused() {
        let t = table();
        assert!(t.write(KIND_DEVICES, &[1; MAX_DEVICES + 1], &[]));
        assert!(t.shuts(id(99, 99)));
        assert!(!t.write(KIND_ONLY, &[], &[id(1, 1); MAX_FILES + 1]));
    }

    #[test]
    fn absurd_counts_stay_in_bounds() {
        let t = table();
        t.device_count.store(u32::MAX, Ordering::Relaxed);
        t.file_count.store(u32::MAX, Ordering::Relaxed);
        for kind in [KIND_DEVICES, KIND_ONLY, KIND_ALL, 77] {
            t.kind.store(kind, Ordering::Relaxed);
            t.shuts(id(3, 4));
        }
    }
}
