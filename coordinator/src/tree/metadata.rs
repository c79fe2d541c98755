//! Extended attributes, owners, modes and times.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::{Errno, Result};

use super::seen::Seen;

/// Bytes: `XATTR_LIST_MAX` and `XATTR_SIZE_MAX` of linux/limits.h.
const MAX: usize = 1 << 16;

/// An extended attribute. ACLs are among them (`system.posix_acl_*`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    pub(crate) name: CString,
    pub(crate) value: Box<[u8]>,
}

/// What an entry has of metadata, its extended attributes aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits with set-id and sticky bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// ns since 1970.
    pub(crate) mtime_ns: i64,
}

impl From<&Seen> for Attributes {
    fn from(seen: &Seen) -> Attributes {
        Attributes {
            mode: seen.permissions(),
            uid: seen.uid,
            gid: seen.gid,
            mtime_ns: seen.mtime_ns,
        }
    }
}

/// Reads extended attributes into buffers that are kept.
#[derive(Debug, Default)]
pub(crate) struct XattrReader {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    /// All attributes of an open file. A file system that has none has no error.
    pub(crate) fn read(&mut self, fd: impl AsFd) -> Result<Vec<Xattr>> {
        self.read_by(
            |list| rustix::fs::flistxattr(&fd, list),
            |name, value| rustix::fs::fgetxattr(&fd, name, value),
        )
    }

    /// The same of what is open with `O_PATH`, which no other call takes: a symbolic link,
    /// FIFO, socket or device. None without a `/proc`.
    pub(crate) fn read_path(&mut self, fd: impl AsFd) -> Result<Vec<Xattr>> {
        let path = by_descriptor(&fd);
        let read = self.read_by(
            |list| rustix::fs::listxattr(&path, list),
            |name, value| rustix::fs::getxattr(&path, name, value),
        );
        match read {
            Err(Errno::NOENT) => Ok(Vec::new()),
            other => other,
        }
    }

    fn read_by(
        &mut self,
        list: impl FnOnce(&mut [u8]) -> Result<usize>,
        get: impl Fn(&CStr, &mut [u8]) -> Result<usize>,
    ) -> Result<Vec<Xattr>> {
        self.list.resize(MAX, 0);
        let length = match list(self.list.as_mut_slice()) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Ok(length) => length,
            Err(cause) => return Err(cause),
        };
        self.value.resize(MAX, 0);
        let mut xattrs = Vec::new();
        for name in self.list[..length].split_inclusive(|byte| *byte == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else {
                continue;
            };
            match get(name, self.value.as_mut_slice()) {
                Ok(length) => xattrs.push(Xattr {
                    name: name.to_owned(),
                    value: self.value[..length].into(),
                }),
                // Removed since it was listed; or listed, but not ours to read (trusted.*).
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(cause) => return Err(cause),
            }
        }
        Ok(xattrs)
    }
}

/// What could not be set.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) what: String,
    pub(crate) cause: Errno,
}

fn failed(what: &str) -> impl FnOnce(Errno) -> Failed {
    move |cause| Failed {
        what: what.to_owned(),
        cause,
    }
}

/// The name by which the kernel finds an open file, whatever it is.
fn by_descriptor(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Gives an open file or directory the metadata of its original. Attributes it has
/// already are replaced, none is taken away.
///
/// The order matters: a change of owner clears set-id bits and file capabilities; attributes
/// can be set as long as the owner may write; a change of the mode after the
/// ACL sets the ACL's mask, to the group bits it was read with; all of these move the times.
pub(crate) fn apply(
    fd: &OwnedFd,
    attributes: &Attributes,
    xattrs: &[Xattr],
) -> std::result::Result<(), Failed> {
    let owned = give(attributes, |uid, gid| rustix::fs::fchown(fd, uid, gid))
        .map_err(failed("the owner of"))?;
    set_xattrs(xattrs, |name, value| {
        rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty())
    })?;
    rustix::fs::fchmod(fd, mode(attributes, owned)).map_err(failed("the mode of"))?;
    rustix::fs::futimens(fd, &times(attributes)).map_err(failed("the times of"))
}

