//! Whether the tree of a snapshot is what its manifest says.
//!
//! The walk goes by directory descriptors and single names, follows no link and opens
//! nothing but directories and regular files. It enters only directories that the manifest
//! knows, so that what it does is bounded by the manifest.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use blake3::Hash;
use rustix::fs::{Advice, AtFlags, OFlags};
use rustix::io::Errno;

use crate::Result;
use crate::digest::{self, Parsed};
use crate::progress::Progress;
use crate::store::manifest::{FileRecord, Kind, PathName};
use crate::store::{Snapshot, names_in};
use crate::tree::dirs::{Dirs, Node, as_path};
use crate::tree::seen::Seen;

/// Most findings that are kept; the others are counted.
const MOST: usize = 1000;

/// Something that is not as the manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The entry, by its path in the live tree.
    pub path: PathName,
    /// What of it: `missing`, `extra`, `kind`, `size`, `content`, `target`, `mode`, `owner`,
    /// `mtime`, `link`, `digest`, `unreadable`.
    pub what: &'static str,
    /// What the manifest says.
    pub expected: String,
    /// What there is.
    pub found: String,
}

/// What came of a comparison.
#[derive(Debug, Default)]
pub struct Findings {
    /// Entries in the manifest.
    pub entries: u64,
    /// Bytes that were read and compared with their digests, holes among them.
    pub bytes: u64,
    /// Files whose bytes were not compared: without a digest that is known here, or that
    /// this user may not read.
    pub unchecked: u64,
    /// How many things are not as the manifest says.
    pub damaged: u64,
    /// The first of them, by path.
    pub damage: Vec<Damage>,
}

impl Findings {
    fn add(&mut self, path: &Path, what: &'static str, expected: String, found: String) {
        self.damaged += 1;
        if self.damage.len() < MOST {
            self.damage.push(Damage {
                path: PathName(path.to_owned()),
                what,
                expected,
                found,
            });
        }
    }
}

/// Compares a snapshot's tree with its manifest; `quick`: without the files' bytes.
///
/// # Errors
///
/// The tree itself cannot be opened. All else is a finding.
pub fn compare(snapshot: &Snapshot, quick: bool, progress: &mut dyn Progress) -> Result<Findings> {
    let files = &snapshot.manifest.files;
    let bytes = files.iter().filter(|file| !quick && is_digested(file));
    progress.begin(
        "verifying",
        bytes.fold(0, |sum, file| sum.saturating_add(file.size)),
    );
    let mut walk = Walk {
        index: index(files),
        above: above(snapshot),
        linked: linked(files),
        links: HashMap::new(),
        digests: HashMap::new(),
        met: vec![false; files.len()],
        owner: snapshot.owner,
        dirs: Dirs::new().without_atime(),
        to_do: Vec::new(),
        found: Findings {
            entries: files.len() as u64,
            ..Findings::default()
        },
        files,
        quick,
        progress,
    };
    walk.all(snapshot.open_at(Path::new("/"), OFlags::RDONLY | OFlags::DIRECTORY))?;
    let Walk {
        met,
        mut found,
        progress,
        ..
    } = walk;
    progress.end();
    for (file, _) in files.iter().zip(met).filter(|(_, met)| !met) {
        // Sockets and devices are only recorded.
        if !matches!(file.kind, Kind::Socket | Kind::Device) {
            let kind = name_of(file.kind).to_owned();
            found.add(file.path.as_ref(), "missing", kind, "nothing".to_owned());
        }
    }
    found.damage.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn is_digested(file: &FileRecord) -> bool {
    file.kind == Kind::File && file.digest.is_some()
}

/// Records by path. That paths are in one form, and none twice, was seen to when the
/// manifest was read.
fn index(files: &[FileRecord]) -> HashMap<&[u8], usize> {
    files
        .iter()
        .enumerate()
        .map(|(i, file)| (file.path.0.as_os_str().as_bytes(), i))
        .collect()
}

/// The directories above what was captured, which have no record.
fn above(snapshot: &Snapshot) -> HashSet<Vec<u8>> {
    let manifest = &snapshot.manifest;
    let files = manifest.files.iter().map(|file| &file.path.0);
    let roots = manifest.roots.iter().map(|root| &root.0);
    let mut above = HashSet::new();
    for path in files.chain(roots) {
        for parent in path.ancestors().skip(1) {
            // What is above a known one is known.
            if !above.insert(parent.as_os_str().as_bytes().to_vec()) {
                break;
            }
        }
    }
    above
}

/// The live identities that have several names in the manifest.
fn linked(files: &[FileRecord]) -> HashSet<(u64, u64)> {
    let further = |file: &&FileRecord| file.capture.as_deref() == Some("hardlink");
    let identity = |file: &FileRecord| (file.dev, file.ino);
    files.iter().filter(further).map(identity).collect()
}

struct Walk<'a> {
    files: &'a [FileRecord],
    index: HashMap<&'a [u8], usize>,
    above: HashSet<Vec<u8>>,
    linked: HashSet<(u64, u64)>,
    /// The inode in the tree of each of those.
    links: HashMap<(u64, u64), u64>,
    /// Of files with several names, by inode: each is read once.
    digests: HashMap<u64, Hash>,
    met: Vec<bool>,
    /// Whose the snapshot is: who made it.
    owner: u32,
    quick: bool,
    dirs: Dirs,
    to_do: Vec<Node>,
    found: Findings,
    progress: &'a mut dyn Progress,
}

