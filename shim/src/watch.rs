//! While the gate is armed: what calls change is noted, and the call that reaches a
//! commit point shuts the gate, in the program's own thread, before it returns.
//!
//! Nothing in here is done while the gate is open. What is noted, and what of it is
//! believed, is in [`snapshim_gate::watch`].

use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU32};

use snapshim_gate::abi::Gate;
use snapshim_gate::slot::{Call, Class, Slot};
use snapshim_gate::sys::{futex_wait, futex_wake_all, monotonic_ns};
use snapshim_gate::table::FileId;
use snapshim_gate::watch::{self, Noted, Tracked, Watch};
use snapshim_gate::word;

use crate::guard::{self, Frame};
use crate::member::{Change, Target};
use crate::vectors::preserving;
use crate::{attach, claim, sys};

/// A call that may reach a commit point, although it changes nothing.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Makes an open file durable.
    Sync = 1,
    /// Makes everything durable.
    SyncAll = 2,
    /// A lock by fcntl.
    Lock = 3,
    /// A lock by flock.
    Flock = 4,
    /// A lock by lockf.
    Lockf = 5,
    /// Closes a descriptor.
    Close = 6,
}

impl Event {
    fn from_raw(raw: usize) -> Option<Event> {
        use Event::*;
        [Sync, SyncAll, Lock, Flock, Lockf, Close]
            .into_iter()
            .find(|event| *event as usize == raw)
    }
}

/// Whether this process was granted a write lock and has given none up since. A hint,
/// for what is counted for `status`.
static LOCKED: AtomicBool = AtomicBool::new(false);
/// Whether this process ever took a lock: its closes may drop some.
static HAS_LOCKED: AtomicBool = AtomicBool::new(false);

/// Changes between two looks at the clock.
const LOOK_AT_CLOCK: u32 = 256;

const F_RDLCK: i16 = 0;
const F_WRLCK: i16 = 1;
const F_UNLCK: i16 = 2;

/// Before a call that may reach a point.
#[inline(always)]
pub(crate) fn event(event: Event, fd: i32, argument: u64) -> Frame {
    if let Some(gate) = attach::gate()
        && word::is_armed(gate.header().word.load(Relaxed))
    {
        return begin(gate, event, fd, argument);
    }
    Frame::NONE
}

#[cold]
#[inline(never)]
fn begin(gate: &'static Gate, event: Event, fd: i32, argument: u64) -> Frame {
    let mut frame = Frame::NONE;
    preserving(&mut || frame = begin_event(gate, event, fd, argument));
    frame
}

fn begin_event(gate: &'static Gate, event: Event, fd: i32, argument: u64) -> Frame {
    // Whatever it takes to find out may be fatal.
    if attach::is_sandboxed() {
        gate.header().watch.set_blind();
        return Frame::NONE;
    }
    let watch = &gate.header().watch;
    let arming = u64::from(watch.arming.load(Relaxed) as u16);
    let payload = match event {
        Event::Sync => {
            let begun = member(gate, fd).and_then(|id| watch.sync_begins(id));
            let Some((tracked, covered)) = begun else {
                return Frame::NONE;
            };
            u64::from(tracked.pack(arming as u32)) << 32 | u64::from(covered)
        }
        Event::SyncAll => match watch.sync_all_begins() {
            Some(covered) => arming << 48 | u64::from(covered),
            None => return Frame::NONE,
        },
        Event::Lock | Event::Flock | Event::Lockf => {
            HAS_LOCKED.store(true, Relaxed);
            if member(gate, fd).is_none() {
                return Frame::NONE;
            }
            // Whoever holds a lock must be able to go on: to upgrade it, to take more, to
            // give it up.
            if !LOCKED.load(Relaxed) && takes_lock(event, argument) {
                wait_at_door(gate);
            }
            argument
        }
        Event::Close => {
            let writes = member(gate, fd).is_some() && sys::is_writable(fd);
            let points = watch.points.load(Relaxed);
            let matters = writes
                || points & watch::LOCK != 0
                    && HAS_LOCKED.load(Relaxed)
                    && member(gate, fd).is_some();
            if !matters {
                return Frame::NONE;
            }
            u64::from(writes)
        }
    };
    Frame::event(event as u32, payload)
}

/// The member behind a descriptor.
fn member(gate: &Gate, fd: i32) -> Option<FileId> {
    let word = gate.header().word.load(Relaxed);
    let table = gate.table(word::bank(word));
    match Target::Fd(fd).change(snapshim_gate::slot::Class::Write, table) {
        Change::File(id) => Some(id),
        _ => None,
    }
}

