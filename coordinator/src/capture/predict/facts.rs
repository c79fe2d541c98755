//! What the cost of capturing a file depends on.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::super::record::{LEFT_ALONE, allocated};
use super::Flush;
use crate::store::extents;
use crate::tree::reflink;
use crate::tree::seen::{Seen, born_ns, now_ns};

/// Whoever only appends has nothing dirty before this many bytes from the end, or before as many as are
/// dirty: nothing at all, if all of the file is.
const TAIL: u64 = 1 << 20;
/// But then the file is no older than this, ns: the kernel writes back what has been dirty for half that
/// time (`vm.dirty_expire_centisecs`).
const YOUNG: i64 = 60_000_000_000;

/// A kind of file system, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct FileSystem {
    pub(super) name: String,
}

impl FileSystem {
    pub(in super::super) fn of(file: impl AsFd) -> FileSystem {
        FileSystem {
            name: reflink::file_system(file),
        }
    }

    pub(super) fn is_btrfs(&self) -> bool {
        self.name == "btrfs"
    }

    /// Nothing is ever written back.
    pub(super) fn is_memory(&self) -> bool {
        self.name == "tmpfs"
    }
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Bytes.
    pub(super) size: u64,
    /// Bytes of it that are no hole.
    pub(super) data: u64,
    /// Bytes that are in memory only.
    pub(super) dirty: u64,
    /// These will have been written back by the cut.
    pub(super) is_to_be_flushed: bool,
    /// Where the file system tells.
    pub(super) extents: Option<u32>,
    /// It is being written to, and not only at its end.
    pub(super) is_overwritten: bool,
    /// It was seen to be written to only at its end.
    pub(super) is_appended: bool,
}

impl Facts {
    /// Of a file that was only seen: it is taken to be clean, and in few pieces.
    pub(super) fn plain(seen: &Seen) -> Facts {
        Facts {
            size: seen.size,
            data: seen.size,
            dirty: 0,
            is_to_be_flushed: false,
            extents: None,
            is_overwritten: false,
            is_appended: false,
        }
    }

    /// The same of a small file; if it was written to just before it was scanned, at these times, it is taken to
    /// be dirty at the cut, whatever is flushed.
    pub(super) fn small(seen: &Seen, scanned: &Range<i64>) -> Facts {
        let fresh = scanned.start - LEFT_ALONE..scanned.end;
        let dirty = match fresh.contains(&seen.mtime_ns) {
            true => seen.size,
            false => 0,
        };
        Facts {
            dirty,
            ..Facts::plain(seen)
        }
    }

    /// Of an open file that was `seen` before. It is being written to if its mtime is `fresh`, ns, or
    /// has moved since, or, where all was flushed meanwhile, if something is dirty. Before a flush, after which it is
    /// looked at again, it counts as one that grows unless the opposite is seen; after it, that it `was_appended` to
    /// holds as long as nothing is dirty again.
    pub(super) fn of(
        file: &OwnedFd,
        seen: &Seen,
        fresh: i64,
        flush: Flush,
        was_appended: bool,
    ) -> Facts {
        let Ok(stat) = rustix::fs::fstat(file) else {
            return Facts::plain(seen);
        };
        let now = Seen::of(&stat);
        let dirty = dirty(file, 0, now.size);
        let is_written = now.mtime_ns != seen.mtime_ns
            || (0..fresh).contains(&age(&now))
            || flush == Flush::Done && dirty > 0;
        let end = now.size.saturating_sub(dirty.max(TAIL));
        let is_dirty_at_start = is_written && dirty > 0 && self::dirty(file, 0, end) > 0;
        let is_dirty_at_end = dirty > 0 && end > 0 && !is_dirty_at_start;
        let has_grown = now.size > seen.size && !is_dirty_at_start;
        let was_appended = was_appended && dirty == 0;
        let is_appended = is_written && (has_grown || is_dirty_at_end || was_appended);
        // What does not show yet will after the flush.
        let may_be_appended =
            || flush == Flush::ToCome && !is_dirty_at_start && (end > 0 || is_young(file));
        Facts {
            size: now.size,
            data: allocated(&stat).min(now.size),
            dirty,
            is_to_be_flushed: false,
            extents: extents(file),
            is_overwritten: is_written && !is_appended && !may_be_appended(),
            is_appended,
        }
    }
}

