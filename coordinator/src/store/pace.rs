//! How fast snapshots are removed: in small steps, and beside a running program with rests
//! between them and at idle I/O priority, so that it is not felt.

use std::fmt;
use std::time::{Duration, Instant};

use nix::libc;
use rustix::io::Errno;

/// Beside a running program: rests three times as long as it works.
const REST: u32 = 3;
/// Work at a stretch before a rest.
const STRETCH: Duration = Duration::from_millis(5);
/// Longest sleep before it is asked again whether to stop.
const NAP: Duration = Duration::from_millis(20);

/// The pace of a removal; asked between its steps.
pub struct Pace<'a> {
    rest: u32,
    stop: &'a dyn Fn(usize) -> bool,
    /// Removals to be done, this one included.
    waiting: usize,
    since: Instant,
}

impl Pace<'static> {
    /// Step by step, without a rest.
    pub fn brisk() -> Pace<'static> {
        Pace {
            rest: 0,
            stop: &|_| false,
            waiting: 0,
            since: Instant::now(),
        }
    }
}

impl<'a> Pace<'a> {
    /// More removals than this are too many to be gentle about: more come than go.
    pub const MANY: usize = 16;

    /// Mostly at rest and at idle I/O priority, until `stop` says so; it is told how many
    /// removals wait to be done.
    pub fn gentle(stop: &'a dyn Fn(usize) -> bool) -> Pace<'a> {
        Pace {
            rest: REST,
            stop,
            waiting: 0,
            since: Instant::now(),
        }
    }

    /// Makes the I/O of this thread idle while the value lives, if that is the pace.
    pub(crate) fn idle(&self) -> Option<IdleIo> {
        (self.rest > 0).then(IdleIo::begin).flatten()
    }

    /// Before each removal: how many there are.
    pub(super) fn begin(&mut self, waiting: usize) {
        self.waiting = waiting;
        self.since = Instant::now();
    }

    /// After each step of the work.
    ///
    /// # Errors
    ///
    /// `ECANCELED`: it is to stop here.
    pub(super) fn step(&mut self) -> rustix::io::Result<()> {
        let rest = if self.waiting > Self::MANY {
            0
        } else {
            self.rest
        };
        let worked = self.since.elapsed();
        if worked < STRETCH {
            return Ok(());
        }
        let until = Instant::now() + worked * rest;
        loop {
            if (self.stop)(self.waiting) {
                return Err(Errno::CANCELED);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(NAP));
        }
        self.since = Instant::now();
        Ok(())
    }
}

impl fmt::Debug for Pace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace").field("rest", &self.rest).finish()
    }
}

/// This thread's I/O has to wait for everybody else's, while this lives.
pub(crate) struct IdleIo {
    before: libc::c_long,
}

impl IdleIo {
    /// `None` if it cannot be: then the rests have to do.
    fn begin() -> Option<IdleIo> {
        const IDLE: libc::c_long = 3 << 13;
        // SAFETY: takes numbers and returns one; 0 is the calling thread.
        let before = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) };
        (before >= 0 && set_io_priority(IDLE)).then_some(IdleIo { before })
    }
}

impl Drop for IdleIo {
    fn drop(&mut self) {
        set_io_priority(self.before);
    }
}

fn set_io_priority(priority: libc::c_long) -> bool {
    // SAFETY: takes numbers; 1 says that the next one is a thread, 0 the calling one.
    unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, priority) == 0 }
}