/// Whether a call about locks is going to take one. What it gives up never waits.
fn takes_lock(event: Event, argument: u64) -> bool {
    const LOCK_UN: u64 = 8;
    const F_ULOCK: u64 = 0;
    match event {
        Event::Flock => argument & LOCK_UN == 0,
        Event::Lockf => argument != F_ULOCK,
        // The kernel reads the kind for us: the address may be any.
        _ => sys::peek_u16(argument as usize).is_some_and(|kind| kind as i16 != F_UNLCK),
    }
}

/// Waits while the door is shut to this process, at most as long as a call may wait. Then
/// it goes in: the point will not be reached.
fn wait_at_door(gate: &Gate) {
    // A forked child has to know its own id first.
    attach::ensure();
    const EINTR: isize = -4;
    /// Between looks: the door opens without a change of the gate's word.
    const LOOK_NS: u64 = 5_000_000;
    let process = attach::owner(attach::page().pid.load(Relaxed)).pack();
    let word = &gate.header().word;
    let watch = &gate.header().watch;
    let start = monotonic_ns();
    loop {
        let seen = word.load(Relaxed);
        let spent = monotonic_ns().wrapping_sub(start);
        if !word::is_armed(seen) || !watch.is_shut_to(process) {
            return;
        }
        let is_over = start.wrapping_add(spent) > watch.until_ns.load(Relaxed);
        if is_over || spent >= gate.hold_bound_ns() {
            // For everybody: the point will not be reached, or nobody is there to see it.
            watch.open_door();
            return;
        }
        // A signal: the program may have asked for it to end its own wait.
        if futex_wait(word, seen, LOOK_NS.min(gate.hold_bound_ns() - spent)) == EINTR {
            return;
        }
    }
}

/// The program begins a unit of work: something that has to be in a snapshot as a whole.
/// Units nest; each belongs to its thread.
#[unsafe(no_mangle)]
pub extern "C" fn snapshim_begin() {
    if let Some((gate, slot)) = mine() {
        let word = gate.header().word.load(Relaxed);
        if slot.units.load(Relaxed) == 0 && !word::is_open(word) && !attach::is_sandboxed() {
            if word::is_armed(word) {
                wait_at_door(gate);
            } else if !word::is_guarded(word) {
                // Its first change would have to wait anyway.
                guard::leave(guard::enter(Class::Submit, -1, || Target::Any), -1);
            }
        }
        slot.units.fetch_add(1, AcqRel);
    }
}

/// The program has ended the unit.
#[unsafe(no_mangle)]
pub extern "C" fn snapshim_end() {
    if let Some((gate, slot)) = mine() {
        let units = slot.units.load(Relaxed);
        slot.units.store(units.saturating_sub(1), Release);
        let watch = &gate.header().watch;
        if watch.counted(Noted::Units) == 0 {
            watch.count(Noted::Units);
        }
        if units == 1 && word::is_armed(gate.header().word.load(Relaxed)) {
            reached(watch::UNIT);
        }
    }
}

/// The gate and this thread's slot.
fn mine() -> Option<(&'static Gate, &'static Slot)> {
    let is_known = attach::ensure();
    let gate = attach::gate()?;
    let slot = if is_known { claim::slot(gate) } else { None };
    Some((gate, slot?))
}

/// After it.
pub(crate) fn end(raw: usize, payload: u64, result: isize) {
    if result != 0 {
        return;
    }
    let (Some(event), Some(gate)) = (Event::from_raw(raw), attach::gate()) else {
        return;
    };
    end_event(gate, event, payload);
}

fn end_event(gate: &'static Gate, event: Event, payload: u64) {
    let watch = &gate.header().watch;
    let arming = watch.arming.load(Relaxed);
    match event {
        Event::Sync => {
            if let Some(tracked) = Tracked::unpack((payload >> 32) as u32, arming) {
                watch.sync_ends(tracked, payload as u32);
                synced(gate);
            }
        }
        Event::SyncAll => {
            if payload >> 48 == u64::from(arming as u16) {
                watch.sync_all_ends(payload as u32);
                synced(gate);
            }
        }
        Event::Lock => {
            // SAFETY: fcntl has just read a `struct flock` there.
            let kind = unsafe { (payload as *const i16).read_unaligned() };
            locked(gate, kind == F_WRLCK, matches!(kind, F_UNLCK | F_RDLCK));
        }
        Event::Flock => {
            const LOCK_SH: u64 = 1;
            const LOCK_EX: u64 = 2;
            const LOCK_UN: u64 = 8;
            let takes = payload & LOCK_EX != 0;
            locked(gate, takes, payload & (LOCK_SH | LOCK_UN) != 0);
        }
        Event::Lockf => {
            const F_ULOCK: u64 = 0;
            const F_LOCK: u64 = 1;
            const F_TLOCK: u64 = 2;
            locked(
                gate,
                matches!(payload, F_LOCK | F_TLOCK),
                payload == F_ULOCK,
            );
        }
        Event::Close => {
            if payload != 0 {
                watch.count(Noted::Closed);
                boundary(gate, watch::CLOSE | watch::LOCK);
            } else {
                boundary(gate, watch::LOCK);
            }
        }
    }
}

