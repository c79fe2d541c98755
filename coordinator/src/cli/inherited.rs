//! What this process was started with and its own runtime changes: the programs
//! it starts shall find it as it was.
//!
//! Before `main`, Rust ignores SIGPIPE and opens `/dev/null` where a standard
//! stream is closed; starting a program, it empties the signal mask. So the
//! state is recorded before all that, by a constructor in the binary.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU64};

use nix::libc;

/// Signals that were ignored; bit n-1 is signal n.
static IGNORED: AtomicU64 = AtomicU64::new(0);
/// Signals that were blocked.
static BLOCKED: AtomicU64 = AtomicU64::new(0);
/// Standard streams that were closed; bit n is descriptor n.
static CLOSED: AtomicU8 = AtomicU8::new(0);

/// The highest signal number.
pub const LAST_SIGNAL: i32 = 64;

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Records the state, and takes back the one part of it that would harm us: with
/// SIGCHLD ignored, the exit status of a child is lost. For a constructor: calls
/// nothing that needs the runtime.
pub fn record() {
    let mut ignored = 0;
    let mut blocked = 0;
    // SAFETY: all-zero is a value of these C structures; the calls only fill them.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, std::ptr::null(), &mut mask);
        for signal in 1..=LAST_SIGNAL {
            let mut action: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &mut action) == 0
                && action.sa_sigaction == libc::SIG_IGN
            {
                ignored |= bit(signal);
            }
            if libc::sigismember(&mask, signal) == 1 {
                blocked |= bit(signal);
            }
        }
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
    let mut closed = 0;
    for fd in 0..3 {
        // SAFETY: asks about a number; any is allowed.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            closed |= 1 << fd;
        }
    }
    IGNORED.store(ignored, Relaxed);
    BLOCKED.store(blocked, Relaxed);
    CLOSED.store(closed, Relaxed);
}

/// Whether `signal` was ignored when this process started.
pub fn was_ignored(signal: i32) -> bool {
    IGNORED.load(Relaxed) & bit(signal) != 0
}

/// Makes `command` start its program with the recorded state.
pub fn restore_in(command: &mut Command) {
    // SAFETY: `restore` makes only async-signal-safe calls and allocates nothing.
    unsafe {
        command.pre_exec(restore);
    }
}

/// Between fork and exec, after the standard library's own changes.
fn restore() -> io::Result<()> {
    let blocked = BLOCKED.load(Relaxed);
    for signal in [libc::SIGPIPE, libc::SIGCHLD] {
        let action = if was_ignored(signal) {
            libc::SIG_IGN
        } else {
            libc::SIG_DFL
        };
        // SAFETY: no handler is installed.
        unsafe { libc::signal(signal, action) };
    }
    for fd in 0..3 {
        if CLOSED.load(Relaxed) & 1 << fd != 0 {
            // SAFETY: what stands there is the runtime's /dev/null, which nothing here uses.
            unsafe { libc::close(fd) };
        }
    }
    // SAFETY: all-zero is a value of a signal set; the calls fill and read it.
    let set = unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut mask);
        for signal in 1..=LAST_SIGNAL {
            if blocked & bit(signal) != 0 {
                libc::sigaddset(&mut mask, signal);
            }
        }
        libc::sigprocmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut())
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
