//! At which of the program's own points the gate is shut.
//!
//! | module | what it does |
//! |---|---|
//! | [`reach`] | waits for the point, and shuts the gate there |
//! | [`judge`] | whether the point is reached, looked at under the hold |
//! | [`locked`] | the same of `lock`, told from what was seen of each process |
//! | [`observed`] | what the programs were seen to do, and what `auto` makes of it |
//! | [`locks`] | who holds which write lock, as the kernel tells |
//! | [`seal`] | that nothing has changed, where calls are only noticed |
//! | [`files`] | which files under the watched paths the processes of the set have open |
//!
//! The shim only shuts the gate at a moment that looks right; what is claimed is
//! judged here, with the gate shut and everything drained.

pub mod files;
pub mod judge;
pub mod locked;
pub mod locks;
pub mod observed;
pub mod reach;
#[cfg(test)]
mod schedules;
pub mod seal;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use snapshim_gate::watch;

/// A point at which a cut may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitPoint {
    /// Between complete calls.
    Write,
    /// After everything that was changed has been made durable by the program.
    Sync,
    /// While no write lock is held.
    Lock,
    /// While no member is open for writing.
    Close,
    /// Right after a rename: the end of a save that replaces a file.
    Rename,
    /// While no thread is in a unit of work that the program itself has marked.
    Unit,
    /// After nothing was changed for so long.
    Idle(Duration),
    /// The strongest point that the program is seen to offer.
    Auto,
}

impl CommitPoint {
    /// The calls that may reach it, as bits of [`watch::Watch::points`].
    pub fn bits(self) -> u32 {
        match self {
            CommitPoint::Sync => watch::SYNC,
            CommitPoint::Lock => watch::LOCK,
            CommitPoint::Close => watch::CLOSE,
            CommitPoint::Rename => watch::RENAME,
            CommitPoint::Unit => watch::UNIT,
            CommitPoint::Write | CommitPoint::Idle(_) | CommitPoint::Auto => 0,
        }
    }

    /// Whether it can be told though members were mapped before it was reached, if they are not any
    /// more: what was stored into them counts as no change that was seen. [`CommitPoint::Auto`] may
    /// choose such a one.
    pub fn may_have_been_mapped(self) -> bool {
        matches!(
            self,
            CommitPoint::Lock | CommitPoint::Close | CommitPoint::Unit | CommitPoint::Auto
        )
    }

    /// Whether it is told from the calls that change files, so that one which is not noted spoils it.
    pub fn needs_notes(self) -> bool {
        matches!(
            self,
            CommitPoint::Sync | CommitPoint::Rename | CommitPoint::Idle(_) | CommitPoint::Lock
        )
    }

    /// What is claimed of a snapshot at this point, and what is not.
    pub fn claim(self) -> &'static str {
        match self {
            CommitPoint::Write => "between complete calls; a logical update may be half done",
            CommitPoint::Sync => {
                "every member changed since the checkpoint began to wait had been made durable \
                 by the program itself, and no change was in flight; whether a logical update \
                 was complete is not known"
            }
            CommitPoint::Lock => {
                "no write lock was held on a member, or nothing was changed since the one that \
                 was held had been granted; what is done without a lock is not covered"
            }
            CommitPoint::Close => "no member was open for writing by a program of the set",
            CommitPoint::Rename => "nothing was changed since a file was put in place by rename",
            CommitPoint::Unit => "no thread was in a unit of work as the program marks them",
            CommitPoint::Idle(_) => "nothing was changed for that long before the cut",
            CommitPoint::Auto => "",
        }
    }

    /// What a snapshot at this point may be all the same, for whoever has to choose.
    pub fn limits(self) -> &'static str {
        match self {
            CommitPoint::Write => "a logical update of several calls may be half done",
            CommitPoint::Sync => {
                "a program that syncs in the middle of an update is not told from one that syncs \
                 at its end"
            }
            CommitPoint::Lock => {
                "an update done without a lock, or under several locks one after another, may be \
                 half done"
            }
            CommitPoint::Close => {
                "an update of several files, each closed after it was written, may be half done"
            }
            CommitPoint::Rename => {
                "an update of several files, each put in place by itself, may be half done"
            }
            CommitPoint::Unit => "what the program does outside its units may be half done",
            CommitPoint::Idle(_) => {
                "an update in which the program pauses for that long may be half done"
            }
            CommitPoint::Auto => "",
        }
    }
}

impl fmt::Display for CommitPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommitPoint::Write => f.write_str("write"),
            CommitPoint::Sync => f.write_str("sync"),
            CommitPoint::Lock => f.write_str("lock"),
            CommitPoint::Close => f.write_str("close"),
            CommitPoint::Rename => f.write_str("rename"),
            CommitPoint::Unit => f.write_str("unit"),
            CommitPoint::Idle(time) => write!(f, "idle:{}ms", time.as_millis()),
            CommitPoint::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for CommitPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<CommitPoint, String> {
        match text {
            "write" => Ok(CommitPoint::Write),
            "sync" => Ok(CommitPoint::Sync),
            "lock" => Ok(CommitPoint::Lock),
            "close" => Ok(CommitPoint::Close),
            "rename" => Ok(CommitPoint::Rename),
            "unit" => Ok(CommitPoint::Unit),
            "auto" => Ok(CommitPoint::Auto),
            other => idle(other).ok_or_else(|| {
                format!(
                    "there is no commit point `{other}`; there are write, sync, lock, close, \
                     rename, unit, idle:200ms, and auto"
                )
            }),
        }
    }
}

/// `idle:200ms`, or with a plain number, which is milliseconds.
fn idle(text: &str) -> Option<CommitPoint> {
    let time = text.strip_prefix("idle:")?;
    let time = match time.parse::<u64>() {
        Ok(ms) => Duration::from_millis(ms),
        Err(_) => crate::cli::args::parse_duration(time).ok()?,
    };
    let sensible = Duration::from_millis(1)..=Duration::from_secs(3600);
    sensible.contains(&time).then_some(CommitPoint::Idle(time))
}

/// What is done if the point is not reached in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// Nothing is published.
    Fail,
    /// The cut is made there.
    At(CommitPoint),
}

impl FromStr for Otherwise {
    type Err = String;

    fn from_str(text: &str) -> Result<Otherwise, String> {
        match text {
            "fail" => Ok(Otherwise::Fail),
            "auto" => Err("say one point, or fail".into()),
            point => point.parse().map(Otherwise::At),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_as_they_are_written() {
        for text in [
            "write",
            "sync",
            "lock",
            "close",
            "rename",
            "unit",
            "auto",
            "idle:200ms",
        ] {
            let point: CommitPoint = text.parse().unwrap();
            assert_eq!(point.to_string(), text);
        }
        assert_eq!(
            "idle:50".parse(),
            Ok(CommitPoint::Idle(Duration::from_millis(50)))
        );
        assert_eq!(
            "idle:2s".parse(),
            Ok(CommitPoint::Idle(Duration::from_secs(2)))
        );
        for text in [
            "", "idle", "idle:", "idle:0", "idle:-1", "idle:2h", "Write", "locks",
        ] {
            assert!(text.parse::<CommitPoint>().is_err(), "{text}");
        }
        assert_eq!("fail".parse(), Ok(Otherwise::Fail));
        assert!("auto".parse::<Otherwise>().is_err());
    }
}
