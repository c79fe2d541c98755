//! Whether a commit point is reached: looked at with the gate shut and drained.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use snapshim_gate::abi::Gate;
use snapshim_gate::slot::Seen;
use snapshim_gate::table::FileId;
use snapshim_gate::watch::{Noted, Watch};

use super::{CommitPoint, files, locks};
use crate::capture::Member;
use crate::hold::process::Pid;

/// What is known of the ground on which a point is judged.
#[derive(Debug)]
pub struct Ground<'a> {
    /// The gate of the set.
    pub gate: &'a Gate,
    /// What is watched.
    pub roots: &'a [PathBuf],
    /// The files there were when the checkpoint began.
    pub members: Vec<Member>,
}

/// Judges one point, again and again.
#[derive(Debug)]
pub struct Judge<'a> {
    ground: &'a Ground<'a>,
    point: CommitPoint,
    /// Identity and ctime of each member when the gate was armed.
    ctimes: HashMap<PathBuf, (FileId, i64, i64)>,
    /// Of processes that held no write lock when they were last looked at: the changes
    /// they had made by then.
    lockless: BTreeMap<Pid, u64>,
    inodes: HashSet<u64>,
}

/// Members whose ctimes are compared; more take too long under a hold.
const MAX_STATS: usize = 5_000;

impl<'a> Judge<'a> {
    /// Under the hold after which the gate is armed.
    pub fn new(ground: &'a Ground<'a>, point: CommitPoint) -> Judge<'a> {
        let ctimes = match point {
            CommitPoint::Sync | CommitPoint::Rename | CommitPoint::Idle(_) => ctimes(ground),
            _ => HashMap::new(),
        };
        Judge {
            ground,
            point,
            ctimes,
            lockless: BTreeMap::new(),
            inodes: ground.members.iter().map(|member| member.id.ino).collect(),
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
            CommitPoint::Rename => self.watch().is_renamed() && self.all_changes_were_seen(),
            CommitPoint::Close => self.is_closed(),
            CommitPoint::Lock => self.is_unlocked(is_quiet),
            CommitPoint::Idle(_) => is_quiet && self.all_changes_were_seen(),
            CommitPoint::Auto => false,
        }
    }

    /// Whether every member that was changed since was changed by a call that was noted.
    fn all_changes_were_seen(&self) -> bool {
        self.ground.members.len() <= MAX_STATS
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

    /// Whether no process of the set has a file open for writing.
    fn is_closed(&self) -> bool {
        let pids = files::changes(self.ground.gate);
        pids.keys().all(|pid| {
            files::open_below(*pid, self.ground.roots)
                .is_ok_and(|open| !open.iter().any(|file| file.is_writer))
        })
    }

    /// Whether nobody holds a write lock under which something was changed.
    fn is_unlocked(&mut self, is_quiet: bool) -> bool {
        let Ok(all) = locks::held() else {
            return false;
        };
        let changes = files::changes(self.ground.gate);
        let mut locked: HashSet<Pid> = HashSet::new();
        let mut is_free = true;
        for lock in all {
            if !self.matters(&lock, &changes) {
                continue;
            }
            let Some(pid) = lock.pid else {
                is_free = false;
                continue;
            };
            locked.insert(pid);
            // Granted since it was seen without any, and nothing changed since then.
            let unchanged = changes
                .get(&pid)
                .is_some_and(|now| self.lockless.get(&pid) == Some(now));
            is_free &= unchanged;
        }
        for (pid, now) in changes {
            if !locked.contains(&pid) {
                self.lockless.insert(pid, now);
            }
        }
        is_free && self.uses_locks(is_quiet)
    }

    /// Whether a lock is on a file under the watched paths.
    fn matters(&self, lock: &locks::WriteLock, set: &BTreeMap<Pid, u64>) -> bool {
        if self.inodes.contains(&lock.ino) {
            return true;
        }
        // A file made since, say. Only processes of the set are asked.
        let has = |pid: &Pid| {
            files::open_below(*pid, self.ground.roots)
                .map_or(true, |open| open.iter().any(|file| file.ino == lock.ino))
        };
        match lock.pid {
            Some(pid) => set.contains_key(&pid) && has(&pid),
            None => set.keys().any(has),
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

fn ctimes(ground: &Ground<'_>) -> HashMap<PathBuf, (FileId, i64, i64)> {
    let stat = |member: &Member| {
        let meta = std::fs::symlink_metadata(&member.path).ok()?;
        let times = (member.id, meta.ctime(), meta.ctime_nsec());
        Some((member.path.clone(), times))
    };
    ground.members.iter().take(MAX_STATS).filter_map(stat).collect()
}
