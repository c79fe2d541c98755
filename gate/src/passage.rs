//! A call's way past the gate: the writer's side of the protocol.

use core::sync::atomic::Ordering::Release;

use crate::memory::{Cell, Memory, Mutation};
use crate::slot::{Call, Entered, Slot, is_free};
use crate::word;

/// What the protocol asks of the thread that runs it.
pub trait Thread<M: Memory> {
    /// Whether the file of this call is shut by member table `bank`.
    fn is_shut(&mut self, bank: usize) -> bool;
    /// Whether the file of the outermost call in flight in this thread is shut
    /// by member table `bank`.
    fn outer_is_shut(&mut self, bank: usize) -> bool;
    /// Whether there is proof that the outermost call counted in this thread's
    /// slot will never return. May be wrong only on the side of `false`.
    fn outer_is_abandoned(&mut self) -> bool;
    /// Notes what this call is about to change, at the gate armed by `seen`. `is_nested`:
    /// inside another call.
    fn watched(&mut self, seen: u32, is_nested: bool);
    /// Marks what this call is about to change, which is counted and passes the gate.
    /// `is_nested`: inside another call.
    fn mark(&mut self, is_nested: bool);
    /// Whether the gate guarded by `seen` lets this call pass: what it changes is no part of
    /// the cut, or captured; and marks that, if calls are to. If not, it has asked for it.
    /// `is_nested`: inside another call.
    fn may_change(&mut self, seen: u32, is_nested: bool) -> bool;
    /// Waits until what was asked for may be there, or the word is no longer `seen`;
    /// `false` if the time this call may wait in total is spent.
    fn wait_for_chunks(&mut self, word: &M::U32, seen: u32) -> bool;
    /// Waits until the word is no longer `seen`, is woken, or the time this call
    /// may wait in total is spent; `false` if it is spent.
    fn wait(&mut self, word: &M::U32, seen: u32) -> bool;
    /// Wakes everybody who waits on the word.
    fn wake_all(&mut self, word: &M::U32);
}

/// Takes one call past the gate, waiting if it is shut. It is counted in the slot
/// then: [`Slot::leave_frame`] is due when it returns.
#[inline(always)]
pub fn pass<M: Memory, T: Thread<M>>(slot: &Slot<M>, gate: &M::U32, call: Call, thread: &mut T) {
    let entered = slot.enter(gate, call);
    if is_free(&entered) {
        return;
    }
    pass_slowly(slot, gate, call, thread, entered);
}

/// The rest of [`pass`], once the fast path did not apply.
#[cold]
pub fn pass_slowly<M: Memory, T: Thread<M>>(
    slot: &Slot<M>,
    gate: &M::U32,
    call: Call,
    thread: &mut T,
    entered: Entered,
) {
    let Entered {
        mut outer,
        word: mut seen,
    } = entered;
    if outer > 0 && thread.outer_is_abandoned() {
        slot.abandon_outer(call);
        outer = 0;
    }
    loop {
        if word::is_open(seen) || word::is_armed(seen) {
            if outer == 0 {
                slot.mark_passed();
            }
            // Noted before it is made, and after it is counted: whoever drains the slot
            // finds the note.
            if word::is_armed(seen) {
                thread.watched(seen, outer > 0);
            }
            if word::has_marks(seen) {
                thread.mark(outer > 0);
            }
            return;
        }
        if word::is_guarded(seen) {
            if M::mutated(Mutation::GuardedAsOpen) || thread.may_change(seen, outer > 0) {
                if outer == 0 {
                    slot.mark_passed();
                }
                return;
            }
            // Not counted while we wait: whoever ends this guard may begin a hold.
            slot.leave();
            if !thread.wait_for_chunks(gate, seen) {
                break_hold(gate, seen, thread);
            }
            let entered = slot.enter(gate, call);
            outer = entered.outer;
            seen = entered.word;
            continue;
        }
        let bank = word::bank(seen);
        // The drain waits for the outer call, which cannot return before we do.
        let nested = outer > 0
            && (M::mutated(Mutation::NestedAlwaysPasses)
                || (slot.holds_up(seen) && thread.outer_is_shut(bank)));
        if nested {
            if word::has_marks(seen) {
                thread.mark(true);
            }
            return;
        }
        // Not counted while we ask: a handler that interrupts us here would have
        // to wait, and the drain for us, and so for it.
        slot.leave();
        let shut = thread.is_shut(bank);
        if shut && !thread.wait(gate, seen) {
            break_hold(gate, seen, thread);
        }
        let entered = slot.enter(gate, call);
        // The table is this hold's only while the word stands. Counted all the same:
        // the call may outlast this hold, and the next may shut its file.
        if !shut && (entered.word == seen || M::mutated(Mutation::TableWithoutRecheck)) {
            if entered.outer == 0 {
                slot.stand_aside(entered.word);
            }
            // A member all the same, if this hold is about one file only.
            if word::has_marks(entered.word) {
                thread.mark(entered.outer > 0);
            }
            return;
        }
        outer = entered.outer;
        seen = entered.word;
    }
}

/// Takes a call past the gate in a thread that could get no slot: it waits like
/// any other, but cannot be waited for.
#[cold]
pub fn pass_uncounted<M: Memory, T: Thread<M>>(gate: &M::U32, thread: &mut T) {
    loop {
        let seen = gate.load_sc();
        if word::is_open(seen) || word::is_armed(seen) {
            if word::is_armed(seen) {
                thread.watched(seen, true);
            }
            if word::has_marks(seen) {
                thread.mark(true);
            }
            return;
        }
        if word::is_guarded(seen) {
            if thread.may_change(seen, true) {
                return;
            }
            if !thread.wait_for_chunks(gate, seen) {
                break_hold(gate, seen, thread);
            }
            continue;
        }
        if !thread.is_shut(word::bank(seen)) {
            if word::has_marks(seen) {
                thread.mark(true);
            }
            return;
        }
        if !thread.wait(gate, seen) {
            break_hold(gate, seen, thread);
        }
    }
}

/// Ends a hold, or a guard, that lasted longer than this call may wait. Only the very hold
/// that was waited for: a later one, or one that ended, is left alone.
fn break_hold<M: Memory, T: Thread<M>>(gate: &M::U32, seen: u32, thread: &mut T) {
    if end_hold::<M>(gate, seen) {
        thread.wake_all(gate);
    }
}

/// Opens the gate if it is still at `seen`; whether it was. Who waits is to be woken.
pub fn end_hold<M: Memory>(gate: &M::U32, seen: u32) -> bool {
    let open = word::next(seen, word::OPEN);
    if M::mutated(Mutation::BreakWithoutCompare) {
        gate.store(open, Release);
        return true;
    }
    gate.cas(seen, open).is_ok()
}
