//! What the file system and the device under it say: bytes written, space used, extents.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Waits until everything on the file system of `path` is on its device.
pub fn sync(path: &Path) {
    let file = File::open(path).expect("a directory to sync");
    // SAFETY: the descriptor is open; the call takes no pointer.
    unsafe { libc::syncfs(file.as_raw_fd()) };
}

/// Bytes written so far to the block device that the file system at `mount` is on; `None`
/// for tmpfs. Taken from `/proc/diskstats` of the loop device.
pub fn device_written(mount: &Path) -> Option<u64> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let source = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let source = fields.next()?;
        (fields.next() == mount.to_str()).then(|| source.to_owned())
    })?;
    let name = source.strip_prefix("/dev/")?;
    let stats = fs::read_to_string("/proc/diskstats").ok()?;
    stats
        .lines()
        .find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // major minor name reads merged sectors ms writes merged SECTORS
            (fields.get(2) == Some(&name)).then(|| fields.get(9)?.parse::<u64>().ok())?
        })
        .map(|sectors| sectors * 512)
}

/// Bytes used on the file system of `path`.
pub fn used(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path)
        .map_or(0, |s| (s.blocks() - s.blocks_free()) * s.fragment_size())
}

/// Bytes of the files below `path`.
pub fn size(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !meta.is_dir() {
        return meta.size();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|e| size(&e.path())).sum()
}

/// Bytes allocated for the files below `path` that have no other name: what a copy added, at most.
pub fn own(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !meta.is_dir() {
        return if meta.nlink() == 1 {
            meta.blocks() * 512
        } else {
            0
        };
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|e| own(&e.path())).sum()
}

/// Number of extents of a file, by FIEMAP, without waiting for what is not yet on disk;
/// `None` where the file system cannot say.
pub fn extents(path: &Path) -> Option<u64> {
    /// `struct fiemap` without its array: with room for none, the kernel only counts.
    #[repr(C)]
    #[derive(Default)]
    struct Fiemap {
        start: u64,
        length: u64,
        flags: u32,
        mapped: u32,
        room: u32,
        reserved: u32,
    }
    /// `_IOWR('f', 11, struct fiemap)`
    const FIEMAP: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;
    let file = File::open(path).ok()?;
    let mut map = Fiemap {
        length: u64::MAX,
        ..Fiemap::default()
    };
    // SAFETY: the structure is the kernel's, and has room for no extent, which it is told.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &mut map) };
    (done == 0).then_some(map.mapped.into())
}
