//! What a restore is about to do, on disk before it does it: `journal.json` in the first
//! staging directory.
//!
//! Whether an operation was done is not in it: that is seen by looking at which inode is where.
//! Inode numbers stay what they are over a restart of the machine; device numbers do not, and
//! all that an operation is about is on the device of its staging directory anyway.

use std::ffi::{CString, OsString};
use std::io::{BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::source::Traits;
use crate::store::fault;
use crate::store::manifest::{PathName, VERSION};
use crate::tree::STAGING;
use crate::tree::metadata::{Attributes, Xattr};
use crate::{Error, Result};

const NAME: &str = "journal.json";
pub(super) const UNFINISHED: &str = "journal.json.tmp";
/// Bytes; that of a million swaps has some 200 MB.
const MAX: u64 = 1 << 30;

/// How far a restore has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// What comes is being made; nothing was replaced.
    Staging,
    /// Entries are being put into place.
    Swapping,
    /// All is in its place and durable: what is staged can go.
    Done,
    /// The same, but what was replaced is to stay.
    Kept,
    /// What was replaced is being put back.
    Undoing,
}

/// The journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Journal {
    pub(super) version: u32,
    pub(super) state: State,
    /// The snapshot.
    pub(super) id: String,
    /// When it was begun, RFC 3339, UTC.
    pub(super) time: String,
    /// Where to; `None`: in place.
    pub(super) to: Option<PathName>,
    pub(super) keep: bool,
    /// When all was in its place and kept, in nanoseconds by the file system's clock: what has a
    /// later ctime was changed since.
    #[serde(default)]
    pub(super) settled_ns: Option<i64>,
    pub(super) places: Vec<PlaceForm>,
    pub(super) dirs: Vec<DirForm>,
    pub(super) ops: Vec<OpForm>,
}

/// A staging directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PlaceForm {
    /// The directory it is in.
    #[serde(flatten)]
    pub(super) parent: PathName,
}

/// A live directory, what it was like, and what it is to be like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct DirForm {
    #[serde(flatten)]
    pub(super) path: PathName,
    pub(super) ino: u64,
    /// Not part of the restore itself: its metadata is left alone.
    pub(super) is_base: bool,
    pub(super) old: TraitsForm,
    pub(super) new: Option<TraitsForm>,
}

/// A name in a live directory, swapped with what has the operation's number in a staging
/// directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct OpForm {
    /// By number.
    pub(super) dir: usize,
    #[serde(flatten)]
    pub(super) name: PathName,
    /// By number.
    pub(super) place: usize,
    /// The inode that is there before; `None`: nothing.
    pub(super) old: Option<u64>,
    /// The inode that is there afterwards; `None`: nothing.
    pub(super) new: Option<u64>,
}

impl OpForm {
    pub(super) fn c_name(&self) -> CString {
        // Validated when the journal was read.
        CString::new(self.name.0.as_os_str().as_bytes()).unwrap_or_default()
    }
}

/// All metadata of a directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct TraitsForm {
    pub(super) mode: u32,
    uid: u32,
    gid: u32,
    mtime_ns: i64,
    /// Names and values, in hexadecimal.
    xattrs: Vec<(String, String)>,
}

impl From<&Traits> for TraitsForm {
    fn from(traits: &Traits) -> TraitsForm {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        let a = traits.attributes;
        TraitsForm {
            mode: a.mode,
            uid: a.uid,
            gid: a.gid,
            mtime_ns: a.mtime_ns,
            xattrs: traits
                .xattrs
                .iter()
                .map(|x| (hex(x.name.to_bytes()), hex(&x.value)))
                .collect(),
        }
    }
}

