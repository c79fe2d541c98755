//! Handling the entries of a directory tree: what capture and restore have in common.
//!
//! | module | what it does |
//! |---|---|
//! | [`dirs`] | directories by number, opened one name at a time, following no link |
//! | [`seen`] | what a stat said |
//! | [`metadata`] | reading and setting owners, modes, times and extended attributes |
//! | [`reflink`] | cloning a file's extents |
//! | [`subvolume`] | the ioctls of btrfs subvolumes |
//! | [`copy`] | reading a file's bytes, and copying them, its holes left out |

pub(crate) mod copy;
pub(crate) mod dirs;
pub(crate) mod metadata;
pub(crate) mod reflink;
pub(crate) mod seen;
pub(crate) mod subvolume;

/// The name of the directory in which a restore gets ready what it puts into place, and
/// keeps what it takes away. Never captured, never restored.
pub(crate) const STAGING: &[u8] = b".snapshim-restore";

/// Bytes that are free for us on the file system of `fd`.
pub(crate) fn free(fd: impl std::os::fd::AsFd) -> rustix::io::Result<u64> {
    let stat = rustix::fs::fstatvfs(fd)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
