//! Making entries of a snapshot anew in a staging directory, complete with metadata.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::look;
use super::place::{Place, full};
use super::source::{Source, Traits};
use super::wanted::Wanted;
use crate::digest::{self, Parsed};
use crate::progress::Progress;
use crate::store::fault;
use crate::store::manifest::{FileRecord, Kind};
use crate::tree::dirs::{Dirs, Node};
use crate::tree::metadata;
use crate::tree::{STAGING, copy, reflink};
use crate::{Error, Result};

/// How the bytes of files get to a staging directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Nothing was tried yet.
    Unknown,
    Reflink,
    Copy,
}

/// Makes entries.
pub(super) struct Maker<'a> {
    source: &'a Source<'a>,
    wanted: &'a Wanted,
    /// The staged directories; the staging directories are its tops, in their order.
    dirs: Dirs,
    tops: Vec<Node>,
    ways: Vec<Way>,
    /// Records of the files to be made, each once.
    files: &'a [usize],
    /// Their bytes, holes included.
    left: u64,
    /// The name made first of each group of links, by staging directory.
    first: HashMap<(usize, usize), (Node, CString)>,
    buffer: Vec<u8>,
    sync_each: bool,
    progress: &'a mut dyn Progress,
    go_on: &'a mut dyn FnMut() -> bool,
}

/// A directory that was made, with the metadata it is still to be given.
struct MadeDir {
    node: Node,
    traits: Option<Traits>,
}

impl<'a> Maker<'a> {
    pub(super) fn new(
        source: &'a Source<'a>,
        wanted: &'a Wanted,
        places: &[Place],
        (files, bytes): (&'a [usize], u64),
        sync_each: bool,
        progress: &'a mut dyn Progress,
        go_on: &'a mut dyn FnMut() -> bool,
    ) -> Result<Maker<'a>> {
        let mut dirs = Dirs::new();
        let mut tops = Vec::new();
        for place in places {
            let fd = rustix::io::dup(&place.fd);
            let fd = fd.map_err(|cause| fault("open", &place.path, cause))?;
            tops.push(dirs.add_top(&place.path, fd));
        }
        Ok(Maker {
            source,
            wanted,
            dirs,
            ways: vec![Way::Unknown; places.len()],
            tops,
            files,
            left: bytes,
            first: HashMap::new(),
            buffer: Vec::new(),
            sync_each,
            progress,
            go_on,
        })
    }

    /// Makes `item` and all below it as `name` in the staging directory `place`. Returns its
    /// inode and, of a directory, the metadata it is to be given once more when it is in its
    /// place: renaming it may move its times (XFS), and takes the right to write to it.
    ///
    /// # Errors
    ///
    /// The snapshot is damaged; there is no room; interrupted.
    pub(super) fn make(
        &mut self,
        place: usize,
        name: &CStr,
        item: usize,
    ) -> Result<(u64, Option<Traits>)> {
        let mut made: Vec<MadeDir> = Vec::new();
        let top = self.tops[place];
        let mut pending = vec![(item, top, name.to_owned())];
        while let Some((item, parent, name)) = pending.pop() {
            if !(self.go_on)() {
                return Err(interrupted());
            }
            let fd = self.open(parent)?;
            let record = self.wanted.record(self.source.snapshot, item);
            if record.is_some_and(|record| record.kind != Kind::Dir) {
                self.leaf(place, parent, &fd, &name, item)?;
                continue;
            }
            rustix::fs::mkdirat(&fd, &*name, Mode::RWXU)
                .map_err(|cause| self.failed("make", parent, &name, cause))?;
            let opened = self.dirs.open_dir_at(&fd, &name);
            let opened =
                Arc::new(opened.map_err(|cause| self.failed("open", parent, &name, cause))?);
            let node = self.dirs.add(parent, &name, None, &opened);
            let traits = match record {
                Some(record) => {
                    let opened = self.source.open(record)?;
                    Some(self.source.traits(record, opened.as_ref())?)
                }
                None => None,
            };
            made.push(MadeDir { node, traits });
            for child in self.wanted.items[item].children.iter().rev() {
                let name = &self.wanted.items[*child].name;
                if name.to_bytes() != STAGING {
                    pending.push((*child, node, name.clone()));
                }
            }
        }
        // The deepest first: what is made in a directory moves its times.
        let mut later = None;
        for (i, dir) in made.iter().enumerate().rev() {
            let fd = self.open(dir.node)?;
            let path = self.dirs.path(dir.node);
            let failed = |cause| full("set the metadata of", &path, cause);
            match &dir.traits {
                Some(traits) => {
                    let mut attributes = traits.attributes;
                    if i == 0 {
                        later = Some(traits.clone());
                        if !is_root() {
                            attributes.mode |= 0o700;
                        }
                    }
                    metadata::apply(&fd, &attributes, &traits.xattrs)
                        .map_err(|failed| not_set(&path, failed))?;
                }
                None => rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(failed)?,
            }
            if self.sync_each {
                rustix::fs::fsync(&fd).map_err(failed)?;
            }
        }
        let look = look::look(&self.open(top)?, name)
            .map_err(|cause| self.failed("look at", top, name, cause))?;
        match look {
            Some(look) => Ok((look.seen.id.ino, later)),
            None => Err(self.failed("find", top, name, Errno::NOENT)),
        }
    }

