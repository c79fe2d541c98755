//! What the machine itself does to a thread that only wants to sleep for a millisecond at a
//! time: no figure of a stall means anything that is not compared with this.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::control::now_ns;

/// Measures until dropped.
#[derive(Debug)]
pub struct Noise {
    shared: Arc<(AtomicBool, AtomicU64)>,
}

impl Noise {
    /// Starts to measure.
    pub fn start() -> Noise {
        let shared: Arc<(AtomicBool, AtomicU64)> = Arc::default();
        let noise = Noise {
            shared: Arc::clone(&shared),
        };
        std::thread::spawn(move || {
            // SAFETY: sets an attribute of this thread: timers as exact as the writers'.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
            const STEP: u64 = 1_000_000;
            let mut due = now_ns() + STEP;
            while !shared.0.load(Ordering::Relaxed) {
                let early = due.saturating_sub(now_ns());
                std::thread::sleep(Duration::from_nanos(early));
                let now = now_ns();
                shared
                    .1
                    .fetch_max(now.saturating_sub(due), Ordering::Relaxed);
                due = now.max(due) + STEP;
            }
        });
        noise
    }

    /// The longest delay since the last time this was asked, µs.
    pub fn take_us(&self) -> f64 {
        self.shared.1.swap(0, Ordering::Relaxed) as f64 / 1000.0
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.shared.0.store(true, Ordering::Relaxed);
    }
}
