//! Walking the roots: iterative, by descriptors, following no symbolic link.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use snapshim_gate::table::FileId;

use super::Scope;
use super::parts::in_parts;
use crate::tree::STAGING;
use crate::tree::dirs::{Dirs, Node, as_path};
use crate::tree::seen::Seen;
use crate::{Error, Result};

/// So many directories are open, and so many files put off, until threads look at these.
const DIRS: usize = 64;
const FILES: usize = if cfg!(test) { 512 } else { 8_192 };

/// The checked paths of a [`Scope`].
#[derive(Debug)]
pub(super) struct Paths {
    /// None is inside another.
    roots: Vec<PathBuf>,
    excludes: Vec<PathBuf>,
    /// The last components of the excludes by what is above them.
    excluded_names: HashMap<PathBuf, HashSet<OsString>>,
    /// The excluded directories that exist, and the tree itself.
    excluded_dirs: HashSet<FileId>,
    elsewhere: Option<Elsewhere>,
}

/// Where the roots are read, if not where they are: in a frozen copy.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// The directory each root is in there, under its own name.
    pub(super) parents: HashMap<PathBuf, OwnedFd>,
    /// Devices there, and those that they stand for.
    pub(super) devices: HashMap<u64, u64>,
}

impl Paths {
    /// Checks the paths; `tree` is never captured, wherever it is.
    pub(super) fn new(scope: &Scope, tree: Option<FileId>) -> Result<Paths> {
        let mut sorted = scope
            .roots
            .iter()
            .map(|path| plain(path))
            .collect::<Result<Vec<_>>>()?;
        sorted.sort_unstable();
        let mut roots: Vec<PathBuf> = Vec::new();
        for root in sorted {
            // Sorted by components: what contains it, if anything, came before it.
            if !roots.iter().any(|other| root.starts_with(other)) {
                roots.push(root);
            }
        }
        let mut paths = Paths {
            roots,
            excludes: scope
                .excludes
                .iter()
                .map(|path| plain(path))
                .collect::<Result<_>>()?,
            excluded_names: HashMap::new(),
            excluded_dirs: HashSet::from_iter(tree),
            elsewhere: None,
        };
        for exclude in &paths.excludes {
            if let (Some(parent), Some(name)) = (exclude.parent(), exclude.file_name()) {
                let names = paths.excluded_names.entry(parent.to_owned()).or_default();
                names.insert(name.to_owned());
            }
            if let Ok(stat) = rustix::fs::stat(exclude)
                && FileType::from_raw_mode(stat.st_mode).is_dir()
            {
                paths.excluded_dirs.insert(Seen::of(&stat).id);
            }
        }
        Ok(paths)
    }

    /// The paths to begin at; none is inside another.
    pub(super) fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    pub(super) fn is_excluded(&self, path: &Path) -> bool {
        self.excludes
            .iter()
            .any(|exclude| path.starts_with(exclude))
    }

    /// From now on walks read there. Paths stay those of the roots.
    pub(super) fn read_from(&mut self, elsewhere: Elsewhere) {
        self.elsewhere = Some(elsewhere);
    }

    /// What stands for which device where walks read.
    pub(super) fn stands_for(&self) -> HashMap<u64, u64> {
        let devices = self.elsewhere.as_ref().map(|e| e.devices.clone());
        devices.unwrap_or_default()
    }

    /// Opens the directory that a root is in.
    fn open_parent(&self, root: &Path, parent: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match &self.elsewhere {
            None => rustix::fs::open(parent, flags, Mode::empty()),
            Some(elsewhere) => {
                let parent = elsewhere.parents.get(root).ok_or(Errno::NOENT)?;
                rustix::fs::openat(parent, c".", flags, Mode::empty())
            }
        }
    }

