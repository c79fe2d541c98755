//! What would be chosen now, for `status`: nothing is cloned, flushed, made or held.
//!
//! A checkpoint tries whether files can be cloned, and flushes them, before it chooses. Here it
//! is told from the file systems, and what is dirty counts only of files that are being overwritten, or are small and
//! are being written to:
//! the rest will be flushed.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

use super::super::mounted::mounted;
use super::super::prepare::{Known, Plan, Scan, Scanner, Way, devices_that_show_stores, fits};
use super::super::walk::{At, Found, Looked, Paths, Visitor, walk};
use super::super::{Base, Member, Method, Scope, subvolume};
use super::facts::{FileSystem, has_reflink};
use super::{Flush, Means, predict};
use crate::store::prediction::Prediction;
use crate::tree::dirs::{Dirs, Node};
use crate::tree::free;
use crate::tree::seen::Seen;
use crate::{Error, Result};

/// Entries that are looked at.
const MOST: usize = 100_000;
/// A file that was written to within this time, ns, is taken to be written to still.
const FRESH: i64 = 1_000_000_000;

/// What is under the roots now.
#[derive(Debug)]
pub struct Now {
    scan: Scan,
    paths: Paths,
    is_partial: bool,
}

/// Looks at what is under the roots, up to 100,000 entries.
///
/// # Errors
///
/// A path that is not absolute; a directory that cannot be read.
pub fn look(scope: &Scope) -> Result<Now> {
    let paths = Paths::new(scope, None)?;
    let mut scan = Scan::new();
    let mut dirs = Dirs::new().without_atime();
    let mut few = Few {
        scanner: Scanner { scan: &mut scan },
        seen: 0,
    };
    let walked = walk(&paths, &mut dirs, &mut few);
    let is_partial = few.seen > MOST;
    if !is_partial {
        walked?;
    }
    scan.walked(dirs);
    Ok(Now {
        scan,
        paths,
        is_partial,
    })
}

impl Now {
    /// The regular files.
    pub fn members(&self) -> Vec<Member> {
        self.scan.members()
    }

    /// Says with what unchanged files would be shared.
    pub fn share(&mut self, mut base: Base) {
        let mounted = mounted(&self.scan);
        base.only_on(&devices_that_show_stores(&self.scan), mounted.as_ref());
        for known in &mut self.scan.members {
            known.is_shared = base.find(&known.seen).is_some();
        }
    }

    /// What `auto` would choose for a snapshot in `store`, and what each method would take.
    /// `not_guarded`: why programs cannot be asked to wait for what they would change, if so.
    pub fn predict(&self, store: &Path, not_guarded: Option<String>) -> Prediction {
        let method = Method::Auto;
        let mut plan = Plan::new(method);
        let store_at = existing(store);
        for dev in &self.scan.devices {
            let first = self
                .scan
                .members
                .iter()
                .find(|known| known.seen.id.dev == *dev);
            let Some(file) = first.and_then(|known| self.scan.open(known).ok()) else {
                continue;
            };
            let file_system = FileSystem::of(&file);
            if !is_together(*dev, &file_system, store_at.as_ref()) {
                return apart(&self.scan, first, store);
            }
            plan.decide(
                *dev,
                match has_reflink(&file, &file_system) {
                    true => Way::Reflink,
                    false => Way::Copy,
                },
            );
        }
        let room = store_at.as_ref().and_then(|(_, at)| free(at).ok());
        let can_freeze = self.scan.to_capture().count() >= subvolume::MANY
            && store_at
                .is_some_and(|(_, at)| subvolume::check(&self.scan, &self.paths, at).is_ok());
        let predicted = predict(
            &self.scan,
            &plan,
            Means {
                method,
                can_freeze,
                room,
                flush: Flush::Unknown,
                appended: None,
                fresh: FRESH,
                not_guarded: &mut || not_guarded.clone().or_else(|| fits(&self.scan).err()),
            },
        );
        Prediction {
            partial: self.is_partial,
            ..predicted.prediction
        }
    }
}

/// The device of the store, or of the nearest directory above it that is there, open.
fn existing(store: &Path) -> Option<(u64, OwnedFd)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut above = store.ancestors();
    let open = above.find_map(|dir| rustix::fs::open(dir, flags, Mode::empty()).ok())?;
    let stat = rustix::fs::fstat(&open).ok()?;
    Some((Seen::of(&stat).id.dev, open))
}

/// Whether files of this device can be captured without being copied to another file system.
fn is_together(dev: u64, file_system: &FileSystem, store: Option<&(u64, OwnedFd)>) -> bool {
    let Some((store_dev, at)) = store else {
        return true;
    };
    // Subvolumes have devices of their own.
    dev == *store_dev || file_system.is_btrfs() && FileSystem::of(at).is_btrfs()
}

fn apart(scan: &Scan, first: Option<&Known>, store: &Path) -> Prediction {
    let path = first.map(|known| scan.path(known)).unwrap_or_default();
    Prediction {
        choice: "none".to_owned(),
        why: format!(
            "{} is on another file system than the store {}: put the store there, or pass --capture copy",
            path.display(),
            store.display()
        ),
        files: scan.members.len() as u64,
        ..Prediction::default()
    }
}

/// A walk that ends after [`MOST`] entries.
struct Few<'a> {
    scanner: Scanner<'a>,
    seen: usize,
}

impl Few<'_> {
    fn count(&mut self) -> Result<()> {
        self.seen += 1;
        match self.seen > MOST {
            true => Err(Error::new("there are too many files to look at")),
            false => Ok(()),
        }
    }
}

impl Visitor for Few<'_> {
    fn absent(&mut self, root: &Path, parent: Option<&OwnedFd>) -> Result<()> {
        self.scanner.absent(root, parent)
    }

    fn top(&mut self, parent: &Path, node: Node) -> Result<()> {
        self.scanner.top(parent, node)
    }

    fn entry(
        &mut self,
        at: &At<'_>,
        name: &CStr,
        kind: Option<FileType>,
        looked: Looked,
    ) -> Result<Found> {
        self.count()?;
        self.scanner.entry(at, name, kind, looked)
    }

    fn dir(&mut self, at: &At<'_>, name: &CStr, fd: &OwnedFd, seen: Seen) -> Result<()> {
        self.scanner.dir(at, name, fd, seen)
    }

    fn gone(&mut self, path: PathBuf) {
        self.scanner.gone(path);
    }
}
