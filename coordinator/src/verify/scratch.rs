//! A copy of a snapshot's tree that a command may write to.

use std::path::{Path, PathBuf};

use crate::Result;
use crate::capture::{self, Method, Scope};
use crate::stop::Stop;
use crate::store::{ScratchDir, Store};

/// The copy; removed with [`Scratch::remove`], or, as far as that goes, when dropped.
pub(super) struct Scratch {
    dir: Option<ScratchDir>,
    tree: PathBuf,
}

impl Scratch {
    /// Copies `tree`, by reflink where that can be: with owners, modes, times, extended
    /// attributes, links, FIFOs and holes, as a capture does.
    pub(super) fn of(tree: &Path, id: &str, store: &Store, stop: &Stop) -> Result<Scratch> {
        let dir = store.scratch_dir(id)?;
        let path = dir.path().to_owned();
        let scratch = Scratch {
            tree: path.join(tree.strip_prefix("/").unwrap_or(tree)),
            dir: Some(dir),
        };
        let scope = Scope {
            roots: vec![tree.to_owned()],
            excludes: Vec::new(),
        };
        // File by file: nobody writes to it, so there is nothing to freeze.
        capture::prepare(&scope, &path, Method::Auto)?
            .needs_locks()?
            .capture(&mut || !stop.is_asked())?
            .finish()?;
        Ok(scratch)
    }

    pub(super) fn tree(&self) -> &Path {
        &self.tree
    }

    pub(super) fn remove(mut self) -> Result<()> {
        match self.dir.take() {
            Some(dir) => dir.remove(),
            None => Ok(()),
        }
    }
}
