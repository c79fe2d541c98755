//! Reading a store: what snapshots there are and what their manifests say.

use std::ffi::CString;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;
use serde::Deserialize;

use super::manifest::{Manifest, VERSION};
use super::{LATEST, MANIFEST, Store, TREE, fault, id, shape};
use crate::{Error, Result};

/// Bytes; a manifest of a million files has some 400 MB.
const MAX_MANIFEST: u64 = 1 << 30;

/// A published snapshot.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its id.
    pub id: String,
    /// Its directory, `<store>/<set>/<id>`.
    pub path: PathBuf,
    /// Its certificate, or why that cannot be used.
    pub manifest: std::result::Result<Manifest, String>,
}

impl Entry {
    /// Where its files are, under their absolute paths.
    pub fn tree(&self) -> PathBuf {
        self.path.join(TREE)
    }
}

impl Store {
    /// Every published snapshot, oldest first. One whose manifest is damaged is
    /// listed with the damage.
    ///
    /// # Errors
    ///
    /// The store's directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>> {
        Ok(self.ids()?.into_iter().map(|id| self.entry(id)).collect())
    }

    /// Where the files of the snapshot `id` are, under their absolute paths.
    pub fn tree_of(&self, id: &str) -> PathBuf {
        self.path.join(id).join(TREE)
    }

    /// The snapshot that `name` stands for: an id, the beginning of only one, or `latest`,
    /// the newest verified one; behind any of them `~N`, the N-th one older than that
    /// (`~` alone the next older one), verified or not.
    ///
    /// # Errors
    ///
    /// There is none or more than one; the message says what there is.
    pub fn find(&self, name: &str) -> Result<Entry> {
        Ok(self.entry(self.resolve(name)?))
    }

    /// The id of the snapshot that `name` stands for, as [`Store::find`] has it.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn resolve(&self, name: &str) -> Result<String> {
        let mut ids = self.ids()?;
        let (base, older) = match name.split_once('~') {
            Some((base, "")) => (base, 1),
            // Digits only: `parse` would take a sign as well.
            Some((base, count)) => match count.parse() {
                Ok(older) if count.bytes().all(|byte| byte.is_ascii_digit()) => (base, older),
                _ => {
                    return Err(Error::usage(format!(
                        "'{}' is no number of snapshots back",
                        count.escape_default()
                    ))
                    .next("write for example latest~1"));
                }
            },
            None => (name, 0),
        };
        let found = self.position(&ids, base)?;
        match found.checked_sub(older) {
            Some(position) => Ok(ids.swap_remove(position)),
            None => Err(Error::new(format!(
                "there are only {found} snapshots older than '{}' in {}",
                base.escape_default(),
                self.path.display()
            ))
            .next(what_there_is(&ids))),
        }
    }

    /// Where in `ids` the one is that `name` stands for.
    fn position(&self, ids: &[String], name: &str) -> Result<usize> {
        if name == LATEST {
            let latest = self.latest();
            return match ids.iter().position(|id| Some(id) == latest.as_ref()) {
                Some(position) => Ok(position),
                None => Err(Error::new(format!(
                    "there is no verified snapshot in {}",
                    self.path.display()
                ))
                .next(what_there_is(ids))),
            };
        }
        let matching: Vec<usize> = (0..ids.len())
            .filter(|i| ids[*i].starts_with(name))
            .collect();
        match matching.as_slice() {
            [one] if !name.is_empty() => Ok(*one),
            [] | [_] => Err(Error::new(format!(
                "there is no snapshot '{}' in {}",
                name.escape_default(),
                self.path.display()
            ))
            .next(what_there_is(ids))),
            several => Err(Error::new(format!(
                "'{}' stands for {} snapshots",
                name.escape_default(),
                several.len()
            ))
            .next(what_there_is(
                &several.iter().map(|i| &ids[*i]).collect::<Vec<_>>(),
            ))),
        }
    }

    /// The id `latest` points to, if it is a valid one. Whether that snapshot is
    /// still there is another question.
    pub fn latest(&self) -> Option<String> {
        let target = rustix::fs::readlinkat(&self.dir, LATEST, Vec::new()).ok()?;
        let target = target.into_string().ok()?;
        id::is_valid(&target).then_some(target)
    }

    /// The ids of all published snapshots, oldest first.
    ///
    /// # Errors
    ///
    /// The store's directory cannot be read.
    pub fn ids(&self) -> Result<Vec<String>> {
        let mut ids: Vec<String> = self
            .names()?
            .into_iter()
            .filter_map(|name| name.into_string().ok())
            .filter(|name| id::is_valid(name))
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// All names in the set's directory.
    pub(super) fn names(&self) -> Result<Vec<CString>> {
        names_in(&self.dir).map_err(|cause| fault("read", &self.path, cause))
    }

    pub(super) fn entry(&self, id: String) -> Entry {
        Entry {
            manifest: self.read_manifest(&id),
            path: self.path.join(&id),
            id,
        }
    }

    fn read_manifest(&self, id: &str) -> std::result::Result<Manifest, String> {
        let (_, file) = self.open_manifest(id)?;
        parse(&read_text(file)?, id)
    }

    /// Opens a snapshot's directory and the manifest in it, which is a regular file.
    pub(super) fn open_manifest(
        &self,
        id: &str,
    ) -> std::result::Result<(OwnedFd, OwnedFd), String> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let unreadable = |what: &str, cause: Errno| match cause {
            Errno::NOENT => format!("{what} is missing"),
            // ELOOP: a symbolic link where none belongs.
            Errno::LOOP => format!("{what} is a symbolic link"),
            Errno::NOTDIR => format!("{what} is not a directory"),
            other => format!("{what} cannot be read: {other}"),
        };
        let dir = rustix::fs::openat(&self.dir, id, flags | OFlags::DIRECTORY, Mode::empty())
            .map_err(|cause| unreadable("the snapshot", cause))?;
        // O_NONBLOCK: a FIFO in its place must not make us wait for its writer.
        let file = rustix::fs::openat(&dir, MANIFEST, flags | OFlags::NONBLOCK, Mode::empty())
            .map_err(|cause| unreadable(MANIFEST, cause))?;
        let stat = rustix::fs::fstat(&file).map_err(|cause| unreadable(MANIFEST, cause))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(format!("{MANIFEST} is not a regular file"));
        }
        Ok((dir, file))
    }
}

