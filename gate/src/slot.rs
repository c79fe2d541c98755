//! A slot: one thread's in-flight word, and who owns it.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::memory::{Cell, Memory, Mutation, Shared};
use crate::word;

/// What a call does, as far as the gate cares.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Changes bytes of an open file.
    Write = 1,
    /// Changes the size or allocation of an open file.
    Size = 2,
    /// Copies into an open file inside the kernel.
    Copy = 3,
    /// May create or truncate a file by path.
    Open = 4,
    /// Changes a directory.
    Name = 5,
    /// Changes captured metadata of an open file.
    Meta = 6,
    /// Changes bytes or captured metadata of a file named by path.
    Path = 7,
    /// Hands writes to the kernel to be done later.
    Submit = 8,
}

impl Class {
    /// The class stored as `raw`, if there is one.
    pub fn from_raw(raw: u32) -> Option<Class> {
        use Class::*;
        [Write, Size, Copy, Open, Name, Meta, Path, Submit]
            .into_iter()
            .find(|c| *c as u32 == raw)
    }
}

/// Calls that do not hold the drain, counted for `status`.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// fsync, fdatasync, msync, sync, …
    Sync = 0,
    /// fcntl locks, flock, lockf.
    Lock = 1,
    /// close, dup2, dup3, close_range.
    Close = 2,
    /// Renames (also gated, as [`Class::Name`]).
    Rename = 3,
    /// mmap, mprotect, mremap, munmap.
    Map = 4,
    /// Asynchronous submissions (also gated, as [`Class::Submit`]).
    Submit = 5,
    /// Calls that start a sandbox.
    Sandbox = 6,
    /// mmap of a file, shared and writable.
    MapShared = 7,
}

/// Number of counters in [`Slot::seen`].
pub const SEEN: usize = 8;

/// A call as its thread publishes it.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// What it does.
    pub class: Class,
    /// The descriptor it changes, or -1.
    pub fd: i32,
    /// The stack pointer at the hook.
    pub sp: u64,
}

/// Who owns a slot: process and thread id as the owner sees them, and a hash of
/// its pid namespace, for ids of two namespaces may be equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Process id, in the owner's namespace.
    pub pid: u32,
    /// Thread id, in the owner's namespace.
    pub tid: u32,
    /// Low 20 bits of the inode number of the owner's pid namespace.
    pub pidns: u32,
}

/// Linux pids are at most 2²² (`PID_MAX_LIMIT`).
const PID_BITS: u32 = 22;
const PID_MASK: u64 = (1 << PID_BITS) - 1;
/// Bits of a pid namespace's inode number that are kept.
pub const PIDNS_MASK: u32 = 0xf_ffff;

/// Bit of [`Slot::image`]: the owner's process was forked from another since the program was
/// begun (execve), and may have inherited locks.
pub const FORKED: u64 = 1;

/// [`Slot::owner`] of a slot nobody owns.
pub const FREE: u64 = 0;
/// [`Slot::owner`] of a slot that is being claimed or reset.
pub const REAPING: u64 = u64::MAX;

impl Owner {
    /// The form in [`Slot::owner`]. Never [`FREE`] for a real process, and never
    /// [`REAPING`], which would need a pid of 2²²-1 in the last namespace.
    pub const fn pack(self) -> u64 {
        ((self.pidns & PIDNS_MASK) as u64) << (2 * PID_BITS)
            | (self.pid as u64 & PID_MASK) << PID_BITS
            | (self.tid as u64 & PID_MASK)
    }

    /// The owner stored as `raw`; `None` if free or being reset.
    pub const fn unpack(raw: u64) -> Option<Owner> {
        if raw == FREE || raw == REAPING {
            return None;
        }
        Some(Owner {
            pid: (raw >> PID_BITS & PID_MASK) as u32,
            tid: (raw & PID_MASK) as u32,
            pidns: (raw >> (2 * PID_BITS)) as u32 & PIDNS_MASK,
        })
    }
}