impl TraitsForm {
    /// `None` if it is damaged.
    pub(super) fn traits(&self) -> Option<Traits> {
        let xattrs = self.xattrs.iter().map(|(name, value)| {
            Some(Xattr {
                name: CString::new(bytes(name)?).ok()?,
                value: bytes(value)?.into(),
            })
        });
        Some(Traits {
            attributes: Attributes {
                mode: self.mode & 0o7777,
                uid: self.uid,
                gid: self.gid,
                mtime_ns: self.mtime_ns,
            },
            xattrs: xattrs.collect::<Option<_>>()?,
        })
    }
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let digit = |d: u8| {
        char::from(d)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    digits
        .chunks(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect()
}

impl Journal {
    /// The live path an operation is about.
    pub(super) fn path(&self, op: &OpForm) -> PathBuf {
        match self.dirs.get(op.dir) {
            Some(dir) => dir.path.0.join(&op.name.0),
            None => op.name.0.clone(),
        }
    }

    /// Whether it is of one of these paths, or of something in or above one.
    pub(super) fn is_about(&self, paths: &[PathBuf]) -> bool {
        let near = |one: &Path| {
            let mut all = paths.iter();
            all.any(|path| one.starts_with(path) || path.starts_with(one))
        };
        let mut ops = self.ops.iter();
        let mut dirs = self.dirs.iter().filter(|dir| dir.new.is_some());
        (self.ops.is_empty() && self.dirs.is_empty())
            || ops.any(|op| near(&self.path(op)))
            || dirs.any(|dir| paths.iter().any(|path| dir.path.0.starts_with(path)))
    }

    /// Something it is of, for people.
    pub(super) fn first(&self) -> PathBuf {
        let op = self.ops.first().map(|op| self.path(op));
        op.or_else(|| self.dirs.first().map(|dir| dir.path.0.clone()))
            .unwrap_or_default()
    }

    /// What the restore was of, for people.
    pub(super) fn describe(&self) -> String {
        let to = match &self.to {
            Some(dir) => format!("to {}", dir.0.display()),
            None => "in place".into(),
        };
        format!("the restore of {} {to}, begun {}", self.id, self.time)
    }

    /// Writes the journal to `dir`, whole or not at all, and durably.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub(super) fn write(&self, dir: &OwnedFd, path: &Path) -> Result<()> {
        write(dir, path, NAME, self)
    }

    /// When that in `dir` was last written, by the file system's clock.
    ///
    /// # Errors
    ///
    /// It cannot be looked at.
    pub(super) fn written_ns(dir: &OwnedFd) -> rustix::io::Result<i64> {
        let stat = rustix::fs::statat(dir, NAME, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(crate::tree::seen::Seen::of(&stat).ctime_ns)
    }

    /// Reads that in `dir`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// It is damaged, of a newer version, or no plain file.
    pub(super) fn read(dir: &OwnedFd, path: &Path) -> Result<Option<Journal>> {
        let path = path.join(NAME);
        let Some(journal) = read::<Journal>(dir, &path, NAME)? else {
            return Ok(None);
        };
        match journal.fault() {
            Some(what) => Err(damaged(&path, what)),
            None => Ok(Some(journal)),
        }
    }

    /// Removes it, durably.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub(super) fn remove(dir: &OwnedFd) -> rustix::io::Result<()> {
        for name in [UNFINISHED, NAME, HOME] {
            match rustix::fs::unlinkat(dir, name, rustix::fs::AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(cause) => return Err(cause),
            }
        }
        rustix::fs::fsync(dir)
    }

    /// What is wrong with it.
    fn fault(&self) -> Option<String> {
        if self.version != VERSION {
            return Some(format!(
                "it has version {}, this program knows {VERSION}",
                self.version
            ));
        }
        if self.places.is_empty() {
            return Some("it names no staging directory".into());
        }
        let plain = |path: &Path| {
            let part = |c| matches!(c, Component::RootDir | Component::Normal(_));
            path.is_absolute() && path.components().all(part) && !has_nul(path)
        };
        let paths = self.places.iter().map(|place| &place.parent);
        let paths = paths.chain(self.dirs.iter().map(|dir| &dir.path));
        if let Some(bad) = paths.into_iter().find(|path| !plain(&path.0)) {
            return Some(format!("'{}' is no absolute path", bad.0.display()));
        }
        let traits = |form: &TraitsForm| form.traits().is_some();
        let is_dir_sound = |dir: &DirForm| traits(&dir.old) && dir.new.as_ref().is_none_or(traits);
        if !self.dirs.iter().all(is_dir_sound) {
            return Some("attributes are not pairs of hexadecimal digits".into());
        }
        let is_op_sound = |op: &OpForm| {
            let mut parts = op.name.0.components();
            let name = parts.next();
            let one = matches!(name, Some(Component::Normal(n)) if n == op.name.0.as_os_str());
            one && parts.next().is_none()
                && !has_nul(&op.name.0)
                && op.name.0.as_os_str().as_bytes() != STAGING
                && op.dir < self.dirs.len()
                && op.place < self.places.len()
                && (op.old.is_some() || op.new.is_some())
        };
        let bad = self.ops.iter().find(|op| !is_op_sound(op))?;
        Some(format!("'{}' is no operation", bad.name.0.display()))
    }
}

fn has_nul(path: &Path) -> bool {
    path.as_os_str().as_bytes().contains(&0)
}

const HOME: &str = "home.json";

/// In a staging directory other than the first: where that one is.
#[derive(Serialize, Deserialize)]
pub(super) struct Home {
    version: u32,
    #[serde(flatten)]
    parent: PathName,
}

impl Home {
    pub(super) fn write(dir: &OwnedFd, path: &Path, parent: &Path) -> Result<()> {
        let home = Home {
            version: VERSION,
            parent: PathName(parent.to_owned()),
        };
        write(dir, path, HOME, &home)
    }