/// All names in a directory but `.` and `..`.
pub(crate) fn names_in(dir: impl AsFd) -> rustix::io::Result<Vec<CString>> {
    // Opened again: a directory's read position belongs to the open file, and a
    // second listing through the same one would start where the first ended.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(dir, ".", flags, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 1 << 15];
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

/// The text of a manifest.
pub(super) fn read_text(file: OwnedFd) -> std::result::Result<Vec<u8>, String> {
    let too_large = || format!("{MANIFEST} is larger than {MAX_MANIFEST} bytes");
    let size = rustix::fs::fstat(&file).map_or(0, |stat| stat.st_size);
    if u64::try_from(size).is_ok_and(|size| size > MAX_MANIFEST) {
        return Err(too_large());
    }
    // Bounded by what is read, too: it could grow meanwhile.
    let mut text = Vec::new();
    std::fs::File::from(file)
        .take(MAX_MANIFEST + 1)
        .read_to_end(&mut text)
        .map_err(|cause| format!("{MANIFEST} cannot be read: {cause}"))?;
    if text.len() as u64 > MAX_MANIFEST {
        return Err(too_large());
    }
    Ok(text)
}

/// Understands and checks the manifest of the snapshot `id`.
pub(super) fn parse(text: &[u8], id: &str) -> std::result::Result<Manifest, String> {
    /// All that can be relied on in a version not known yet.
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let damaged = |cause: serde_json::Error| format!("{MANIFEST} is damaged: {cause}");
    let too_new = |version: u32| {
        format!(
            "{MANIFEST} has version {version}, this program knows {VERSION}: use a newer snapshim"
        )
    };
    shape::check_size(text)?;
    let manifest: Manifest = match serde_json::from_slice(text) {
        Ok(manifest) => manifest,
        Err(cause) => {
            return Err(match serde_json::from_slice::<Versioned>(text) {
                Ok(Versioned { version }) if version > VERSION => too_new(version),
                _ => damaged(cause),
            });
        }
    };
    match manifest.version {
        0 => return Err(format!("{MANIFEST} is damaged: there is no version 0")),
        version if version > VERSION => return Err(too_new(version)),
        _ => {}
    }
    if manifest.id != id {
        return Err(format!(
            "{MANIFEST} is that of another snapshot, '{}'",
            manifest.id.escape_default()
        ));
    }
    shape::check(&manifest).map_err(|cause| format!("{MANIFEST} is damaged: {cause}"))?;
    Ok(manifest)
}

fn what_there_is(ids: &[impl AsRef<str>]) -> String {
    /// Ids shown before it is cut short.
    const SHOWN: usize = 20;
    if ids.is_empty() {
        return "there are none yet: take one with 'snapshim checkpoint'".to_owned();
    }
    let newest: Vec<&str> = ids.iter().rev().take(SHOWN).map(AsRef::as_ref).collect();
    let more = match ids.len() - newest.len() {
        0 => String::new(),
        more => format!(" and {more} older"),
    };
    format!("there are: {}{more}", newest.join(" "))
}
