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
//! | `next` | the functions behind the hooks, found without `dlsym` |
//! | `sys` | system calls without libc |
//!
//! Syscall sites inside libc are another layer, which will call `guard` and
//! `hooks::raw` just as the symbol hooks do.
#![no_std]
// The hooks carry the names and signatures of libc's functions.
#![allow(clippy::missing_safety_doc, missing_docs, unreachable_pub)]

mod attach;
mod claim;
mod guard;
mod hooks;
mod member;
mod next;
mod sys;
mod thread;

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
/// held even if it makes no call for a while. Hooks that are called earlier, by
/// constructors of other libraries, do it for themselves.
#[used]
#[unsafe(link_section = ".init_array")]
static INIT: extern "C" fn() = init;

extern "C" fn init() {
    hooks::resolve_all();
    attach::at_start();
}
