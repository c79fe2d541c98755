//! Looking at the live tree: by descriptors and single names, following no symbolic link.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use snapshim_gate::table::FileId;

use crate::store::snapshot::open_below;
use crate::tree::seen::{Seen, nanoseconds};

/// What there is under a name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) seen: Seen,
    /// The mount it is reached through: nothing can be renamed into another one.
    pub(super) mount: u64,
    /// `chattr +i` or `+a`: it cannot be renamed or removed.
    pub(super) is_fixed: bool,
}

impl Look {
    /// What a staging directory serves: a file system, as far as renames go.
    pub(super) fn realm(&self) -> (u64, u64) {
        (self.seen.id.dev, self.mount)
    }
}

/// Looks at `name` in `dir`; `None` if there is nothing.
///
/// # Errors
///
/// Those of statx(2).
pub(super) fn look(dir: impl AsFd, name: &CStr) -> rustix::io::Result<Option<Look>> {
    match look_by(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        other => other.map(Some),
    }
}

/// Looks at what is open.
///
/// # Errors
///
/// Those of statx(2).
pub(super) fn look_at(fd: impl AsFd) -> rustix::io::Result<Look> {
    look_by(fd, c"", AtFlags::EMPTY_PATH)
}

fn look_by(dir: impl AsFd, name: &CStr, flags: AtFlags) -> rustix::io::Result<Look> {
    let flags = flags | AtFlags::NO_AUTOMOUNT;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let x = rustix::fs::statx(dir, name, flags, wanted)?;
    let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    let seen = Seen {
        id: FileId {
            dev: rustix::fs::makedev(x.stx_dev_major, x.stx_dev_minor),
            ino: x.stx_ino,
        },
        mode: x.stx_mode.into(),
        uid: x.stx_uid,
        gid: x.stx_gid,
        nlink: x.stx_nlink.into(),
        size: x.stx_size,
        rdev: rustix::fs::makedev(x.stx_rdev_major, x.stx_rdev_minor),
        mtime_ns: nanoseconds(x.stx_mtime.tv_sec, x.stx_mtime.tv_nsec.into()),
        ctime_ns: nanoseconds(x.stx_ctime.tv_sec, x.stx_ctime.tv_nsec.into()),
    };
    Ok(Look {
        seen,
        mount: x.stx_mnt_id,
        is_fixed: x.stx_attributes.intersects(fixed),
    })
}

/// Opens a directory by its absolute path; no part of it may be a symbolic link.
///
/// # Errors
///
/// Those of openat2(2): `ELOOP` for a symbolic link.
pub(super) fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    open_below(root.as_fd(), path, flags)
}

/// All names in a directory but `.` and `..`, its access time left alone where allowed.
///
/// # Errors
///
/// It cannot be opened or read.
pub(super) fn names_in(dir: impl AsFd) -> rustix::io::Result<Vec<CString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |flags| rustix::fs::openat(&dir, c".", flags, Mode::empty());
    let fd = match open(flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags)?,
        other => other?,
    };
    let mut buffer = [MaybeUninit::uninit(); 1 << 15];
    let mut entries = RawDir::new(fd, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
