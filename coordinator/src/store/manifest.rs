//! The certificate of a snapshot: `manifest.json`, a stable, versioned interface.
//!
//! Rule: fields are added, never renamed or given another meaning, while
//! [`VERSION`] stays. `docs/manifest.md` describes each.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

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
    /// `reflink`, `copy`, `mixed`, or `none` if there was no file.
    pub capture: String,
    /// The longest stop of a process from outside, µs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_us: Option<u64>,
    /// What was watched, absolute.
    pub roots: Vec<PathName>,
    /// Every entry of the tree.
    pub files: Vec<FileRecord>,
    /// Processes of the set that could change a member.
    pub writers: Vec<Writer>,
    /// Processes outside the set that could change a member.
    pub foreign: Vec<Foreign>,
    /// Fields of a later version, kept.
    #[serde(flatten)]
    pub unknown: serde_json::Map<String, serde_json::Value>,
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

/// A path that may not be UTF-8, carried without loss.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathName(pub PathBuf);

/// `path` for people and for all UTF-8 names; `path_hex` only where that loses something.
#[derive(Serialize, Deserialize)]
struct PathForm {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
}

impl Serialize for PathName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let path_hex = self.0.to_str().is_none().then(|| {
            let bytes = self.0.as_os_str().as_bytes();
            bytes.iter().map(|b| format!("{b:02x}")).collect()
        });
        let path = self.0.to_string_lossy().into_owned();
        PathForm { path, path_hex }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PathName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let form = PathForm::deserialize(deserializer)?;
        let Some(hex) = form.path_hex else {
            return Ok(PathName(form.path.into()));
        };
        let digits = hex.as_bytes();
        if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(D::Error::custom(
                "path_hex is not pairs of hexadecimal digits",
            ));
        }
        let bytes = digits
            .chunks(2)
            .map(|pair| {
                let pair = std::str::from_utf8(pair).map_err(D::Error::custom)?;
                u8::from_str_radix(pair, 16).map_err(D::Error::custom)
            })
            .collect::<Result<Vec<u8>, _>>()?;
        Ok(PathName(OsString::from_vec(bytes).into()))
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
    /// `reflink` or `copy`; for a further name of a file captured already, `hardlink`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<String>,
    /// Of a regular file's bytes: `blake3:` and 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What device a device node stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
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
