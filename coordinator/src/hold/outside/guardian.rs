//! The process that stops others, and above all lets them go again.
//!
//! It is this program, started again with [`COMMAND`], with the coordinator at the
//! other end of its standard streams. It has one thread (a ptrace tracer is a
//! thread), a session of its own, so that no terminal reaches it, and all signals
//! blocked.
//!
//! What ends a stop: the word of the coordinator; the end of the pipe, which the death
//! of the coordinator is; the bound, which comes with the first command; and, if the
//! guardian itself is stopped or stuck, SIGKILL from a timer of the kernel's, which was
//! armed before the first stop. SIGKILL ends a stopped process too, and the kernel lets
//! go of what a dying tracer held.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::freezer::Freezer;
use super::protocol::{self, Answer};
use super::sigstop::Stopper;
use super::trace::Tracer;
use super::{Method, Target, guard};

/// The hidden command.
pub const COMMAND: &str = "internal-guardian";

/// What a guardian is called.
pub(super) const NAME: &std::ffi::CStr = c"snapshim";

/// How long after the bound the kernel's timer strikes.
const MARGIN: Duration = Duration::from_millis(50);

/// Runs as a guardian; `None` if that is not what was asked.
pub fn main(arguments: &[OsString]) -> Option<ExitCode> {
    if !matches!(arguments, [_, command] if command == COMMAND) {
        return None;
    }
    // A member that the coordinator has inherited open would make a writer of us.
    close_all_but_streams();
    let _ = nix::sys::prctl::set_name(NAME);
    let _ = nix::unistd::setsid();
    let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None);
    let mut guardian = Guardian::default();
    // Whatever ends it: everybody goes.
    guardian.serve();
    guardian.release();
    Some(ExitCode::SUCCESS)
}

fn close_all_but_streams() {
    let (first, last, flags) = (3_u32, u32::MAX, 0_u32);
    // SAFETY: nothing of this program is open yet but its standard streams.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } == 0 {
        return;
    }
    // Before Linux 5.9.
    let listed = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    let open: Vec<i32> = listed
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // SAFETY: as above; that of the listing itself is closed already.
        unsafe { libc::close(fd) };
    }
}

/// Asked again and again during a stop: whether there is any use in going on.
pub(super) struct Watch {
    until: Instant,
}

impl Watch {
    /// Whether time is left and the coordinator is there.
    pub(super) fn goes_on(&self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        let stdin = std::io::stdin();
        let fd = stdin.as_fd();
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        !matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }
}

#[derive(Default)]
struct Guardian {
    tracer: Tracer,
    freezer: Freezer,
    stopper: Stopper,
    /// When everybody is let go.
    until: Option<Instant>,
    /// When the first was stopped.
    since: Option<Instant>,
}

impl Guardian {
    fn serve(&mut self) {
        if say("ready").is_none() {
            return;
        }
        let mut buffer = Vec::new();
        while let Some(line) = self.line(&mut buffer) {
            let said = match protocol::read_stop(&line) {
                Some((left_us, methods, targets)) => {
                    self.stop(Duration::from_micros(left_us), &methods, &targets)
                }
                None if line == "release" => {
                    let fell = self.freezer.fell().or_else(|| self.stopper.fell());
                    let since = self.since;
                    self.release();
                    let us = since.map_or(0, |s| s.elapsed().as_micros());
                    say(&fell.map_or(format!("released {us}"), |why| format!("fell {why}")))
                }
                None => None,
            };
            if said.is_none() {
                return;
            }
        }
    }

    /// The next command; `None` at the end of the pipe, and at the bound.
    fn line(&self, buffer: &mut Vec<u8>) -> Option<String> {
        loop {
            if let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                return String::from_utf8(line[..end].to_vec()).ok();
            }
            let stdin = std::io::stdin();
            if let Some(until) = self.until {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                if !guard::can_read(&stdin, left) {
                    continue;
                }
            }
            let mut chunk = [0; 4096];
            // Not through the standard library's buffer, which a poll does not see.
            match rustix::io::read(&stdin, &mut chunk) {
                Ok(0) | Err(_) => return None,
                Ok(n) => buffer.extend(&chunk[..n]),
            }
        }
    }

    fn stop(&mut self, left: Duration, methods: &[Method], targets: &[Target]) -> Option<()> {
        let now = Instant::now();
        let until = match self.until {
            Some(until) => until,
            None => {
                if let Err(cause) = arm(left + MARGIN) {
                    let cause = format!("no timer can bound the stop: {cause}");
                    for target in targets {
                        say(&protocol::answer(*target, &Answer::Not(cause.clone())))?;
                    }
                    return say("end");
                }
                now + left
            }
        };
        self.until = Some(until);
        self.since.get_or_insert(now);
        // The capture needs time as well.
        let watch = Watch {
            until: now + until.saturating_duration_since(now) / 2,
        };
        let mut open: Vec<(Target, Vec<String>)> =
            targets.iter().map(|t| (*t, Vec::new())).collect();
        for method in methods {
            let asked: Vec<Target> = open.iter().map(|(t, _)| *t).collect();
            let answers = match method {
                Method::Ptrace => self.tracer.stop(&asked, &watch),
                Method::Freezer => self.freezer.stop(&asked, &watch),
                Method::Sigstop => self.stopper.stop(&asked, &watch),
            };
            for (target, answer) in answers {
                match answer {
                    Answer::Not(cause) => {
                        let of = open.iter_mut().find(|(t, _)| *t == target);
                        of?.1.push(format!("{method}: {cause}"));
                    }
                    settled => {
                        open.retain(|(t, _)| *t != target);
                        say(&protocol::answer(target, &settled))?;
                    }
                }
            }
        }
        for (target, causes) in open {
            say(&protocol::answer(target, &Answer::Not(causes.join("; "))))?;
        }
        say("end")
    }

    fn release(&mut self) {
        self.tracer.release();
        self.freezer.release();
        self.stopper.release();
    }
}

/// Says one line; `None` if nobody listens any more.
pub(super) fn say(line: &str) -> Option<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(format!("{line}\n").as_bytes()).ok()?;
    stdout.flush().ok()
}

/// Has the kernel kill this process in `after`, whatever state it is in by then.
fn arm(after: Duration) -> std::io::Result<()> {
    // SAFETY: all-zero is a value of these C structures; the calls read and fill them.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut timer: libc::timer_t = std::mem::zeroed();
        if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let mut time: libc::itimerspec = std::mem::zeroed();
        time.it_value.tv_sec = after.as_secs() as libc::time_t;
        time.it_value.tv_nsec = after.subsec_nanos().into();
        if libc::timer_settime(timer, 0, &time, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}