/// How long ago a file was written to, ns.
fn age(seen: &Seen) -> i64 {
    since(seen.mtime_ns)
}

/// How long ago that was, ns.
fn since(time_ns: i64) -> i64 {
    now_ns().saturating_sub(time_ns)
}

/// Whether a file may have been made of late: where that is not told, too.
fn is_young(file: &OwnedFd) -> bool {
    born_ns(file).is_none_or(|born_ns| since(born_ns) < YOUNG)
}

/// Bytes of `len` from `from` on that are in memory only: cachestat(2), Linux 6.5. Of an earlier
/// kernel, none.
pub(in super::super) fn dirty(file: &OwnedFd, from: u64, len: u64) -> u64 {
    const CACHESTAT: nix::libc::c_long = 451;
    if len == 0 {
        // To the kernel, 0 is all of it.
        return 0;
    }
    let range = [from, len];
    // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
    let mut pages = [0u64; 5];
    // SAFETY: both structures are as large as the kernel's; it writes to the second.
    let done = unsafe {
        nix::libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            pages.as_mut_ptr(),
            0,
        )
    };
    match done {
        0 => pages[1]
            .saturating_add(pages[2])
            .saturating_mul(rustix::param::page_size() as u64),
        _ => 0,
    }
}

/// Extents of a file: `fsx_nextents` of FS_IOC_FSGETXATTR, which XFS knows by heart and others
/// leave at 0.
fn extents(file: &OwnedFd) -> Option<u32> {
    const FS_IOC_FSGETXATTR: nix::libc::c_ulong = 0x801c_581f;
    // struct fsxattr: fsx_xflags, fsx_extsize, fsx_nextents, fsx_projid, fsx_cowextsize, 8 bytes.
    let mut attributes = [0u32; 7];
    // SAFETY: the structure has 28 bytes, which the kernel writes.
    let done =
        unsafe { nix::libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, attributes.as_mut_ptr()) };
    Some(attributes[2]).filter(|count| done == 0 && *count > 0)
}

/// Samples of a file, and their length, bytes.
const SAMPLES: u64 = 8;
const SAMPLE: u64 = 1 << 20;

/// Extents of a file on btrfs, where they can only be counted, which keeps writers out meanwhile: of a
/// large file, from samples.
pub(super) fn sampled(file: &OwnedFd, size: u64) -> Option<u32> {
    if size == 0 {
        return None;
    }
    let length = SAMPLE.min(size);
    let count = SAMPLES.min(size.div_ceil(SAMPLE));
    let mut extents = 0.0;
    for sample in 0..count {
        let start = (size - length) / count * sample;
        extents += f64::from(extents::count(file, start, length).ok()?);
    }
    // Each sample cuts through one.
    let within = (extents - count as f64).max(0.0);
    let all = within * size as f64 / (length * count) as f64;
    Some((all as u32).saturating_add(1))
}

/// Whether files can be cloned there, found out without cloning any.
pub(super) fn has_reflink(file: &OwnedFd, file_system: &FileSystem) -> bool {
    match file_system.name.as_str() {
        "btrfs" | "bcachefs" => true,
        "xfs" => xfs_has_reflink(file),
        _ => false,
    }
}

