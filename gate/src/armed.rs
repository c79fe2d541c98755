//! What a call does at an armed gate: what it notes in [`Watch`], when it shuts the gate,
//! and who waits at the door. The shim's side of a commit point, without its system calls, so
//! that the code the simulation of schedules plays is the code that runs
//! (`coordinator/src/commit/schedules.rs`).

use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::slot::Slot;
use crate::table::FileId;
use crate::watch::{self, Noted, Tracked, Watch};
use crate::word;

/// Whether locks are noted while this is the gate's word: from the first hold of a checkpoint on,
/// also while a boundary is looked at. A lock is granted then as at any other time, and what
/// is given up later may be another.
#[inline(always)]
pub const fn notes_locks(word: u32) -> bool {
    !word::is_open(word) && !word::is_guarded(word)
}

/// A way to break the rules on purpose: each must make the simulation fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// What was changed under a lock counts as settled when any other is given up.
    AnyUnlockSettles,
    /// Locks are noted only while the gate is armed, not while it is shut.
    LocksNotedArmedOnly,
    /// The judge does not ask who waits for a lock since before the checkpoint.
    WaitersAreForgotten,
    /// Changes are not counted in the slot.
    ChangesUncounted,
    /// Whoever holds a lock waits at the door like anybody else.
    DoorForHolders,
    /// The door is for ever.
    DoorWithoutBound,
    /// The judge trusts a lock that it has not seen before.
    NewLocksArePassed,
    /// The judge forgets who held a lock and is gone.
    TheDeadAreForgotten,
    /// The judge looks before calls in flight have returned.
    JudgedUndrained,
    /// The judge looks only at processes that have made changes.
    OnlyWorkersLookedAt,
}

/// The rules: as they are written, or broken.
pub trait Rules {
    /// Whether they are broken in this way; `false` outside the simulation.
    #[inline(always)]
    fn broken(_: Break) -> bool {
        false
    }
}

/// The rules as they are written.
#[derive(Debug)]
pub enum AsWritten {}

impl Rules for AsWritten {}

/// What a call does to members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Changes this file.
    File(FileId),
    /// Changes a directory.
    Name,
    /// Renames something.
    Rename,
    /// Changes what cannot be told, or will later.
    Unknown,
}

/// Kinds of locks that do not see one another, or end in different ways: giving up one leaves
/// another on the same descriptor alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of a process: `F_SETLK`, `lockf`.
    Posix,
    /// Of an open file description: `F_OFD_SETLK`.
    Ofd,
    /// `flock`.
    Flock,
}

/// The descriptors under which a process was granted write locks, and has given none up since,
/// modulo 64, by kind. A descriptor that was closed stays: its lock may live on with another process.
/// So it errs on the side of a lock that is gone.
#[derive(Debug, Default)]
pub struct Locks {
    posix: AtomicU64,
    ofd: AtomicU64,
    flock: AtomicU64,
}

impl Locks {
    /// None.
    pub const fn none() -> Locks {
        Locks {
            posix: AtomicU64::new(0),
            ofd: AtomicU64::new(0),
            flock: AtomicU64::new(0),
        }
    }

    fn of(&self, kind: Kind) -> &AtomicU64 {
        match kind {
            Kind::Posix => &self.posix,
            Kind::Ofd => &self.ofd,
            Kind::Flock => &self.flock,
        }
    }

    const fn bit(fd: i32) -> u64 {
        1 << (fd as u32 % 64)
    }

    /// Whether there is one.
    pub fn is_any(&self) -> bool {
        (self.posix.load(Relaxed) | self.ofd.load(Relaxed) | self.flock.load(Relaxed)) != 0
    }

    /// A copy, as a forked child has it.
    pub fn inherited(&self) -> Locks {
        let copy = |kind| AtomicU64::new(self.of(kind).load(Relaxed));
        Locks {
            posix: copy(Kind::Posix),
            ofd: copy(Kind::Ofd),
            flock: copy(Kind::Flock),
        }
    }

    /// A write lock was granted.
    pub fn took(&self, watch: &Watch, kind: Kind, fd: i32) {
        self.of(kind).fetch_or(Locks::bit(fd), Relaxed);
        watch.count(Noted::Locked);
    }

    /// A lock was given up, or made one for reading.
    pub fn gave_up<R: Rules>(&self, watch: &Watch, slot: Option<&Slot>, kind: Kind, fd: i32) {
        let before = self.of(kind).fetch_and(!Locks::bit(fd), AcqRel);
        if before & Locks::bit(fd) != 0 {
            watch.count(Noted::Unlocked);
        }
        // Should this process end now, its lock has not vanished with it; and what it has changed
        // was not done under a lock that somebody else still holds.
        let Some(slot) = slot else { return };
        let changed = slot.changed.fetch_add(1, AcqRel).wrapping_add(1);
        if !self.is_any() || R::broken(Break::AnyUnlockSettles) {
            slot.settled.store(changed, Release);
        }
    }
}

