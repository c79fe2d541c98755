//! Finding the snapshots of a set, also when its gate is long gone: after the
//! machine was started again, the store is all there is.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::hold::set::{self, Set};
use crate::store::pace::Pace;
use crate::store::policy::Policy;
use crate::store::{Store, StoreLock, check_set_name};
use crate::{Error, Result};

use super::{output, usage};

/// The snapshots of one set.
#[derive(Debug)]
pub struct Snapshots {
    /// The set's name.
    pub set: String,
    /// The store it is in.
    pub place: PathBuf,
    /// The store, open.
    pub store: Store,
    /// Which of them stay, as the set says; of a set that is gone nobody knows.
    pub policy: Policy,
}

impl Snapshots {
    /// Takes the right to change the store, when nobody else has it, and removes what was left
    /// half done there.
    pub fn lock(&self) -> Result<StoreLock> {
        let lock = self.store.lock(WAIT)?;
        for line in self.store.sweep(&lock)?.lines() {
            output::note(&format!("snapshim: {}", output::name(&line)));
        }
        Ok(lock)
    }

    /// Removes what is on its way out, after the lock was given up. What cannot be removed is
    /// said, and no failure of what was asked for.
    pub fn clear(&self) {
        if let Err(error) = self.store.clear(&mut Pace::brisk()) {
            output::note(&format!("snapshim: {}", output::name(&error.line())));
        }
    }
}

/// How long a command waits for another one that changes the store.
const WAIT: Duration = Duration::from_secs(10);

/// Finds them: in `place` if given, else where the set says, else, if there is
/// no such set, in the default store of the current directory.
pub fn find(name: Option<&str>, place: Option<&Path>) -> Result<Snapshots> {
    if let Some(place) = place {
        return in_place(name, &set::resolve(place)?);
    }
    match Set::open(name) {
        Ok(set) => {
            let store = Store::open(&set.config.store, &set.name)?;
            Ok(Snapshots {
                set: set.name.clone(),
                place: set.config.store.clone(),
                store,
                policy: set.config.policy.clone(),
            })
        }
        Err(error) => default_place(name).ok_or_else(|| {
            let next = error.next.clone().unwrap_or_default();
            error.next(format!(
                "{next}; or say where its snapshots are with --store"
            ))
        }),
    }
}

/// A snapshot as the user names it, and perhaps a path in it: `ID[:PATH]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named<'a> {
    /// See [`Store::find`].
    pub snapshot: &'a str,
    /// What is behind the first colon.
    pub path: Option<&'a Path>,
}

impl<'a> Named<'a> {
    /// Takes a name apart. Neither ids nor the names of sets have colons in them.
    ///
    /// # Errors
    ///
    /// It cannot be the name of a snapshot, or the path is empty.
    pub fn parse(text: &'a OsStr) -> Result<Named<'a>> {
        let bytes = text.as_bytes();
        let (snapshot, path) = match bytes.iter().position(|byte| *byte == b':') {
            Some(colon) => (&bytes[..colon], Some(&bytes[colon + 1..])),
            None => (bytes, None),
        };
        let wrong = || usage(format!("{text:?} is no snapshot"), "write ID or ID:PATH");
        Ok(Named {
            snapshot: std::str::from_utf8(snapshot).map_err(|_| wrong())?,
            path: match path {
                Some(b"") => return Err(wrong()),
                path => path.map(|path| Path::new(OsStr::from_bytes(path))),
            },
        })
    }
}

/// The path in the live tree that the user means, who may be somewhere inside and come by
/// symbolic links: as it is written, taken from the current directory, if that is `known`;
/// else with the links above it resolved. `None` if neither is.
pub fn locate(path: &Path, known: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    let mut written = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                written.pop();
            }
            part => written.push(part),
        }
    }
    if known(&written) {
        return Some(written);
    }
    let parent = set::resolve(absolute.parent()?).ok()?;
    Some(parent.join(absolute.file_name()?)).filter(|path| known(path))
}

/// The set's snapshots in the default store of the current directory, inside or beside it.
fn default_place(name: Option<&str>) -> Option<Snapshots> {
    let here = set::resolve(Path::new(".")).ok()?;
    let inside = here.join(".snapshim");
    let places = [inside, Store::default_place(&[here])];
    places
        .iter()
        .filter(|p| p.is_dir())
        .find_map(|place| in_place(name, place).ok())
}

fn in_place(name: Option<&str>, place: &Path) -> Result<Snapshots> {
    let set = match name {
        Some(name) => name.to_owned(),
        None => only_set(place)?,
    };
    let store = Store::open(place, &set)?;
    Ok(Snapshots {
        set,
        place: place.to_owned(),
        store,
        policy: Policy::default(),
    })
}

/// The one set that has snapshots in a store.
fn only_set(place: &Path) -> Result<String> {
    let entries = std::fs::read_dir(place).map_err(|cause| {
        Error::new(format!(
            "cannot read the store {}: {cause}",
            place.display()
        ))
        .next("name the directory that `snapshim run --store` was given")
    })?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| check_set_name(name).is_ok())
        .collect();
    names.sort();
    match names.len() {
        1 => Ok(names.remove(0)),
        0 => Err(
            Error::new(format!("there is no set in the store {}", place.display()))
                .next("name the directory that `snapshim run --store` was given"),
        ),
        _ => Err(usage(
            format!(
                "there are several sets in the store {}: {}",
                place.display(),
                names.join(", ")
            ),
            "say which one by its name",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let named = |text: &'static str| Named::parse(OsStr::new(text)).ok();
        let expect = |snapshot, path: Option<&'static str>| {
            Some(Named {
                snapshot,
                path: path.map(Path::new),
            })
        };
        assert_eq!(named("latest~1"), expect("latest~1", None));
        assert_eq!(named("2026:/a:b"), expect("2026", Some("/a:b")));
        assert_eq!(named("2026:"), None);
        assert_eq!(named(":x"), expect("", Some("x")));
    }

    #[test]
    fn paths_are_those_of_the_live_tree() {
        let found = |path: &str, at: &str| locate(Path::new(path), |p| p == Path::new(at));
        assert_eq!(found("/a/./b/../c/", "/a/c"), Some("/a/c".into()));
        let here = std::env::current_dir().unwrap().join("nosuch");
        assert_eq!(found("nosuch", here.to_str().unwrap()), Some(here));
        assert_eq!(found("/proc/self/status", "/nowhere"), None);
        let me = format!("/proc/{}/status", std::process::id());
        assert_eq!(found("/proc/self/status", &me), Some(me.into()));
    }
}
