//! The bound of a hold, and the signals put off meanwhile.

use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

/// The time of a hold, by the gate or only from outside. As long as the value lives, signals that would end or stop this process are put off: dying or
/// stopping now would make programs wait for nothing.
#[derive(Debug)]
pub struct Clock {
    since: Instant,
    limit: Duration,
    _mask: Mask,
}

impl Clock {
    /// Begins a hold of at most `limit`.
    pub fn start(limit: Duration) -> Clock {
        let mut signals = SigSet::empty();
        let _ = sigprocmask(
            SigmaskHow::SIG_BLOCK,
            Some(&SigSet::all()),
            Some(&mut signals),
        );
        Clock {
            since: Instant::now(),
            limit,
            _mask: Mask(signals),
        }
    }

    /// Takes over a hold that began so long `ago`.
    pub fn take_over(limit: Duration, ago: Duration) -> Clock {
        let clock = Clock::start(limit);
        let since = clock.since.checked_sub(ago).unwrap_or(clock.since);
        Clock { since, ..clock }
    }

    /// Whether a signal that would end this process is being put off.
    pub fn is_asked_to_end() -> bool {
        use nix::libc;
        let mut pending = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: writes the whole set, or fails.
        let pending = unsafe {
            if libc::sigpending(pending.as_mut_ptr()) != 0 {
                return false;
            }
            pending.assume_init()
        };
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT]
            .into_iter()
            // SAFETY: asks about a set that is initialised.
            .any(|signal| unsafe { libc::sigismember(&raw const pending, signal) } == 1)
    }

    /// How long it may last.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// How long it has lasted.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// How much longer it may last.
    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.elapsed())
    }
}

/// The signals that were put off before; they are again when this is dropped.
#[derive(Debug)]
struct Mask(SigSet);

impl Drop for Mask {
    fn drop(&mut self) {
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.0), None);
    }
}
