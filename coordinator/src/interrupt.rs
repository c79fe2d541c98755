//! Ending work cleanly when somebody asks for it by a signal (^C, SIGTERM, SIGHUP).

use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::Relaxed;

use nix::libc;

use crate::cli::inherited;

/// The signal that came; 0 for none.
static CAME: AtomicI32 = AtomicI32::new(0);

const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

extern "C" fn note(signal: libc::c_int) {
    CAME.store(signal, Relaxed);
}

/// From now on the signals that ask a program to end are only noted; see [`is_asked`]. What was
/// ignored when this program was started stays so.
pub fn note_signals() {
    for signal in SIGNALS {
        if !inherited::was_ignored(signal) {
            let _ = handle(signal);
        }
    }
}

/// For a thread that works for another: signals are for that one, which asks whether any came when it can. Whoever
/// writes to a terminal from the background with them blocked is not stopped either, with everybody he holds.
pub(crate) fn leave_to_others() {
    let _ = nix::sys::signal::SigSet::all().thread_block();
}

/// Whether one has come.
pub fn is_asked() -> bool {
    came().is_some()
}

/// Which one has come.
pub fn came() -> Option<i32> {
    Some(CAME.load(Relaxed)).filter(|signal| *signal != 0)
}

/// Has a signal noted; what was done about it before.
fn handle(signal: i32) -> libc::sigaction {
    // SAFETY: all-zero is a value of the structures; the handler only stores to an atomic.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &action, &mut before);
        before
    }
}

/// As long as it lives, signals that ask for the end are noted, for there is something to be
/// put in order first. Whoever drops it looks at [`is_asked`].
///
/// A thread that has them blocked takes them in another way (`snapshim run`), and is left alone.
#[derive(Debug)]
pub(crate) struct Deferred(Vec<(i32, libc::sigaction)>);

impl Deferred {
    pub(crate) fn begin() -> Deferred {
        let blocked = nix::sys::signal::SigSet::thread_get_mask();
        let is_blocked = |signal: &i32| {
            let signal = nix::sys::signal::Signal::try_from(*signal);
            matches!((&blocked, signal), (Ok(set), Ok(signal)) if set.contains(signal))
        };
        let ours = SIGNALS.into_iter();
        let ours = ours.filter(|s| !is_blocked(s) && !inherited::was_ignored(*s));
        Deferred(ours.map(|signal| (signal, handle(signal))).collect())
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        for (signal, before) in &self.0 {
            // SAFETY: what the kernel said was in force before.
            unsafe {
                libc::sigaction(*signal, before, std::ptr::null_mut());
            }
        }
    }
}