impl Walk<'_> {
    fn all(&mut self, top: rustix::io::Result<OwnedFd>) -> Result<()> {
        let top =
            top.map_err(|cause| crate::Error::new(format!("cannot open the tree: {cause}")))?;
        let node = self.dirs.add_top(Path::new("/"), top);
        self.to_do.push(node);
        while let Some(node) = self.to_do.pop() {
            if let Err(cause) = self.directory(node) {
                let path = self.dirs.path(node);
                self.unreadable(&path, cause);
                self.pass_over(&path);
            }
        }
        Ok(())
    }

    /// What is below a directory that cannot be read is not missing.
    fn pass_over(&mut self, dir: &Path) {
        for (file, met) in self.files.iter().zip(&mut self.met) {
            *met |= file.path.0.starts_with(dir);
        }
    }

    fn unreadable(&mut self, path: &Path, cause: Errno) {
        let expected = "readable".to_owned();
        self.found
            .add(path, "unreadable", expected, cause.to_string());
    }

    fn directory(&mut self, node: Node) -> rustix::io::Result<()> {
        let dir = self.dirs.open(node)?;
        let here = self.dirs.path(node);
        for name in names_in(&dir)? {
            let path = here.join(as_path(&name));
            if let Err(cause) = self.entry(node, &dir, &name, &path) {
                self.unreadable(&path, cause);
                self.pass_over(&path);
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        node: Node,
        dir: &OwnedFd,
        name: &CStr,
        path: &Path,
    ) -> rustix::io::Result<()> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let seen = Seen::of(&stat);
        let bytes = path.as_os_str().as_bytes();
        let is_entered = match self.index.get(bytes) {
            Some(&i) => {
                self.met[i] = true;
                self.record(&self.files[i], &seen, dir, name)?
            }
            None if self.above.contains(bytes) => {
                if seen.kind() != Kind::Dir {
                    self.is_other(path, "kind", Kind::Dir, &seen);
                }
                seen.kind() == Kind::Dir
            }
            None => {
                let found = name_of(seen.kind()).to_owned();
                self.found.add(path, "extra", "nothing".to_owned(), found);
                false
            }
        };
        if is_entered {
            let fd = self.dirs.open_dir_at(dir, name)?;
            let node = self.dirs.add(node, name, Some(seen.id), &fd.into());
            self.to_do.push(node);
        }
        Ok(())
    }

    fn is_other(&mut self, path: &Path, what: &'static str, expected: Kind, seen: &Seen) {
        let (expected, found) = (name_of(expected), name_of(seen.kind()));
        self.found
            .add(path, what, expected.to_owned(), found.to_owned());
    }

    /// Compares an entry with its record; whether it is a directory to enter.
    fn record(
        &mut self,
        record: &FileRecord,
        seen: &Seen,
        dir: &OwnedFd,
        name: &CStr,
    ) -> rustix::io::Result<bool> {
        let path = record.path.as_ref();
        if matches!(record.kind, Kind::Socket | Kind::Device) {
            let found = name_of(seen.kind()).to_owned();
            let expected = "nothing: it is only recorded".to_owned();
            self.found.add(path, "extra", expected, found);
            return Ok(false);
        }
        if seen.kind() != record.kind {
            self.is_other(path, "kind", record.kind, seen);
            return Ok(false);
        }
        self.metadata(record, seen);
        self.link(record, seen);
        match record.kind {
            Kind::File if seen.size != record.size => {
                let bytes = |size| format!("{size} bytes");
                let (expected, found) = (bytes(record.size), bytes(seen.size));
                self.found.add(path, "size", expected, found);
            }
            Kind::File if !self.quick => self.content(record, seen, dir, name)?,
            Kind::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
                let found = as_path(&target);
                let expected = record.target.as_ref().map(|target| target.0.as_path());
                if expected != Some(found) {
                    let expected = expected.unwrap_or(Path::new("")).display().to_string();
                    let found = found.display().to_string();
                    self.found.add(path, "target", expected, found);
                }
            }
            _ => {}
        }
        Ok(record.kind == Kind::Dir)
    }

    fn metadata(&mut self, record: &FileRecord, seen: &Seen) {
        let path = record.path.as_ref();
        let owned = (seen.uid, seen.gid) == (record.uid, record.gid);
        // Who is not root cannot give files away: then they are his own.
        if !owned && (self.owner == 0 || seen.uid != self.owner) {
            let form = |uid, gid| format!("{uid}:{gid}");
            let (expected, found) = (form(record.uid, record.gid), form(seen.uid, seen.gid));
            self.found.add(path, "owner", expected, found);
        }
        // A set-id bit is left off where it would lend another's rights.
        let mask = if owned { 0o7777 } else { 0o1777 };
        if record.kind != Kind::Symlink && seen.permissions() & mask != record.mode & mask {
            let form = |mode| format!("{mode:04o}");
            let (expected, found) = (form(record.mode), form(seen.permissions()));
            self.found.add(path, "mode", expected, found);
        }
        if !is_same_time(record.mtime_ns, seen.mtime_ns) {
            let (expected, found) = (in_words(record.mtime_ns), in_words(seen.mtime_ns));
            self.found.add(path, "mtime", expected, found);
        }
    }

    /// Names of one file are still names of one file.
    fn link(&mut self, record: &FileRecord, seen: &Seen) {
        let identity = (record.dev, record.ino);
        if record.kind == Kind::Dir || !self.linked.contains(&identity) {
            return;
        }
        let first = *self.links.entry(identity).or_insert(seen.id.ino);
        if first != seen.id.ino {
            let expected = "another name of one file".to_owned();
            let found = "a file of its own".to_owned();
            self.found
                .add(record.path.as_ref(), "link", expected, found);
        }
    }

    fn content(
        &mut self,
        record: &FileRecord,
        seen: &Seen,
        dir: &OwnedFd,
        name: &CStr,
    ) -> rustix::io::Result<()> {
        let path = record.path.as_ref();
        let expected = match record.digest.as_deref().map(digest::parse) {
            Some(Parsed::Blake3(expected)) => expected,
            Some(Parsed::Damaged) => {
                let found: String = record
                    .digest
                    .iter()
                    .flat_map(|d| d.chars())
                    .take(80)
                    .collect();
                let expected = "a digest".to_owned();
                self.found.add(path, "digest", expected, found);
                return Ok(());
            }
            Some(Parsed::Foreign) | None => {
                self.found.unchecked += 1;
                return Ok(());
            }
        };
        let found = match self.digests.get(&seen.id.ino) {
            Some(known) => {
                self.progress.advance(seen.size);
                *known
            }
            None => match self.read(seen, dir, name) {
                Ok(found) => found,
                // Its mode keeps out even its owner, who is not root.
                Err(Errno::ACCESS | Errno::PERM) => {
                    self.found.unchecked += 1;
                    return Ok(());
                }
                Err(cause) => {
                    self.unreadable(path, cause);
                    return Ok(());
                }
            },
        };
        if found != expected {
            let (expected, found) = (digest::form(&expected), digest::form(&found));
            self.found.add(path, "content", expected, found);
        }
        Ok(())
    }

    fn read(&mut self, seen: &Seen, dir: &OwnedFd, name: &CStr) -> rustix::io::Result<Hash> {
        // O_NONBLOCK: a FIFO in its place must not make us wait for its writer.
        let file = self.dirs.open_at(dir, name, OFlags::NONBLOCK)?;
        let now = Seen::of(&rustix::fs::fstat(&file)?);
        if now.id != seen.id || now.kind() != Kind::File {
            return Err(Errno::STALE);
        }
        // What is in memory may be better than what is on the disk.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        let progress = &mut *self.progress;
        let hashed = digest::hash_file(&file, seen.size, &mut |bytes| {
            progress.advance(bytes);
            true
        })?;
        // It was read for nobody's later use.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        self.found.bytes += seen.size;
        if seen.nlink > 1 {
            self.digests.insert(seen.id.ino, hashed.digest);
        }
        Ok(hashed.digest)
    }
}

