//! Stopping with SIGSTOP.
//!
//! The crudest way: the process's parent may see it (WUNTRACED), and SIGCONT from
//! anybody ends it, so each thread's schedule is compared at the end. A process that was
//! stopped before is left so.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::process::{Pid as RawPid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::guardian::{Watch, say};
use super::protocol::{self, Answer};
use super::trace::{RIVAL, RIVAL_PAUSE, is_guardian};
use super::{Held, Method, Target};
use crate::hold::process::{self, Pid, Schedule};

const PAUSE: Duration = Duration::from_micros(50);

/// The schedule of each thread of a process that does not run.
pub(super) type Schedules = Vec<(Pid, Option<Schedule>)>;

/// What the threads of a process do, to be compared later.
pub(super) fn schedules(pid: Pid) -> Schedules {
    let threads = process::threads(pid).unwrap_or_default();
    threads
        .into_iter()
        .filter(|tid| process::task(pid, *tid).is_some_and(|t| !t.is_io_worker))
        .map(|tid| (tid, process::schedule(pid, tid)))
        .collect()
}

#[derive(Debug)]
struct Stopped {
    target: Target,
    process: OwnedFd,
    was_stopped: bool,
    schedules: Schedules,
}

/// The processes that were stopped.
#[derive(Debug, Default)]
pub(super) struct Stopper {
    stopped: Vec<Stopped>,
}

impl Stopper {
    /// Stops each target.
    pub(super) fn stop(&mut self, targets: &[Target], watch: &Watch) -> Vec<(Target, Answer)> {
        let mut answers = Vec::new();
        let mut coming = Vec::new();
        for target in targets {
            match send_stop(*target) {
                Ok(stopped) => coming.push(stopped),
                Err(answer) => answers.push((*target, answer)),
            }
        }
        while !coming.is_empty() {
            let goes_on = watch.goes_on();
            for mut stopped in std::mem::take(&mut coming) {
                let target = stopped.target;
                if !target.is_there() {
                    answers.push((target, Answer::Gone));
                } else if let Some(threads) = stopped_threads(target.pid) {
                    stopped.schedules = schedules(target.pid);
                    let held = Held {
                        method: Method::Sigstop,
                        threads,
                    };
                    answers.push((target, Answer::Held(held)));
                    self.stopped.push(stopped);
                } else if goes_on {
                    coming.push(stopped);
                } else {
                    stopped.undo();
                    let cause =
                        "its threads did not stop in time; try again with a longer --max-hold";
                    answers.push((target, Answer::Not(cause.into())));
                }
            }
            if !coming.is_empty() {
                std::thread::sleep(PAUSE);
            }
        }
        answers
    }

    /// Whether one of them has run since, and which.
    pub(super) fn fell(&self) -> Option<String> {
        let ran = |s: &&Stopped| s.target.is_there() && schedules(s.target.pid) != s.schedules;
        self.stopped.iter().find(ran).map(|s| {
            let pid = s.target.pid;
            format!("somebody continued {} ({pid})", process::name(pid))
        })
    }

    /// Continues those that ran before.
    pub(super) fn release(&mut self) {
        for stopped in std::mem::take(&mut self.stopped) {
            stopped.undo();
        }
    }
}

impl Stopped {
    fn undo(&self) {
        if !self.was_stopped {
            let _ = pidfd_send_signal(&self.process, Signal::CONT);
        }
    }
}

fn send_stop(target: Target) -> Result<Stopped, Answer> {
    let process = open(target).ok_or(Answer::Gone)?;
    // Of the first thread nothing is to be learnt if it has ended.
    let first = process::live_thread(target.pid).ok_or(Answer::Gone)?;
    let until = Instant::now() + RIVAL;
    while let Some(tracer) = process::tracer(target.pid, first).filter(|t| *t != 0) {
        if is_guardian(tracer) && Instant::now() < until {
            std::thread::sleep(RIVAL_PAUSE);
            continue;
        }
        let name = process::name(tracer);
        return Err(Answer::Not(format!(
            "{name} ({tracer}) traces it; end that first (a snapshot ends by itself)"
        )));
    }
    let was_stopped = stopped_threads(target.pid).is_some();
    if !was_stopped {
        say(&protocol::undo(target, Method::Sigstop)).ok_or(Answer::Gone)?;
        pidfd_send_signal(&process, Signal::STOP).map_err(|cause| {
            Answer::Not(format!(
                "no signal can be sent to it: {cause}; run this as root"
            ))
        })?;
    }
    Ok(Stopped {
        target,
        process,
        was_stopped,
        schedules: Vec::new(),
    })
}

/// The number of threads if all are stopped.
fn stopped_threads(pid: Pid) -> Option<u32> {
    let mut threads = 0;
    for tid in process::threads(pid).ok()? {
        match process::task(pid, tid) {
            None => {}
            Some(task) if task.is_io_worker || matches!(task.state, 'Z' | 'X') => {}
            Some(task) if task.state == 'T' => threads += 1,
            Some(_) => return None,
        }
    }
    (threads > 0).then_some(threads)
}

/// The process itself, whatever becomes of its id.
fn open(target: Target) -> Option<OwnedFd> {
    let pid = RawPid::from_raw(i32::try_from(target.pid).ok()?)?;
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    target.is_there().then_some(process)
}

/// Continues a process that a guardian left stopped.
pub(super) fn resume(target: Target) {
    if let Some(process) = open(target) {
        let _ = pidfd_send_signal(&process, Signal::CONT);
    }
}