    fn open(&self, node: Node) -> Result<Arc<OwnedFd>> {
        let opened = self.dirs.open(node);
        opened.map_err(|cause| full("open", &self.dirs.path(node), cause))
    }

    fn failed(&self, what: &str, dir: Node, name: &CStr, cause: Errno) -> Error {
        let path = self.dirs.path(dir).join(crate::tree::dirs::as_path(name));
        full(what, &path, cause)
    }

    /// Anything but a directory.
    fn leaf(
        &mut self,
        place: usize,
        parent: Node,
        dir: &OwnedFd,
        name: &CStr,
        item: usize,
    ) -> Result<()> {
        let Some(record) = self.wanted.record(self.source.snapshot, item) else {
            return Ok(());
        };
        let group = self.wanted.items[item].group.map(|group| (group, place));
        if let Some((node, first)) = group.and_then(|group| self.first.get(&group)) {
            let from = self.open(*node)?;
            return rustix::fs::linkat(&from, &**first, dir, name, AtFlags::empty())
                .map_err(|cause| self.failed("link", parent, name, cause));
        }
        if record.kind == Kind::Device && !(self.source.snapshot.is_own && is_root()) {
            return Ok(());
        }
        self.new_leaf(place, parent, dir, name, record)?;
        if let Some(group) = group {
            self.first.insert(group, (parent, name.to_owned()));
        }
        Ok(())
    }

    fn new_leaf(
        &mut self,
        place: usize,
        parent: Node,
        dir: &OwnedFd,
        name: &CStr,
        record: &FileRecord,
    ) -> Result<()> {
        let opened = self.source.open(record)?;
        let traits = self.source.traits(record, opened.as_ref())?;
        if record.kind == Kind::File {
            let Some((from, _)) = &opened else {
                return Err(self.source.differs(record, "is missing".into()));
            };
            let to = self.bytes(place, parent, dir, name, record, from)?;
            metadata::apply(&to, &traits.attributes, &traits.xattrs)
                .map_err(|failed| not_set(record.path.as_ref(), failed))?;
            if self.sync_each {
                rustix::fs::fsync(&to)
                    .map_err(|cause| self.failed("write", parent, name, cause))?;
            }
            return Ok(());
        }
        let made = match (record.kind, &opened) {
            (Kind::Symlink, Some((link, _))) => rustix::fs::readlinkat(link, c"", Vec::new())
                .and_then(|to| rustix::fs::symlinkat(&to, dir, name)),
            (Kind::Fifo, _) => special(dir, name, FileType::Fifo, 0),
            (Kind::Socket, _) => special(dir, name, FileType::Socket, 0),
            _ => match device(record) {
                Some((kind, number)) => special(dir, name, kind, number),
                None => {
                    let what = "is a device that the manifest does not name".into();
                    return Err(self.source.differs(record, what));
                }
            },
        };
        made.map_err(|cause| self.failed("make", parent, name, cause))?;
        let has_mode = record.kind != Kind::Symlink;
        metadata::apply_by_name(dir, name, &traits.attributes, &traits.xattrs, has_mode)
            .map_err(|failed| not_set(record.path.as_ref(), failed))
    }

