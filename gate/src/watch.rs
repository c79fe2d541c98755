//! What is noted while the gate is armed: which members were changed, which of
//! them were made durable since, and what reached a commit point.
//!
//! Shims write it, in the course of calls that are counted in their slots; the
//! coordinator reads it when it has drained them. A shim's own look at it only
//! serves to shut the gate at the right moment: whether the point was reached is
//! for the coordinator to say, under the hold.
//!
//! Everything that cannot be followed (no room, a call inside a call, work handed to the
//! kernel) sets [`Watch::blind`], never nothing.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::slot::{FORKED, Slot};
use crate::table::FileId;

/// Files whose changes can be followed at the same time.
pub const MAX_WATCHED: usize = 220;

/// Processes known to hold locks while the door is shut; of others it is not known.
pub const MAX_HOLDERS: usize = 16;

/// Point: after a call that made everything changed durable. A bit of [`Watch::points`].
pub const SYNC: u32 = 1;
/// Point: after a lock was given up.
pub const LOCK: u32 = 2;
/// Point: after a member that was open for writing was closed.
pub const CLOSE: u32 = 4;
/// Point: after a rename.
pub const RENAME: u32 = 8;
/// Point: the program says so (`snapshim_end`).
pub const UNIT: u32 = 16;

/// In what is noted of the dead: one of them had asked for locks. (Not a point.)
pub const LOCKER: u32 = 1 << 8;

/// Likewise: one of them had changed something.
pub const CHANGER: u32 = 1 << 9;

/// Likewise: somebody ended at all.
pub const ANYBODY: u32 = 1 << 10;

/// Likewise: one of them had been forked from another, and had changed something or asked for
/// locks. Either may have been under a lock that somebody else has, too.
pub const HEIR: u32 = 1 << 11;

/// What was noted, for [`Watch::counts`].
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// Write locks granted.
    Locked = 0,
    /// Locks given up.
    Unlocked = 1,
    /// Changes made by a process that had taken a write lock and not given one up since.
    ChangedUnderLock = 2,
    /// Calls that made a changed member durable.
    Synced = 3,
    /// Members closed that had been open for writing.
    Closed = 4,
    /// Renames.
    Renamed = 5,
    /// Units the program itself ended.
    Units = 6,
}

/// Number of counters in [`Watch::counts`].
pub const NOTED: usize = 8;

/// The state of an entry of [`Watch::files`].
const FREE: u32 = 0;
const CLAIMING: u32 = 1;
const USED: u32 = 2;

/// A file that was changed while the gate is armed.
#[repr(C)]
#[derive(Debug)]
pub struct WatchedFile {
    dev: AtomicU64,
    ino: AtomicU64,
    state: AtomicU32,
    /// Changes begun.
    begun: AtomicU32,
    /// Changes that have returned.
    done: AtomicU32,
    /// The greatest number of changes known to be durable.
    synced: AtomicU32,
}

/// Written by the coordinator while the gate is shut and drained, by shims while it is armed.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Watch {
    /// C. The points that shut the gate: [`SYNC`] and others, ored.
    pub points: AtomicU32,
    /// C. The low bits of the armed word: tells notes of one arming from those of another.
    pub arming: AtomicU32,
    /// C. When nobody waits for a point any more, CLOCK_MONOTONIC, ns.
    pub until_ns: AtomicU64,
    /// S. When the gate was shut at a boundary, CLOCK_MONOTONIC, ns.
    pub shut_ns: AtomicU64,
    /// S. Changes of members begun.
    pub changes: AtomicU32,
    /// S. Not zero: something was changed by a way that cannot be followed.
    pub blind: AtomicU32,
    /// S. The number, among the changes, of the last rename that succeeded.
    pub renamed: AtomicU32,
    /// S. Entries of `files` that may be in use.
    used: AtomicU32,
    /// C. Not zero: whoever would begin a unit, or holds no lock and would take one, waits.
    pub door: AtomicU32,
    /// Whoever reaps a slot. [`LOCK`], [`UNIT`]: its owner ended in the middle of something;
    /// [`LOCKER`], [`CHANGER`], [`ANYBODY`], [`HEIR`].
    vanished: AtomicU32,
    /// C. Processes that hold a lock, as [`Owner::pack`](crate::slot::Owner::pack)ed with
    /// their process id as thread id; 0 for none.
    pub holders: [AtomicU64; MAX_HOLDERS],
    /// S. What was noted since the gate was made, by [`Noted`].
    pub counts: [AtomicU32; NOTED],
    files: [WatchedFile; MAX_WATCHED],
}