/// One thread's slot. All fields are written by the owning thread (and by calls
/// of its signal handlers), except by whoever reaps it after its owner is gone.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Slot<M: Memory = Shared> {
    /// Calls in flight: 0, 1, or more when a signal handler interrupted a call.
    pub count: M::U32,
    /// Raised when the owner finds that calls counted here will never return.
    pub generation: M::U32,
    /// Raised with each outermost call, twice: odd until it has passed the gate.
    pub seq: M::U32,
    /// [`Class`] of the outermost call.
    pub class: M::U32,
    /// Descriptor of the outermost call, as i32.
    pub fd: M::U32,
    /// Calls of this thread that broke a hold.
    pub breaks: M::U32,
    /// Stack pointer of the outermost call.
    pub sp: M::U64,
    /// [`Owner::pack`], [`FREE`] or [`REAPING`].
    pub owner: M::U64,
    /// Start time of the owner's process in clock ticks since boot
    /// (proc_pid_stat(5), field 22).
    pub start_time: M::U64,
    /// Hash of the owner's AT_RANDOM bytes: changes with execve. [`FORKED`] is not part of it.
    pub image: M::U64,
    /// Longest time one call waited, µs.
    pub longest_wait_us: M::U32,
    /// Units of work the program itself has begun and not ended (`snapshim_begin`).
    pub units: M::U32,
    /// Time all calls waited, µs; wraps.
    pub waited_us: M::U32,
    /// [`Slot::changed`] when this thread last gave up a lock, while the gate was armed.
    pub settled: M::U32,
    /// Calls that waited.
    pub waits: M::U32,
    /// Wait time is being spent now: 1 while parked at the gate.
    pub parked: M::U32,
    /// Counters by [`Seen`].
    pub seen: [M::U32; SEEN],
    /// The closed word of the last hold under which a call passed for being on no
    /// member. What is counted here does not hold up that hold; it does later ones,
    /// which may shut its file.
    pub aside: M::U32,
    /// Changes of members by this thread while the gate was armed.
    pub changed: M::U32,
    /// What the outermost call changes, while the gate is armed: see
    /// [`crate::watch::Watch`]. 0 if nothing.
    pub tracked: M::U32,
    /// With it: the number of a rename among the changes, or 1 if what is written is
    /// durable at once.
    pub ticket: M::U32,
}

/// What a call found when it counted itself in.
#[derive(Clone, Copy, Debug)]
pub struct Entered {
    /// Calls of this thread that were already in flight.
    pub outer: u32,
    /// The gate word, read after counting in.
    pub word: u32,
}

impl<M: Memory> Slot<M> {
    /// Publishes `call` and counts it in, then looks at the gate.
    ///
    /// The order is the protocol: a coordinator that shut the gate before our
    /// look finds our count; a look before its store finds the gate open and
    /// the call is in flight before the cut.
    #[inline(always)]
    pub fn enter(&self, gate: &M::U32, call: Call) -> Entered {
        let early = if M::mutated(Mutation::LookBeforeCount) {
            Some(gate.load(Acquire))
        } else {
            None
        };
        let mut seq = 0;
        if self.count.load(Relaxed) == 0 {
            seq = self.publish(call);
        }
        let outer = if M::mutated(Mutation::EnterWithoutFence) {
            self.count.add(1, Relaxed)
        } else {
            self.count.add_sc(1)
        };
        // A signal handler's call between the two may have published itself over us.
        if outer == 0 && self.seq.load(Relaxed) != seq {
            seq = self.publish_again(call.class, call.fd, call.sp);
        }
        let word = match early {
            Some(word) => word,
            None if M::mutated(Mutation::EnterWithoutFence) => gate.load(Acquire),
            None => gate.load_sc(),
        };
        if outer == 0 && word::is_free(word) {
            self.seq.store(seq.wrapping_add(1), Relaxed);
        }
        Entered { outer, word }
    }

    /// Writes what the outermost call is; returns its sequence number, which is odd.
    #[inline(always)]
    fn publish(&self, call: Call) -> u32 {
        let seq = self.seq.load(Relaxed).wrapping_add(1) | 1;
        self.seq.store(seq, Relaxed);
        self.class.store(call.class as u32, Relaxed);
        self.fd.store(call.fd as u32, Relaxed);
        self.sp.store(call.sp, Relaxed);
        seq
    }

    #[cold]
    #[inline(never)]
    fn publish_again(&self, class: Class, fd: i32, sp: u64) -> u32 {
        self.publish(Call { class, fd, sp })
    }

    /// Counts one call out. What the call did is visible to whoever sees the
    /// lower count with acquire.
    #[inline(always)]
    pub fn leave(&self) {
        if M::mutated(Mutation::LeaveRelaxed) {
            self.count.sub(1, Relaxed);
        } else {
            self.count.sub(1, Release);
        }
    }

    #[cold]
    #[inline(never)]
    fn leave_shared(&self) {
        self.leave();
    }

    /// [`Slot::leave`] for a slot that no other thread counts in: no locked
    /// instruction. A handler that runs in between leaves the count as it found it.
    #[inline(always)]
    pub fn leave_alone(&self) {
        let count = self.count.load(Relaxed).wrapping_sub(1);
        if M::mutated(Mutation::LeaveRelaxed) {
            self.count.store(count, Relaxed);
        } else {
            self.count.store(count, Release);
        }
    }

