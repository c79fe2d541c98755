//! btrfs subvolumes: the few ioctls that taking a snapshot of one needs.
//!
//! Numbers and layouts are those of linux/btrfs.h. A subvolume's top directory has the inode
//! number 256 (`BTRFS_FIRST_FREE_OBJECTID`), and nothing else on btrfs has.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

/// The inode number of a subvolume's top directory.
pub(crate) const TOP: u64 = 256;
/// That of the empty directory that a snapshot has in place of a subvolume of its own.
pub(crate) const PLACEHOLDER: u64 = 2;

const READ_ONLY: u64 = 1 << 1;
const SNAP_CREATE_V2: Opcode = opcode::write::<Args>(0x94, 23);
const GET_FLAGS: Opcode = opcode::read::<u64>(0x94, 25);
const SET_FLAGS: Opcode = opcode::write::<u64>(0x94, 26);
const SNAP_DESTROY_V2: Opcode = opcode::write::<Args>(0x94, 63);

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct Args {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

const _: () = assert!(size_of::<Args>() == 4096);

impl Args {
    fn new(name: &CStr) -> Result<Args> {
        let mut args = Args {
            fd: 0,
            transid: 0,
            flags: 0,
            unused: [0; 4],
            name: [0; 4040],
        };
        let bytes = name.to_bytes_with_nul();
        args.name
            .get_mut(..bytes.len())
            .ok_or(Errno::NAMETOOLONG)?
            .copy_from_slice(bytes);
        Ok(args)
    }
}

/// Whether this is on btrfs.
pub(crate) fn is_btrfs(fd: impl AsFd) -> bool {
    super::reflink::file_system(fd) == "btrfs"
}

/// Whether an open directory is the top of a subvolume.
pub(crate) fn is_top(fd: impl AsFd) -> bool {
    let is_dir = |stat: &rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode).is_dir();
    rustix::fs::fstat(&fd).is_ok_and(|stat| stat.st_ino == TOP && is_dir(&stat)) && is_btrfs(&fd)
}

/// Makes the read-only snapshot `name` in `dir` of the subvolume whose top is open as `of`.
///
/// The kernel writes back all that is dirty in the subvolume, waits for it, and commits a
/// transaction: the snapshot is what the subvolume was at one instant, and durable.
///
/// # Errors
///
/// Those of the kernel: `EPERM` if the subvolume is another user's, `EXDEV` if `dir` is on another
/// file system, `EINVAL` if `of` is no top.
pub(crate) fn snapshot(of: &OwnedFd, dir: impl AsFd, name: &CStr) -> Result<()> {
    use std::os::fd::AsRawFd;
    let mut args = Args::new(name)?;
    args.fd = of.as_raw_fd().into();
    args.flags = READ_ONLY;
    // SAFETY: the opcode goes with this type, which has the size and the layout of the kernel's
    // structure, is only read by it, and lives until the call is over.
    unsafe { ioctl(dir, Setter::<SNAP_CREATE_V2, Args>::new(args)) }
}

/// Removes the subvolume `name` in `dir`, with all that is in it, in one step; its space is freed in
/// the background. Without the right to do so (root's, or its owner's if the file system is
/// mounted with `user_subvol_rm_allowed`) it is only made writable, and can then be emptied.
///
/// # Errors
///
/// Those of the kernel. `ENOTEMPTY`: there is another subvolume in it.
pub(crate) fn destroy(dir: impl AsFd, name: &CStr) -> Result<()> {
    let try_it = || {
        let args = Args::new(name)?;
        // SAFETY: as in `snapshot`.
        unsafe { ioctl(&dir, Setter::<SNAP_DESTROY_V2, Args>::new(args)) }
    };
    match try_it() {
        // A user may not remove what is read-only, whatever else he may.
        Err(Errno::PERM | Errno::ACCESS | Errno::ROFS) => {
            make_writable(&dir, name)?;
            try_it()
        }
        other => other,
    }
}

fn make_writable(dir: impl AsFd, name: &CStr) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    // SAFETY: the opcode goes with a u64, which the kernel writes.
    let flags = unsafe { ioctl(&fd, Getter::<GET_FLAGS, u64>::new()) }?;
    if flags & READ_ONLY == 0 {
        return Ok(());
    }
    // SAFETY: the opcode goes with a u64, which the kernel reads.
    unsafe { ioctl(&fd, Setter::<SET_FLAGS, u64>::new(flags & !READ_ONLY)) }
}
