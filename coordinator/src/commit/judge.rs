//! Whether a commit point is reached: looked at with the gate shut and drained.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Acquire;

use snapshim_gate::abi::Gate;
use snapshim_gate::slot::Seen;
use snapshim_gate::table::FileId;
use snapshim_gate::watch::{self, Noted, Watch};

use super::{CommitPoint, files};
use crate::capture::Member;
use crate::hold::evidence::{self, Scan};
use crate::hold::process::{self, Pid};

/// What is known of the ground on which a point is judged.
#[derive(Debug)]
pub struct Ground<'a, 's> {
    /// The gate of the set.
    pub gate: &'a Gate,
    /// What is watched.
    pub roots: &'a [PathBuf],
    /// The files there were when the checkpoint began.
    pub members: &'a [Member],
    /// Who could change them then.
    pub seen: &'s Scan,
}

/// Judges one point, again and again.
#[derive(Debug)]
pub struct Judge<'a> {
    ground: &'a Ground<'a, 'a>,
    point: CommitPoint,
    /// Identity and ctime of each member when the gate was armed.
    ctimes: HashMap<PathBuf, (FileId, i64, i64)>,
    /// Of processes that held no write lock when they were last looked at: the changes
    /// they had made by then.
    lockless: BTreeMap<files::Key, files::Changes>,
    /// Of processes that were seen to hold one: likewise.
    locked: BTreeMap<files::Key, files::Changes>,
    below: files::Below<'a>,
}

/// Members whose ctimes are compared; more take too long under a hold.
const MAX_STATS: usize = 5_000;

