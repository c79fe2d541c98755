//! `libsnapshim.so`: preloaded into programs that know nothing of it, it takes
//! every call that changes a file past the gate of its set.
//!
//! It lives in other people's processes, so it allocates nothing, takes no lock,
//! keeps no descriptor, prints nothing, leaves `errno` alone, may be entered by a
//! signal handler at any instruction, and never ends the process. Where it
//! cannot do its work it lets the call pass: better no snapshot than a broken
//! program.
//!
//! | module | what it does |
//! |---|---|
//! | `hooks` | the table of interposed functions |
//! | `guard` | what each hook does before and after the real call |
//! | `member` | which file a call means, asked only while the gate is shut |
//! | `attach` | finding, checking and mapping the gate; fork and exec |
//! | `claim` | a thread's slot |
//! | `thread` | the thread's own word |
//! | `sites` | the system call instructions inside libc and other files |
//! | `libc` | what is asked of a libc, if there is one |
//! | `next` | the functions behind the hooks, found without `dlsym` |
//! | `watch` | what is noted while the gate is armed, and shutting it at a commit point |
//! | `vectors` | calls that leave the vector registers alone |
//! | `sys` | system calls without libc |
#![no_std]
// The hooks carry the names and signatures of libc's functions.
#![allow(clippy::missing_safety_doc, missing_docs, unreachable_pub)]

use core::ffi::{c_char, c_int};

mod attach;
mod chunks;
mod claim;
mod guard;
mod hooks;
mod libc;
mod marks;
mod member;
mod next;
#[cfg(target_arch = "x86_64")]
mod sites;
#[cfg(target_arch = "x86_64")]
mod strings;
mod sys;
mod thread;
mod vectors;
mod watch;

/// Nothing in the shim panics (a test looks for panic machinery in the built
/// library); Rust wants the handler all the same.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

// Rust's core library, built to unwind, names this function in its tables. No
// frame of ours is ever asked: there is nothing to clean up in any of them.
core::arch::global_asm!(
    ".hidden rust_eh_personality",
    ".globl rust_eh_personality",
    "rust_eh_personality:",
    "ret",
);

/// Attaches before `main`, so that the coordinator can see that this process is
/// held even if it makes no call for a while. The library is linked as one to
/// be initialised first (`-z initfirst`), before other libraries' constructors and
/// the program's own `.preinit_array`; glibc before 2.34 may prefer its libpthread.
/// Hooks that are called earlier all the same do it for themselves. (glibc passes
/// the arguments; musl none, but has set `environ` by then, and they are not used.)
#[used]
#[unsafe(link_section = ".init_array")]
static INIT: extern "C" fn(c_int, *mut *const c_char, *mut *const c_char) = init;

extern "C" fn init(_: c_int, _: *mut *const c_char, environment: *mut *const c_char) {
    if !libc::is_present() {
        return;
    }
    next::begin();
    attach::at_start(environment);
    sites::install();
    hooks::begin();
}

/// Other machines: there is no such layer yet.
#[cfg(not(target_arch = "x86_64"))]
mod sites {
    pub(crate) fn is_covered(_: usize) -> bool {
        false
    }

    pub(crate) fn install() {}
}