/// Notes what a call that passes an armed gate is about to do. Whether there is something to be
/// done about it when it returns: see [`changed`].
pub fn note<R: Rules>(
    watch: &Watch,
    slot: Option<&Slot>,
    locks: &Locks,
    change: Change,
    is_nested: bool,
    is_durable: impl FnOnce() -> bool,
) -> bool {
    if let Change::None = change {
        return false;
    }
    let arming = watch.arming.load(Relaxed);
    // What the outer call of this thread has noted covers it.
    if let (true, Some(slot), Change::File(id)) = (is_nested, slot, change)
        && let Some(outer) = Tracked::unpack(slot.tracked.load(Relaxed), arming)
        && watch.is(outer, id)
    {
        return false;
    }
    // Noted as begun before it is counted: whoever makes everything durable finds it in
    // flight, or the count moved.
    let tracked = match change {
        Change::File(id) if slot.is_some() && !is_nested => watch.begin(id),
        _ => None,
    };
    let number = watch.change();
    if locks.is_any() {
        watch.count(Noted::ChangedUnderLock);
    }
    let Some(slot) = slot else {
        watch.set_blind();
        return false;
    };
    if !R::broken(Break::ChangesUncounted) {
        slot.changed.fetch_add(1, AcqRel);
    }
    match (change, tracked) {
        _ if is_nested => {
            watch.set_blind();
            false
        }
        (Change::File(_), Some(tracked)) => {
            slot.ticket.store(u32::from(is_durable()), Relaxed);
            slot.tracked.store(tracked.pack(arming), Relaxed);
            true
        }
        (Change::Rename, _) => {
            slot.ticket.store(number, Relaxed);
            slot.tracked.store(Tracked::RENAME.pack(arming), Relaxed);
            true
        }
        (Change::File(_) | Change::Name, _) => false,
        (Change::Unknown | Change::None, _) => {
            watch.set_blind();
            false
        }
    }
}

/// After a call that was noted, while it is still counted. The points it may have reached:
/// to be handed to [`shut_at`] when it is counted no more.
pub fn changed(watch: &Watch, slot: &Slot, result: isize) -> u32 {
    let packed = slot.tracked.load(Relaxed);
    slot.tracked.store(0, Relaxed);
    let Some(tracked) = Tracked::unpack(packed, watch.arming.load(Relaxed)) else {
        return 0;
    };
    let ticket = slot.ticket.load(Relaxed);
    if tracked == Tracked::RENAME {
        // What is in flight may end after the rename.
        if result != 0 || !watch.is_still() {
            return 0;
        }
        watch.renamed.fetch_max(ticket, AcqRel);
        watch.count(Noted::Renamed);
        return match watch.is_renamed() {
            true => watch::RENAME,
            false => 0,
        };
    }
    let is_durable = ticket != 0 && result >= 0;
    watch.end(tracked, is_durable);
    match is_durable && watch.is_synced() {
        true => watch::SYNC,
        false => 0,
    }
}

/// Shuts the gate, if it is armed for one of these points; whether it did, and waiters are to
/// be woken. `now`: CLOCK_MONOTONIC, ns.
pub fn shut_at(word: &AtomicU32, watch: &Watch, points: u32, now: impl FnOnce() -> u64) -> bool {
    let armed = word.load(Relaxed);
    if !word::is_armed(armed) || watch.points.load(Relaxed) & points == 0 {
        return false;
    }
    let now = now();
    if now > watch.until_ns.load(Relaxed) {
        // Nobody waits any more.
        let open = word::next(armed, word::OPEN);
        let _ = word.compare_exchange(armed, open, AcqRel, Relaxed);
        return false;
    }
    // Before the gate is shut, so that whoever finds it shut finds the time. Of two threads
    // that are here together, either's will do.
    watch.shut_ns.store(now, Relaxed);
    let shut = word::next(armed, word::CLOSED);
    word.compare_exchange(armed, shut, SeqCst, Relaxed).is_ok()
}

/// What becomes of somebody at the door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// He goes in.
    Open,
    /// He waits, at most so long, ns, and asks again.
    Shut(u64),
}

/// Whether a process, as [`crate::slot::Owner::pack`]ed with its id as thread id, has to wait at the door
/// before it takes a lock or begins a unit. It has come at `came`, and waits at most as long as a
/// call may wait. Then it goes in, and so may all: the point will not be reached.
pub fn door<R: Rules>(
    word: u32,
    watch: &Watch,
    process: u64,
    is_holder: bool,
    came: u64,
    now: u64,
    bound_ns: u64,
) -> Door {
    // Whoever holds a lock must be able to go on: to upgrade it, to take more, to give it up.
    if is_holder && !R::broken(Break::DoorForHolders) {
        return Door::Open;
    }
    if !word::is_armed(word) || !watch.is_shut_to(process) {
        return Door::Open;
    }
    let spent = now.saturating_sub(came);
    let is_over = now > watch.until_ns.load(Relaxed) || spent >= bound_ns;
    if is_over && !R::broken(Break::DoorWithoutBound) {
        watch.open_door();
        return Door::Open;
    }
    Door::Shut(bound_ns.saturating_sub(spent).max(1))
}
