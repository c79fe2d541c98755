//! What every hook does before and after the real call.

use core::mem::MaybeUninit;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use snapshim_gate::Shared;
use snapshim_gate::abi::Gate;
use snapshim_gate::passage::{self, Thread};
use snapshim_gate::slot::{Call, Class, Seen, Slot, is_free};
use snapshim_gate::sys::{futex_wait, futex_wake_all, monotonic_ns, ticks};
use snapshim_gate::word;

use crate::attach;
use crate::member::{self, Target};
use crate::vectors::preserving;
use crate::{chunks, claim, marks, sys, thread, watch};

/// What a call has to undo when it returns. Two words: it stays in registers.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// The slot it is counted in. Slots are aligned to 128 bytes; an odd address has
    /// something else to be done with: [`NOTED`], [`EVENT`].
    slot: *const Slot,
    /// Upper half: the process that counted, for a child forked while the call was
    /// in flight returns from it as well. (Generations count forks, so half of one
    /// will do.) Lower half: the slot's generation, for the count may have been
    /// given up since. Of an event: its payload.
    generations: u64,
}

/// Low bit of [`Frame::slot`]: not just counted.
const MARKED: usize = 1;
/// With it: counted, and noted in the slot; see [`watch::changed`].
const NOTED: usize = MARKED;
/// With it: not counted. The rest is a kind of [`watch::Event`], or 0 for nothing to do.
const EVENT: usize = MARKED | 2;
const EVENT_SHIFT: u32 = 2;

impl Frame {
    /// Nothing to undo.
    pub(crate) const NONE: Frame = Frame {
        slot: core::ptr::without_provenance(EVENT),
        generations: 0,
    };

    #[inline(always)]
    fn counted(slot: &Slot, process: u64) -> Frame {
        Frame {
            slot,
            generations: process << 32 | u64::from(slot.generation.load(Relaxed)),
        }
    }

    /// Whether it was counted in this very process.
    #[inline(always)]
    fn is_mine(self) -> bool {
        let process = attach::page().generation.load(Relaxed);
        process as u32 == (self.generations >> 32) as u32
    }

    /// Something to be looked at when the call has returned.
    pub(crate) fn event(kind: usize, payload: u64) -> Frame {
        Frame {
            slot: core::ptr::without_provenance(kind << EVENT_SHIFT | EVENT),
            generations: payload,
        }
    }

    fn noted(self) -> Frame {
        Frame {
            slot: self.slot.map_addr(|address| address | NOTED),
            ..self
        }
    }
}

/// Takes a call past the gate. With an open gate: loads and stores on the thread's
/// own cache lines and one locked add, no system call.
///
/// Everything else is one call out of line, which begins anew and asks for the
/// `target` then: nothing is laid out for it on the way that matters.
#[inline(always)]
pub(crate) fn enter(class: Class, fd: i32, target: impl FnOnce() -> Target) -> Frame {
    let thread = thread::current();
    let process = attach::page().generation.load(Relaxed);
    let sp = thread::stack_pointer();
    if thread.generation.get() == process {
        // SAFETY: both were set when the slot was claimed in this process, which is
        // attached for good: a mapped gate stays mapped.
        let (slot, header) = unsafe { (&*thread.slot.get(), &*thread.header.get()) };
        let entered = slot.enter(&header.word, Call { class, fd, sp });
        if is_free(&entered) {
            return Frame::counted(slot, process);
        }
        slot.leave();
    }
    enter_slowly(class, fd, sp, target())
}

/// Counts the call out again. `result`: what the call returned, negative if it failed.
#[inline(always)]
pub(crate) fn leave(frame: Frame, result: isize) {
    if frame.slot.addr() & MARKED == 0 {
        count_out(frame);
    } else if frame.slot.addr() != EVENT {
        leave_marked(frame, result);
    }
}

#[inline(always)]
fn count_out(frame: Frame) {
    let alone = !thread::SHARING.load(Relaxed);
    // SAFETY: a slot lies in the gate, which stays mapped.
    unsafe { &*frame.slot }.leave_frame(frame.is_mine(), frame.generations as u32, alone);
}

/// What was noted at an armed gate.
#[cold]
#[inline(never)]
fn leave_marked(frame: Frame, result: isize) {
    preserving(&mut || leave_noted(frame, result));
}

fn leave_noted(frame: Frame, result: isize) {
    let address = frame.slot.addr();
    if address & EVENT == EVENT {
        return watch::end(address >> EVENT_SHIFT, frame.generations, result);
    }
    let frame = Frame {
        slot: frame.slot.map_addr(|address| address & !MARKED),
        ..frame
    };
    // SAFETY: a slot lies in the gate, which stays mapped.
    let slot = unsafe { &*frame.slot };
    // In a child forked meanwhile, the note is its parent's.
    let points = match frame.is_mine() {
        true if slot.generation.load(Relaxed) == frame.generations as u32 => {
            if let Some(gate) = attach::gate() {
                chunks::returned(gate, slot, result);
            }
            watch::changed(slot, result)
        }
        _ => 0,
    };
    count_out(frame);
    if points != 0 {
        watch::reached(points);
    }
}