    /// The bytes of a file, in a new one.
    fn bytes(
        &mut self,
        place: usize,
        parent: Node,
        dir: &OwnedFd,
        name: &CStr,
        record: &FileRecord,
        from: &OwnedFd,
    ) -> Result<OwnedFd> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let to = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|cause| self.failed("make", parent, name, cause))?;
        let cloned = match self.ways[place] {
            Way::Copy => false,
            _ => match reflink::clone(&to, from) {
                Ok(()) => true,
                Err(cause @ (Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::ROFS)) => {
                    let error = self.failed("clone to", parent, name, cause);
                    return Err(self.with_need(error, cause));
                }
                Err(_) => false,
            },
        };
        match (self.ways[place], cloned) {
            (Way::Unknown, true) => self.ways[place] = Way::Reflink,
            (Way::Unknown, false) => {
                self.ways[place] = Way::Copy;
                self.room(dir, parent)?;
            }
            _ => {}
        }
        if !cloned {
            self.copied(parent, name, record, from, &to)?;
        }
        self.left = self.left.saturating_sub(record.size);
        if let Some(text) = &record.digest {
            let Parsed::Blake3(expected) = digest::parse(text) else {
                let what = "has a digest in the manifest that is none".into();
                return Err(self.source.differs(record, what));
            };
            // All of it: a clone is as long as its original.
            let size = rustix::fs::fstat(&to).map(|stat| u64::try_from(stat.st_size).unwrap_or(0));
            let go_on = &mut *self.go_on;
            let found = size.and_then(|size| digest::hash_file(&to, size, &mut |_| go_on()));
            match found {
                Ok(found) if found.digest == expected => {}
                Ok(_) => {
                    let what = "does not have the content that its digest vouches for".into();
                    return Err(self.source.differs(record, what));
                }
                Err(Errno::INTR) => return Err(interrupted()),
                Err(cause) => return Err(self.failed("read", parent, name, cause)),
            }
        }
        self.progress.advance(record.size);
        Ok(to)
    }

    fn copied(
        &mut self,
        parent: Node,
        name: &CStr,
        record: &FileRecord,
        from: &OwnedFd,
        to: &OwnedFd,
    ) -> Result<()> {
        self.buffer.resize(copy::CHUNK, 0);
        match copy::copy(to, from, record.size, &mut self.buffer, self.go_on) {
            Ok(()) => Ok(()),
            Err(copy::Failed::Stopped) => Err(interrupted()),
            Err(copy::Failed::Read(cause)) => {
                let place = self.source.snapshot.place_of(record.path.as_ref());
                Err(fault("read", &place, cause))
            }
            Err(copy::Failed::Write(cause)) => {
                let error = self.failed("write", parent, name, cause);
                Err(self.with_need(error, cause))
            }
        }
    }

    /// Whether there is room for what has to be copied.
    fn room(&self, dir: &OwnedFd, parent: Node) -> Result<()> {
        let Ok(free) = crate::tree::free(dir) else {
            return Ok(());
        };
        if self.left <= free {
            return Ok(());
        }
        let need = self.allocated();
        if need <= free {
            return Ok(());
        }
        Err(Error::new(format!(
            "there is no room in {}: {need} bytes are needed, {free} are free",
            self.dirs.path(parent).display(),
        ))
        .next("nothing was replaced; free space there, or restore fewer paths with --path"))
    }

    /// Bytes that the files take in the snapshot, without their holes.
    fn allocated(&self) -> u64 {
        let files = &self.source.snapshot.manifest.files;
        let blocks = self.files.iter().filter_map(|record| {
            let (fd, _) = self.source.open(&files[*record]).ok()??;
            rustix::fs::fstat(&fd).ok()?.st_blocks.try_into().ok()
        });
        blocks.fold(0, |sum: u64, blocks: u64| {
            sum.saturating_add(blocks.saturating_mul(512))
        })
    }

    fn with_need(&self, error: Error, cause: Errno) -> Error {
        match cause {
            Errno::NOSPC | Errno::DQUOT => error.next(format!(
                "nothing was replaced; some {} bytes more are needed",
                self.left
            )),
            _ => error,
        }
    }
}

fn special(dir: &OwnedFd, name: &CStr, kind: FileType, number: u64) -> rustix::io::Result<()> {
    rustix::fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, number)
}

fn device(record: &FileRecord) -> Option<(FileType, u64)> {
    let device = record.device.as_ref()?;
    let kind = match device.kind.as_str() {
        "char" => FileType::CharacterDevice,
        "block" => FileType::BlockDevice,
        _ => return None,
    };
    Some((kind, rustix::fs::makedev(device.major, device.minor)))
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The error of metadata that could not be set.
pub(super) fn not_set(path: &Path, failed: metadata::Failed) -> Error {
    let error = full(&format!("set {}", failed.what), path, failed.cause);
    match failed.cause {
        Errno::OPNOTSUPP => error
            .next("the file system restored to has no such attributes: choose another with --to"),
        _ => error,
    }
}

fn interrupted() -> Error {
    Error::new("interrupted; nothing was replaced")
}

/// Gives a live directory exactly this metadata.
pub(super) fn set_exactly(
    fd: &OwnedFd,
    traits: &Traits,
) -> std::result::Result<(), metadata::Failed> {
    metadata::take_away(fd, &traits.xattrs)?;
    metadata::apply(fd, &traits.attributes, &traits.xattrs)
}
