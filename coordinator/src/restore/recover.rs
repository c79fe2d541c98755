//! A restore that did not come to its end, found by the next one.

use std::path::{Path, PathBuf};

use super::journal::{Home, Journal, State};
use super::place::Place;
use super::swap::{Standing, Swap};
use crate::{Error, Result};

/// Entries told one by one.
const TOLD: usize = 1000;

/// Looks for a staging directory in each of these directories. One that was only just made is
/// removed unless `look_only`.
///
/// # Errors
///
/// There is one that is in use, is damaged, or is not ours.
pub(super) fn find(parents: &[PathBuf], look_only: bool) -> Result<Option<Swap>> {
    for parent in parents {
        let Some(place) = Place::open(parent)? else {
            continue;
        };
        if let Some(journal) = Journal::read(&place.fd, &place.path)? {
            return with_all(journal, place).map(Some);
        }
        if let Some(home) = Home::read(&place.fd, &place.path)? {
            drop(place);
            if let Some(found) = at(&home)? {
                return Ok(Some(found));
            }
            return Err(Error::new(format!(
                "{} belongs to a restore whose journal in {} is gone",
                parent.join(super::place::staging()).display(),
                home.display()
            ))
            .next("look at what it holds, move what you need, and remove it"));
        }
        if !place.is_unused()? {
            return Err(Error::new(format!(
                "{} holds something, but no journal says what",
                place.path.display()
            ))
            .next("look at it, move what you need, and remove it"));
        }
        if !look_only {
            Journal::remove(&place.fd)
                .map_err(|cause| crate::store::fault("clear", &place.path, cause))?;
            place.remove()?;
        }
    }
    Ok(None)
}

fn at(home: &Path) -> Result<Option<Swap>> {
    let Some(place) = Place::open(home)? else {
        return Ok(None);
    };
    match Journal::read(&place.fd, &place.path)? {
        Some(journal) => with_all(journal, place).map(Some),
        None => Ok(None),
    }
}

fn with_all(journal: Journal, home: Place) -> Result<Swap> {
    let mut places = vec![home];
    if journal.places[0].parent.0 != places[0].parent {
        return Err(Error::new(format!(
            "{} was made in {}: it was moved",
            places[0].path.display(),
            journal.places[0].parent.0.display()
        ))
        .next("move it back there"));
    }
    for form in &journal.places[1..] {
        let parent = &form.parent.0;
        match Place::open(parent)? {
            Some(place) => places.push(place),
            // The others are removed before the first, and made after it.
            None if matches!(journal.state, State::Staging | State::Done) => {}
            None => {
                return Err(Error::new(format!(
                    "{} of {} is missing",
                    parent.join(super::place::staging()).display(),
                    journal.describe()
                ))
                .next("mount the file system it is on, and try again"));
            }
        }
    }
    Ok(Swap { journal, places })
}

/// What is there of each entry, for people.
pub(super) fn account(swap: &Swap) -> Vec<String> {
    let (new, old, changed) = swap.count();
    let state = match swap.journal.state {
        State::Undoing => "was being undone and did not come to its end",
        State::Kept => "is complete, and what it replaced is kept",
        _ => "did not come to its end",
    };
    let mut lines = vec![format!(
        "{} {state}: {new} entries are new, {old} are old{}",
        swap.journal.describe(),
        match changed {
            0 => String::new(),
            n => format!(", {n} were changed since"),
        }
    )];
    for op in swap.journal.ops.iter().take(TOLD) {
        let word = match swap.standing(op) {
            Standing::New => "new",
            Standing::Old => "old",
            Standing::Changed => "changed since",
        };
        lines.push(format!("{word}: {}", swap.journal.path(op).display()));
    }
    if swap.journal.ops.len() > TOLD {
        lines.push(format!("and {} more", swap.journal.ops.len() - TOLD));
    }
    lines
}