fn synced(gate: &'static Gate) {
    let watch = &gate.header().watch;
    watch.count(Noted::Synced);
    if watch.is_synced() {
        boundary(gate, watch::SYNC);
    }
}

fn locked(gate: &'static Gate, takes: bool, gives_up: bool) {
    let watch = &gate.header().watch;
    if takes {
        LOCKED.store(true, Relaxed);
        watch.count(Noted::Locked);
    } else if gives_up {
        if LOCKED.swap(false, AcqRel) {
            watch.count(Noted::Unlocked);
        }
        // Should this process end now, its lock has not vanished with it.
        if let Some((_, slot)) = mine() {
            let changed = slot.changed.fetch_add(1, AcqRel).wrapping_add(1);
            slot.settled.store(changed, Release);
        }
        boundary(gate, watch::LOCK);
    }
}

/// Shuts the gate, if it is armed for one of these points.
fn boundary(gate: &'static Gate, points: u32) {
    let header = gate.header();
    let armed = header.word.load(Relaxed);
    // In a sandbox, the calls below may be fatal.
    if !word::is_armed(armed)
        || header.watch.points.load(Relaxed) & points == 0
        || attach::is_sandboxed()
    {
        return;
    }
    let now = monotonic_ns();
    if now > header.watch.until_ns.load(Relaxed) {
        // Nobody waits any more.
        let open = word::next(armed, word::OPEN);
        let _ = header.word.compare_exchange(armed, open, AcqRel, Relaxed);
        return;
    }
    // Before the gate is shut, so that whoever finds it shut finds the time. Of two threads
    // that are here together, either's will do.
    header.watch.shut_ns.store(now, Relaxed);
    let shut = word::next(armed, word::CLOSED);
    if header
        .word
        .compare_exchange(armed, shut, core::sync::atomic::Ordering::SeqCst, Relaxed)
        .is_ok()
    {
        futex_wake_all(&header.word);
    }
}

/// What a call that passes an armed gate is about to do.
pub(crate) fn note(
    gate: &'static Gate,
    slot: Option<&Slot>,
    call: Call,
    target: Target,
    armed: u32,
    is_nested: bool,
) -> bool {
    let watch = &gate.header().watch;
    let table = gate.table(word::bank(armed));
    let change = match attach::is_sandboxed() {
        true => Change::Unknown,
        false => target.change(call.class, table),
    };
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
    give_up_in_time(gate, watch, armed, number);
    if LOCKED.load(Relaxed) {
        watch.count(Noted::ChangedUnderLock);
    }
    let Some(slot) = slot else {
        watch.set_blind();
        return false;
    };
    slot.changed.fetch_add(1, AcqRel);
    match (change, tracked) {
        _ if is_nested => {
            watch.set_blind();
            false
        }
        (Change::File(_), Some(tracked)) => {
            // Only what is written; nobody promises as much of a size or a mode.
            let is_durable = matches!((call.class, target), (Class::Write, Target::Fd(fd)) if sys::is_durable(fd));
            slot.ticket.store(u32::from(is_durable), Relaxed);
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

/// Opens a gate that nobody waits at any more: whoever armed it is gone.
fn give_up_in_time(gate: &'static Gate, watch: &Watch, armed: u32, number: u32) {
    if !number.is_multiple_of(LOOK_AT_CLOCK) || attach::is_sandboxed() {
        return;
    }
    if monotonic_ns() > watch.until_ns.load(Relaxed) {
        let open = word::next(armed, word::OPEN);
        let word: &AtomicU32 = &gate.header().word;
        let _ = word.compare_exchange(armed, open, AcqRel, Relaxed);
    }
}

/// After a call that was noted, while it is still counted. The points it may have reached:
/// to be handed to [`reached`] when it is counted no more.
pub(crate) fn changed(slot: &Slot, result: isize) -> u32 {
    let Some(gate) = attach::gate() else { return 0 };
    let watch = &gate.header().watch;
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

/// Shuts the gate at what [`changed`] found.
pub(crate) fn reached(points: u32) {
    if let Some(gate) = attach::gate()
        && !attach::is_sandboxed()
    {
        boundary(gate, points);
    }
}

/// A file may be changed through memory from now on.
#[inline(always)]
pub(crate) fn mapped() {
    if let Some(gate) = attach::gate()
        && word::is_armed(gate.header().word.load(Relaxed))
    {
        gate.header().watch.set_blind();
    }
}