/// By XFS_IOC_FSGEOMETRY; if that cannot be had, it is what mkfs.xfs makes by default.
fn xfs_has_reflink(file: &OwnedFd) -> bool {
    const XFS_IOC_FSGEOMETRY: nix::libc::c_ulong = 0x8100_587e;
    const XFS_FSOP_GEOM_FLAGS_REFLINK: u32 = 1 << 20;
    // struct xfs_fsop_geom: 256 bytes, of which `flags` is the 24th word.
    let mut geometry = [0u32; 64];
    // SAFETY: the structure has 256 bytes, which the kernel writes.
    let done =
        unsafe { nix::libc::ioctl(file.as_raw_fd(), XFS_IOC_FSGEOMETRY, geometry.as_mut_ptr()) };
    done != 0 || geometry[23] & XFS_FSOP_GEOM_FLAGS_REFLINK != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_are_seen() {
        let file = OwnedFd::from(tempfile());
        rustix::io::pwrite(&file, &[1; 8192], 0).unwrap();
        // On tmpfs everything is; elsewhere what was just written, on a kernel that tells.
        assert!(dirty(&file, 0, 8192) <= 8192);
        assert_eq!(dirty(&file, 0, 0), 0);
        assert!(extents(&file) != Some(0));
    }

    #[test]
    fn a_file_that_is_written_in_place_is_told_from_others() {
        let file = OwnedFd::from(tempfile());
        rustix::io::pwrite(&file, &vec![1; 8 << 20], 0).unwrap();
        rustix::fs::fsync(&file).unwrap();
        let before = Seen::of(&rustix::fs::fstat(&file).unwrap());
        let long = 3_600_000_000_000;
        assert!(Facts::of(&file, &before, long, Flush::Unknown, false).is_overwritten);
        // All of it is dirty, where that can be told.
        rustix::io::pwrite(&file, &vec![1; 8 << 20], 0).unwrap();
        let is_told = dirty(&file, 0, 8 << 20) == 8 << 20;
        assert!(Facts::of(&file, &before, long, Flush::Unknown, false).is_overwritten);
        assert!(!is_told || !Facts::of(&file, &before, long, Flush::ToCome, false).is_overwritten);
        rustix::fs::fsync(&file).unwrap();
        let before = Seen::of(&rustix::fs::fstat(&file).unwrap());
        // Left alone for longer than that.
        let still = Seen {
            mtime_ns: before.mtime_ns,
            ..before
        };
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(!Facts::of(&file, &still, 1_000_000, Flush::Unknown, false).is_overwritten);
        // It grows, and is overwritten.
        rustix::io::pwrite(&file, &[1; 4096], 8 << 20).unwrap();
        rustix::io::pwrite(&file, &[1; 4096], 0).unwrap();
        let is_told = dirty(&file, 0, 4096) == 4096;
        assert!(!is_told || Facts::of(&file, &before, long, Flush::Unknown, false).is_overwritten);
        // It only grows.
        rustix::fs::fsync(&file).unwrap();
        let before = Seen::of(&rustix::fs::fstat(&file).unwrap());
        rustix::io::pwrite(&file, &[1; 4096], (8 << 20) + 4096).unwrap();
        assert!(!Facts::of(&file, &before, long, Flush::Unknown, false).is_overwritten);
        // It did, and much of that is dirty still, where that can be told.
        rustix::fs::fsync(&file).unwrap();
        rustix::io::pwrite(&file, &vec![1; 4 << 20], (8 << 20) + 8192).unwrap();
        let before = Seen::of(&rustix::fs::fstat(&file).unwrap());
        let is_told = dirty(&file, 0, before.size) == 4 << 20;
        assert!(!is_told || !Facts::of(&file, &before, long, Flush::Unknown, false).is_overwritten);
        // Flushed: that is not forgotten before something else is seen.
        let seen = Facts::of(&file, &before, long, Flush::ToCome, false);
        let flushed = || Facts::of(&file, &before, long, Flush::Done, seen.is_appended);
        let is_flushed = || dirty(&file, 0, before.size) == 0;
        rustix::fs::fsync(&file).unwrap();
        assert!(!is_told || !is_flushed() || !flushed().is_overwritten);
        rustix::io::pwrite(&file, &[1; 4096], 0).unwrap();
        assert!(!is_told || flushed().is_overwritten);
        assert!(!is_told || Facts::of(&file, &before, long, Flush::Unknown, false).is_overwritten);
    }

    fn tempfile() -> std::fs::File {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "snapshim-predict-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
