//! A gate in plain memory, for unit tests.

use std::alloc::{Layout, alloc_zeroed};
use std::sync::atomic::Ordering::Relaxed;

use snapshim_gate::abi::{ABI_VERSION, Gate, HEADER_SIZE, Header, MAGIC, file_size};
use snapshim_gate::slot::Slot;

/// An open gate with so many slots. It is never freed: a gate is mapped for good.
pub(crate) fn new(slots: u32) -> Gate {
    let size = file_size(slots);
    let layout = Layout::from_size_align(size, 4096).expect("a layout");
    // SAFETY: the size is not zero.
    let base = unsafe { alloc_zeroed(layout) };
    assert!(!base.is_null());
    // SAFETY: allocated, aligned to a page and long enough; made of atomics, for which zero
    // is a value.
    let header = unsafe { &*base.cast::<Header>() };
    header.version.store(ABI_VERSION, Relaxed);
    header.header_size.store(HEADER_SIZE as u32, Relaxed);
    header.slot_size.store(size_of::<Slot>() as u32, Relaxed);
    header.slot_count.store(slots, Relaxed);
    header.hold_bound_ms.store(1_000, Relaxed);
    header.magic.store(MAGIC, Relaxed);
    // SAFETY: as above; it stays allocated until the process ends.
    unsafe { Gate::attach(base, size) }.expect("a gate")
}