/// A followed file of a [`Watch`], by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked(u16);

impl Tracked {
    /// Stands for a rename, which changes no file.
    pub const RENAME: Tracked = Tracked(MAX_WATCHED as u16);

    /// The form in [`crate::slot::Slot::tracked`]; never 0.
    pub fn pack(self, arming: u32) -> u32 {
        (arming << 16) | (u32::from(self.0) + 1)
    }

    /// What was packed under the same arming.
    pub fn unpack(packed: u32, arming: u32) -> Option<Tracked> {
        let index = (packed & 0xffff).checked_sub(1)?;
        (packed >> 16 == arming & 0xffff && index as usize <= MAX_WATCHED)
            .then_some(Tracked(index as u16))
    }
}

impl Watch {
    /// Forgets what was noted, and begins anew. For the coordinator, with the gate shut
    /// and drained: nobody else is at it. But for who ended: that is told from the beginning of the
    /// checkpoint on, see [`Watch::forget_ended`].
    pub fn arm(&self, word: u32) {
        for file in &self.files {
            file.state.store(FREE, Relaxed);
            for count in [&file.begun, &file.done, &file.synced] {
                count.store(0, Relaxed);
            }
        }
        for cell in [
            &self.used,
            &self.changes,
            &self.blind,
            &self.renamed,
            &self.door,
        ] {
            cell.store(0, Relaxed);
        }
        self.arming.store(arming(word), Relaxed);
    }

    fn entries(&self) -> usize {
        (self.used.load(Acquire) as usize).min(MAX_WATCHED)
    }

    /// Counts a change that is about to be made; its number, from 1.
    pub fn change(&self) -> u32 {
        self.changes.fetch_add(1, AcqRel).wrapping_add(1)
    }

    /// Notes that something cannot be followed.
    #[inline(always)]
    pub fn set_blind(&self) {
        self.blind.store(1, Release);
    }

    /// Notes that `id` is about to be changed. `None`: it cannot be followed (and that is
    /// noted).
    pub fn begin(&self, id: FileId) -> Option<Tracked> {
        let Some(tracked) = self.find(id, true) else {
            self.set_blind();
            return None;
        };
        self.file(tracked).begun.fetch_add(1, AcqRel);
        Some(tracked)
    }

    /// Notes that the change has been made. `is_durable`: it is on disk already (O_SYNC).
    pub fn end(&self, tracked: Tracked, is_durable: bool) {
        let file = self.file(tracked);
        let done = file.done.fetch_add(1, AcqRel).wrapping_add(1);
        // Only if it is known which of several in flight were.
        if is_durable && file.begun.load(Acquire) == done && file.synced.load(Acquire) + 1 == done {
            file.synced.store(done, Release);
        }
    }

    /// Before a call that makes `id` durable: the entry, and the changes it will cover.
    /// `None` if there are none, or if one is in flight, of which it is not known whether it will be.
    pub fn sync_begins(&self, id: FileId) -> Option<(Tracked, u32)> {
        let tracked = self.find(id, false)?;
        let file = self.file(tracked);
        let done = file.done.load(Acquire);
        (file.begun.load(Acquire) == done).then_some((tracked, done))
    }

    /// After it has succeeded.
    pub fn sync_ends(&self, tracked: Tracked, covered: u32) {
        self.file(tracked).synced.fetch_max(covered, AcqRel);
    }

    /// Before a call that makes everything durable: how many changes it will cover.
    pub fn sync_all_begins(&self) -> Option<u32> {
        let changes = self.changes.load(Acquire);
        self.is_still().then_some(changes)
    }

    /// After it has succeeded. If something was changed meanwhile, it is not known what
    /// was covered.
    pub fn sync_all_ends(&self, covered: u32) {
        if self.changes.load(Acquire) != covered {
            return;
        }
        for file in &self.files[..self.entries()] {
            file.synced
                .fetch_max(file.done.load(Acquire).min(covered), AcqRel);
        }
    }

    /// Whether everything changed was made durable since, nothing is in flight, and
    /// there was something. For the coordinator, who has drained: a fact. For a
    /// shim: a reason to try.
    pub fn is_synced(&self) -> bool {
        let used = self.entries();
        used > 0
            && self.blind.load(Acquire) == 0
            && self.files[..used].iter().all(|file| {
                let begun = file.begun.load(Acquire);
                file.done.load(Acquire) == begun
                    && file.synced.load(Acquire) == begun
                    && file.state.load(Acquire) != CLAIMING
            })
    }

