//! Cloning a file: its extents are shared, its bytes are not read.
//!
//! `FICLONE` locks out writers of the source, writes back what is dirty, then shares the
//! extents (ioctl_ficlone(2)). It copies neither metadata nor extended attributes, leaves the
//! source's times alone and promises no durability. The destination is always fresh:
//! a longer one would keep its tail.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{IFlags, ioctl_ficlone, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

/// Makes the empty file `to` a clone of `from`.
pub(crate) fn clone(to: impl AsFd, from: impl AsFd) -> Result<(), Errno> {
    match ioctl_ficlone(&to, &from) {
        // btrfs refuses if one of them has checksums and the other has none. That comes
        // with copy-on-write switched off, for the file (chattr +C) or for the
        // directory it was made in. The flag can be changed as long as a file is empty.
        Err(Errno::INVAL) if match_nocow(&to, &from) == Ok(true) => ioctl_ficlone(&to, &from),
        other => other,
    }
}

/// Finds out whether `from` can be cloned into the empty file `to`, by its first block alone: whatever is shared,
/// if only for a moment, is written elsewhere when it is changed, and leaves the file in more
/// pieces.
pub(crate) fn try_clone(to: impl AsFd, from: impl AsFd) -> Result<(), Errno> {
    match clone_first_block(&to, &from) {
        Err(Errno::INVAL) if match_nocow(&to, &from) == Ok(true) => clone_first_block(&to, &from),
        other => other,
    }
}

fn clone_first_block(to: impl AsFd, from: impl AsFd) -> Result<(), Errno> {
    const FICLONERANGE: nix::libc::c_ulong = 0x4020_940d;
    let stat = rustix::fs::fstat(&from)?;
    let (size, block) = (stat.st_size as u64, stat.st_blksize as u64);
    // struct file_clone_range: src_fd, src_offset, src_length (0: to the end), dest_offset.
    let length = if size > block { block } else { 0 };
    let range = [from.as_fd().as_raw_fd() as u64, 0, length, 0];
    // SAFETY: the kernel reads the structure, which is as large as its own.
    let done = unsafe { nix::libc::ioctl(to.as_fd().as_raw_fd(), FICLONERANGE, range.as_ptr()) };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// Gives `to` the no-copy-on-write flag of `from`; whether that changed anything.
fn match_nocow(to: impl AsFd, from: impl AsFd) -> Result<bool, Errno> {
    let wanted = ioctl_getflags(&from)? & IFlags::NOCOW;
    let flags = ioctl_getflags(&to)?;
    if flags & IFlags::NOCOW == wanted {
        return Ok(false);
    }
    ioctl_setflags(&to, flags.difference(IFlags::NOCOW) | wanted)?;
    Ok(true)
}

/// Whether the error says that the file system has no reflink at all, as against
/// this clone having failed.
pub(crate) fn is_unsupported(cause: Errno) -> bool {
    // EOPNOTSUPP from the kernel's generic code; ENOTTY from file systems that hand on ioctls.
    matches!(cause, Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS)
}

/// The name of a file system by its magic number (statfs(2)).
pub(crate) fn file_system(fd: impl AsFd) -> String {
    let Ok(stat) = rustix::fs::fstatfs(fd) else {
        return "unknown".to_owned();
    };
    // Signed on some architectures, and some numbers have the highest of 32 bits.
    #[allow(clippy::cast_sign_loss)]
    let magic = stat.f_type as u32;
    let name = match magic {
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0xef53 => "ext4",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x6969 => "nfs",
        0xfe53_4d42 => "smb",
        0x0102_1997 => "9p",
        0x6573_5546 => "fuse",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        0xca45_1a4e => "bcachefs",
        0x00c3_6400 => "ceph",
        other => return format!("type {other:#x}"),
    };
    name.to_owned()
}
