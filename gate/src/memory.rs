//! What the protocol needs of memory, so that a model checker can stand in for it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// One atomic cell of the shared segment.
///
/// `*_sc` are the two operations that take part in the store-then-load
/// handshake between a writer (count, then look at the gate) and the
/// coordinator (shut the gate, then look at the counts). They must be
/// sequentially consistent: each side has to see at least the other's store.
pub trait Cell<T: Copy + PartialEq> {
    /// Plain atomic load.
    fn load(&self, order: Ordering) -> T;
    /// Plain atomic store.
    fn store(&self, value: T, order: Ordering);
    /// Compare-and-swap, `AcqRel`/`Acquire`; `Ok(previous)` when it happened.
    fn cas(&self, current: T, new: T) -> Result<T, T>;
    /// Sequentially consistent compare-and-swap.
    fn cas_sc(&self, current: T, new: T) -> Result<T, T>;
    /// Sequentially consistent add; returns the previous value.
    fn add_sc(&self, value: T) -> T;
    /// Add with the given order; returns the previous value.
    fn add(&self, value: T, order: Ordering) -> T;
    /// Subtract with the given order; returns the previous value.
    fn sub(&self, value: T, order: Ordering) -> T;
    /// Sequentially consistent load.
    fn load_sc(&self) -> T;
}

macro_rules! cell {
    ($atomic:ty, $int:ty) => {
        impl Cell<$int> for $atomic {
            #[inline(always)]
            fn load(&self, order: Ordering) -> $int {
                <$atomic>::load(self, order)
            }
            #[inline(always)]
            fn store(&self, value: $int, order: Ordering) {
                <$atomic>::store(self, value, order)
            }
            #[inline(always)]
            fn cas(&self, current: $int, new: $int) -> Result<$int, $int> {
                self.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
            }
            #[inline(always)]
            fn cas_sc(&self, current: $int, new: $int) -> Result<$int, $int> {
                self.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst)
            }
            #[inline(always)]
            fn add_sc(&self, value: $int) -> $int {
                self.fetch_add(value, Ordering::SeqCst)
            }
            #[inline(always)]
            fn add(&self, value: $int, order: Ordering) -> $int {
                self.fetch_add(value, order)
            }
            #[inline(always)]
            fn sub(&self, value: $int, order: Ordering) -> $int {
                self.fetch_sub(value, order)
            }
            #[inline(always)]
            fn load_sc(&self) -> $int {
                <$atomic>::load(self, Ordering::SeqCst)
            }
        }
    };
}
cell!(AtomicU32, u32);
cell!(AtomicU64, u64);

/// A way to break the protocol on purpose. Each is compiled out of real builds
/// (see [`Memory::mutated`]) and must make the model fail: that is the proof
/// that the model looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A writer's count is not sequentially consistent with its look at the gate.
    EnterWithoutFence,
    /// A writer looks at the gate before it counts itself in.
    LookBeforeCount,
    /// A writer leaves with a relaxed decrement.
    LeaveRelaxed,
    /// The coordinator's close is not ordered before its look at the counts.
    CloseWithoutFence,
    /// The coordinator looks at the counts with relaxed loads.
    DrainRelaxed,
    /// The coordinator's look at the counts is not ordered after its close.
    DrainAcquire,
    /// The coordinator cuts without waiting for the counts.
    CutWithoutDrain,
    /// The coordinator reopens with a store instead of a compare-and-swap.
    OpenWithoutCompare,
    /// A waiter breaks the hold with a store instead of a compare-and-swap.
    BreakWithoutCompare,
    /// The coordinator reopens and wakes nobody.
    OpenWithoutWake,
    /// A slot is reaped by its owner's ids alone.
    ReapWithoutSecondLook,
    /// A slot is reset before it is taken from its owner.
    ReapBeforeTaking,
    /// A slot is reset with relaxed stores.
    ReapRelaxed,
    /// A nested call passes a shut gate whatever the outer call is on.
    NestedAlwaysPasses,
    /// A nested call passes although its outer call has not passed yet.
    NestedInUnpassed,
    /// A call on no member of one hold is not waited for by later ones.
    AsideForEver,
    /// A frame undoes a count without asking whose it was.
    LeaveWithoutGeneration,
    /// A waiter trusts a member table that was replaced while it read.
    TableWithoutRecheck,
    /// A call passes a guarded gate without asking for what it changes.
    GuardedAsOpen,
    /// A chunk is marked as captured by a relaxed store.
    MarkRelaxed,
    /// A guard ends with a store instead of a compare-and-swap.
    UnguardWithoutCompare,
    /// A call does not mark what it changes.
    MarkNothing,
}

/// The memory the gate lives in: shared memory, or the model checker's.
pub trait Memory {
    /// A 32-bit cell.
    type U32: Cell<u32>;
    /// A 64-bit cell.
    type U64: Cell<u64>;
    /// Whether this run breaks the protocol in the given way; `false` outside the model.
    #[inline(always)]
    fn mutated(_: Mutation) -> bool {
        false
    }
}

/// Real shared memory.
#[derive(Debug)]
pub enum Shared {}

impl Memory for Shared {
    type U32 = AtomicU32;
    type U64 = AtomicU64;
}