    /// Whether no change of a file is in flight.
    pub fn is_still(&self) -> bool {
        self.files[..self.entries()].iter().all(|file| {
            let done = file.done.load(Acquire);
            file.begun.load(Acquire) == done
        })
    }

    /// To be told of a slot before it is reaped: its owner, who is gone, may have been in the
    /// middle of a unit, or have changed something since it last gave up a lock.
    pub fn note_end(&self, slot: &Slot) {
        self.vanished.fetch_or(ANYBODY, AcqRel);
        let locks = slot.seen[crate::slot::Seen::Lock as usize].load(Relaxed) > 0;
        let is_unsettled = slot.changed.load(Acquire) != slot.settled.load(Acquire);
        if locks && is_unsettled {
            self.vanished.fetch_or(LOCK, AcqRel);
        }
        let changes = slot.changed.load(Acquire) != 0;
        if changes {
            self.vanished.fetch_or(CHANGER, AcqRel);
        }
        if slot.image.load(Relaxed) & FORKED != 0 && (changes || locks) {
            self.vanished.fetch_or(HEIR, AcqRel);
        }
        if locks {
            self.vanished.fetch_or(LOCKER, AcqRel);
        }
        if slot.units.load(Acquire) != 0 {
            self.vanished.fetch_or(UNIT, AcqRel);
        }
    }

    /// Forgets who ended. For the coordinator, before it shuts the gate for the first time.
    pub fn forget_ended(&self) {
        self.vanished.store(0, Release);
    }

    /// Whether somebody ended so, since the checkpoint began; `point`: [`LOCK`], [`UNIT`] or
    /// [`LOCKER`], [`CHANGER`], [`ANYBODY`], [`HEIR`].
    pub fn has_vanished(&self, point: u32) -> bool {
        self.vanished.load(Acquire) & point != 0
    }

    /// Whether nothing was changed since a rename that succeeded.
    pub fn is_renamed(&self) -> bool {
        let renamed = self.renamed.load(Acquire);
        renamed != 0 && renamed == self.changes.load(Acquire)
    }

    /// Whether this file was changed.
    pub fn has(&self, id: FileId) -> bool {
        self.find(id, false).is_some()
    }

    /// Whether a tracked file is this one.
    pub fn is(&self, tracked: Tracked, id: FileId) -> bool {
        let file = self.file(tracked);
        tracked != Tracked::RENAME
            && file.dev.load(Relaxed) == id.dev
            && file.ino.load(Relaxed) == id.ino
    }

    /// Shuts the door; `holders` pass it all the same. For the coordinator.
    pub fn shut_door(&self, holders: impl IntoIterator<Item = u64>) {
        for cell in &self.holders {
            cell.store(0, Relaxed);
        }
        for (cell, holder) in self.holders.iter().zip(holders) {
            cell.store(holder, Relaxed);
        }
        self.door.store(1, Release);
    }

    /// Opens the door. Whoever waits there looks again when the gate's word changes, or soon.
    pub fn open_door(&self) {
        self.door.store(0, Release);
    }

    /// Whether the door is shut to a process.
    pub fn is_shut_to(&self, process: u64) -> bool {
        self.door.load(Acquire) != 0
            && !self
                .holders
                .iter()
                .any(|holder| holder.load(Relaxed) == process)
    }

    /// Notes an event.
    pub fn count(&self, what: Noted) {
        self.counts[what as usize].fetch_add(1, Relaxed);
    }

    /// How often something was noted.
    pub fn counted(&self, what: Noted) -> u32 {
        self.counts[what as usize].load(Relaxed)
    }

    fn file(&self, tracked: Tracked) -> &WatchedFile {
        &self.files[usize::from(tracked.0) % MAX_WATCHED]
    }

