//! From a draft to a snapshot: durable first, then one rename.

use std::io::{BufWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::manifest::Manifest;
use super::policy::Class;
use super::{MANIFEST, Store, StoreLock, TMP, TREE, fault, id, latest, remove};
use crate::{Error, Result};

/// A snapshot in the making: `.tmp-<id>`, seen by nobody. Dropped without
/// [`Draft::publish`], it is removed (best effort; the next sweep gets the rest).
///
/// The lock it was begun under must be held until it is published or dropped.
#[derive(Debug)]
pub struct Draft {
    /// The set's directory.
    set: OwnedFd,
    set_path: PathBuf,
    /// `.tmp-<id>`.
    dir: OwnedFd,
    id: String,
    published: bool,
}

impl Store {
    /// Begins a snapshot: chooses its id and makes `.tmp-<id>/tree`.
    ///
    /// Ids are UTC timestamps, `20261120T231700.123456Z`, each greater than any that
    /// is in the store, also after the clock was set back.
    ///
    /// # Errors
    ///
    /// The store cannot be written (full, read-only), or holds an id so far in
    /// the future that none can follow.
    pub fn begin(&self, lock: &StoreLock) -> Result<Draft> {
        let _ = lock;
        let last = self.last_id_in_use()?;
        let id = id::next(Timestamp::now(), last.as_deref()).ok_or_else(|| {
            Error::new(format!(
                "no snapshot id can follow {} in {}",
                last.unwrap_or_default(),
                self.path.display()
            ))
            .next("remove that entry, which no clock of today can have made, and try again")
        })?;
        let name = format!("{TMP}{id}");
        let path = self.path.join(&name);
        let set = rustix::io::dup(&self.dir).map_err(|cause| fault("open", &self.path, cause))?;
        rustix::fs::mkdirat(&self.dir, &name, Mode::RWXU)
            .map_err(|cause| fault("make", &path, cause))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.dir, &name, flags, Mode::empty())
            .map_err(|cause| fault("open", &path, cause))?;
        let draft = Draft {
            set,
            set_path: self.path.clone(),
            dir,
            id,
            published: false,
        };
        rustix::fs::mkdirat(&draft.dir, TREE, Mode::RWXU)
            .map_err(|cause| fault("make", &draft.tree(), cause))?;
        Ok(draft)
    }

    /// The greatest id in any name of the store, published or not.
    fn last_id_in_use(&self) -> Result<Option<String>> {
        let ids = self.names()?.into_iter().filter_map(|name| {
            let name = name.to_str().ok()?;
            let name = name
                .strip_prefix(TMP)
                .or(name.strip_prefix(super::DEL))
                .unwrap_or(name);
            id::is_valid(name).then(|| name.to_owned())
        });
        // `latest` may outlive what it points to.
        Ok(ids.chain(self.latest()).max())
    }
}

impl Draft {
    /// The id the snapshot will have.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory the files go to.
    pub fn tree(&self) -> PathBuf {
        self.path().join(TREE)
    }

    /// The draft's directory, open.
    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The directory the files go to, open.
    ///
    /// # Errors
    ///
    /// Those of openat(2).
    pub(crate) fn tree_fd(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, TREE, flags, Mode::empty())
            .map_err(|cause| fault("open", &self.tree(), cause))
    }

    fn path(&self) -> PathBuf {
        self.set_path.join(self.name())
    }

    fn name(&self) -> String {
        format!("{TMP}{}", self.id)
    }

    /// Publishes the snapshot and returns the path of its tree. Everything in the tree
    /// must be durable already.
    ///
    /// Order: the manifest is written, synced and renamed into place, the draft's directory
    /// is synced, the draft is renamed to its id, the set's directory is synced. Only then,
    /// and only if the snapshot is good, `latest` is replaced by a link to it, by rename.
    ///
    /// # Errors
    ///
    /// Before the rename to its id: nothing is published and the draft is removed.
    /// After it, the message says that the snapshot exists.
    pub fn publish(mut self, manifest: &Manifest) -> Result<PathBuf> {
        if manifest.id != self.id {
            return Err(Error::new(format!(
                "the manifest of snapshot {} names another, {}",
                self.id, manifest.id
            )));
        }
        let path = self.path();
        write_manifest(&self.dir, &path, manifest)?;
        rustix::fs::fsync(&self.dir).map_err(|cause| fault("write", &path, cause))?;
        let target = self.set_path.join(&self.id);
        self.rename_to_id()
            .map_err(|cause| fault("publish", &target, cause))?;
        self.published = true;
        let exists = |cause: Errno, what: &str| {
            let error = fault(what, &self.set_path, cause);
            let message = format!("snapshot {} is published, but: {}", self.id, error.message);
            Error { message, ..error }
        };
        rustix::fs::fsync(&self.set).map_err(|cause| exists(cause, "write"))?;
        if manifest.class() == Class::Good {
            latest::point(&self.set, &self.id)
                .map_err(|cause| exists(cause, "replace the link 'latest' in"))?;
        }
        Ok(target.join(TREE))
    }

    /// Renames the draft, never over something that is there.
    fn rename_to_id(&self) -> rustix::io::Result<()> {
        let name = self.name();
        match rustix::fs::renameat_with(
            &self.set,
            &name,
            &self.set,
            &self.id,
            RenameFlags::NOREPLACE,
        ) {
            // A file system without RENAME_NOREPLACE (EINVAL). The plain form
            // refuses to replace anything but an empty directory.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::renameat(&self.set, &name, &self.set, &self.id)
            }
            other => other,
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: a sweep removes what stays.
            let _ = remove::remove_tree(&self.set, self.name().as_ref());
        }
    }
}

fn write_manifest(dir: &OwnedFd, path: &Path, manifest: &Manifest) -> Result<()> {
    let temp = format!("{MANIFEST}.tmp");
    let failed = |cause: Errno| fault("write", &path.join(MANIFEST), cause);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, &temp, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 16, std::fs::File::from(file));
    let written = serde_json::to_writer_pretty(&mut out, manifest)
        .map_err(std::io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .and_then(|()| out.get_ref().sync_all());
    written.map_err(|error| match Errno::from_io_error(&error) {
        Some(errno) => failed(errno),
        None => Error::new(format!(
            "cannot write {}: {error}",
            path.join(MANIFEST).display()
        )),
    })?;
    rustix::fs::renameat(dir, &temp, dir, MANIFEST).map_err(failed)
}