/// Whether a file system has kept this time: to the nanosecond, or cut to its own whole
/// seconds or pairs of them.
fn is_same_time(recorded: i64, found: i64) -> bool {
    const SECOND: i64 = 1_000_000_000;
    let late = recorded.saturating_sub(found);
    recorded == found || (found % SECOND == 0 && (0..2 * SECOND).contains(&late))
}

fn in_words(ns: i64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(ns)) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{ns} ns"),
    }
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "a regular file",
        Kind::Dir => "a directory",
        Kind::Symlink => "a symbolic link",
        Kind::Fifo => "a FIFO",
        Kind::Socket => "a socket",
        Kind::Device => "a device node",
    }
}

impl Damage {
    /// In one line.
    pub fn line(&self) -> String {
        let path: PathBuf = self.path.0.clone();
        match self.what {
            "missing" => format!("{}: missing: {}", path.display(), self.expected),
            "extra" => format!("{}: extra: {}", path.display(), self.found),
            what => format!(
                "{}: {what}: expected {}, found {}",
                path.display(),
                self.expected,
                self.found
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_a_file_system_has_cut() {
        let time = 1_700_000_001_500_000_000;
        assert!(is_same_time(time, time));
        assert!(is_same_time(time, 1_700_000_001_000_000_000));
        assert!(is_same_time(time, 1_700_000_000_000_000_000));
        for other in [time + 1, time - 1, 1_700_000_002_000_000_000, 0, i64::MIN] {
            assert!(!is_same_time(time, other), "{other}");
        }
    }
}
