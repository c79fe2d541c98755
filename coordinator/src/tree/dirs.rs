//! Directories by number, opened when needed, with a bounded number kept open.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CStr, OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, Result};
use snapshim_gate::table::FileId;

use super::seen::Seen;

/// Most descriptors one table keeps open, its tops not counted.
const MAX_OPEN: usize = 256;

/// A directory in a [`Dirs`].
pub(crate) type Node = u32;

/// Directories, each known by its parent and its name in it.
///
/// Opening one goes from the nearest ancestor that is open, one component at
/// a time, each with `O_NOFOLLOW`: a single name can lead neither up nor through a link,
/// which is what `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS` would say of a longer path, and
/// paths of any length work.
#[derive(Debug)]
pub(crate) struct Dirs {
    nodes: Vec<Entry>,
    open: RefCell<Open>,
    /// Tried on opening for reading; given up once refused (only owners may).
    noatime: Cell<OFlags>,
}

#[derive(Clone, Debug)]
struct Entry {
    place: Place,
    /// Checked when it is opened again.
    id: Option<FileId>,
}

#[derive(Clone, Debug)]
enum Place {
    /// Always open.
    Top(PathBuf),
    In(Node, Box<CStr>),
}

#[derive(Debug)]
struct Open {
    fds: Vec<Option<Arc<OwnedFd>>>,
    /// Of those that may be closed, in the order they were opened.
    order: VecDeque<Node>,
    max: usize,
}

impl Dirs {
    pub(crate) fn new() -> Dirs {
        // A quarter of what this process may have: there are two tables.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let quarter = usize::try_from(limit.unwrap_or(u64::MAX) / 4).unwrap_or(MAX_OPEN);
        Dirs {
            nodes: Vec::new(),
            open: RefCell::new(Open {
                fds: Vec::new(),
                order: VecDeque::new(),
                max: quarter.clamp(8, MAX_OPEN),
            }),
            noatime: Cell::new(OFlags::empty()),
        }
    }

    /// Files and directories opened for reading keep their access times, where allowed.
    pub(crate) fn without_atime(self) -> Dirs {
        self.noatime.set(OFlags::NOATIME);
        self
    }

    /// The same directories for another thread, which opens them by itself.
    pub(crate) fn apart(&self) -> Dirs {
        let open = self.open.borrow();
        let is_top = |at: &usize| matches!(self.nodes[*at].place, Place::Top(_));
        let tops = |at: usize| open.fds[at].clone().filter(|_| is_top(&at));
        Dirs {
            nodes: self.nodes.clone(),
            open: RefCell::new(Open {
                fds: (0..self.nodes.len()).map(tops).collect(),
                order: VecDeque::new(),
                max: open.max / 4,
            }),
            noatime: self.noatime.clone(),
        }
    }

    /// Adds a directory that stays open.
    pub(crate) fn add_top(&mut self, path: &Path, fd: OwnedFd) -> Node {
        self.open.get_mut().fds.push(Some(Arc::new(fd)));
        self.push(Place::Top(path.to_owned()), None)
    }

    /// Adds the directory `name` in `parent`, open as `fd`.
    pub(crate) fn add(
        &mut self,
        parent: Node,
        name: &CStr,
        id: Option<FileId>,
        fd: &Arc<OwnedFd>,
    ) -> Node {
        let node = self.push(Place::In(parent, name.into()), id);
        let open = self.open.get_mut();
        open.fds.push(None);
        open.keep(node, fd);
        node
    }

    fn push(&mut self, place: Place, id: Option<FileId>) -> Node {
        self.nodes.push(Entry { place, id });
        // A directory takes more than one byte of memory: there are fewer than 2^32.
        (self.nodes.len() - 1) as Node
    }

    /// All numbers, parents before what is in them.
    pub(crate) fn nodes(&self) -> std::ops::Range<Node> {
        0..self.nodes.len() as Node
    }

    /// The parent of a directory and its name there; `None` for a top.
    pub(crate) fn place(&self, node: Node) -> Option<(Node, &CStr)> {
        match &self.nodes[node as usize].place {
            Place::Top(_) => None,
            Place::In(parent, name) => Some((*parent, name)),
        }
    }