/// Waits like a call on anything, but holds no drain up: for calls that hand
/// work to the kernel and may then wait for it. What they started is in flight
/// when they return, so being in the call proves nothing.
#[inline(always)]
pub(crate) fn submit() -> Frame {
    leave(enter(Class::Submit, -1, || Target::Any), -1);
    seen(Seen::Submit);
    Frame::NONE
}

/// Notes a call that holds no drain up.
#[inline(always)]
pub(crate) fn seen(what: Seen) {
    let thread = thread::current();
    if thread.generation.get() == attach::page().generation.load(Relaxed) {
        // SAFETY: as in `enter`.
        let slot = unsafe { &*thread.slot.get() };
        let counter = &slot.seen[what as usize];
        // Only this thread writes it; losing a handler's increment does no harm.
        counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
    }
}

/// A call at a gate that is not open or inside another call, or the first call of a
/// thread, of a forked child, or of a process without a gate.
#[cold]
#[inline(never)]
fn enter_slowly(class: Class, fd: i32, sp: u64, target: Target) -> Frame {
    let mut frame = MaybeUninit::uninit();
    preserving(&mut || {
        frame.write(pass(Call { class, fd, sp }, target));
    });
    // SAFETY: `preserving` has called the closure.
    unsafe { frame.assume_init() }
}

fn pass(call: Call, target: Target) -> Frame {
    let is_known = attach::ensure();
    let Some(gate) = attach::gate() else {
        return Frame::NONE;
    };
    let slot = if is_known { claim::slot(gate) } else { None };
    let Some(slot) = slot else {
        pass_without_slot(gate, call, target);
        return Frame::NONE;
    };
    let process = attach::page().generation.load(Relaxed);
    let mut waiter = Waiter::new(gate, Some(slot), call, target);
    passage::pass::<Shared, _>(slot, &gate.header().word, call, &mut waiter);
    let frame = Frame::counted(slot, process);
    if waiter.is_noted {
        frame.noted()
    } else {
        frame
    }
}

/// Waits at a shut gate, but cannot be waited for: a thread that found no room, or
/// that can learn nothing of itself in its sandbox. The coordinator is told that
/// there are such writers, and verifies nothing while they are at it. (A child of
/// vfork is none: it is one call or two away from its exec.)
fn pass_without_slot(gate: &'static Gate, call: Call, target: Target) {
    if attach::is_sandboxed() || !attach::is_borrowing() {
        // Before the look at the gate, like a count, and ordered like one.
        gate.header().overflow.fetch_add(1, SeqCst);
    }
    let mut waiter = Waiter::new(gate, None, call, target);
    passage::pass_uncounted::<Shared, _>(&gate.header().word, &mut waiter);
}

/// One call at a gate that is not open.
struct Waiter<'a> {
    gate: &'static Gate,
    slot: Option<&'a Slot>,
    call: Call,
    target: Target,
    spent_ns: u64,
    /// There is something to be done about it when it returns.
    is_noted: bool,
    /// What it waits for at a guarded gate.
    asking: Option<chunks::Asking>,
}

impl<'a> Waiter<'a> {
    fn new(gate: &'static Gate, slot: Option<&'a Slot>, call: Call, target: Target) -> Waiter<'a> {
        Waiter {
            gate,
            slot,
            call,
            target,
            spent_ns: 0,
            is_noted: false,
            asking: None,
        }
    }

    /// Waits by way of `sleep`, for at most what is left of this call's time; `false` if
    /// nothing is.
    fn spend(&mut self, sleep: impl FnOnce(&Self, u64)) -> bool {
        let left_ns = self.gate.hold_bound_ns().saturating_sub(self.spent_ns);
        if left_ns == 0 {
            return false;
        }
        if let Some(slot) = self.slot {
            slot.parked.store(1, Relaxed);
        }
        // By its own clock in a sandbox, where it may not ask for the time.
        let waited_ns = if attach::is_sandboxed() {
            let start = ticks();
            sleep(self, left_ns);
            ticks().wrapping_sub(start) / self.ticks_per_us() * 1_000
        } else {
            let start = monotonic_ns();
            sleep(self, left_ns);
            monotonic_ns().wrapping_sub(start).max(1)
        };
        if let Some(slot) = self.slot {
            slot.parked.store(0, Relaxed);
        }
        self.account(waited_ns);
        self.spent_ns = self.spent_ns.saturating_add(waited_ns);
        self.spent_ns < self.gate.hold_bound_ns()
    }

    /// The rate comes from shared memory: no rate of any machine is outside this.
    fn ticks_per_us(&self) -> u64 {
        u64::from(self.gate.header().ticks_per_us.load(Relaxed)).clamp(1, 20_000)
    }

    /// Waits by looking, in a process where any system call may be fatal.
    fn spin(&self, word: &AtomicU32, seen: u32, left_ns: u64) {
        let limit = left_ns.div_ceil(1_000).saturating_mul(self.ticks_per_us());
        let start = ticks();
        while word.load(Relaxed) == seen && ticks().wrapping_sub(start) < limit {
            core::hint::spin_loop();
        }
    }

    fn account(&self, waited_ns: u64) {
        let Some(slot) = self.slot else { return };
        if self.spent_ns == 0 {
            slot.waits.fetch_add(1, Relaxed);
        }
        slot.waited_us
            .fetch_add((waited_ns / 1_000) as u32, Relaxed);
        self.gate.guard().count_wait(waited_ns / 1_000);
        let longest_us = u32::try_from((self.spent_ns + waited_ns) / 1_000);
        slot.longest_wait_us
            .fetch_max(longest_us.unwrap_or(u32::MAX), Relaxed);
    }
}

