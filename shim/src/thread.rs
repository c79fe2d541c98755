//! The thread's own word: which slot it has, and in which process that was true.
//!
//! Initial-exec thread-local storage, written by hand: one load from the thread
//! pointer, no `__tls_get_addr` (which may allocate), no destructor. A preloaded
//! library always gets its share of static TLS. Threads that share a TLS block
//! (raw clone without CLONE_SETTLS, the child of vfork) share the slot as well,
//! which its count allows.

use core::arch::{asm, global_asm};
use core::cell::Cell;
use core::sync::atomic::AtomicBool;

use snapshim_gate::abi::Header;
use snapshim_gate::slot::Slot;

/// What a thread knows of itself. Its handlers may write it at any time.
#[repr(C)]
pub(crate) struct Thread {
    /// [`crate::attach::Page::generation`] at the time the slot was claimed; all
    /// ones in a new thread, which no process ever has.
    pub(crate) generation: Cell<u64>,
    /// The slot, valid while the generation is the process's.
    pub(crate) slot: Cell<*const Slot>,
    /// The head of the gate, likewise.
    pub(crate) header: Cell<*const Header>,
}

#[cfg(target_arch = "x86_64")]
macro_rules! tls_object {
    () => {
        "@tls_object"
    };
}
#[cfg(target_arch = "aarch64")]
macro_rules! tls_object {
    () => {
        "%tls_object"
    };
}

global_asm!(
    ".section .tdata.snapshim,\"awT\"",
    ".balign 16",
    ".hidden snapshim_thread",
    ".globl snapshim_thread",
    concat!(".type snapshim_thread, ", tls_object!()),
    ".size snapshim_thread, 32",
    "snapshim_thread:",
    ".quad -1",
    ".quad 0",
    ".quad 0",
    ".quad 0",
    ".previous",
);

/// Set once a thread may have been made that shares its creator's thread-local
/// storage, and so its slot: from then on counts are lowered atomically.
pub(crate) static SHARING: AtomicBool = AtomicBool::new(false);

/// This thread's word.
#[inline(always)]
pub(crate) fn current() -> &'static Thread {
    let at: *const Thread;
    // SAFETY: reads the thread pointer and a constant offset from the GOT. The
    // result is used within the call that asked, in the thread that asked.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!(
            "mov {at}, qword ptr fs:[0]",
            "add {at}, qword ptr [rip + snapshim_thread@GOTTPOFF]",
            at = out(reg) at,
            options(nostack, pure, readonly),
        );
        #[cfg(target_arch = "aarch64")]
        asm!(
            "mrs {at}, tpidr_el0",
            "adrp {off}, :gottprel:snapshim_thread",
            "ldr {off}, [{off}, :gottprel_lo12:snapshim_thread]",
            "add {at}, {at}, {off}",
            at = out(reg) at,
            off = out(reg) _,
            options(nostack, pure, readonly),
        );
        &*at
    }
}

/// The stack pointer, about here.
#[inline(always)]
pub(crate) fn stack_pointer() -> u64 {
    let sp: u64;
    // SAFETY: reads a register.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        asm!("mov {}, sp", out(reg) sp, options(nomem, nostack, preserves_flags));
    }
    sp
}
