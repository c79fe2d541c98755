//! Finding the snapshots of a set, also when its gate is long gone: after the
//! machine was started again, the store is all there is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::hold::set::{self, Set};
use crate::store::policy::Policy;
use crate::store::{Store, StoreLock, check_set_name};
use crate::{Error, Result};

use super::usage;

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
    /// Takes the right to change the store, when nobody else has it.
    pub fn lock(&self) -> Result<StoreLock> {
        self.store.lock(WAIT)
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