/// Takes away the attributes that are not among `xattrs`, as far as this process may.
pub(crate) fn take_away(fd: &OwnedFd, xattrs: &[Xattr]) -> std::result::Result<(), Failed> {
    let there = XattrReader::default().read(fd);
    for xattr in there.map_err(failed("the attributes of"))? {
        if xattrs.iter().any(|wanted| wanted.name == xattr.name) {
            continue;
        }
        match rustix::fs::fremovexattr(fd, &xattr.name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(_) if !is_users(&xattr.name) => {}
            Err(cause) => {
                let what = format!("the attribute {} of", xattr.name.to_string_lossy());
                return Err(Failed { what, cause });
            }
        }
    }
    Ok(())
}

/// The same for what cannot be opened: a symbolic link, which has no mode, FIFO, socket or
/// device. Nobody else may be able to get at `dir`, so that the name is still what was just made.
pub(crate) fn apply_by_name(
    dir: &OwnedFd,
    name: &CStr,
    attributes: &Attributes,
    xattrs: &[Xattr],
    has_mode: bool,
) -> std::result::Result<(), Failed> {
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    let owned = give(attributes, |uid, gid| {
        rustix::fs::chownat(dir, name, uid, gid, nofollow)
    })
    .map_err(failed("the owner of"))?;
    if !xattrs.is_empty() {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty())
            .map_err(failed("the attributes of"))?;
        let path = by_descriptor(&fd);
        set_xattrs(xattrs, |name, value| {
            rustix::fs::setxattr(&path, name, value, XattrFlags::empty())
        })?;
    }
    if has_mode {
        rustix::fs::chmodat(dir, name, mode(attributes, owned), AtFlags::empty())
            .map_err(failed("the mode of"))?;
    }
    rustix::fs::utimensat(dir, name, &times(attributes), nofollow).map_err(failed("the times of"))
}

fn set_xattrs(
    xattrs: &[Xattr],
    set: impl Fn(&CStr, &[u8]) -> Result<()>,
) -> std::result::Result<(), Failed> {
    for xattr in xattrs {
        match set(&xattr.name, &xattr.value) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL)
                if !is_users(&xattr.name) => {}
            Err(cause) => {
                let what = format!("the attribute {} of", xattr.name.to_string_lossy());
                return Err(Failed { what, cause });
            }
        }
    }
    Ok(())
}

/// Whether an attribute is the user's own: carried, or an error. All others (labels,
/// capabilities, the file system's own) are carried where this process may.
pub(crate) fn is_users(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_")
}

/// Changes the owner as far as allowed; whether owner and group are those of the original.
///
/// `EPERM`: not root; `EINVAL`: no such user in this user namespace.
fn give(
    attributes: &Attributes,
    chown: impl Fn(Option<Uid>, Option<Gid>) -> Result<()>,
) -> Result<bool> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    match chown(Some(uid), Some(gid)) {
        Ok(()) => return Ok(true),
        Err(Errno::PERM | Errno::INVAL) => {}
        Err(cause) => return Err(cause),
    }
    match chown(None, Some(gid)) {
        Ok(()) | Err(Errno::PERM | Errno::INVAL) => Ok(false),
        Err(cause) => Err(cause),
    }
}

/// The mode to set; without set-id bits if these would lend another's rights than the original's.
fn mode(attributes: &Attributes, owned: bool) -> Mode {
    let bits = attributes.mode & 0o7777;
    Mode::from_raw_mode(if owned { bits } else { bits & !0o6000 })
}

/// The modification time; the access time is left alone.
fn times(attributes: &Attributes) -> Timestamps {
    let second = 1_000_000_000;
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: attributes.mtime_ns.div_euclid(second),
            tv_nsec: attributes.mtime_ns.rem_euclid(second) as _,
        },
    }
}
