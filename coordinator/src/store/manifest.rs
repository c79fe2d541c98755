//! The certificate of a snapshot: `manifest.json`, a stable, versioned interface.
//!
//! Rule: fields are added, never renamed or given another meaning, while
//! [`VERSION`] stays. `docs/manifest.md` describes each.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::prediction::Prediction;

/// The version of the manifest and of every `--json` object.
pub const VERSION: u32 = 1;

/// What a snapshot is and what is guaranteed of it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// Sortable by time, unique in the set.
    pub id: String,
    /// The set's name.
    pub set: String,
    /// When the cut was made, RFC 3339, UTC.
    pub time: String,
    /// The commit point the cut was made at.
    pub commit_point: String,
    /// The commit point asked for.
    pub commit_point_asked: String,
    /// What the commit point claims, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    /// Whether everything the commit point promises was proved.
    pub verified: bool,
    /// Why not, one entry for each thing that was not proved; empty if verified.
    pub reasons: Vec<Reason>,
    /// What `verified` rests on beyond what was observed.
    pub assumptions: Vec<String>,
    /// From shutting the gate to opening it, µs.
    pub hold_us: u64,
    /// From shutting the gate to the last call in flight having returned, µs.
    pub drain_us: u64,
    /// `reflink`, `copy`, `copy-before-write`, `mixed`, `subvolume`, `shared` if no file had
    /// changed since the previous snapshot, or `none` if there was no file.
    pub capture: String,
    /// The longest stop of a process from outside, µs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_us: Option<u64>,
    /// How long files were captured after the hold, while programs went on and what they were
    /// about to change was captured first, µs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard_us: Option<u64>,
    /// Pieces of files that programs waited for meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard_asked: Option<u64>,
    /// What capturing was expected to take, by each method, and what it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// What was captured after the cut of files whose changes calls mark (`--mark-blocks`), and
    /// what was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marked: Option<Marked>,
    /// Bytes that were hashed for the digests of the files; those of the others were known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hashed_bytes: Option<u64>,
    /// What was checked of the snapshot since its cut, and what came of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
    /// What was watched, absolute.
    pub roots: Vec<PathName>,
    /// What was left out, absolute, the store among it; `None` in a manifest that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excludes: Option<Vec<PathName>>,
    /// From which boot and which mounts the files were read; `None` if that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounted: Option<Mounted>,
    /// The one file under `roots` that was captured, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<PathName>,
    /// Processes of the set that could change a member.
    pub writers: Vec<Writer>,
    /// Processes outside the set that could change a member.
    pub foreign: Vec<Foreign>,
    /// How much there is in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub totals: Option<Totals>,
    /// Set if it stays whatever a policy says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// Fields of a later version, kept.
    #[serde(flatten)]
    pub unknown: serde_json::Map<String, serde_json::Value>,
    /// Every entry of the tree. Last, so that all else can be read without it.
    #[serde(deserialize_with = "super::shape::files")]
    pub files: Vec<FileRecord>,
}

/// Where files were mounted when they were read. While that is so, a file whose ctime stands has the
/// bytes that it had.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Mounted {
    /// The kernel's `boot_id`.
    pub boot: String,
    /// One for each device.
    pub mounts: Vec<Mount>,
}

/// A mount of a device.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Mount {
    /// As of the files.
    pub dev: u64,
    /// The mount's id; since Linux 6.8 it has it alone, until the next boot.
    pub mount: u64,
}

impl Mounted {
    /// The mount of a device.
    pub fn mount_of(&self, dev: u64) -> Option<u64> {
        let found = self.mounts.iter().find(|mount| mount.dev == dev);
        found.map(|mount| mount.mount)
    }

    /// Whether a device has been mounted ever since `then`.
    pub fn has_stayed(&self, then: &Mounted, dev: u64) -> bool {
        let mount = self.mount_of(dev);
        self.boot == then.boot && mount.is_some() && mount == then.mount_of(dev)
    }
}

/// How much there is in a snapshot.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Totals {
    /// Names of regular files.
    pub files: u64,
    /// The sum of their sizes.
    pub bytes: u64,
    /// How many of them share their copy with the previous snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_files: Option<u64>,
    /// The sum of the sizes of those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
}

/// What a snapshot has of an earlier one, by what calls have marked since.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Marked {
    /// Bytes that were captured.
    pub bytes_captured: u64,
    /// Bytes that were taken from `base`.
    pub bytes_shared: u64,
    /// The id of that snapshot; `None` if there was none to build on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Unmarked bytes that were captured all the same, and compared with those of `base`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_compared: Option<u64>,
}

/// That a snapshot stays.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Pin {
    /// Why, in somebody's words; may be empty.
    pub note: String,
    /// Since when, RFC 3339, UTC.
    pub time: String,
}

impl Pin {
    /// A pin of now.
    pub fn now(note: &str) -> Pin {
        Pin {
            note: note.to_owned(),
            time: jiff::Timestamp::now().to_string(),
        }
    }
}

/// One thing that was not proved.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Reason {
    /// A stable word, e.g. `foreign-writer`.
    pub code: String,
    /// For people: names the process or file, the cause and what would help.
    pub text: String,
    /// The process, as the coordinator sees it, if one is to blame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