    /// The directory in which the first one is.
    pub(super) fn read(dir: &OwnedFd, path: &Path) -> Result<Option<PathBuf>> {
        let path = path.join(HOME);
        let home = read::<Home>(dir, &path, HOME)?;
        match home {
            Some(home) if home.version != VERSION || !home.parent.0.is_absolute() => {
                Err(damaged(&path, "it names no directory".into()))
            }
            other => Ok(other.map(|home| home.parent.0)),
        }
    }
}

fn write(dir: &OwnedFd, path: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let failed = |cause: Errno| super::place::full("write", &path.join(name), cause);
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = rustix::fs::openat(dir, UNFINISHED, flags, mode).map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 16, std::fs::File::from(file));
    let written = serde_json::to_writer(&mut out, value)
        .map_err(std::io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .and_then(|()| out.get_ref().sync_all());
    written.map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    rustix::fs::renameat(dir, UNFINISHED, dir, name).map_err(failed)?;
    rustix::fs::fsync(dir).map_err(failed)
}

fn read<T: serde::de::DeserializeOwned>(
    dir: &OwnedFd,
    path: &Path,
    name: &str,
) -> Result<Option<T>> {
    // O_NONBLOCK: a FIFO in its place must not make us wait for its writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(cause) => return Err(fault("read", path, cause)),
    };
    let stat = rustix::fs::fstat(&file).map_err(|cause| fault("look at", path, cause))?;
    if !FileType::from_raw_mode(stat.st_mode).is_file() {
        return Err(damaged(path, "it is no plain file".into()));
    }
    let mut text = Vec::new();
    let read = std::fs::File::from(file)
        .take(MAX + 1)
        .read_to_end(&mut text);
    read.map_err(|cause| damaged(path, cause.to_string()))?;
    if text.len() as u64 > MAX {
        return Err(damaged(path, format!("it is larger than {MAX} bytes")));
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|cause| damaged(path, cause.to_string()))
}

fn damaged(path: &Path, what: String) -> Error {
    Error::new(format!("{} cannot be used: {what}", path.display())).next(
        "beside it lies what was replaced, or was to come: look at it, move what you need, and remove the directory",
    )
}

/// A path that has a name.
pub(super) fn name_of(path: &Path) -> CString {
    let name = path.file_name().map(|n| n.as_bytes().to_vec());
    CString::new(name.unwrap_or_default()).unwrap_or_default()
}

/// A name as it is in a journal.
pub(super) fn form_of(name: &std::ffi::CStr) -> PathName {
    PathName(OsString::from_vec(name.to_bytes().to_vec()).into())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::store::scratch::Scratch;

    fn sound() -> Value {
        let traits = json!({"mode": 493, "uid": 0, "gid": 0, "mtime_ns": 1,
            "xattrs": [["757365722e78", "00ff"]]});
        json!({"version": 1, "state": "swapping", "id": "x", "time": "t", "to": null,
            "keep": false, "places": [{"path": "/srv"}],
            "dirs": [{"path": "/srv/data", "ino": 7, "is_base": false, "old": traits, "new": null}],
            "ops": [{"dir": 0, "path": "name", "place": 0, "old": 8, "new": null}]})
    }

    fn read_back(scratch: &Scratch, journal: &Value) -> Result<Option<Journal>> {
        std::fs::write(scratch.join(NAME), journal.to_string()).unwrap();
        let dir = std::fs::File::open(scratch.path()).unwrap().into();
        Journal::read(&dir, scratch.path())
    }

    #[test]
    fn what_is_written_is_read() {
        let scratch = Scratch::new();
        let journal = read_back(&scratch, &sound()).unwrap().unwrap();
        let traits = journal.dirs[0].old.traits().unwrap();
        assert_eq!(traits.xattrs[0].name.to_bytes(), b"user.x");
        assert_eq!(*traits.xattrs[0].value, [0, 255]);
        let dir = std::fs::File::open(scratch.path()).unwrap().into();
        journal.write(&dir, scratch.path()).unwrap();
        let again = Journal::read(&dir, scratch.path()).unwrap().unwrap();
        assert_eq!(again.path(&again.ops[0]), Path::new("/srv/data/name"));
        Journal::remove(&dir).unwrap();
        assert!(Journal::read(&dir, scratch.path()).unwrap().is_none());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let scratch = Scratch::new();
        for (pointer, value) in [
            ("/version", json!(2)),
            ("/state", json!("other")),
            ("/places", json!([])),
            ("/places/0/path", json!("srv")),
            ("/dirs/0/path", json!("/srv/../etc")),
            ("/dirs/0/old/xattrs/0/1", json!("0")),
            ("/dirs/0/old/xattrs/0/0", json!("00")),
            ("/ops/0/dir", json!(1)),
            ("/ops/0/place", json!(1)),
            ("/ops/0/path", json!("a/b")),
            ("/ops/0/path", json!("..")),
            ("/ops/0/path", json!("/etc")),
            ("/ops/0/path", json!("")),
            ("/ops/0/path", json!("a\0b")),
            ("/ops/0/path", json!(".snapshim-restore")),
            ("/ops/0/old", json!(null)),
            ("/ops/0/old", json!(-1)),
        ] {
            let mut journal = sound();
            *journal.pointer_mut(pointer).unwrap() = value.clone();
            let refused = read_back(&scratch, &journal);
            assert!(refused.is_err(), "{pointer} {value}");
        }
        std::fs::remove_file(scratch.join(NAME)).unwrap();
        let dir: OwnedFd = std::fs::File::open(scratch.path()).unwrap().into();
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(&dir, NAME, FileType::Fifo, mode, 0).unwrap();
        assert!(Journal::read(&dir, scratch.path()).is_err());
    }
}
