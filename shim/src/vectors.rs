//! Calls that leave the vector registers alone.

use core::ffi::c_void;

/// Calls `what`, and leaves the vector registers as they were: at a patched system
/// call instruction they are the program's. The code of this library is compiled
/// for the oldest machines and so touches their lower 16 bytes only, by
/// instructions that leave the rest as it is.
#[cold]
pub(crate) fn preserving<F: FnMut()>(what: &mut F) {
    extern "C" fn run<F: FnMut()>(what: *mut c_void) {
        // SAFETY: the pointer that `preserving` was given.
        unsafe { (*what.cast::<F>())() }
    }
    // SAFETY: `run` is called once, with `what`, before this returns.
    unsafe { call_preserving((&raw mut *what).cast(), run::<F>) }
}

/// Saves the vector registers, calls `run(what)`, puts them back.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn call_preserving(what: *mut c_void, run: extern "C" fn(*mut c_void)) {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "sub rsp, 256",
        ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "movaps [rsp + 16 * \\i], xmm\\i",
        ".endr",
        "call rsi",
        ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "movaps xmm\\i, [rsp + 16 * \\i]",
        ".endr",
        "leave",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
    )
}

/// Only hooks come here on this machine, and a function may use these registers.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn call_preserving(what: *mut c_void, run: extern "C" fn(*mut c_void)) {
    run(what);
}
