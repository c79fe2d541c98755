//! Signals of `snapshim run`: taken in one place, one at a time.
//!
//! The program runs in our process group, so what the terminal sends reaches it
//! without our help: forwarding it would deliver it twice. What somebody sends
//! to us alone is meant for the program: it is passed on.

use std::io;
use std::ptr;
use std::time::{Duration, Instant};

use nix::libc;

use super::inherited::{self, LAST_SIGNAL};

/// Blocked signals, to be taken by [`Signals::next`].
pub struct Signals {
    set: libc::sigset_t,
}

/// A signal that was taken.
#[derive(Clone, Copy)]
pub struct Taken {
    /// Its number.
    pub signal: i32,
    info: libc::siginfo_t,
}

impl Signals {
    /// Blocks every signal that can be waited for, in this thread and those it
    /// starts. To be called before there are others.
    pub fn block() -> io::Result<Signals> {
        // SAFETY: all-zero is a value of a signal set; the calls fill and read it.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in (1..=LAST_SIGNAL).filter(|s| is_taken(*s)) {
                // Refuses what the C library keeps to itself.
                libc::sigaddset(&mut set, signal);
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) {
                0 => Ok(Signals { set }),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Waits for the next signal.
    pub fn next(&self) -> Taken {
        // SAFETY: all-zero is a value of the structure, which the call fills.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        loop {
            // SAFETY: both point to live values.
            let signal = unsafe { libc::sigwaitinfo(&self.set, &mut info) };
            // It fails when a stop and a continue went by, and for no other reason.
            if signal > 0 {
                return Taken { signal, info };
            }
        }
    }

    /// Waits for so long, unless somebody asks for the end; whether somebody did.
    pub fn ends_within(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: left.subsec_nanos().into(),
            };
            // SAFETY: all-zero is a value of the structure, which the call fills; the rest is
            // alive and readable.
            let (signal, info) = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                (libc::sigtimedwait(&self.set, &mut info, &timeout), info)
            };
            if signal > 0 && (Taken { signal, info }).is_end() {
                return true;
            }
            if signal <= 0 && left.is_zero() {
                return false;
            }
        }
    }

    /// Stops this process as `signal` would have, until it is continued.
    pub fn stop(&self, signal: i32) {
        // SAFETY: sets made and read here; the signal is one of the stop signals,
        // whose disposition is the default, or ignored as it was when we started.
        unsafe {
            let mut one: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut one);
            libc::sigaddset(&mut one, signal);
            libc::kill(libc::getpid(), signal);
            // Delivered here; the call returns when we are continued.
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &one, ptr::null_mut());
            libc::pthread_sigmask(libc::SIG_BLOCK, &one, ptr::null_mut());
        }
    }
}

/// Whether `run` takes a signal. Not those that report a fault of this process
/// itself, nor what was ignored when it was started (a program in the background
/// of a script ignores what the terminal sends): it stays so, for the program too.
fn is_taken(signal: i32) -> bool {
    const FAULTS: [i32; 6] = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGTRAP,
        libc::SIGSYS,
    ];
    // Ignored by our runtime: a closed pipe is an error of a write here.
    let ours = [libc::SIGPIPE, libc::SIGKILL, libc::SIGSTOP];
    signal == libc::SIGCHLD
        || !(FAULTS.contains(&signal) || ours.contains(&signal) || inherited::was_ignored(signal))
}

impl Taken {
    /// Whether it asks this process to stop, as ^Z does.
    pub fn is_stop(&self) -> bool {
        matches!(self.signal, libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU)
    }

    /// Whether it commonly asks a program to end.
    pub fn is_end(&self) -> bool {
        matches!(
            self.signal,
            libc::SIGINT | libc::SIGTERM | libc::SIGHUP | libc::SIGQUIT
        )
    }

    /// Whether the program `pid` is still to be told.
    fn is_news_to(&self, pid: i32) -> bool {
        if self.signal == libc::SIGCHLD {
            return false;
        }
        if self.info.si_code > 0 {
            // From the kernel: the terminal's goes to the whole process group, except
            // that a hangup is told to the leader of the session only.
            // SAFETY: asks about this process.
            let leads = unsafe { libc::getsid(0) == libc::getpid() };
            return self.signal == libc::SIGHUP && leads;
        }
        // What the program itself sent to its process group, or to us.
        // SAFETY: a signal that a process sent carries its pid.
        unsafe { self.info.si_pid() != pid }
    }

    /// Passes it on to the program `pid`, which has not been waited for yet.
    pub fn forward(&self, pid: i32) {
        if !self.is_news_to(pid) {
            return;
        }
        // A signal that cannot be delivered is one that nobody needs any more.
        // SAFETY: `pid` is our child, and its id cannot be given to another process
        // before we have waited for it; a queued signal carries a value.
        unsafe {
            if self.info.si_code == libc::SI_QUEUE {
                libc::sigqueue(pid, self.signal, self.info.si_value());
            } else {
                libc::kill(pid, self.signal);
            }
        }
    }
}

/// Has `next` in the thread that waits return, with a SIGCHLD.
pub fn wake() {
    // SAFETY: to ourselves; SIGCHLD is blocked, or else has no effect.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGCHLD);
    }
}

/// Ends this process by `signal`, as the program ended, without a core dump: that
/// of the program is the one that matters. Returns if the signal ends nobody.
pub fn die_by(signal: i32) {
    // However it fails, the worst is a needless core dump.
    let _ = nix::sys::prctl::set_dumpable(false);
    // SAFETY: the default disposition needs no handler; the set is made here.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        let mut one: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut one);
        libc::sigaddset(&mut one, signal);
        libc::kill(libc::getpid(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &one, ptr::null_mut());
    }
}