    /// Whether this directory is left out, by whatever path it is reached.
    fn is_excluded_dir(&self, mut id: FileId) -> bool {
        if let Some(elsewhere) = &self.elsewhere {
            id.dev = *elsewhere.devices.get(&id.dev).unwrap_or(&id.dev);
        }
        self.excluded_dirs.contains(&id)
    }
}

/// The path without `.` components and trailing slashes.
fn plain(path: &Path) -> Result<PathBuf> {
    let named = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute()
        || !path.components().all(named)
        || path.as_os_str().as_bytes().contains(&0)
    {
        return Err(
            Error::usage(format!("'{}' is not a plain absolute path", path.display()))
                .next("name it from / on, without '..'"),
        );
    }
    if path.parent().is_none() {
        return Err(Error::usage("'/' as a whole cannot be captured")
            .next("name the directories that hold the program's files"));
    }
    Ok(path.components().collect())
}

/// A directory being walked.
pub(super) struct At<'a> {
    pub(super) dirs: &'a Dirs,
    pub(super) node: Node,
    pub(super) fd: &'a OwnedFd,
}

impl At<'_> {
    /// The path of an entry, for messages.
    pub(super) fn path(&self, name: &CStr) -> PathBuf {
        self.dirs.path(self.node).join(as_path(name))
    }
}

/// What a visitor found an entry to be.
pub(super) enum Found {
    /// Dealt with.
    Entry,
    /// A directory, to be walked.
    Dir,
    /// Not there any more.
    Gone,
}

/// What looking at a name brought, if that was done already.
pub(super) type Looked = Option<rustix::io::Result<Seen>>;

/// Looks at a name, following no link.
pub(super) fn look_at(dir: impl AsFd, name: &CStr) -> rustix::io::Result<Seen> {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| Seen::of(&stat))
}

/// Who is told what a walk finds.
pub(super) trait Visitor {
    /// A root that is not there; `parent` is open if that is.
    fn absent(&mut self, root: &Path, parent: Option<&OwnedFd>) -> Result<()>;
    /// A root's parent, before the root.
    fn top(&mut self, parent: &Path, node: Node) -> Result<()>;
    /// An entry not known to be a directory; `kind` is what the listing says, if anything.
    /// `looked`: what `fstatat` says, of a file that was put off: see [`Visitor::shares_looks`].
    fn entry(
        &mut self,
        at: &At<'_>,
        name: &CStr,
        kind: Option<FileType>,
        looked: Looked,
    ) -> Result<Found>;
    /// A directory, before what is in it. `at` is its parent.
    fn dir(&mut self, at: &At<'_>, name: &CStr, fd: &OwnedFd, seen: Seen) -> Result<()>;
    /// Whether threads are to look at what the listing says are regular files. Of these [`Visitor::entry`] is told
    /// later than of anything else in their directories.
    fn shares_looks(&self) -> bool {
        false
    }
    /// A name that was listed and is gone, or a directory that was moved away.
    fn gone(&mut self, path: PathBuf);
    /// Whether it relies on being able to tell later what changed since [`Visitor::dir`].
    fn follows_changes(&self) -> bool {
        false
    }
}

/// Walks every root. Directories are numbered in `dirs` in the order of [`Visitor::dir`],
/// parents first, tops in that of [`Visitor::top`].
pub(super) fn walk(paths: &Paths, dirs: &mut Dirs, visitor: &mut impl Visitor) -> Result<()> {
    let mut walk = Walk {
        paths,
        dirs,
        visitor,
        pending: Vec::new(),
        to_look_at: Vec::new(),
        dirs_to_look_in: 0,
        buffer: vec![MaybeUninit::uninit(); 1 << 16],
    };
    for root in &paths.roots {
        walk.root(root)?;
        // Depth first, so that most directories are opened from a parent that is open still.
        loop {
            while let Some((parent, name)) = walk.pending.pop() {
                walk.descend(parent, &name)?;
            }
            if walk.to_look_at.is_empty() {
                break;
            }
            // One may be a directory by now.
            walk.look()?;
        }
    }
    Ok(())
}

/// A regular file to be looked at together with others; its directory is open.
struct ToLookAt {
    node: Node,
    dir: Arc<OwnedFd>,
    name: CString,
}

struct Walk<'a, V> {
    paths: &'a Paths,
    dirs: &'a mut Dirs,
    visitor: &'a mut V,
    /// Directories found, not walked yet.
    pending: Vec<(Node, CString)>,
    /// See [`Visitor::shares_looks`]; and in how many directories these are.
    to_look_at: Vec<ToLookAt>,
    dirs_to_look_in: usize,
    buffer: Vec<MaybeUninit<u8>>,
}

