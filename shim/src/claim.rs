//! A thread's slot: found again, or claimed.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use snapshim_gate::abi::Gate;
use snapshim_gate::reap;
use snapshim_gate::slot::{FREE, Owner, Slot};

use crate::{attach, sys, thread};

/// Dead threads looked for per claim: bounds the cost of a claim, and is more
/// than enough to keep pace, for each claim makes at most one slot stale.
const DEAD_THREADS_CHECKED: usize = 16;

/// This thread's slot, claimed if need be. `None`: there is no room, or no safe way.
#[cold]
pub(crate) fn slot(gate: &Gate) -> Option<&'static Slot> {
    let thread = thread::current();
    if attach::is_sandboxed() {
        return None;
    }
    let owner = attach::owner(sys::gettid());
    let slot = claim(gate, owner)?;
    thread.slot.set(slot);
    // Last: from here on calls of this thread, handlers' included, take the slot.
    thread.generation.set(attach::page().generation.load(Acquire));
    Some(slot)
}

fn claim(gate: &Gate, owner: Owner) -> Option<&'static Slot> {
    let page = attach::page();
    let (start, image) = (page.start_time.load(Relaxed), attach::image());
    let own = owner.pack();
    let mut free = None;
    let mut checked = 0;
    for slot in gate.used_slots() {
        let raw = slot.owner.load(Relaxed);
        if raw == own {
            // Left by a dead thread whose id we were given, or taken by a handler
            // of ours a moment ago and quiet again: ours either way.
            reap::reap(slot, raw, slot.start_time.load(Acquire));
            if slot.claim(owner, start, image) {
                return Some(slot);
            }
        }
        if raw == FREE {
            free = free.or(Some(slot));
            continue;
        }
        if free.is_none()
            && checked < DEAD_THREADS_CHECKED
            && let Some(other) = Owner::unpack(raw)
            && other.pid == owner.pid
            && other.pidns == owner.pidns
        {
            checked += 1;
            if sys::is_dead(other.pid, other.tid)
                && reap::reap(slot, raw, slot.start_time.load(Acquire))
            {
                free = Some(slot);
            }
        }
    }
    if let Some(slot) = free
        && slot.claim(owner, start, image)
    {
        return Some(slot);
    }
    let high_water = &gate.header().high_water;
    for (index, slot) in gate.slots().iter().enumerate() {
        if slot.owner.load(Relaxed) == FREE && slot.claim(owner, start, image) {
            high_water.fetch_max(index as u32 + 1, AcqRel);
            return Some(slot);
        }
    }
    None
}
