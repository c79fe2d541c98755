//! Writing back what is dirty, piece by piece: so that somebody can be told how far it is, and so
//! that a device, or the kernel's thread that stands for one, has pauses in which the program gets
//! its turn. And names that were made ahead, while other work goes on.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread::Builder;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::predict::facts::dirty;
use super::record::Target;
use crate::interrupt;
use crate::tally::Tally;
use crate::tree::reflink;

/// Bytes waited for at a time.
const PIECE: u64 = 1 << 20;

/// Begins to write back a file, unless it is large; how much of it was dirty, bytes. `sync_file_range` commits no journal and flushes no disk
/// cache (sync_file_range(2)).
///
/// # Errors
///
/// The file could not be written back. That must be heeded: it is reported once to each
/// open file and, once anybody was told, not to later ones, while a clone made after it may hold
/// zeros where reading the file itself shows the data.
pub(super) fn begin(file: &OwnedFd, size: u64) -> rustix::io::Result<u64> {
    let dirty = dirty(file, 0, size);
    if size <= PIECE {
        sync(file, 0, 0, nix::libc::SYNC_FILE_RANGE_WRITE)?;
    }
    Ok(dirty)
}

/// Waits until a file is written back, of which `dirty` bytes were dirty when that began.
///
/// # Errors
///
/// As [`begin`].
pub(super) fn wait(file: &OwnedFd, size: u64, dirty: u64, tally: &Tally) -> rustix::io::Result<()> {
    let all = nix::libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | nix::libc::SYNC_FILE_RANGE_WRITE
        | nix::libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let before = tally.done();
    let mut at = 0;
    while dirty > 0 && size > PIECE && at < size {
        let left = self::dirty(file, at, PIECE.min(size - at));
        sync(file, at, PIECE, all)?;
        tally.add(left);
        at += PIECE;
    }
    // What was added to it since, too.
    sync(file, 0, 0, all)?;
    // Some was on disk before it was looked at.
    tally.set(before + dirty);
    Ok(())
}

/// Writes back all of a large file that was written, telling how far it is; `fsync` then has little to do.
///
/// # Errors
///
/// As [`begin`].
pub(super) fn told(file: &OwnedFd, size: u64, tally: &Tally) -> rustix::io::Result<()> {
    if size < PIECE {
        return Ok(());
    }
    let dirty = begin(file, size)?;
    wait(file, size, dirty, tally)
}

/// Begins to write to disk that names were made in the tree, so that little of it is left when all has to be there.
/// Only on XFS, where to sync a directory is to write the log up to its last change, and nothing else
/// (`xfs_dir_fsync`); a commit of a journal elsewhere would make the program wait one time more.
pub(super) fn begin_names(target: &Target) {
    if reflink::file_system(&*target.fd) != "xfs" {
        return;
    }
    // A change that comes after all of them. If it cannot be made, whatever has to be will say why.
    if target.with_scratch(drop).is_err() {
        return;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Another description: what goes wrong is to be told to whoever relies on it.
    let Ok(dir) = rustix::fs::openat(&target.fd, Path::new("."), flags, Mode::empty()) else {
        return;
    };
    // Nobody waits for it.
    let _ = Builder::new().spawn(move || {
        interrupt::leave_to_others();
        rustix::fs::fsync(&dir)
    });
}

/// Where it is not possible, whoever clones or syncs the file will do it.
fn sync(file: &OwnedFd, from: u64, len: u64, flags: u32) -> rustix::io::Result<()> {
    let (Ok(from), Ok(len)) = (i64::try_from(from), i64::try_from(len)) else {
        return Ok(());
    };
    // SAFETY: takes no pointers; the descriptor is open as long as `file` lives.
    let done = unsafe { nix::libc::sync_file_range(file.as_raw_fd(), from, len, flags) };
    if done == 0 {
        return Ok(());
    }
    match Errno::from_io_error(&std::io::Error::last_os_error()) {
        Some(cause @ (Errno::IO | Errno::NOSPC | Errno::DQUOT)) => Err(cause),
        _ => Ok(()),
    }
}