impl<V: Visitor> Walk<'_, V> {
    fn root(&mut self, root: &Path) -> Result<()> {
        let (Some(parent), Some(name)) = (root.parent(), root.file_name()) else {
            return Ok(()); // `Paths` has refused it
        };
        if self.paths.is_excluded(root) {
            return Ok(());
        }
        let name = CString::new(name.as_bytes()).unwrap_or_default(); // `Paths` has refused NUL
        let fd = match self.paths.open_parent(root, parent) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return self.visitor.absent(root, None),
            Err(cause) => return Err(unreadable(parent, cause)),
        };
        let stat = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW);
        match stat.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::Symlink) => Err(linked_root(root)),
            Ok(kind) => {
                let node = self.dirs.add_top(parent, fd);
                self.visitor.top(parent, node)?;
                if kind.is_dir() {
                    self.pending.push((node, name));
                    return Ok(());
                }
                let fd = self
                    .dirs
                    .open(node)
                    .map_err(|cause| unreadable(parent, cause))?;
                self.entry(node, &fd, name, Some(kind), None)
            }
            Err(Errno::NOENT) => self.visitor.absent(root, Some(&fd)),
            Err(cause) => Err(unreadable(root, cause)),
        }
    }

    fn entry(
        &mut self,
        node: Node,
        fd: &OwnedFd,
        name: CString,
        kind: Option<FileType>,
        looked: Looked,
    ) -> Result<()> {
        let at = At {
            dirs: self.dirs,
            node,
            fd,
        };
        match self.visitor.entry(&at, &name, kind, looked)? {
            Found::Entry => {}
            Found::Gone => {
                let path = at.path(&name);
                self.visitor.gone(path);
            }
            Found::Dir => self.pending.push((node, name)),
        }
        Ok(())
    }

    /// Looks at the files that were put off.
    fn look(&mut self) -> Result<()> {
        self.dirs_to_look_in = 0;
        if self.to_look_at.is_empty() {
            return Ok(());
        }
        let files = std::mem::take(&mut self.to_look_at);
        let looked = in_parts(&files, || (), |(), file| look_at(&file.dir, &file.name));
        for (ToLookAt { node, dir, name }, looked) in files.into_iter().zip(looked) {
            self.entry(node, &dir, name, Some(FileType::RegularFile), Some(looked))?;
        }
        Ok(())
    }

    fn descend(&mut self, parent: Node, name: &CStr) -> Result<()> {
        let path = || self.dirs.path(parent).join(as_path(name));
        let opened = self.dirs.open(parent).and_then(|parent| {
            let fd = self.dirs.open_dir_at(&parent, name)?;
            Ok((parent, fd))
        });
        let (parent_fd, fd) = match opened {
            Ok(fds) => fds,
            // Gone, or something else has its name now: ENOTDIR also for a symbolic link.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => {
                let path = path();
                self.visitor.gone(path);
                return Ok(());
            }
            Err(cause) => return Err(unreadable(&path(), cause)),
        };
        let seen = rustix::fs::fstat(&fd).map_err(|cause| unreadable(&path(), cause))?;
        let seen = Seen::of(&seen);
        if self.paths.is_excluded_dir(seen.id) {
            return Ok(());
        }
        let at = At {
            dirs: self.dirs,
            node: parent,
            fd: &parent_fd,
        };
        self.visitor.dir(&at, name, &fd, seen)?;
        // btrfs lists what was there when the directory was opened, less what has gone since: a
        // file that was replaced before it was looked at would be missing.
        let fresh = match self.visitor.follows_changes() {
            true => {
                let opened = self.dirs.open_dir_at(&fd, c".");
                Some(opened.map_err(|cause| unreadable(&path(), cause))?)
            }
            false => None,
        };
        let fd = Arc::new(fd);
        let node = self.dirs.add(parent, name, Some(seen.id), &fd);
        self.list(node, &fd, fresh.as_ref().unwrap_or(&fd))?;
        self.dirs_to_look_in += 1;
        if self.dirs_to_look_in >= DIRS {
            self.look()?;
        }
        Ok(())
    }

    /// `fd` is `dir`, opened later.
    fn list(&mut self, node: Node, dir: &Arc<OwnedFd>, fd: &OwnedFd) -> Result<()> {
        let shares_looks = self.visitor.shares_looks();
        let excluded = match self.paths.excluded_names.is_empty() {
            true => None,
            false => self.paths.excluded_names.get(&self.dirs.path(node)),
        };
        // Taken, so that entries can be dealt with while the listing goes on.
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut entries = RawDir::new(fd, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // Removed while it was listed: gone, with all that was in it.
                Err(Errno::NOENT) => break,
                Err(cause) => return Err(unreadable(&self.dirs.path(node), cause)),
            };
            let name = entry.file_name();
            // A restore's staging directory holds what is not in its place yet, or not any more.
            if matches!(name.to_bytes(), b"." | b".." | STAGING) {
                continue;
            }
            if let Some(excluded) = excluded
                && excluded.contains(&OsString::from_vec(name.to_bytes().to_vec()))
            {
                continue;
            }
            match entry.file_type() {
                FileType::Directory => self.pending.push((node, name.to_owned())),
                FileType::Unknown => self.entry(node, fd, name.to_owned(), None, None)?,
                FileType::RegularFile if shares_looks => {
                    self.to_look_at.push(ToLookAt {
                        node,
                        dir: Arc::clone(dir),
                        name: name.to_owned(),
                    });
                    if self.to_look_at.len() >= FILES {
                        self.look()?;
                    }
                }
                kind => self.entry(node, fd, name.to_owned(), Some(kind), None)?,
            }
        }
        self.buffer = buffer;
        Ok(())
    }
}