impl<'a> Judge<'a> {
    /// Under the hold after which the gate is armed.
    pub fn new(ground: &'a Ground<'a, 'a>, point: CommitPoint) -> Judge<'a> {
        let ctimes = match point {
            CommitPoint::Sync | CommitPoint::Rename | CommitPoint::Idle(_) => ctimes(ground),
            _ => HashMap::new(),
        };
        Judge {
            ground,
            point,
            ctimes,
            lockless: BTreeMap::new(),
            locked: BTreeMap::new(),
            below: files::Below::new(ground.roots, ground.members),
        }
    }

    fn watch(&self) -> &Watch {
        &self.ground.gate.header().watch
    }

    /// Whether the point is reached now. `is_quiet`: nothing has been changed since the
    /// gate was armed, for some time. What cannot be looked at is not reached.
    pub fn is_reached(&mut self, is_quiet: bool) -> bool {
        match self.point {
            CommitPoint::Write => true,
            CommitPoint::Sync => self.watch().is_synced() && self.all_changes_were_seen(),
            CommitPoint::Rename => {
                self.watch().is_renamed() && self.was_put_in_place() && self.all_changes_were_seen()
            }
            CommitPoint::Close => self.is_closed(),
            CommitPoint::Lock => self.is_unlocked(is_quiet),
            CommitPoint::Unit => self.is_between_units(),
            CommitPoint::Idle(_) => is_quiet && self.all_changes_were_seen(),
            CommitPoint::Auto => false,
        }
    }

    /// Whether a member has been replaced by another file since: renames elsewhere are none
    /// of ours.
    fn was_put_in_place(&self) -> bool {
        self.ctimes.iter().any(|(path, (id, _, _))| {
            std::fs::symlink_metadata(path)
                .is_ok_and(|meta| (meta.dev(), meta.ino()) != (id.dev, id.ino))
        })
    }

    /// Whether every member that was changed since was changed by a call that was noted, and
    /// every such call can be followed.
    fn all_changes_were_seen(&self) -> bool {
        self.watch().blind.load(Acquire) == 0
            && self.ground.members.len() <= MAX_STATS
            && self.ctimes.iter().all(|(path, (id, ctime, nsec))| {
                let Ok(meta) = std::fs::symlink_metadata(path) else {
                    return true; // its name went: a change of a directory
                };
                let is_same = (meta.dev(), meta.ino()) == (id.dev, id.ino);
                !is_same
                    || (meta.ctime(), meta.ctime_nsec()) == (*ctime, *nsec)
                    || self.watch().has(*id)
            })
    }

    /// Whether nobody has a file open for writing. Also those that own no slot: what they
    /// have open they may have inherited.
    fn is_closed(&self) -> bool {
        files::workers(self.ground.gate).is_some() && self.nobody(&[], |file| file.is_writer)
    }

    /// Whether no process but these has a file open of which that is true. Those that
    /// may not be looked at are the evidence's to speak of.
    fn nobody(&self, but: &[Pid], is_it: impl Fn(&files::Open) -> bool) -> bool {
        let me = std::process::id();
        process::all().is_ok_and(|all| {
            let others = all
                .into_iter()
                .filter(|pid| *pid != me && !but.contains(pid));
            let mut open = others.filter_map(|pid| self.open(pid));
            !open.any(|mut open| open.any(|file| is_it(&file)))
        })
    }

    /// Whether the program marks its units, and nobody is in one, or was when it ended.
    fn is_between_units(&self) -> bool {
        let mut slots = self.ground.gate.used_slots().iter();
        self.watch().counted(Noted::Units) > 0
            && !self.watch().has_vanished(watch::UNIT)
            && !slots.any(|slot| slot.units.load(Acquire) > 0)
    }

    /// The processes that hold a lock on a member, in the form of the door's list.
    pub fn holders(&self) -> Vec<u64> {
        let workers = files::workers(self.ground.gate).unwrap_or_default();
        let pids = workers.into_values().filter_map(|worker| worker.pid);
        let locks = |pid: &Pid| {
            self.open(*pid)
                .is_none_or(|mut open| open.any(|f| f.is_locked))
        };
        pids.filter(locks).filter_map(files::packed).collect()
    }

    /// What a process has open below the watched paths; `None` if that cannot be told.
    fn open(&self, pid: Pid) -> Option<impl Iterator<Item = files::Open> + use<>> {
        let open = files::open_below(pid, &self.below);
        open.ok().map(Vec::into_iter)
    }

    /// Whether nobody holds a write lock under which something was changed, and none vanished
    /// with its owner.
    fn is_unlocked(&mut self, is_quiet: bool) -> bool {
        let Some(workers) = files::workers(self.ground.gate) else {
            return false;
        };
        let mut is_free = !self.watch().has_vanished(watch::LOCK);
        let mappers = evidence::mappers(self.ground.seen, self.ground.gate);
        let is_settled = workers.values().all(|worker| !worker.is_unsettled);
        let mut looked_at = Vec::new();
        for (key, worker) in workers {
            let known = self.lockless.get(&key);
            let Some(pid) = worker.pid else {
                // It gave its lock up first; or was seen without one, and changed nothing since.
                let held = self.locked.get(&key) == Some(&worker.changes);
                is_free &= !held && !worker.is_unsettled || known == Some(&worker.changes);
                continue;
            };
            let Some(mut open) = self.open(pid) else {
                is_free = false;
                continue;
            };
            looked_at.push(pid);
            if !open.any(|file| file.is_write_locked) {
                self.lockless.insert(key, worker.changes);
                continue;
            }
            // Granted since it was seen without any, and nothing changed since, by nobody: a
            // lock may be one process's and the changes under it another's. Stores into a mapping, also
            // one that is gone by now, are changes that were not counted.
            is_free &= is_settled && known == Some(&worker.changes) && !mappers.contains(&pid);
            self.locked.insert(key, worker.changes);
        }
        is_free && self.uses_locks(is_quiet) && self.nobody(&looked_at, |file| file.is_write_locked)
    }

    /// Whether the absence of locks says something: the program was seen to lock, change and
    /// unlock; or it uses locks, and changes nothing without one.
    fn uses_locks(&self, is_quiet: bool) -> bool {
        let watch = self.watch();
        watch.counted(Noted::ChangedUnderLock) > 0 && watch.counted(Noted::Unlocked) > 0
            || is_quiet && files::seen(self.ground.gate, Seen::Lock) > 0
    }
}

fn ctimes(ground: &Ground<'_, '_>) -> HashMap<PathBuf, (FileId, i64, i64)> {
    let stat = |member: &Member| {
        let meta = std::fs::symlink_metadata(&member.path).ok()?;
        let times = (member.id, meta.ctime(), meta.ctime_nsec());
        Some((member.path.clone(), times))
    };
    ground
        .members
        .iter()
        .take(MAX_STATS)
        .filter_map(stat)
        .collect()
}
