//! A thread's slot: found again, or claimed.

use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use snapshim_gate::abi::Gate;
use snapshim_gate::reap::{self, Claimed};
use snapshim_gate::slot::{FREE, Owner, Slot};

use crate::{attach, sys, thread};

/// Owners looked at per claim in search of dead ones: bounds the cost of a claim,
/// and keeps pace, for a claim makes at most one slot stale.
const DEAD_CHECKED: usize = 16;

/// This thread's slot, claimed if need be. `None`: there is no room, or no safe way.
#[cold]
pub(crate) fn slot(gate: &'static Gate) -> Option<&'static Slot> {
    let thread = thread::current();
    let process = attach::page().generation.load(Acquire);
    if thread.generation.get() == process {
        // SAFETY: claimed in this process; a mapped gate stays mapped.
        return Some(unsafe { &*thread.slot.get() });
    }
    // A child of vfork would leave its id, soon a dead one, in its parent's word.
    if attach::is_sandboxed() || attach::is_borrowing() {
        return None;
    }
    let claimant = Claimant::new(sys::gettid());
    let slot = claimant.claim(gate)?;
    thread.slot.set(slot);
    thread.header.set(gate.header());
    // Last: from here on calls of this thread, handlers' included, take the slot.
    thread
        .generation
        .set(attach::page().generation.load(Acquire));
    Some(slot)
}

/// Who claims.
struct Claimant {
    owner: Owner,
    start_time: u64,
    image: u64,
}

impl Claimant {
    fn new(tid: u32) -> Claimant {
        Claimant {
            owner: attach::owner(tid),
            start_time: attach::page().start_time.load(Relaxed),
            image: attach::image(),
        }
    }

    /// A slot: one left under our own name, a free one among those in use, one of
    /// a dead thread, a new one, and when all are taken, any dead thread's.
    fn claim(&self, gate: &'static Gate) -> Option<&'static Slot> {
        self.left_or_free(gate)
            .or_else(|| self.of_the_dead(gate, DEAD_CHECKED))
            .or_else(|| self.new_one(gate))
            .or_else(|| self.of_the_dead(gate, usize::MAX))
    }

    fn take(&self, slot: &Slot) -> bool {
        slot.claim(self.owner, self.start_time, self.image)
    }

    fn left_or_free(&self, gate: &'static Gate) -> Option<&'static Slot> {
        let own = self.owner.pack();
        let mut free = None;
        for slot in gate.used_slots() {
            let raw = slot.owner.load(Relaxed);
            if raw == own {
                // Left by a dead thread whose id we were given, or taken by a
                // handler of ours a moment ago and quiet again: ours either way.
                if let Some(claimed) = Claimed::read(slot) {
                    gate.header().watch.note_end(slot);
                    reap::reap(slot, claimed);
                }
                if self.take(slot) {
                    return Some(slot);
                }
            }
            if raw == FREE && free.is_none() {
                free = Some(slot);
            }
        }
        free.filter(|slot| self.take(slot))
    }

    /// A dead thread's slot, of this process or any other of its pid namespace.
    /// Begins at a place of its own, so that a row of long-lived threads is not
    /// looked at by every claimant.
    fn of_the_dead(&self, gate: &'static Gate, limit: usize) -> Option<&'static Slot> {
        let used = gate.used_slots();
        let begin = (self.owner.tid as usize).wrapping_mul(31) % used.len().max(1);
        let (before, after) = used.split_at_checked(begin)?;
        after
            .iter()
            .chain(before)
            .take(limit)
            .find(|slot| self.free_if_dead(gate, slot) && self.take(slot))
    }

    fn free_if_dead(&self, gate: &Gate, slot: &Slot) -> bool {
        let Some(claimed) = Claimed::read(slot) else {
            return false;
        };
        let is_dead = Owner::unpack(claimed.owner).is_some_and(|owner| {
            owner.pidns == self.owner.pidns && sys::is_dead(owner.pid, owner.tid)
        });
        if is_dead {
            gate.header().watch.note_end(slot);
        }
        is_dead && reap::reap(slot, claimed)
    }

    fn new_one(&self, gate: &'static Gate) -> Option<&'static Slot> {
        let high_water = &gate.header().high_water;
        let begin = (high_water.load(Relaxed) as usize).min(gate.slots().len());
        for (index, slot) in gate.slots().iter().enumerate().skip(begin) {
            if slot.owner.load(Relaxed) == FREE && self.take(slot) {
                high_water.fetch_max(index as u32 + 1, SeqCst);
                return Some(slot);
            }
        }
        None
    }
}
