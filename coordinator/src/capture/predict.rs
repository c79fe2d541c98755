//! How long a hold would be: what decides between capturing under it, and after the cut.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use super::Method;
use super::prepare::{Plan, Scan, Way};

/// A hold that is not worth avoiding.
const SHORT: Duration = Duration::from_millis(1);
/// Making a clone, and each extent of it: measured on XFS and btrfs, on a virtual machine.
const CLONE: Duration = Duration::from_micros(30);
const EXTENT: Duration = Duration::from_nanos(1_500);
/// Walking, for each file.
const WALK: Duration = Duration::from_nanos(2_500);
/// Opening, reading and writing a file that is small.
const COPY: Duration = Duration::from_micros(25);
/// Bytes that are copied in no time.
const LITTLE: u64 = 8 << 20;
/// Bytes a second: copied in memory, and written back to a disk.
const COPIED: u64 = 2 << 30;
const WRITTEN_BACK: u64 = 300 << 20;

/// What a capture under the hold is expected to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) hold: Duration,
    /// On btrfs, copying much stalls a program's own writes more than anything else does.
    pub(super) is_btrfs: bool,
    /// What would be copied, bytes.
    pub(super) bytes: u64,
}

/// Whether to guard the cut rather than to capture under the hold.
pub(super) fn is_better_guarded(method: Method, expected: Expected) -> bool {
    match method {
        Method::CopyBeforeWrite => true,
        Method::Auto => expected.hold > SHORT && (!expected.is_btrfs || expected.bytes <= LITTLE),
        Method::Reflink | Method::Copy | Method::Subvolume => false,
    }
}

/// Looks at the members; after they were flushed.
pub(super) fn expect(scan: &Scan, plan: &Plan) -> Expected {
    let files = u32::try_from(scan.members.len()).unwrap_or(u32::MAX);
    let mut expected = Expected {
        hold: WALK * files,
        ..Expected::default()
    };
    let mut devices = std::collections::BTreeSet::new();
    for member in scan.to_capture() {
        let size = member.seen.size;
        if devices.insert(member.seen.id.dev) {
            expected.is_btrfs |= scan.open(member).is_ok_and(|file| is_btrfs(&file));
        }
        expected.bytes = expected.bytes.saturating_add(size);
        expected.hold += match plan.way(member.seen.id.dev) {
            Way::Copy => COPY + at_rate(size, COPIED),
            Way::Reflink | Way::Unknown => {
                // What is small has few of either.
                let (dirty, extents) = match size {
                    0..1_048_576 => (0, 1),
                    _ => scan
                        .open(member)
                        .map_or((0, 1), |file| (dirty(&file, size), extents(&file))),
                };
                CLONE + EXTENT * extents + at_rate(dirty, WRITTEN_BACK)
            }
        };
    }
    expected
}

fn at_rate(bytes: u64, rate: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / rate as f64)
}

fn is_btrfs(file: &OwnedFd) -> bool {
    const BTRFS_MAGIC: i64 = 0x9123_683e;
    rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == BTRFS_MAGIC)
}

/// Bytes of a file that are in memory only: cachestat(2), Linux 6.5. Of an earlier kernel, none.
fn dirty(file: &OwnedFd, size: u64) -> u64 {
    const CACHESTAT: nix::libc::c_long = 451;
    let range = [0u64, size];
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
fn extents(file: &OwnedFd) -> u32 {
    const FS_IOC_FSGETXATTR: nix::libc::c_ulong = 0x801c_581f;
    // struct fsxattr: fsx_xflags, fsx_extsize, fsx_nextents, fsx_projid, fsx_cowextsize, 8 bytes.
    let mut attributes = [0u32; 7];
    // SAFETY: the structure has 28 bytes, which the kernel writes.
    let done =
        unsafe { nix::libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, attributes.as_mut_ptr()) };
    if done == 0 { attributes[2].max(1) } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_guarded() {
        let expected = |ms, is_btrfs| Expected {
            hold: Duration::from_millis(ms),
            is_btrfs,
            bytes: 1 << 30,
        };
        let little = Expected {
            bytes: 1 << 20,
            ..expected(30, true)
        };
        assert!(is_better_guarded(Method::Auto, little));
        assert!(is_better_guarded(Method::Auto, expected(30, false)));
        assert!(!is_better_guarded(Method::Auto, expected(30, true)));
        assert!(!is_better_guarded(Method::Auto, expected(0, false)));
        assert!(is_better_guarded(
            Method::CopyBeforeWrite,
            expected(0, true)
        ));
        assert!(!is_better_guarded(Method::Copy, expected(9_999, false)));
    }

    #[test]
    fn dirty_pages_are_seen() {
        let file = OwnedFd::from(tempfile());
        rustix::io::pwrite(&file, &[1; 8192], 0).unwrap();
        // On tmpfs everything is; elsewhere what was just written, on a kernel that tells.
        assert!(dirty(&file, 8192) <= 8192);
        assert!(extents(&file) >= 1);
    }

    fn tempfile() -> std::fs::File {
        let path = std::env::temp_dir().join(format!("snapshim-predict-{}", std::process::id()));
        let file = std::fs::File::create_new(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
