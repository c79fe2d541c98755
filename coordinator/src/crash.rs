//! After a program has crashed: its files as the newest good snapshot has them.
//!
//! For programs that are only safe as long as nobody kills them in the middle of an
//! update. What the crash has left is not lost: it is a snapshot of its own first.

use jiff::Timestamp;

use crate::checkpoint::{Options, checkpoint};
use crate::commit::{CommitPoint, Otherwise};
use crate::hold::evidence::reason;
use crate::hold::set::Set;
use crate::progress::Progress;
use crate::restore::{self, Target, What, restore};
use crate::store::Listed;
use crate::store::Store;
use crate::store::policy::Class;
use crate::{Error, Result};

/// What was done about a crash.
#[derive(Debug)]
pub struct PutBack {
    /// The snapshot that was put back.
    pub id: String,
    /// The snapshot of what the crash had left.
    pub crashed: String,
}

/// The newest good snapshot of the set, if there is one.
///
/// # Errors
///
/// The store cannot be opened.
pub fn newest(set: &Set) -> Result<Option<String>> {
    Ok(Store::open_or_create(&set.config.store, &set.name)?.latest())
}

/// The newest good snapshot of those that were cut `not_after` that time: who looks at files after
/// a crash finds nothing wrong with them, and may well make a snapshot of them.
fn newest_before(set: &Set, not_after: Timestamp) -> Result<Option<String>> {
    let listed = Store::open_or_create(&set.config.store, &set.name)?.heads()?;
    let is_before = |listed: &Listed| {
        listed.head.as_ref().is_ok_and(|head| {
            head.class() == Class::Good && head.cut_at().is_some_and(|time| time <= not_after)
        })
    };
    Ok(listed
        .into_iter()
        .rev()
        .find(is_before)
        .map(|found| found.id))
}

/// Puts the newest good snapshot back that was made before the program `ended`, and keeps what
/// it replaces as a snapshot that says why
/// it is not verified. What is older than `not_before` is no good. `how` the program ended:
/// "was ended by signal 9".
///
/// # Errors
///
/// There is no good snapshot; what is there cannot be kept; a process still writes to the
/// files; whatever else keeps a restore from being made. Nothing is replaced then.
pub fn put_back(
    set: &Set,
    options: &Options,
    not_before: Option<&str>,
    ended: Timestamp,
    how: &str,
    progress: &mut dyn Progress,
) -> Result<PutBack> {
    // Ids sort by time.
    let is_new = |id: &String| not_before.is_none_or(|first| id.as_str() >= first);
    let id = newest_before(set, ended)?.filter(is_new).ok_or_else(|| {
        Error::new("there is no verified snapshot since it was started that could be put back")
            .next("`snapshim list` shows what there is; `snapshim restore --in-place` goes further back")
    })?;
    let kept = Options {
        at: CommitPoint::Write,
        otherwise: Otherwise::Fail,
        // It is not to be checked: nobody claims that it is good.
        verify: None,
        hooks: Default::default(),
        doubt: Some(reason(
            "crashed",
            format!("the program {how}: this is what it left, and {id} was put back"),
            None,
        )),
        ..options.clone()
    };
    let crashed = checkpoint(set, &kept, progress)?.manifest.id;
    let _lock = set.lock(options.wait)?;
    let store = Store::open(&set.config.store, &set.name)?;
    let snapshot = store.open_snapshot(store.find(&id)?)?;
    restore(
        &snapshot,
        &What::default(),
        &Target::InPlace,
        Some(&set.config.excludes),
        &restore::Options::default(),
        progress,
        &mut || true,
    )?;
    Ok(PutBack { id, crashed })
}
