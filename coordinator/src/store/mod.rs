//! The snapshots on disk.
//!
//! ```text
//! <store>/<set>/                 0700, owned by whoever takes the snapshots
//!     .lock                      flock: one writer of the store at a time
//!     20261120T231700.123456Z/   a published snapshot
//!         manifest.json          its certificate
//!         tree/srv/data/...      the files, under their absolute paths
//!     latest                     symbolic link to the newest good one
//!     .tmp-*                     not published (yet); swept if a crash left it
//!     .del-*                     on its way out; cleared step by step
//! ```
//!
//! A snapshot appears by one rename after all of it is durable, and goes by
//! one rename before any of it is removed: whatever has a snapshot's name is whole.
//!
//! What is read from a store is not trusted: names are validated, manifests
//! are bounded, and nothing here follows a symbolic link found inside.

pub mod extents;
pub mod manifest;
pub mod pace;
pub mod policy;
pub mod prediction;
pub mod retention;
pub mod snapshot;

mod annotate;
mod fault;
mod head;
mod id;
mod latest;
mod place;
mod publish;
mod read;
mod remove;
#[cfg(test)]
pub(crate) mod scratch;
mod scratch_dir;
mod shape;
mod sweep;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, Result};

pub(crate) use fault::fault;
pub use head::{Head, Listed};
pub(crate) use place::INHERITED;
pub use publish::Draft;
pub use read::Entry;
pub(crate) use read::names_in;
pub(crate) use remove::remove_tree;
pub(crate) use scratch_dir::ScratchDir;
pub(crate) use shape::order;
pub use snapshot::Snapshot;
pub(crate) use snapshot::open_below;
pub use sweep::Swept;

/// The prefix of what is not published yet.
const TMP: &str = ".tmp-";
/// The prefix of what is being removed.
const DEL: &str = ".del-";
/// The symbolic link to the newest verified snapshot.
const LATEST: &str = "latest";
/// The directory of the files inside a snapshot.
const TREE: &str = "tree";
/// The certificate inside a snapshot.
const MANIFEST: &str = "manifest.json";

/// The snapshots of one set: `<store>/<set>/`.
///
/// Holds the directory open: what is done to a store is done to the directory
/// that was checked when it was opened, wherever its name leads later.
#[derive(Debug)]
pub struct Store {
    dir: OwnedFd,
    path: PathBuf,
}

/// The right to change a store; given up when dropped, also by a crash.
#[derive(Debug)]
pub struct StoreLock {
    _file: OwnedFd,
}

impl Store {
    /// Where the store of these watched paths is unless the user says otherwise:
    /// `.snapshim` beside the first of them, that is, on the same file system, so that
    /// files can be cloned into it.
    ///
    /// One that exists is preferred, so that every user finds the same store. If the
    /// parent is on another device or not writable, the place is inside the watched
    /// directory; the caller excludes it from capture.
    pub fn default_place(roots: &[PathBuf]) -> PathBuf {
        place::default_place(roots)
    }

    /// Opens the store of `set` at `place`, making either (0700) if absent. Takes no lock.
    ///
    /// # Errors
    ///
    /// A set name that is not allowed; a place that is missing its parent, is a symbolic
    /// link or not a directory, is read-only, not accessible, or a set directory that
    /// belongs to somebody else or can be changed by others.
    pub fn open_or_create(place: &Path, set: &str) -> Result<Store> {
        check_set_name(set)?;
        place::open_or_create(place, set)
    }

    /// Opens the store of `set` at `place` to read it; makes nothing.
    ///
    /// # Errors
    ///
    /// As [`Store::open_or_create`], and if there is no such store. Root may read
    /// a store that belongs to another user.
    pub fn open(place: &Path, set: &str) -> Result<Store> {
        check_set_name(set)?;
        place::open(place, set)
    }

    /// `<store>/<set>`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the store's lock, waiting for another holder for at most `wait`.
    ///
    /// # Errors
    ///
    /// The wait is over, the lock file cannot be made, or the store belongs to somebody else
    /// or can be changed by others.
    pub fn lock(&self, wait: Duration) -> Result<StoreLock> {
        place::check_ours(&self.dir, &self.path)?;
        let deadline = Instant::now() + wait;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = self.path.join(".lock");
        let file = rustix::fs::openat(&self.dir, ".lock", flags, Mode::RUSR | Mode::WUSR)
            .map_err(|cause| fault("open the lock", &path, cause))?;
        loop {
            // Polled: flock has no timeout, and an alarm signal would be the
            // process's, not this call's.
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(StoreLock { _file: file }),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::new(format!(
                        "the store {} is in use by another snapshim command",
                        self.path.display()
                    ))
                    .next("wait until that command has ended and try again"));
                }
                Err(Errno::INTR) => {}
                Err(cause) => return Err(fault("lock", &path, cause)),
            }
        }
    }
}

/// Checks the name of a set: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with a dot.
///
/// # Errors
///
/// A usage error that says what is allowed.
pub fn check_set_name(set: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if !set.is_empty() && set.len() <= 64 && !set.starts_with('.') && set.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "'{}' cannot be the name of a set",
        set.escape_default()
    ))
    .next("use 1 to 64 letters, digits, dots, underscores and dashes, not starting with a dot"))
}
