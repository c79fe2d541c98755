//! Whether a commit point is reached: looked at with the gate shut and drained.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Acquire;
use std::time::Instant;

use snapshim_gate::abi::Gate;
use snapshim_gate::slot::Seen;
use snapshim_gate::table::FileId;
use snapshim_gate::watch::{self, Noted, Watch};

use super::locked::{Ended, LockJudge, Look, State};
use super::seal::Seal;
use super::{CommitPoint, files};
use crate::capture::{Member, Scope};
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
    /// Where files are looked for.
    pub scope: &'a Scope,
    /// Who could change them when the checkpoint began.
    pub seen: &'s Scan,
}

/// Judges one point, again and again.
#[derive(Debug)]
pub struct Judge<'a> {
    ground: &'a Ground<'a, 'a>,
    point: CommitPoint,
    /// Identity and ctime of each member when the gate was armed.
    ctimes: HashMap<PathBuf, (FileId, i64, i64)>,
    /// What is known of locks.
    locks: LockJudge,
    /// Where not everything is noted: what all files were like when this was judged last.
    seal: Option<Seal>,
    sealed_at: Instant,
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
            locks: LockJudge::default(),
            seal: None,
            sealed_at: Instant::now(),
            below: files::Below::new(ground.roots, ground.members),
        }
    }

    fn watch(&self) -> &Watch {
        &self.ground.gate.header().watch
    }

    /// Whether the point is reached now. `is_quiet`: nothing has been changed since the
    /// gate was armed, for some time. What cannot be looked at is not reached.
    pub fn is_reached(&mut self, is_quiet: bool) -> bool {
        if self.ground.seen.is_partly_seen() && self.point.needs_notes() {
            return self.is_reached_unnoted(is_quiet);
        }
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

    /// The same, where changes are made that are not noted. What all files are like is looked at first:
    /// if they are so when they have been captured, nothing has changed since.
    fn is_reached_unnoted(&mut self, is_quiet: bool) -> bool {
        let before = self.seal.take();
        let since = std::mem::replace(&mut self.sealed_at, Instant::now());
        self.seal = Seal::of(self.ground.scope);
        let Some(now) = &self.seal else { return false };
        match self.point {
            CommitPoint::Idle(time) => {
                let is_same = before.is_some_and(|before| now.is_as(&before));
                is_same && is_quiet && since.elapsed() >= time
            }
            // Nobody holds any, nor has ended with one: then it does not matter what was changed.
            CommitPoint::Lock => {
                let ended = self.ended();
                let Some(workers) = files::workers(self.ground.gate) else {
                    return false;
                };
                let is_gone = |worker: &files::Worker| worker.pid.is_none() && worker.locks;
                !(ended.unsettled || ended.locker || workers.values().any(is_gone))
                    && self.uses_locks(is_quiet)
                    && self.nobody(&[], |file| file.is_write_locked)
            }
            // Whether a change that is not noted came before, nothing tells.
            _ => false,
        }
    }

    /// Whether it is told by comparing one look with the next.
    pub fn compares(&self) -> bool {
        self.ground.seen.is_partly_seen() && matches!(self.point, CommitPoint::Idle(_))
    }

    /// What has to be so when the files have been captured.
    pub fn into_seal(self) -> Option<Seal> {
        self.seal
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
            // Stores into a mapping, also one that is gone by now, are changes that nobody noted.
            && evidence::mappers(self.ground.seen, self.ground.gate).is_empty()
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
        // Stores into a mapping, also one that is gone by now, are changes that were not counted.
        let mappers = evidence::mappers(self.ground.seen, self.ground.gate);
        let look = |(key, worker): (files::Key, files::Worker)| Look {
            key,
            // First: a lock that is granted in between is seen by one of the two looks.
            is_waiting: self.locks.asks_who_waits(&key)
                && (worker.pid).is_some_and(|pid| files::waits_for_lock(pid, &worker.lockers)),
            state: match worker.pid.map(|pid| self.open(pid)) {
                None => State::Gone,
                Some(None) => State::Unknown,
                Some(Some(open)) => {
                    let open: Vec<files::Open> = open.filter(|f| f.is_write_locked).collect();
                    match open.is_empty() {
                        true => State::Unlocked,
                        false => State::Locked {
                            is_own: !open.iter().any(|file| file.is_shared_lock),
                        },
                    }
                }
            },
            changes: worker.changes,
            may_store: worker.pid.is_some_and(|pid| mappers.contains(&pid)),
            is_unsettled: worker.is_unsettled,
            locks: worker.locks,
            image: worker.image,
        };
        let looked_at: Vec<Pid> = workers.values().filter_map(|worker| worker.pid).collect();
        let looks = workers.into_iter().map(look).collect();
        let is_first = self.locks.is_first();
        let is_free = self.locks.is_free(looks, self.ended());
        let may_be = is_free && self.uses_locks(is_quiet);
        // All others take time: when it matters, and once so that it is known who has inherited what.
        if !may_be && !is_first {
            return false;
        }
        let others = self.others_are_free(&looked_at);
        others && may_be
    }

    /// Whether no process but these holds a write lock, and none has ended with one.
    fn others_are_free(&mut self, but: &[Pid]) -> bool {
        let Ok(all) = process::all() else {
            return false;
        };
        let me = std::process::id();
        let holds = |pid: &Pid| {
            let open = self.open(*pid);
            open.is_some_and(|mut open| open.any(|file| file.is_write_locked))
        };
        let others = all
            .into_iter()
            .filter(|pid| *pid != me && !but.contains(pid));
        let holders = others.filter(holds);
        let holders = holders.map(|pid| (pid, process::start_time(pid).unwrap_or(0)));
        let holders = holders.collect();
        let below = &self.below;
        self.locks.is_free_of_others(holders, |(pid, start)| {
            let is_there = process::is_alive(*pid)
                && process::start_time(*pid).is_none_or(|now| now == *start);
            is_there.then(|| {
                let open = files::open_below(*pid, below);
                open.map_or(true, |open| open.iter().any(|file| file.is_write_locked))
            })
        })
    }

    /// Who ended since the checkpoint began.
    fn ended(&self) -> Ended {
        Ended {
            unsettled: self.watch().has_vanished(watch::LOCK),
            locker: self.watch().has_vanished(watch::LOCKER),
            changer: self.watch().has_vanished(watch::CHANGER),
            anybody: self.watch().has_vanished(watch::ANYBODY),
            heir: self.watch().has_vanished(watch::HEIR),
        }
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
