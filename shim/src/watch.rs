//! While the gate is armed: what calls change is noted, and the call that reaches a
//! commit point shuts the gate, in the program's own thread, before it returns.
//!
//! Locks are noted while it is shut, too: they are granted then as well.
//!
//! Nothing in here is done while the gate is open. What is noted, and what of it is
//! believed, is in [`snapshim_gate::watch`].

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU32, fence};

use snapshim_gate::abi::Gate;
use snapshim_gate::armed::{self, AsWritten, Change, Door, Kind, Locks};
use snapshim_gate::slot::{Call, Class, Seen, Slot};
use snapshim_gate::sys::{futex_wait, futex_wake_all, monotonic_ns};
use snapshim_gate::table::FileId;
use snapshim_gate::watch::{self, Noted, Tracked, Watch};
use snapshim_gate::word;

use crate::guard::{self, Frame};
use crate::member::Target;
use crate::vectors::preserving;
use crate::{attach, claim, sys, thread};

/// A call that may reach a commit point, although it changes nothing.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Makes an open file durable.
    Sync = 1,
    /// Makes everything durable.
    SyncAll = 2,
    /// A process's lock by fcntl.
    Lock = 3,
    /// A lock by flock.
    Flock = 4,
    /// A lock by lockf.
    Lockf = 5,
    /// Closes a descriptor.
    Close = 6,
    /// An open file description's lock by fcntl.
    Ofd = 7,
}

impl Event {
    fn from_raw(raw: usize) -> Option<Event> {
        use Event::*;
        [Sync, SyncAll, Lock, Flock, Lockf, Close, Ofd]
            .into_iter()
            .find(|event| *event as usize == raw)
    }
}

/// The write locks of this process, as far as they were noted: [`armed::notes_locks`].
static LOCKS: Locks = Locks::none();
/// Whether this process ever took a lock: its closes may drop some.
static HAS_LOCKED: AtomicBool = AtomicBool::new(false);

/// What of an event says its kind; the rest is the descriptor.
const KIND_BITS: u32 = 8;
const KIND: usize = (1 << KIND_BITS) - 1;

/// Changes between two looks at the clock.
const LOOK_AT_CLOCK: u32 = 256;

const F_RDLCK: i16 = 0;
const F_WRLCK: i16 = 1;
const F_UNLCK: i16 = 2;

/// Counts a call about locks. Unlike others it is worth a slot: whoever ends with a lock must be known.
#[inline(always)]
pub(crate) fn seen_lock() {
    let thread = thread::current();
    if thread.generation.get() != attach::page().generation.load(Relaxed) {
        claim_slot();
    }
    guard::seen(Seen::Lock);
}

#[cold]
#[inline(never)]
fn claim_slot() {
    preserving(&mut || _ = mine());
}

/// Before a call that may reach a point.
#[inline(always)]
pub(crate) fn event(event: Event, fd: i32, argument: u64) -> Frame {
    if let Some(gate) = attach::gate() {
        let word = gate.header().word.load(Relaxed);
        let is_noted = match event {
            Event::Lock | Event::Ofd | Event::Flock | Event::Lockf => armed::notes_locks(word),
            Event::Sync | Event::SyncAll | Event::Close => word::is_armed(word),
        };
        if is_noted {
            return begin(gate, word, event, fd, argument);
        }
    }
    Frame::NONE
}

#[cold]
#[inline(never)]
fn begin(gate: &'static Gate, word: u32, event: Event, fd: i32, argument: u64) -> Frame {
    let mut frame = Frame::NONE;
    preserving(&mut || frame = begin_event(gate, word, event, fd, argument));
    frame
}

/// `word`: what was found at the gate.
fn begin_event(gate: &'static Gate, word: u32, event: Event, fd: i32, argument: u64) -> Frame {
    // The members were written before the word that says which table they are in.
    fence(Acquire);
    // Whatever it takes to find out may be fatal.
    if attach::is_sandboxed() {
        gate.header().watch.set_blind();
        return Frame::NONE;
    }
    let watch = &gate.header().watch;
    let arming = u64::from(watch.arming.load(Relaxed) as u16);
    let payload = match event {
        Event::Sync => {
            let begun = member(gate, word, fd).and_then(|id| watch.sync_begins(id));
            let Some((tracked, covered)) = begun else {
                return Frame::NONE;
            };
            u64::from(tracked.pack(arming as u32)) << 32 | u64::from(covered)
        }
        Event::SyncAll => match watch.sync_all_begins() {
            Some(covered) => arming << 48 | u64::from(covered),
            None => return Frame::NONE,
        },
        Event::Lock | Event::Ofd | Event::Flock | Event::Lockf => {
            HAS_LOCKED.store(true, Relaxed);
            if member(gate, word, fd).is_none() {
                return Frame::NONE;
            }
            // At a gate that is shut nobody waits at the door.
            if word::is_armed(word) && !LOCKS.is_any() && takes_lock(event, argument) {
                wait_at_door(gate);
            }
            argument
        }
        Event::Close => {
            let writes = member(gate, word, fd).is_some() && sys::is_writable(fd);
            let points = watch.points.load(Relaxed);
            let matters = writes
                || points & watch::LOCK != 0
                    && HAS_LOCKED.load(Relaxed)
                    && member(gate, word, fd).is_some();
            if !matters {
                return Frame::NONE;
            }
            u64::from(writes)
        }
    };
    let extra = (fd as u32 as usize) << KIND_BITS;
    Frame::event(event as usize | extra, payload)
}

