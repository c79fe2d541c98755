//! The gate's memory, as loom sees it, with signals that arrive between any two accesses.

use std::cell::{Cell as StdCell, RefCell};

use loom::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, SeqCst};
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};
use loom::thread::{self, ThreadId};
use snapshim_gate::memory::{Cell, Memory, Mutation};

/// Where a sequentially consistent access has its fence.
///
/// loom has no sequentially consistent accesses: it treats `SeqCst` as `AcqRel`. It
/// does have sequentially consistent fences, and a compiler may build the accesses
/// out of those in two ways, each weaker than the other somewhere. With the fence
/// before, nothing orders an access with a later one that is not sequentially
/// consistent itself; with the fence after, with an earlier one. The protocol has to
/// hold under both: then it owes nothing to a fence that only one of them has.
///
/// What this cannot show: loom's fences also pass on what happened before them, so
/// that an acquire or release missing beside a fence may go unnoticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fences {
    Before,
    After,
}

thread_local! {
    // Threads of a model are coroutines of one thread of the system; so these are
    // of one exploration, whatever is explored beside it.
    static FENCES: StdCell<Fences> = const { StdCell::new(Fences::Before) };
    static MUTATION: StdCell<Option<Mutation>> = const { StdCell::new(None) };
    static SIGNAL: RefCell<Option<Signal>> = const { RefCell::new(None) };
}

/// How the next exploration on this thread sees memory, and how it breaks the protocol.
pub(crate) fn set_up(fences: Fences, mutation: Option<Mutation>) {
    FENCES.set(fences);
    MUTATION.set(mutation);
}

pub(crate) enum Modelled {}

impl Memory for Modelled {
    type U32 = U32;
    type U64 = U64;

    fn mutated(mutation: Mutation) -> bool {
        MUTATION.get() == Some(mutation)
    }
}

fn fenced<T>(access: impl FnOnce() -> T) -> T {
    if FENCES.get() == Fences::Before {
        fence(SeqCst);
    }
    let result = access();
    if FENCES.get() == Fences::After {
        fence(SeqCst);
    }
    result
}

macro_rules! cell {
    ($cell:ident, $atomic:ident, $int:ty) => {
        pub(crate) struct $cell($atomic);

        impl $cell {
            pub(crate) fn new(value: $int) -> $cell {
                $cell($atomic::new(value))
            }
        }

        impl Cell<$int> for $cell {
            fn load(&self, order: Ordering) -> $int {
                deliver();
                self.0.load(order)
            }
            fn store(&self, value: $int, order: Ordering) {
                deliver();
                self.0.store(value, order)
            }
            fn cas(&self, current: $int, new: $int) -> Result<$int, $int> {
                deliver();
                self.0.compare_exchange(current, new, AcqRel, Acquire)
            }
            fn cas_sc(&self, current: $int, new: $int) -> Result<$int, $int> {
                fenced(|| self.cas(current, new))
            }
            fn add_sc(&self, value: $int) -> $int {
                fenced(|| self.add(value, AcqRel))
            }
            fn add(&self, value: $int, order: Ordering) -> $int {
                deliver();
                self.0.fetch_add(value, order)
            }
            fn sub(&self, value: $int, order: Ordering) -> $int {
                deliver();
                self.0.fetch_sub(value, order)
            }
            fn load_sc(&self) -> $int {
                fenced(|| self.load(Acquire))
            }
        }
    };
}
cell!(U32, AtomicU32, u32);
cell!(U64, AtomicU64, u64);

impl U32 {
    /// The value as the kernel reads it: no signal arrives meanwhile.
    pub(crate) fn peek(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

/// A signal on its way to one thread.
struct Signal {
    thread: ThreadId,
    accesses: usize,
    handler: Box<dyn FnOnce()>,
}

/// Has `handler` run in the calling thread, between two of its accesses to the
/// gate: after `accesses` more of them.
pub(crate) fn signal_after(accesses: usize, handler: impl FnOnce() + 'static) {
    let thread = thread::current().id();
    let handler = Box::new(handler);
    SIGNAL.set(Some(Signal {
        thread,
        accesses,
        handler,
    }));
}

/// Takes the signal back; `true` if it had not come.
pub(crate) fn cancel_signal() -> bool {
    SIGNAL.take().is_some()
}

fn deliver() {
    let due = SIGNAL.with_borrow_mut(|pending| match pending {
        Some(signal) if signal.thread == thread::current().id() => {
            if signal.accesses == 0 {
                return pending.take();
            }
            signal.accesses -= 1;
            None
        }
        _ => None,
    });
    if let Some(signal) = due {
        (signal.handler)();
    }
}
