//! Taking a slot from an owner that is gone.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::memory::{Cell, Memory, Mutation};
use crate::slot::{FREE, REAPING, Slot};

/// A slot as somebody had it. Read it *before* finding out whether the owner is
/// gone: ids and start time of a thread that came after may be the same (a reused
/// thread id, an exec), but each reset raises the generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// [`Slot::owner`].
    pub owner: u64,
    /// [`Slot::start_time`].
    pub start_time: u64,
    generation: u32,
}

impl Claimed {
    /// Who has `slot`; `None` if it is free or being reset.
    pub fn read<M: Memory>(slot: &Slot<M>) -> Option<Claimed> {
        // The owner is written last when a slot is claimed.
        let owner = slot.owner.load(Acquire);
        if owner == FREE || owner == REAPING {
            return None;
        }
        Some(Claimed {
            owner,
            start_time: slot.start_time.load(Relaxed),
            generation: slot.generation.load(Relaxed),
        })
    }

    fn still_stands<M: Memory>(&self, slot: &Slot<M>) -> bool {
        M::mutated(Mutation::ReapWithoutSecondLook)
            || (slot.start_time.load(Acquire) == self.start_time
                && slot.generation.load(Relaxed) == self.generation)
    }
}

/// Frees a slot whose owner, as `claimed` names it, was found to be gone. `false`
/// if somebody else was first, or if the slot was meanwhile taken by another owner
/// with the same ids: the slot is taken before it is reset, and what was taken is
/// looked at once more.
pub fn reap<M: Memory>(slot: &Slot<M>, claimed: Claimed) -> bool {
    if M::mutated(Mutation::ReapBeforeTaking) {
        slot.count.store(0, Release);
    }
    if slot.owner.cas(claimed.owner, REAPING).is_err() {
        return false;
    }
    if !claimed.still_stands(slot) {
        slot.owner.store(claimed.owner, Release);
        return false;
    }
    slot.generation.add(1, Relaxed);
    slot.aside.store(0, Relaxed);
    // Whoever found the owner gone knows what its calls did; a drain that sees the
    // count cleared must know it as well.
    let order = if M::mutated(Mutation::ReapRelaxed) {
        Relaxed
    } else {
        Release
    };
    slot.count.store(0, order);
    slot.start_time.store(0, Relaxed);
    slot.image.store(0, Relaxed);
    slot.owner.store(FREE, Release);
    true
}
