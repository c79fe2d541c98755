//! Extended attributes, owners, modes and times.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::{Errno, Result};

use super::seen::Seen;

/// Bytes: `XATTR_LIST_MAX` and `XATTR_SIZE_MAX` of linux/limits.h.
const MAX: usize = 1 << 16;

/// An extended attribute. ACLs are among them (`system.posix_acl_*`).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Xattr {
    pub(super) name: CString,
    pub(super) value: Box<[u8]>,
}

/// Reads extended attributes into buffers that are kept.
#[derive(Debug, Default)]
pub(super) struct XattrReader {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    /// All attributes of an open file. A file system that has none has no error.
    pub(super) fn read(&mut self, fd: impl AsFd) -> Result<Vec<Xattr>> {
        self.list.resize(MAX, 0);
        let length = match rustix::fs::flistxattr(&fd, self.list.as_mut_slice()) {
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
            match rustix::fs::fgetxattr(&fd, name, self.value.as_mut_slice()) {
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

/// The extended attributes of open files, to be compared.
#[derive(Debug, Default)]
pub struct Attributes(XattrReader);

impl Attributes {
    /// Whether two files have the same attributes, as far as a capture carries them whoever
    /// makes it: the user's own and ACLs. With `all` also those that only root can
    /// carry.
    ///
    /// # Errors
    ///
    /// Those of listing and reading them.
    pub fn are_same(&mut self, a: impl AsFd, b: impl AsFd, all: bool) -> Result<bool> {
        let mut read = |fd: rustix::fd::BorrowedFd<'_>| -> Result<Vec<Xattr>> {
            let mut xattrs = self.0.read(fd)?;
            xattrs.retain(|xattr| is_users(&xattr.name) || all && is_roots(&xattr.name));
            xattrs.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(xattrs)
        };
        Ok(read(a.as_fd())? == read(b.as_fd())?)
    }
}

/// What could not be set.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) what: String,
    pub(super) cause: Errno,
}

fn failed(what: &str) -> impl FnOnce(Errno) -> Failed {
    move |cause| Failed {
        what: what.to_owned(),
        cause,
    }
}

/// Gives an open file or directory of the tree the metadata of its original.
///
/// The order matters: a change of owner clears set-id bits and file capabilities; attributes
/// can be set as long as the owner may write; a change of the mode after the
/// ACL sets the ACL's mask, to the group bits it was read with; all of these move the times.
pub(super) fn apply(
    fd: &OwnedFd,
    seen: &Seen,
    xattrs: &[Xattr],
) -> std::result::Result<(), Failed> {
    let owned =
        give(seen, |uid, gid| rustix::fs::fchown(fd, uid, gid)).map_err(failed("the owner of"))?;
    for xattr in xattrs {
        match rustix::fs::fsetxattr(fd, &xattr.name, &xattr.value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL)
                if !is_users(&xattr.name) => {}
            Err(cause) => {
                let what = format!("the attribute {} of", xattr.name.to_string_lossy());
                return Err(Failed { what, cause });
            }
        }
    }
    rustix::fs::fchmod(fd, mode(seen, owned)).map_err(failed("the mode of"))?;
    rustix::fs::futimens(fd, &times(seen)).map_err(failed("the times of"))
}

/// Whether an attribute is the user's own: carried, or an error. All others (labels,
/// capabilities, the file system's own) are carried where this process may.
fn is_users(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_")
}

/// Whether an attribute is one that root can set on any file system that has attributes.
fn is_roots(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.starts_with(b"security.") || name.starts_with(b"trusted.")
}

/// Changes the owner as far as allowed; whether owner and group are those of the original.
///
/// `EPERM`: not root; `EINVAL`: no such user in this user namespace.
pub(super) fn give(
    seen: &Seen,
    chown: impl Fn(Option<Uid>, Option<Gid>) -> Result<()>,
) -> Result<bool> {
    let (uid, gid) = (Uid::from_raw(seen.uid), Gid::from_raw(seen.gid));
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
pub(super) fn mode(seen: &Seen, owned: bool) -> Mode {
    let bits = seen.permissions();
    Mode::from_raw_mode(if owned { bits } else { bits & !0o6000 })
}

/// The modification time; the access time is left alone.
pub(super) fn times(seen: &Seen) -> Timestamps {
    let second = 1_000_000_000;
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seen.mtime_ns.div_euclid(second),
            tv_nsec: seen.mtime_ns.rem_euclid(second) as _,
        },
    }
}
