//! Taking a slot from an owner that is gone.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::memory::{Cell, Memory, Mutation};
use crate::slot::{FREE, REAPING, Slot};

/// Frees a slot whose owner, process start time `start_time` included, was found
/// to be gone. `false` if somebody else was first, or if the slot was meanwhile
/// taken by another owner with the same ids (a reused pid): the slot is taken
/// before it is reset, and what was taken is looked at once more.
pub fn reap<M: Memory>(slot: &Slot<M>, owner: u64, start_time: u64) -> bool {
    if owner == FREE || owner == REAPING {
        return false;
    }
    if M::mutated(Mutation::ReapBeforeTaking) {
        slot.count.store(0, Release);
    }
    if slot.owner.cas(owner, REAPING).is_err() {
        return false;
    }
    if slot.start_time.load(Acquire) != start_time && !M::mutated(Mutation::ReapWithoutStartTime) {
        slot.owner.store(owner, Release);
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