    fn find(&self, id: FileId, make: bool) -> Option<Tracked> {
        /// A thread that is making an entry needs a few instructions for it.
        const PATIENCE: u32 = 1000;
        let mut index = 0;
        let mut tries = 0;
        while index < MAX_WATCHED {
            let file = &self.files[index];
            match file.state.load(Acquire) {
                USED => {
                    if file.dev.load(Relaxed) == id.dev && file.ino.load(Relaxed) == id.ino {
                        // Whoever made it may have been killed before he did this.
                        if make {
                            self.used.fetch_max(index as u32 + 1, AcqRel);
                        }
                        return Some(Tracked(index as u16));
                    }
                    index += 1;
                }
                FREE if !make => return None,
                FREE if file
                    .state
                    .compare_exchange(FREE, CLAIMING, SeqCst, Relaxed)
                    .is_ok() =>
                {
                    file.dev.store(id.dev, Relaxed);
                    file.ino.store(id.ino, Relaxed);
                    file.state.store(USED, Release);
                    self.used.fetch_max(index as u32 + 1, AcqRel);
                    return Some(Tracked(index as u16));
                }
                // Somebody is making it: it may be this very file.
                _ => {
                    tries += 1;
                    if tries > PATIENCE {
                        return None;
                    }
                    core::hint::spin_loop();
                }
            }
        }
        None
    }
}

/// What of an armed word tells one arming from another.
pub const fn arming(word: u32) -> u32 {
    crate::word::epoch(word) & 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::word::{ARMED, next};

    fn watch() -> Watch {
        // SAFETY: made of atomics, for which all-zero is a value.
        unsafe { core::mem::zeroed() }
    }

    fn id(ino: u64) -> FileId {
        FileId { dev: 1, ino }
    }

    #[test]
    fn synced_is_when_all_that_was_changed_is_durable() {
        let w = watch();
        assert!(!w.is_synced(), "nothing was changed");
        let a = w.begin(id(1)).unwrap();
        assert_eq!(w.sync_begins(id(1)), None, "in flight");
        w.end(a, false);
        let b = w.begin(id(2)).unwrap();
        w.end(b, false);
        let (file, covered) = w.sync_begins(id(1)).unwrap();
        w.sync_ends(file, covered);
        assert!(!w.is_synced(), "the other is not");
        let (file, covered) = w.sync_begins(id(2)).unwrap();
        let again = w.begin(id(2)).unwrap();
        w.end(again, false);
        w.sync_ends(file, covered);
        assert!(!w.is_synced(), "changed meanwhile");
        let (file, covered) = w.sync_begins(id(2)).unwrap();
        w.sync_ends(file, covered);
        assert!(w.is_synced());
        w.set_blind();
        assert!(!w.is_synced());
    }

    #[test]
    fn a_durable_write_counts_at_once() {
        let w = watch();
        let a = w.begin(id(1)).unwrap();
        w.end(a, true);
        assert!(w.is_synced());
        let plain = w.begin(id(1)).unwrap();
        w.end(plain, false);
        let durable = w.begin(id(1)).unwrap();
        w.end(durable, true);
        assert!(
            !w.is_synced(),
            "O_SYNC flushes what it wrote, not what was before"
        );
    }

    #[test]
    fn a_sync_of_everything_covers_what_was_before_it() {
        let w = watch();
        for ino in 1..4 {
            w.change();
            let file = w.begin(id(ino)).unwrap();
            w.end(file, false);
        }
        let covered = w.sync_all_begins().unwrap();
        w.sync_all_ends(covered);
        assert!(w.is_synced());
        let covered = w.sync_all_begins().unwrap();
        w.change();
        let file = w.begin(id(1)).unwrap();
        assert_eq!(w.sync_all_begins(), None);
        w.end(file, false);
        w.sync_all_ends(covered);
        assert!(!w.is_synced());
    }

    #[test]
    fn too_many_files_are_noted() {
        let w = watch();
        for ino in 0..MAX_WATCHED as u64 {
            assert!(w.begin(id(ino)).is_some());
        }
        assert_eq!(w.blind.load(Relaxed), 0);
        assert!(w.begin(id(999_999)).is_none());
        assert_eq!(w.blind.load(Relaxed), 1);
        w.arm(next(0, ARMED));
        assert_eq!((w.blind.load(Relaxed), w.entries()), (0, 0));
        assert!(w.begin(id(999_999)).is_some());
    }

    #[test]
    fn what_was_tracked_under_another_arming_is_ignored() {
        let tracked = Tracked(7);
        assert_eq!(Tracked::unpack(tracked.pack(3), 3), Some(tracked));
        assert_eq!(Tracked::unpack(tracked.pack(3), 4), None);
        assert_eq!(Tracked::unpack(0, 0), None);
        assert_eq!(Tracked::unpack(0xffff, 0), None);
    }
}