/// The error of a member or directory that cannot be read.
pub(super) fn unreadable(path: &Path, cause: Errno) -> Error {
    let error = Error::new(format!("cannot read {}: {cause}", path.display()));
    match cause {
        Errno::ACCESS | Errno::PERM => {
            error.next("run as its owner or as root, or leave it out with --exclude")
        }
        Errno::MFILE | Errno::NFILE => error.next("raise the limit of open files (ulimit -n)"),
        // O_NONBLOCK meets a lease (fcntl F_SETLEASE): without it, this would wait.
        Errno::WOULDBLOCK => error
            .next("another process holds a lease on it: try again, or leave it out with --exclude"),
        Errno::IO => error.next("check the kernel log and the disk"),
        _ => error,
    }
}

fn linked_root(root: &Path) -> Error {
    let target = std::fs::canonicalize(root);
    let error = Error::usage(format!(
        "{} is a symbolic link, which is not followed",
        root.display()
    ));
    match target {
        Ok(target) => error.next(format!("name what it leads to: {}", target.display())),
        Err(_) => error.next("name what it leads to"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::scratch::Scratch;

    /// Notes what it is told, and changes things when it comes to a directory.
    struct Late<'a> {
        told: Vec<(PathBuf, bool)>,
        gone: Vec<PathBuf>,
        at_dir: &'a dyn Fn(&Path),
        at_first_look: &'a dyn Fn(),
    }

    impl Visitor for Late<'_> {
        fn absent(&mut self, _: &Path, _: Option<&OwnedFd>) -> Result<()> {
            Ok(())
        }

        fn top(&mut self, _: &Path, _: Node) -> Result<()> {
            Ok(())
        }

        fn entry(
            &mut self,
            at: &At<'_>,
            name: &CStr,
            kind: Option<FileType>,
            looked: Looked,
        ) -> Result<Found> {
            let is_file = kind == Some(FileType::RegularFile);
            assert_eq!(is_file, looked.is_some(), "these are put off");
            let path = at.path(name);
            if is_file && self.told.is_empty() {
                (self.at_first_look)();
            }
            match looked {
                Some(Ok(seen)) if seen.kind() == crate::store::manifest::Kind::Dir => {
                    return Ok(Found::Dir);
                }
                Some(Err(_)) => return Ok(Found::Gone),
                Some(Ok(_)) | None => self.told.push((path, is_file)),
            }
            Ok(Found::Entry)
        }

        fn dir(&mut self, at: &At<'_>, name: &CStr, _: &OwnedFd, _: Seen) -> Result<()> {
            (self.at_dir)(&at.path(name));
            Ok(())
        }

        fn shares_looks(&self) -> bool {
            true
        }

        fn gone(&mut self, path: PathBuf) {
            self.gone.push(path);
        }
    }

    #[test]
    fn what_is_put_off_may_have_changed_by_then() {
        let scratch = Scratch::new();
        let root = scratch.join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        for i in 0..400 {
            fs::write(root.join(i.to_string()), "x").unwrap();
        }
        std::os::unix::fs::symlink("x", root.join("link")).unwrap();
        // By now the files of the root are listed.
        let at_dir = |path: &Path| {
            if path == root.join("sub") {
                fs::remove_file(root.join("7")).unwrap();
                fs::remove_file(root.join("8")).unwrap();
                fs::create_dir(root.join("8")).unwrap();
                fs::write(root.join("8/inner"), "x").unwrap();
                fs::remove_file(root.join("9")).unwrap();
                std::os::unix::fs::symlink("x", root.join("9")).unwrap();
            }
        };
        let scope = Scope {
            roots: vec![root.clone()],
            ..Scope::default()
        };
        let paths = Paths::new(&scope, None).unwrap();
        let mut late = Late {
            told: Vec::new(),
            gone: Vec::new(),
            at_dir: &at_dir,
            at_first_look: &|| {},
        };
        walk(&paths, &mut Dirs::new(), &mut late).unwrap();
        assert_eq!(late.gone, [root.join("7")]);
        let files = (0..400).filter(|i| ![7, 8].contains(i));
        let mut expected: Vec<(PathBuf, bool)> = files
            .map(|i| (root.join(i.to_string()), true))
            .chain([(root.join("8/inner"), true), (root.join("link"), false)])
            .collect();
        expected.sort_unstable();
        late.told.sort_unstable();
        assert_eq!(late.told, expected);
    }

    #[test]
    fn no_more_than_so_many_are_put_off() {
        let scratch = Scratch::new();
        let root = scratch.join("root");
        fs::create_dir(&root).unwrap();
        for i in 0..FILES + 100 {
            fs::write(root.join(i.to_string()), "x").unwrap();
        }
        let scope = Scope {
            roots: vec![root.clone()],
            ..Scope::default()
        };
        let paths = Paths::new(&scope, None).unwrap();
        let mut late = Late {
            told: Vec::new(),
            gone: Vec::new(),
            at_dir: &|_| {},
            at_first_look: &|| fs::remove_dir_all(&root).unwrap(),
        };
        walk(&paths, &mut Dirs::new(), &mut late).unwrap();
        // The others were listed by then, or not.
        assert_eq!(late.told.len(), FILES);
        assert!(late.gone.len() <= 100);
    }
}