/// Something that was checked of a snapshot after its cut.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Check {
    /// `command` (`--verify`), `content` (`snapshim verify`) or `marks` (`--mark-blocks`).
    pub kind: String,
    /// The command, as it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Whether it worked on a copy that it may write to: that was asked for, or files are shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable: Option<bool>,
    /// What came of it.
    pub passed: bool,
    /// The command's exit status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<i32>,
    /// The signal that ended the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether the command took too long and was ended for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// How long it took, ms.
    pub ms: u64,
    /// When it began, RFC 3339, UTC.
    pub time: String,
    /// The end of what a failing command printed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// How many entries are not as the manifest says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<u64>,
}

/// A path that may not be UTF-8, carried without loss.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathName(pub PathBuf);

/// `path` for people and for all UTF-8 names; `path_hex` only where that loses something.
#[derive(Serialize, Deserialize)]
struct PathForm<'a> {
    path: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
}

impl Serialize for PathName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let path_hex = self.0.to_str().is_none().then(|| {
            let bytes = self.0.as_os_str().as_bytes();
            bytes.iter().map(|b| format!("{b:02x}")).collect()
        });
        let path = self.0.to_string_lossy();
        PathForm { path, path_hex }.serialize(serializer)
    }
}

impl PathForm<'_> {
    fn name(self) -> Result<PathName, &'static str> {
        let Some(hex) = self.path_hex else {
            return Ok(PathName(self.path.into_owned().into()));
        };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let pair = |pair: &[u8]| match *pair {
            [high, low] => u8::try_from(digit(high)? << 4 | digit(low)?).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = hex.as_bytes().chunks(2).map(pair).collect();
        let bytes = bytes.ok_or("path_hex is not pairs of hexadecimal digits")?;
        Ok(PathName(OsString::from_vec(bytes).into()))
    }
}

impl<'de> Deserialize<'de> for PathName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = PathForm::deserialize(deserializer)?;
        form.name().map_err(serde::de::Error::custom)
    }
}

impl AsRef<Path> for PathName {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

/// What kind of entry a record is about.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Dir,
    /// Symbolic link.
    Symlink,
    /// Named pipe (made again in the tree).
    Fifo,
    /// Socket (recorded, not made).
    Socket,
    /// Device node (recorded, not made).
    Device,
}

/// One entry of the tree, as it stood at the cut.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(try_from = "FileForm")]
pub struct FileRecord {
    /// Its absolute path in the live tree.
    #[serde(flatten)]
    pub path: PathName,
    /// What it is.
    pub kind: Kind,
    /// Bytes; 0 for anything but a file.
    pub size: u64,
    /// Permission bits, with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, ns since 1970.
    pub mtime_ns: i64,
    /// Change time, ns since 1970.
    pub ctime_ns: i64,
    /// Device and inode in the live tree.
    pub dev: u64,
    /// See `dev`.
    pub ino: u64,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<PathName>,
    /// `reflink`, `copy` or `copy-before-write`; for a further name of a file captured already,
    /// `hardlink`; if it had not changed since the previous snapshot, and its copy is a further
    /// name of the one there, `shared`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<String>,
    /// Of a regular file's bytes: `blake3:` and 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What device a device node stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
}

/// The form of [`FileRecord`] in which it is read. Fields that are not known here are passed over,
/// not collected, as serde's `flatten` would do.
#[derive(Deserialize)]
struct FileForm {
    path: String,
    #[serde(default)]
    path_hex: Option<String>,
    kind: Kind,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime_ns: i64,
    ctime_ns: i64,
    dev: u64,
    ino: u64,
    #[serde(default)]
    target: Option<PathName>,
    #[serde(default)]
    capture: Option<String>,
    #[serde(default)]
    digest: Option<String>,
    #[serde(default)]
    device: Option<Device>,
}

impl TryFrom<FileForm> for FileRecord {
    type Error = &'static str;

    fn try_from(form: FileForm) -> Result<FileRecord, &'static str> {
        let path = PathForm {
            path: form.path.into(),
            path_hex: form.path_hex,
        };
        Ok(FileRecord {
            path: path.name()?,
            kind: form.kind,
            size: form.size,
            mode: form.mode,
            uid: form.uid,
            gid: form.gid,
            mtime_ns: form.mtime_ns,
            ctime_ns: form.ctime_ns,
            dev: form.dev,
            ino: form.ino,
            target: form.target,
            capture: form.capture,
            digest: form.digest,
            device: form.device,
        })
    }
}

/// A device, as its node names it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Device {
    /// `char` or `block`.
    pub kind: String,
    /// Of the driver.
    pub major: u32,
    /// The driver's own.
    pub minor: u32,
}

/// A process of the set that had a member open for writing, or was in a call; or one
/// that was held from outside.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Writer {
    /// As the coordinator sees it.
    pub pid: u32,
    /// Its command name.
    pub name: String,
    /// Threads that own a slot, or that were stopped.
    pub threads: u32,
    /// The layer that held it: `sites`, `symbols`, or from outside `ptrace`, `freezer`
    /// or `sigstop`.
    pub layer: String,
    /// Why not a better layer, and what else is known of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A process outside the set that had a member open for writing or mapped writable.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Foreign {
    /// As the coordinator sees it.
    pub pid: u32,
    /// Its command name.
    pub name: String,
    /// The member.
    #[serde(flatten)]
    pub path: PathName,
    /// `open` or `mapped`.
    pub how: String,
    /// The layer that held it from outside, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_by: Option<String>,
}
