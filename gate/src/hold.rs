//! A hold: the coordinator's side of the protocol.

use core::sync::atomic::Ordering::{Relaxed, Release};

use crate::memory::{Cell, Memory, Mutation};
use crate::slot::Slot;
use crate::word;

/// Shuts the gate. The member table of the bank that `word::next(open, CLOSED)`
/// selects must be written before. Returns the closed word, or the word found
/// if the gate was not open.
pub fn close<M: Memory>(gate: &M::U32) -> Result<u32, u32> {
    let open = gate.load_sc();
    if !word::is_open(open) {
        return Err(open);
    }
    let closed = word::next(open, word::CLOSED);
    let swapped = if M::mutated(Mutation::CloseWithoutFence) {
        gate.cas(open, closed)
    } else {
        gate.cas_sc(open, closed)
    };
    swapped.map(|_| closed)
}

/// Whether no call is in flight in `slots` that the hold `closed` has to wait for.
/// Called after [`close`], with the slots looked up after it.
pub fn is_drained<'a, M: Memory + 'a>(
    closed: u32,
    slots: impl IntoIterator<Item = &'a Slot<M>>,
) -> bool {
    M::mutated(Mutation::CutWithoutDrain) || slots.into_iter().all(|slot| slot.is_quiet(closed))
}

/// Reopens the gate. `false` if the hold was broken: whatever was captured under
/// it is worth nothing.
#[must_use]
pub fn open<M: Memory>(gate: &M::U32, closed: u32, wake_all: impl FnOnce(&M::U32)) -> bool {
    let open = word::next(closed, word::OPEN);
    let ours = if M::mutated(Mutation::OpenWithoutCompare) {
        gate.store(open, Release);
        true
    } else {
        gate.cas(closed, open).is_ok()
    };
    if ours && !M::mutated(Mutation::OpenWithoutWake) {
        wake_all(gate);
    }
    ours
}

/// Lets calls pass again that change nothing of the cut `closed` that is not captured.
/// The table of [`crate::guard`] must be written before. Returns the guarded word; `None`
/// if the hold was broken. `has_marks`: from now on calls mark what they change.
#[must_use]
pub fn guard<M: Memory>(
    gate: &M::U32,
    closed: u32,
    has_marks: bool,
    wake_all: impl FnOnce(&M::U32),
) -> Option<u32> {
    let guarded = word::guarded(closed, has_marks);
    gate.cas_sc(closed, guarded).ok()?;
    wake_all(gate);
    Some(guarded)
}

/// Ends a guard. `false` if it was broken: what was captured under it is worth nothing.
#[must_use]
pub fn unguard<M: Memory>(gate: &M::U32, guarded: u32, wake_all: impl FnOnce(&M::U32)) -> bool {
    if M::mutated(Mutation::UnguardWithoutCompare) {
        gate.store(word::next(guarded, word::OPEN), Release);
        wake_all(gate);
        return true;
    }
    open::<M>(gate, guarded, wake_all)
}

/// Whether the hold still stands.
pub fn stands<M: Memory>(gate: &M::U32, closed: u32) -> bool {
    gate.load(Relaxed) == closed
}

/// Opens a gate that a coordinator left shut when it died. For the holder of
/// the set's lock only: no other coordinator can be at work.
pub fn recover<M: Memory>(gate: &M::U32, wake_all: impl FnOnce(&M::U32)) -> bool {
    let found = gate.load_sc();
    !word::is_open(found) && open::<M>(gate, found, wake_all)
}