impl Thread<Shared> for Waiter<'_> {
    fn is_shut(&mut self, bank: usize) -> bool {
        attach::is_sandboxed() || self.target.is_shut(self.call.class, self.gate.table(bank))
    }

    fn outer_is_shut(&mut self, bank: usize) -> bool {
        let Some(slot) = self.slot else { return false };
        attach::is_sandboxed() || member::outer_is_shut(slot, self.gate.table(bank))
    }

    fn outer_is_abandoned(&mut self) -> bool {
        // A handler that interrupted a call runs below its frame, by at least the
        // signal frame (over 800 bytes on x86-64, over 4 KiB on aarch64). So a
        // call from about the same height, or above it, is no handler's: the old
        // one was left by siglongjmp or cancellation. Unless we are on another
        // stack: the alternate signal stack, or that of a thread which shares
        // this thread's word.
        const BELOW: u64 = 512;
        let Some(slot) = self.slot else { return false };
        if self.call.sp.saturating_add(BELOW) <= slot.sp.load(Relaxed) || attach::is_sandboxed() {
            return false;
        }
        let owner = attach::owner(sys::gettid()).pack();
        slot.owner.load(Relaxed) == owner && !sys::on_alternate_stack()
    }

    fn watched(&mut self, seen: u32, is_nested: bool) {
        self.is_noted = watch::note(
            self.gate,
            self.slot,
            self.call,
            self.target,
            seen,
            is_nested,
        );
    }

    fn mark(&mut self, is_nested: bool) {
        if attach::is_sandboxed() {
            return marks::note_blind(self.gate);
        }
        let marks = self.gate.marks();
        let knows = |id| marks.find(id).is_some();
        let change = chunks::change(self.call, self.target, is_nested, sys::identity, knows);
        self.is_noted |= marks::note(self.gate, self.slot, change, is_nested);
    }

    fn wait(&mut self, word: &AtomicU32, seen: u32) -> bool {
        self.spend(|waiter, left_ns| {
            if attach::is_sandboxed() {
                waiter.spin(word, seen, left_ns);
            } else {
                futex_wait(word, seen, left_ns);
            }
        })
    }

    fn may_change(&mut self, seen: u32, is_nested: bool) -> bool {
        let (guard, has_marks) = (self.gate.guard(), word::has_marks(seen));
        let knows =
            |id| guard.find(id).is_some() || has_marks && self.gate.marks().find(id).is_some();
        let change = match attach::is_sandboxed() {
            true => chunks::Change::Everything,
            false if has_marks => {
                chunks::change(self.call, self.target, is_nested, sys::identity, knows)
            }
            false => chunks::change(self.call, self.target, is_nested, sys::fstat, knows),
        };
        let effect = chunks::effect(change, guard);
        match chunks::ask(self.gate, self.slot, effect, seen, is_nested) {
            chunks::Answer::Granted(is_noted) => {
                self.is_noted = is_noted;
                // Only now: as long as it waits, nothing of the cut is changed. It is compared
                // like what it was granted.
                if has_marks {
                    let is_compared = !is_noted && !is_nested;
                    self.is_noted |= marks::note(self.gate, self.slot, change, !is_compared);
                }
                true
            }
            chunks::Answer::Wait(asking) => {
                self.asking = Some(asking);
                false
            }
        }
    }

    fn wait_for_chunks(&mut self, word: &AtomicU32, seen: u32) -> bool {
        let asking = self.asking.take();
        let gate = self.gate;
        let goes_on = self.spend(|waiter, left_ns| match asking {
            Some(asking) if !attach::is_sandboxed() => asking.wait(gate, seen, left_ns),
            _ => waiter.spin(word, seen, left_ns),
        });
        if !goes_on {
            chunks::gives_up(gate, seen);
        }
        goes_on
    }

    fn wake_all(&mut self, gate_word: &AtomicU32) {
        self.gate.header().breaks.fetch_add(1, Relaxed);
        if let Some(slot) = self.slot {
            slot.breaks.fetch_add(1, Relaxed);
        }
        if !attach::is_sandboxed() {
            futex_wake_all(gate_word);
            futex_wake_all(&self.gate.guard().served);
        }
    }
}