/// The member behind a descriptor, by the table of the hold (or arming) that `word` is of. Not
/// by that of the present word: should the gate have been opened meanwhile, that table is an
/// older checkpoint's.
fn member(gate: &Gate, word: u32, fd: i32) -> Option<FileId> {
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
    let came = monotonic_ns();
    loop {
        let seen = word.load(Relaxed);
        let bound = gate.hold_bound_ns();
        let now = monotonic_ns();
        let door = armed::door::<AsWritten>(seen, watch, process, LOCKS.is_any(), came, now, bound);
        let Door::Shut(left) = door else { return };
        // A signal: the program may have asked for it to end its own wait.
        if futex_wait(word, seen, LOOK_NS.min(left)) == EINTR {
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
    let event = Event::from_raw(raw & KIND);
    let (Some(event), Some(gate)) = (event, attach::gate()) else {
        return;
    };
    end_event(gate, event, (raw >> KIND_BITS) as u32, payload);
}

/// `extra`: the descriptor, where a lock is meant.
fn end_event(gate: &'static Gate, event: Event, extra: u32, payload: u64) {
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
        Event::Lock | Event::Ofd => {
            // SAFETY: fcntl has just read a `struct flock` there.
            let kind = unsafe { (payload as *const i16).read_unaligned() };
            let whose = match event {
                Event::Ofd => Kind::Ofd,
                _ => Kind::Posix,
            };
            locked(
                gate,
                whose,
                extra as i32,
                kind == F_WRLCK,
                matches!(kind, F_UNLCK | F_RDLCK),
            );
        }
        Event::Flock => {
            const LOCK_SH: u64 = 1;
            const LOCK_EX: u64 = 2;
            const LOCK_UN: u64 = 8;
            let takes = payload & LOCK_EX != 0;
            locked(
                gate,
                Kind::Flock,
                extra as i32,
                takes,
                payload & (LOCK_SH | LOCK_UN) != 0,
            );
        }
        Event::Lockf => {
            const F_ULOCK: u64 = 0;
            const F_LOCK: u64 = 1;
            const F_TLOCK: u64 = 2;
            locked(
                gate,
                Kind::Posix,
                extra as i32,
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

fn locked(gate: &'static Gate, kind: Kind, fd: i32, takes: bool, gives_up: bool) {
    let watch = &gate.header().watch;
    if takes {
        LOCKS.took(watch, kind, fd);
    } else if gives_up {
        let slot = mine().map(|(_, slot)| slot);
        LOCKS.gave_up::<AsWritten>(watch, slot, kind, fd);
        boundary(gate, watch::LOCK);
    }
}

/// Shuts the gate, if it is armed for one of these points.
fn boundary(gate: &'static Gate, points: u32) {
    let header = gate.header();
    // In a sandbox, the calls below may be fatal.
    if attach::is_sandboxed() {
        return;
    }
    if armed::shut_at(&header.word, &header.watch, points, monotonic_ns) {
        futex_wake_all(&header.word);
    }
}

/// What a call that passes an armed gate is about to do.
pub(crate) fn note(
    gate: &'static Gate,
    slot: Option<&Slot>,
    call: Call,
    target: Target,
    word: u32,
    is_nested: bool,
) -> bool {
    let watch = &gate.header().watch;
    let table = gate.table(word::bank(word));
    let change = match attach::is_sandboxed() {
        true => Change::Unknown,
        false => target.change(call.class, table),
    };
    // Only what is written; nobody promises as much of a size or a mode.
    let is_durable = || match target {
        Target::Fd(fd) | Target::Call { fd, .. } | Target::Stream(fd) => {
            call.class == Class::Write && sys::is_durable(fd)
        }
        _ => false,
    };
    let is_noted = armed::note::<AsWritten>(watch, slot, &LOCKS, change, is_nested, is_durable);
    if change != Change::None {
        give_up_in_time(gate, watch, word, watch.changes.load(Relaxed));
    }
    is_noted
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
    let gate = attach::gate();
    gate.map_or(0, |gate| armed::changed(&gate.header().watch, slot, result))
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
