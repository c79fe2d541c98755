//! Ending long work cleanly when somebody asks for it by a signal.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use nix::libc;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn ask(_: libc::c_int) {
    ASKED.store(true, Relaxed);
}

/// From now on the signals that ask a program to end are only noted; see [`is_asked`]. What was
/// ignored when this program was started stays so.
pub fn note_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        if super::inherited::was_ignored(signal) {
            continue;
        }
        // SAFETY: all-zero is a value of the structure; the handler only stores to an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ask as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Whether one has come.
pub fn is_asked() -> bool {
    ASKED.load(Relaxed)
}
