//! Whether the point `lock` is reached, told from what was seen of each process: without a look at
//! anything, so that it can be tried on made-up programs (`schedules.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;

use snapshim_gate::armed::{AsWritten, Break, Rules};
use snapshim_gate::slot::FORKED;

use super::files::{Changes, Key};

/// What was seen, with the gate shut and drained, of a process that owns slots.
#[derive(Clone, Debug)]
pub struct Look {
    /// Tells it from others.
    pub key: Key,
    /// What it holds.
    pub state: State,
    /// Whether one of its threads waits for a lock, if [`LockJudge::asks_who_waits`]; looked at before
    /// `state` is, so that a lock granted in between is seen in one of them.
    pub is_waiting: bool,
    /// The changes it has made by now.
    pub changes: Changes,
    /// Whether it may have made others that nobody counted: stores into a mapping.
    pub may_store: bool,
    /// Whether some of these were made since it last gave up its locks.
    pub is_unsettled: bool,
    /// Whether it ever asked for a lock.
    pub locks: bool,
    /// The same for those who are forked from one another, and have made no exec since; but for [`FORKED`].
    pub image: u64,
}

/// What ended since the checkpoint began, and whose slot was given up already.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    /// Somebody who had changed something since he last gave up a lock.
    pub unsettled: bool,
    /// Somebody who had ever asked for a lock.
    pub locker: bool,
    /// Somebody who had changed something.
    pub changer: bool,
    /// Somebody.
    pub anybody: bool,
    /// Somebody who was forked from another, and had changed something or asked for a lock.
    pub heir: bool,
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has ended.
    Gone,
    /// It cannot be looked at.
    Unknown,
    /// No write lock on a file below the watched paths.
    Unlocked,
    /// A write lock; `is_own`: none that others can have with it (flock, and those of an open
    /// file description, are inherited).
    Locked {
        /// See there.
        is_own: bool,
    },
}

/// A process that owns no slot, and when it was started.
pub type Outsider = (u32, u64);

/// Judges again and again, while the gate is armed.
#[derive(Debug)]
pub struct LockJudge<R = AsWritten> {
    /// Of processes that held no write lock when they were last looked at: the changes
    /// they had made by then.
    lockless: BTreeMap<Key, Changes>,
    /// Of processes that were seen to hold one: likewise.
    locked: BTreeMap<Key, Changes>,
    /// Processes that held a lock before anything was noted, and were not seen without one since:
    /// what they give up may be another.
    unaccounted: BTreeSet<Key>,
    /// Processes that waited for a lock before anything was noted, and may still: it is granted without
    /// being noted.
    waiting: BTreeSet<Key>,
    /// Processes without a slot that held a lock when they were last looked at: one they have
    /// inherited.
    outsiders: BTreeSet<Outsider>,
    /// The images of all that were seen.
    images: BTreeMap<Key, u64>,
    /// Whether nothing has been looked at: nothing was noted so far.
    is_first: bool,
    /// A lock may have vanished with its owner, and nothing tells that it has not.
    is_lost: bool,
    rules: PhantomData<R>,
}

impl<R> Default for LockJudge<R> {
    fn default() -> LockJudge<R> {
        LockJudge {
            lockless: BTreeMap::new(),
            locked: BTreeMap::new(),
            unaccounted: BTreeSet::new(),
            waiting: BTreeSet::new(),
            outsiders: BTreeSet::new(),
            images: BTreeMap::new(),
            is_first: true,
            is_lost: false,
            rules: PhantomData,
        }
    }
}

impl<R: Rules> LockJudge<R> {
    /// Whether nothing has been looked at. Then all processes are, whatever the first ones are like.
    pub fn is_first(&self) -> bool {
        self.is_first
    }

    /// Whether it matters, of a process, if it waits for a lock: of all when they are first looked
    /// at, then of those who did.
    pub fn asks_who_waits(&self, key: &Key) -> bool {
        (self.is_first || self.waiting.contains(key)) && !R::broken(Break::WaitersAreForgotten)
    }