    /// The directory's path, as it was found.
    pub(crate) fn path(&self, node: Node) -> PathBuf {
        let mut names = Vec::new();
        let mut at = node;
        loop {
            match &self.nodes[at as usize].place {
                Place::In(parent, name) => {
                    names.push(name);
                    at = *parent;
                }
                Place::Top(path) => {
                    // By bytes: a push for each name is slow in a deep tree.
                    let mut bytes = path.as_os_str().as_bytes().to_vec();
                    for name in names.iter().rev() {
                        if !bytes.ends_with(b"/") {
                            bytes.push(b'/');
                        }
                        bytes.extend_from_slice(name.to_bytes());
                    }
                    return OsString::from_vec(bytes).into();
                }
            }
        }
    }

    /// The same for many names: those of a directory mostly come one after the other.
    pub(crate) fn namer(&self) -> Namer<'_> {
        Namer {
            dirs: self,
            last: None,
        }
    }

    /// The directory, open.
    ///
    /// # Errors
    ///
    /// `ESTALE`: another directory has its name now. Else those of openat(2).
    pub(crate) fn open(&self, node: Node) -> Result<Arc<OwnedFd>> {
        let mut open = self.open.borrow_mut();
        let mut missing = Vec::new();
        let mut at = node;
        let mut fd = loop {
            if let Some(fd) = &open.fds[at as usize] {
                break Arc::clone(fd);
            }
            let Place::In(parent, name) = &self.nodes[at as usize].place else {
                return Err(Errno::BADF); // tops are never closed
            };
            missing.push((at, name));
            at = *parent;
        };
        for (node, name) in missing.into_iter().rev() {
            fd = Arc::new(self.open_dir_at(&fd, name)?);
            if let Some(id) = self.nodes[node as usize].id
                && Seen::of(&rustix::fs::fstat(&fd)?).id != id
            {
                return Err(Errno::STALE);
            }
            open.keep(node, &fd);
        }
        Ok(fd)
    }

    /// Opens the directory `name` in `parent` for reading.
    pub(crate) fn open_dir_at(&self, parent: impl AsFd, name: &CStr) -> Result<OwnedFd> {
        self.open_at(parent, name, OFlags::DIRECTORY)
    }

    /// Opens `name` in `parent` for reading, never through a symbolic link.
    pub(crate) fn open_at(&self, parent: impl AsFd, name: &CStr, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let noatime = self.noatime.get();
        match rustix::fs::openat(parent.as_fd(), name, flags | noatime, Mode::empty()) {
            Err(Errno::PERM) if !noatime.is_empty() => {
                self.noatime.set(OFlags::empty());
                rustix::fs::openat(parent, name, flags, Mode::empty())
            }
            other => other,
        }
    }
}

/// Makes paths; see [`Dirs::namer`].
pub(crate) struct Namer<'a> {
    dirs: &'a Dirs,
    /// The path of the directory that was last asked for, with a slash at its end.
    last: Option<(Node, Vec<u8>)>,
}

impl Namer<'_> {
    /// The path of a name in a directory.
    pub(crate) fn path(&mut self, dir: Node, name: &CStr) -> PathBuf {
        let parent = match &self.last {
            Some((node, parent)) if *node == dir => parent,
            _ => {
                let mut parent = self.dirs.path(dir).into_os_string().into_vec();
                if !parent.ends_with(b"/") {
                    parent.push(b'/');
                }
                &self.last.insert((dir, parent)).1
            }
        };
        OsString::from_vec([parent, name.to_bytes()].concat()).into()
    }
}

impl Open {
    fn keep(&mut self, node: Node, fd: &Arc<OwnedFd>) {
        while self.order.len() >= self.max {
            if let Some(oldest) = self.order.pop_front() {
                self.fds[oldest as usize] = None;
            }
        }
        self.fds[node as usize] = Some(Arc::clone(fd));
        self.order.push_back(node);
    }
}

/// A name as the path of one component.
pub(crate) fn as_path(name: &CStr) -> &Path {
    Path::new(OsStr::from_bytes(name.to_bytes()))
}
