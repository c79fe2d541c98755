//! A thread that is there before it is needed.
//!
//! A thread that has just been made, or has just become more urgent, is behind those that run on its
//! processor, and may get it a tick later. One that sleeps is woken and goes on at once.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::interrupt;
use crate::urgency::{self, Urgency};

type Job = Box<dyn FnOnce() + Send>;

/// Waits for something to do. Ends when dropped.
pub(super) struct Standby {
    jobs: SyncSender<Job>,
    /// Nothing is sent: it is closed when the thread is done.
    done: Receiver<()>,
}

/// Waits, wherever it is dropped, until the thread is done.
struct Done(Receiver<()>);

impl Drop for Done {
    fn drop(&mut self) {
        let _ = self.0.recv();
    }
}

impl Standby {
    /// Starts the thread, and waits until it sleeps, or nearly so.
    pub(super) fn start(name: &str, urgency: Urgency) -> std::io::Result<Standby> {
        let (jobs, job) = sync_channel::<Job>(1);
        let (doing, done) = sync_channel::<()>(0);
        let (is_up, up) = sync_channel::<()>(0);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                interrupt::leave_to_others();
                urgency::of_this_thread(urgency);
                drop(is_up);
                if let Ok(job) = job.recv() {
                    job();
                }
                drop(doing);
            })?;
        let _ = up.recv();
        Ok(Standby { jobs, done })
    }

    /// Does `job` in the thread, and meanwhile `here`.
    pub(super) fn beside<'a, R>(
        self,
        job: impl FnOnce() + Send + 'a,
        here: impl FnOnce() -> R,
    ) -> R {
        let Standby { jobs, done } = self;
        let job: Box<dyn FnOnce() + Send + 'a> = Box::new(job);
        // SAFETY: only the lifetime changes. The job is called and dropped by the thread, before
        // that closes `done` (also if it panics: what it owns is dropped on the way); `done` is
        // waited for before this returns, or is unwound. If the thread were gone, the job would be
        // dropped here.
        let job: Job = unsafe { std::mem::transmute(job) };
        let done = Done(done);
        let sent = jobs.send(job);
        drop(sent);
        let here = here();
        drop(done);
        here
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use nix::sys::signal::{SigSet, Signal};

    use super::*;

    #[test]
    fn what_is_borrowed_is_waited_for() {
        let count = AtomicU32::new(0);
        let standby = Standby::start("test", Urgency::Awaited).unwrap();
        let here = standby.beside(
            || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                count.fetch_add(1, Relaxed);
            },
            || 7,
        );
        assert_eq!((here, count.load(Relaxed)), (7, 1));
    }

    #[test]
    fn signals_are_not_for_it() {
        let standby = Standby::start("test", Urgency::Usual).unwrap();
        let mut mask = None;
        standby.beside(|| mask = SigSet::thread_get_mask().ok(), || ());
        let mask = mask.unwrap();
        assert!(mask.contains(Signal::SIGINT) && mask.contains(Signal::SIGTSTP));
    }

    #[test]
    fn it_may_have_nothing_to_do() {
        drop(Standby::start("test", Urgency::Usual).unwrap());
    }

    #[test]
    fn what_panics_is_waited_for() {
        let count = AtomicU32::new(0);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let standby = Standby::start("test", Urgency::Usual).unwrap();
            standby.beside(
                || {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    count.fetch_add(1, Relaxed);
                },
                || panic!("here"),
            )
        }));
        assert!(caught.is_err());
        assert_eq!(count.load(Relaxed), 1);
    }
}