    /// Whether nobody of these holds a write lock under which something was changed, and none
    /// vanished with its owner.
    pub fn is_free(&mut self, looks: Vec<Look>, ended: Ended) -> bool {
        self.find_lost(&looks, ended);
        let has_vanished = ended.unsettled || self.is_lost;
        let mut is_free = !has_vanished || R::broken(Break::TheDeadAreForgotten);
        let is_settled = looks.iter().all(|look| !look.is_unsettled);
        // Whose changes were made under a lock that another has, it may be, who lives.
        let gone = |look: &Look| look.state == State::Gone && !look.changes.is_empty();
        let is_complete = !ended.changer && !looks.iter().any(gone);
        for look in looks {
            let Look { key, changes, .. } = look;
            let known = self.lockless.get(&key);
            match look.state {
                State::Unknown => is_free = false,
                State::Gone => {
                    // It gave its lock up first; or was seen without one, and changed nothing since.
                    let held = self.locked.get(&key) == Some(&changes);
                    is_free &= !held && !look.is_unsettled
                        || known == Some(&changes)
                        || R::broken(Break::TheDeadAreForgotten);
                }
                State::Unlocked => {
                    self.unaccounted.remove(&key);
                    if !look.is_waiting {
                        self.waiting.remove(&key);
                    }
                    self.lockless.insert(key, changes);
                }
                State::Locked { is_own } => {
                    // Granted since it was seen without any, and nothing changed since, by nobody: a
                    // lock may be one process's and the changes under it another's.
                    is_free &= is_settled
                        && is_complete
                        && known == Some(&changes)
                        && !look.may_store
                        && (is_own || !self.has_relatives(key))
                        || R::broken(Break::NewLocksArePassed);
                    self.locked.insert(key, changes);
                }
            }
        }
        is_free
    }

    /// To be told, after a look at all other processes, of those that hold a write lock; whether that is
    /// nobody, and none has ended with one. `has_it`: whether a process that has been one of them before
    /// is there, and has a lock (now it may own a slot).
    pub fn is_free_of_others(
        &mut self,
        holders: BTreeSet<Outsider>,
        has_it: impl Fn(&Outsider) -> Option<bool>,
    ) -> bool {
        let before = std::mem::replace(&mut self.outsiders, holders);
        let is_free = self.outsiders.is_empty();
        for known in before {
            match has_it(&known) {
                Some(true) => _ = self.outsiders.insert(known),
                Some(false) => {}
                None => self.is_lost = true,
            }
        }
        is_free && !self.is_lost
    }

    /// Whether somebody was forked from a process, or it from him.
    fn has_relatives(&self, key: Key) -> bool {
        let image = self.images.get(&key).map(|image| image | FORKED);
        let mut others = self.images.iter().filter(|(other, _)| **other != key);
        others.any(|(_, other)| Some(other | FORKED) == image)
    }

    /// Of whom it cannot be told whether he had given up what he had.
    fn find_lost(&mut self, looks: &[Look], ended: Ended) {
        self.images
            .extend(looks.iter().map(|look| (look.key, look.image)));
        if std::mem::take(&mut self.is_first) {
            // Also who never asked for a lock may have inherited one, and what he changed while the
            // gate was open was not counted.
            self.is_lost = ended.anybody || looks.iter().any(|look| look.state == State::Gone);
            let locked = looks
                .iter()
                .filter(|l| matches!(l.state, State::Locked { .. }));
            self.unaccounted = locked.map(|look| look.key).collect();
            let waiting = looks.iter().filter(|look| look.is_waiting);
            self.waiting = waiting.map(|look| look.key).collect();
            return;
        }
        // What was one's lock may have been another's, too, and he may never have been seen, if he came and
        // went between two looks: neither who changed something under it nor who had it settles that.
        let is_heir =
            |look: &Look| look.image & FORKED != 0 && (look.locks || !look.changes.is_empty());
        let mut gone = looks.iter().filter(|look| look.state == State::Gone);
        self.is_lost |= ended.heir || gone.any(is_heir);
        let is_there = |key: &Key| {
            let mut those = looks.iter().filter(|look| look.key == *key);
            those.any(|look| look.state != State::Gone)
        };
        self.is_lost |= self.unaccounted.iter().any(|key| !is_there(key));
        let was_busy = |key: &Key| {
            let was_idle = match looks.iter().find(|look| look.key == *key) {
                Some(look) => {
                    look.changes.is_empty() || self.lockless.get(key) == Some(&look.changes)
                }
                None => !ended.changer,
            };
            !is_there(key) && !was_idle
        };
        self.is_lost |= self.waiting.iter().any(was_busy);
        // Of those who are forked from one another one may have had the other's.
        let known: Vec<Key> = self.images.keys().copied().collect();
        let unsure = |key: &Key| was_busy(key) && self.has_relatives(*key);
        self.is_lost |= known.iter().any(unsure);
    }
}
