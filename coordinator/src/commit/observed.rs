//! What the programs of a set were seen to do with its files, and what `auto` makes of it.
//!
//! The shim notes it while the gate is armed, and only then: an open gate pays nothing. So there
//! is nothing to know before the first checkpoint at another point than `write`; `auto` arms the
//! gate for half a second then.

use snapshim_gate::abi::Gate;
use snapshim_gate::watch::{Noted, Watch};

use super::CommitPoint;
use super::reach::{OBSERVED, QUIET};

/// How often something was seen, of all processes of the set, since its gate was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Write locks granted.
    pub locks: u32,
    /// Locks given up.
    pub unlocks: u32,
    /// Changes of members by a process that held a write lock.
    pub locked_changes: u32,
    /// Calls that made a changed member durable.
    pub syncs: u32,
    /// Members closed that had been open for writing.
    pub closes: u32,
    /// Renames.
    pub renames: u32,
    /// Whether the program marks its units: not how many.
    pub units: bool,
}

impl Observed {
    /// What was noted so far.
    pub fn of(gate: &Gate) -> Observed {
        Observed::noted(&gate.header().watch)
    }

    fn noted(watch: &Watch) -> Observed {
        Observed {
            locks: watch.counted(Noted::Locked),
            unlocks: watch.counted(Noted::Unlocked),
            locked_changes: watch.counted(Noted::ChangedUnderLock),
            syncs: watch.counted(Noted::Synced),
            closes: watch.counted(Noted::Closed),
            renames: watch.counted(Noted::Renamed),
            units: watch.counted(Noted::Units) > 0,
        }
    }

    /// What counts of it, if `in_part`: a program is held by symbols alone, so that a change that is
    /// not noted would spoil `sync` and `rename`.
    #[must_use]
    pub fn as_noted(self, in_part: bool) -> Observed {
        match in_part {
            true => Observed {
                syncs: 0,
                renames: 0,
                ..self
            },
            false => self,
        }
    }

    /// The points that the programs offer, the strongest first.
    pub fn offered(&self) -> Vec<CommitPoint> {
        let points = [
            (self.units, CommitPoint::Unit),
            (
                self.locked_changes > 0 && self.unlocks > 0,
                CommitPoint::Lock,
            ),
            (self.syncs > 0, CommitPoint::Sync),
            (self.renames > 0, CommitPoint::Rename),
            (self.closes > 0, CommitPoint::Close),
        ];
        let offered = points.into_iter().filter(|(is_offered, _)| *is_offered);
        offered.map(|(_, point)| point).collect()
    }

    /// What `auto` takes, if this is all that is known.
    pub fn choice(&self) -> CommitPoint {
        let strongest = self.offered().first().copied();
        strongest.unwrap_or(CommitPoint::Idle(QUIET))
    }

    /// Why it takes that, in words.
    pub fn why(&self) -> String {
        match self.choice() {
            CommitPoint::Unit => "the program marks its units itself".into(),
            CommitPoint::Lock => format!(
                "files were changed under a write lock ({} changes), and locks were given up ({})",
                self.locked_changes, self.unlocks
            ),
            CommitPoint::Sync => format!(
                "changed files were made durable ({} times), and nothing stronger was seen",
                self.syncs
            ),
            CommitPoint::Rename => format!(
                "files were put in place by rename ({} times), and nothing stronger was seen",
                self.renames
            ),
            CommitPoint::Close => format!(
                "files were closed after writing ({} times), and nothing stronger was seen",
                self.closes
            ),
            _ => format!(
                "nothing better was seen; the next `--at auto` watches for {} ms first, and takes \
                 the strongest point it sees",
                OBSERVED.as_millis()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_point_that_is_offered() {
        let nothing = Observed::default();
        assert!(nothing.offered().is_empty());
        assert_eq!(nothing.choice(), CommitPoint::Idle(QUIET));
        let closes = Observed {
            closes: 1,
            ..nothing
        };
        assert_eq!(closes.choice(), CommitPoint::Close);
        // Locks that nothing is changed under say nothing.
        let reader = Observed {
            locks: 3,
            unlocks: 3,
            ..closes
        };
        assert_eq!(reader.choice(), CommitPoint::Close);
        let all = Observed {
            locked_changes: 1,
            syncs: 1,
            renames: 1,
            units: true,
            ..reader
        };
        assert_eq!(
            all.offered(),
            [
                CommitPoint::Unit,
                CommitPoint::Lock,
                CommitPoint::Sync,
                CommitPoint::Rename,
                CommitPoint::Close
            ]
        );
        for point in [nothing, closes, reader, all] {
            assert!(!point.why().is_empty() && !point.choice().claim().is_empty());
            assert!(!point.choice().limits().is_empty());
        }
    }

    #[test]
    fn notes_become_counts() {
        // SAFETY: made of atomics, for which all-zero is a value.
        let watch: Watch = unsafe { std::mem::zeroed() };
        assert_eq!(Observed::noted(&watch), Observed::default());
        watch.count(Noted::Synced);
        watch.count(Noted::Units);
        watch.count(Noted::Units);
        let seen = Observed::noted(&watch);
        assert_eq!((seen.syncs, seen.units, seen.locks), (1, true, 0));
    }
}
