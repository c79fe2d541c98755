//! Whether a live entry is what the snapshot has.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::look::Look;
use super::source::{Source, Traits};
use crate::store::manifest::{FileRecord, Kind};
use crate::store::{extents, fault};
use crate::tree::copy;
use crate::tree::dirs::Dirs;
use crate::tree::metadata::{Attributes, Xattr, XattrReader};
use crate::tree::seen::Seen;
use crate::{Error, Result};

/// Bytes compared at a time.
const CHUNK: usize = 256 << 10;

/// What is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Same {
    /// Bytes, target, or device.
    pub(super) body: bool,
    /// Owner, mode, times, attributes.
    pub(super) metadata: bool,
}

/// Compares; keeps its buffers.
#[derive(Debug)]
pub(super) struct Comparer {
    xattrs: XattrReader,
    ours: Vec<u8>,
    theirs: Vec<u8>,
    may: May,
}

/// What this process may do to metadata: what it cannot set makes no difference.
#[derive(Debug)]
struct May {
    is_root: bool,
    me: u32,
    groups: Vec<u32>,
}

impl Comparer {
    pub(super) fn new() -> Comparer {
        let groups = rustix::process::getgroups().unwrap_or_default();
        let own = rustix::process::getegid();
        Comparer {
            xattrs: XattrReader::default(),
            ours: Vec::new(),
            theirs: Vec::new(),
            may: May {
                is_root: rustix::process::geteuid().is_root(),
                me: rustix::process::geteuid().as_raw(),
                groups: groups.iter().chain([&own]).map(|g| g.as_raw()).collect(),
            },
        }
    }

    /// Compares the entry `name` in the live directory `dir`, which `look` has seen, with
    /// its record; both are of one kind, and no directories. `go_on` is asked
    /// between chunks; what is told `false` ends with an error.
    ///
    /// # Errors
    ///
    /// The snapshot cannot be read, or is damaged.
    pub(super) fn compare(
        &mut self,
        source: &Source<'_>,
        record: &FileRecord,
        dirs: &Dirs,
        (dir, name, look): (&OwnedFd, &CStr, &Look),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Same> {
        const DIFFERENT: Same = Same {
            body: false,
            metadata: false,
        };
        let opened = source.open(record)?;
        let traits = source.traits(record, opened.as_ref())?;
        let flags = match record.kind {
            Kind::File => OFlags::NONBLOCK | OFlags::NOCTTY,
            _ => OFlags::PATH,
        };
        // What cannot be read cannot be compared: it is replaced.
        let Ok(live) = dirs.open_at(dir, name, flags) else {
            return Ok(DIFFERENT);
        };
        let stat = rustix::fs::fstat(&live).map(|stat| Seen::of(&stat));
        if stat.is_ok_and(|seen| seen.id != look.seen.id) {
            return Ok(DIFFERENT);
        }
        let metadata = self.has(&live, &look.seen, &traits);
        let body = match (record.kind, opened.as_ref()) {
            (Kind::File, Some((file, _))) => {
                look.seen.size == record.size
                    && self.same_bytes(source, record, file, &live, go_on)?
            }
            (Kind::Symlink, Some((link, _))) => {
                let read = |fd: &OwnedFd| rustix::fs::readlinkat(fd, c"", Vec::new());
                matches!((read(link), read(&live)), (Ok(a), Ok(b)) if a == b)
            }
            (Kind::Device, _) => record.device == look.seen.device(),
            _ => true,
        };
        Ok(Same { body, metadata })
    }

    /// Whether something open has this metadata, as far as this process could give it.
    pub(super) fn has(&mut self, live: &OwnedFd, seen: &Seen, traits: &Traits) -> bool {
        let is_readable = matches!(seen.kind(), Kind::File | Kind::Dir);
        let xattrs = match is_readable {
            true => self.xattrs.read(live),
            false => self.xattrs.read_path(live),
        };
        let Ok(mut xattrs) = xattrs else {
            return false;
        };
        xattrs.sort();
        let ours = |xattrs: &[Xattr]| -> Vec<Xattr> {
            let mine = |xattr: &&Xattr| self.may.carries(&xattr.name);
            xattrs.iter().filter(mine).cloned().collect()
        };
        self.may.matches(&traits.attributes, seen) && ours(&xattrs) == ours(&traits.xattrs)
    }

    /// All metadata of a directory.
    ///
    /// # Errors
    ///
    /// Those of the calls.
    pub(super) fn traits_of(&mut self, dir: &OwnedFd, seen: &Seen) -> rustix::io::Result<Traits> {
        Ok(Traits {
            attributes: seen.into(),
            xattrs: self.xattrs.read(dir)?,
        })
    }

    fn same_bytes(
        &mut self,
        source: &Source<'_>,
        record: &FileRecord,
        file: &OwnedFd,
        live: &OwnedFd,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        self.ours.resize(CHUNK, 0);
        self.theirs.resize(CHUNK, 0);
        // A live file that is written to meanwhile is found by whoever looks for writers.
        let ranges = extents::may_differ(file, live).ok().flatten();
        let whole = 0..record.size;
        for range in ranges.unwrap_or_else(|| Vec::from([whole])) {
            let mut at = range.start;
            while at < range.end {
                if !go_on() {
                    return Err(Error::new("interrupted; nothing was changed"));
                }
                let most = usize::try_from(range.end - at).unwrap_or(CHUNK).min(CHUNK);
                let got = copy::read(file, &mut self.ours[..most], at).map_err(|cause| {
                    let place = source.snapshot.place_of(record.path.as_ref());
                    fault("read", &place, cause)
                })?;
                if got == 0 {
                    return Err(source.differs(record, "became shorter".into()));
                }
                let same = copy::read(live, &mut self.theirs[..got], at);
                if same != Ok(got) || self.ours[..got] != self.theirs[..got] {
                    return Ok(false);
                }
                at += got as u64;
            }
        }
        Ok(true)
    }
}

impl May {
    fn carries(&self, name: &CStr) -> bool {
        let name = name.to_bytes();
        let own = name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_");
        own || self.is_root && (name.starts_with(b"trusted.") || name.starts_with(b"security."))
    }

    fn matches(&self, wanted: &Attributes, seen: &Seen) -> bool {
        let uid = seen.uid == wanted.uid || !self.is_root && seen.uid == self.me;
        let gid = seen.gid == wanted.gid || !self.is_root && !self.groups.contains(&wanted.gid);
        let is_given = (seen.uid, seen.gid) == (wanted.uid, wanted.gid);
        let bits = if is_given { 0o7777 } else { 0o1777 };
        let mode = seen.kind() == Kind::Symlink || (seen.mode ^ wanted.mode) & bits == 0;
        uid && gid && mode && seen.mtime_ns == wanted.mtime_ns
    }
}