    /// Counts out the call of a frame made under `generation`, unless that count
    /// was given up since, or (`mine` is false) belongs to another process.
    /// `alone`: see [`Slot::leave_alone`].
    #[inline(always)]
    pub fn leave_frame(&self, mine: bool, generation: u32, alone: bool) {
        if M::mutated(Mutation::LeaveWithoutGeneration)
            || (mine && self.generation.load(Relaxed) == generation)
        {
            if alone {
                self.leave_alone();
            } else {
                self.leave_shared();
            }
        }
    }

    /// Notes that the outermost call has passed the gate.
    pub(crate) fn mark_passed(&self) {
        let seq = self.seq.load(Relaxed);
        self.seq.store(seq.wrapping_add(1) & !1, Relaxed);
    }

    /// Notes that the outermost call, the only one counted, passes the gate shut by
    /// `closed` because it is on no member.
    pub(crate) fn stand_aside(&self, closed: u32) {
        self.aside.store(closed, Release);
        self.mark_passed();
    }

    /// Whether the hold `closed` waits for the outermost call, if that is on a
    /// member. Not if it only came to look: it may have come after the drain.
    pub(crate) fn holds_up(&self, closed: u32) -> bool {
        let passed = self.seq.load(Relaxed) & 1 == 0 || M::mutated(Mutation::NestedInUnpassed);
        passed && self.aside.load(Relaxed) != closed
    }

    /// Gives up all counts but that of the present `call`: the owner has proof
    /// that the calls that made them never return.
    pub fn abandon_outer(&self, call: Call) {
        self.generation.add(1, Relaxed);
        self.publish(call);
        self.count.store(1, Release);
    }

    /// Takes a free slot. `false` if somebody else has it. The owner appears last:
    /// whoever sees it sees the start time that tells it from others of its ids.
    pub fn claim(&self, owner: Owner, start_time: u64, image: u64) -> bool {
        if self.owner.cas(FREE, REAPING).is_err() {
            return false;
        }
        self.image.store(image, Relaxed);
        self.start_time.store(start_time, Relaxed);
        self.forget();
        self.owner.store(owner.pack(), Release);
        true
    }

    /// Sets what is counted for `status` to zero.
    fn forget(&self) {
        self.longest_wait_us.store(0, Relaxed);
        self.waited_us.store(0, Relaxed);
        self.settled.store(0, Relaxed);
        let others = [
            &self.waits,
            &self.breaks,
            &self.changed,
            &self.tracked,
            &self.units,
        ];
        for counter in self.seen.iter().chain(others) {
            counter.store(0, Relaxed);
        }
    }

    /// Whether no call is in flight here that the hold `closed` has to wait for.
    ///
    /// The look is the last step of the handshake with [`Slot::enter`]: an acquire
    /// load alone could be satisfied before the gate is shut.
    pub fn is_quiet(&self, closed: u32) -> bool {
        let count = if M::mutated(Mutation::DrainRelaxed) {
            self.count.load(Relaxed)
        } else if M::mutated(Mutation::DrainAcquire) {
            self.count.load(Acquire)
        } else {
            self.count.load_sc()
        };
        count == 0 || self.is_aside(closed)
    }

    /// Whether no call is in flight here, in the same order as [`Slot::is_quiet`].
    pub fn is_empty(&self) -> bool {
        self.count.load_sc() == 0
    }

    /// Whether no call is in flight here.
    pub fn is_idle(&self) -> bool {
        self.count.load(Acquire) == 0
    }

    fn is_aside(&self, closed: u32) -> bool {
        let aside = self.aside.load(Acquire);
        aside == closed || (M::mutated(Mutation::AsideForEver) && aside != 0)
    }
}

/// Whether `entered` may go on without a further look: the fast path.
#[inline(always)]
pub const fn is_free(entered: &Entered) -> bool {
    entered.outer == 0 && word::is_free(entered.word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_round_trip() {
        for owner in [
            Owner {
                pid: 1,
                tid: 1,
                pidns: 0,
            },
            Owner {
                pid: 4_194_303,
                tid: 4_194_302,
                pidns: PIDNS_MASK,
            },
            Owner {
                pid: 77,
                tid: 4_000_000,
                pidns: 0x1234,
            },
        ] {
            assert_eq!(Owner::unpack(owner.pack()), Some(owner));
        }
        assert_eq!(Owner::unpack(FREE), None);
        assert_eq!(Owner::unpack(REAPING), None);
    }

    #[test]
    fn classes_round_trip() {
        for raw in 1..=8 {
            assert_eq!(Class::from_raw(raw).unwrap() as u32, raw);
        }
        assert_eq!(Class::from_raw(0), None);
        assert_eq!(Class::from_raw(9), None);
    }
}
