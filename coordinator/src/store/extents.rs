//! Where two files differ, as far as the file system knows without reading them: a clone
//! and its original share their extents until one is overwritten.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::Stat;
use rustix::io::{Errno, Result};

/// `FS_IOC_FIEMAP` of linux/fs.h: `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u64 = 0xc020_660b;
/// Write back what is dirty first: what is mapped then is what is in the file.
const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 0x1;
const FIEMAP_EXTENT_MERGED: u32 = 0x1000;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
/// Extents with any other flag (delayed, encoded, inline, unwritten …) may have another
/// content at the same place.
const PLAIN: u32 = FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED;
/// Extents asked for at once.
const BATCH: usize = 512;
/// More extents than this are not worth comparing.
const MAX_EXTENTS: usize = 1 << 20;

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` of linux/fiemap.h.
#[repr(C)]
#[derive(Default)]
struct Head {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// The same with room for extents.
#[repr(C)]
struct Request {
    head: Head,
    extents: [RawExtent; BATCH],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    logical: u64,
    length: u64,
    /// Where it is on the disk; `None` if that says nothing about its content.
    physical: Option<u64>,
}

impl Extent {
    fn end(&self) -> u64 {
        self.logical.saturating_add(self.length)
    }
}

/// The byte ranges in which two regular files may differ, in order, beyond what the
/// shorter one has included. `None` if the file system does not tell: compare them byte by
/// byte. Neither may be written to meanwhile, or what was written is missed.
///
/// Extents at one place on one disk are the same bytes as long as both files exist: the
/// file system gives a block that is in use to nobody else, and writes to a shared
/// one elsewhere (copy on write).
///
/// # Errors
///
/// Those of the ioctl; `EIO` where a file cannot be written back.
pub fn may_differ(a: impl AsFd, b: impl AsFd) -> Result<Option<Vec<Range<u64>>>> {
    let (stat_a, stat_b) = (rustix::fs::fstat(&a)?, rustix::fs::fstat(&b)?);
    if stat_a.st_dev != stat_b.st_dev {
        return Ok(None);
    }
    let (size_a, size_b) = (size(&stat_a), size(&stat_b));
    if (stat_a.st_ino, size_a) == (stat_b.st_ino, size_b) {
        return Ok(Some(Vec::new()));
    }
    let (Some(of_a), Some(of_b)) = (extents(&a, size_a)?, extents(&b, size_b)?) else {
        return Ok(None);
    };
    let common = size_a.min(size_b);
    let mut ranges = differing(&of_a, &of_b, common);
    if size_a != size_b {
        push(&mut ranges, common..size_a.max(size_b));
    }
    Ok(Some(ranges))
}

/// How many extents of a file overlap this range.
///
/// # Errors
///
/// The file system does not tell.
pub fn count(file: impl AsFd, start: u64, length: u64) -> Result<u32> {
    // With no room for any, they are only counted (Documentation/filesystems/fiemap.rst).
    let mut head = Head {
        start,
        length,
        ..Head::default()
    };
    // SAFETY: the structure the call expects, without extents, as `count` says; it outlives the call.
    let done = unsafe {
        nix::libc::ioctl(
            file.as_fd().as_raw_fd(),
            FS_IOC_FIEMAP as _,
            std::ptr::from_mut(&mut head),
        )
    };
    match done {
        0 => Ok(head.mapped),
        _ => Err(Errno::from_raw_os_error(nix::errno::Errno::last_raw())),
    }
}

fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// The extents of a file up to its end, holes left out; `None` if it has none to tell of.
fn extents(file: impl AsFd, size: u64) -> Result<Option<Vec<Extent>>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut request = Box::new(Request {
        head: Head {
            flags: FIEMAP_FLAG_SYNC,
            count: BATCH as u32,
            ..Head::default()
        },
        extents: [RawExtent::default(); BATCH],
    });
    let mut start = 0;
    while start < size {
        request.head.start = start;
        request.head.length = size - start;
        request.head.mapped = 0;
        // SAFETY: the request is the structure the call expects, with room for `count`
        // extents behind it, and outlives the call.
        let result = unsafe {
            nix::libc::ioctl(
                file.as_fd().as_raw_fd(),
                FS_IOC_FIEMAP as _,
                std::ptr::from_mut(&mut *request),
            )
        };
        if result != 0 {
            return match nix::errno::Errno::last() {
                nix::errno::Errno::EOPNOTSUPP
                | nix::errno::Errno::ENOTTY
                | nix::errno::Errno::EINVAL
                | nix::errno::Errno::EBADR => Ok(None),
                other => Err(Errno::from_raw_os_error(other as i32)),
            };
        }
        let mapped = (request.head.mapped as usize).min(BATCH);
        for raw in &request.extents[..mapped] {
            // Never backwards, or a file system with a fault would keep us here.
            if raw.length == 0 || found.last().is_some_and(|last| raw.logical < last.end()) {
                return Ok(None);
            }
            found.push(Extent {
                logical: raw.logical,
                length: raw.length,
                physical: (raw.flags & !PLAIN == 0).then_some(raw.physical),
            });
        }
        let is_last = request.extents[..mapped]
            .last()
            .is_none_or(|last| last.flags & FIEMAP_EXTENT_LAST != 0);
        if is_last {
            break;
        }
        if found.len() > MAX_EXTENTS {
            return Ok(None);
        }
        start = found.last().map_or(size, Extent::end);
    }
    Ok(Some(found))
}

/// Walks both lists at once. What is a hole in both is equal as well.
fn differing(a: &[Extent], b: &[Extent], end: u64) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let (mut i, mut j) = (0, 0);
    let mut at = 0;
    while at < end {
        while a.get(i).is_some_and(|extent| extent.end() <= at) {
            i += 1;
        }
        while b.get(j).is_some_and(|extent| extent.end() <= at) {
            j += 1;
        }
        let (here_a, next_a) = here(a.get(i), at);
        let (here_b, next_b) = here(b.get(j), at);
        let next = next_a.min(next_b).min(end);
        if !same(here_a, here_b) {
            push(&mut ranges, at..next);
        }
        at = next;
    }
    ranges
}

/// What is at an offset: nothing (a hole), or something that may be known by its
/// place; and up to where.
fn here(extent: Option<&Extent>, at: u64) -> (Option<Option<u64>>, u64) {
    match extent {
        None => (None, u64::MAX),
        Some(extent) if extent.logical > at => (None, extent.logical),
        Some(extent) => {
            let place = extent
                .physical
                .and_then(|place| place.checked_add(at - extent.logical));
            (Some(place), extent.end())
        }
    }
}

fn same(a: Option<Option<u64>>, b: Option<Option<u64>>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(Some(a)), Some(Some(b))) => a == b,
        _ => false,
    }
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
// One range is what is expected.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn extent(logical: u64, length: u64, physical: u64) -> Extent {
        Extent {
            logical,
            length,
            physical: Some(physical),
        }
    }

    #[test]
    fn what_is_shared_is_equal() {
        let a = [extent(0, 8, 100), extent(16, 8, 116)];
        assert_eq!(differing(&a, &a, 24), []);
        // The same places in other pieces.
        let pieces = [extent(0, 4, 100), extent(4, 4, 104), extent(16, 8, 116)];
        assert_eq!(differing(&a, &pieces, 24), []);
    }

    #[test]
    fn what_is_not_shared_may_differ() {
        let a = [extent(0, 8, 100), extent(16, 8, 116)];
        let overwritten = [extent(0, 2, 100), extent(2, 2, 500), extent(4, 4, 104)];
        assert_eq!(differing(&a, &overwritten, 24), [2..4, 16..24]);
        let shifted = [extent(0, 8, 101)];
        assert_eq!(differing(&a[..1], &shifted, 8), [0..8]);
        // Up to the end of the file only.
        assert_eq!(differing(&a[..1], &[], 5), [0..5]);
    }

    #[test]
    fn an_extent_without_a_place_proves_nothing() {
        let unknown = [Extent {
            logical: 0,
            length: 8,
            physical: None,
        }];
        assert_eq!(differing(&unknown, &unknown, 8), [0..8]);
    }

    #[test]
    fn equal_neighbours_are_one_range() {
        let a = [extent(0, 4, 100), extent(4, 4, 104)];
        let b = [extent(0, 4, 200), extent(4, 4, 204)];
        assert_eq!(differing(&a, &b, 8), [0..8]);
    }
}
