//! Stopping with ptrace.
//!
//! PTRACE_SEIZE and PTRACE_INTERRUPT, thread by thread. A thread stops on its way back to
//! the program: a system call it is in ends first, or is begun again later. A write to
//! a regular file is not cut short: `generic_perform_write` and the file systems' own
//! loops look for *fatal* signals only, and this is none.
//!
//! Nothing of the stop stays:
//!
//! * Stops are looked at with WNOWAIT. A thread may stop because a signal is about
//!   to be delivered; the signal is given back on detaching. If the guardian dies
//!   first, the kernel delivers it, but only if nobody has taken the stop's exit code, which
//!   an ordinary wait does.
//! * A process that was stopped by SIGSTOP or ^Z is in group-stop; detaching puts it
//!   back there, or lets it run if SIGCONT came meanwhile.
//! * Its parent is told nothing: stops under ptrace are the tracer's only.
//!
//! New threads and children of a stopped thread are seized by the kernel as they
//! are made (PTRACE_O_TRACECLONE and the like), or a program that keeps making them could
//! not be caught up with.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;

use super::guardian::{self, Watch};
use super::protocol::Answer;
use super::{Held, Method, Target};
use crate::hold::calls;
use crate::hold::process::{self, Doing, Pid, Unreadable};

/// Time between two looks at threads that have not stopped yet, after the first few.
const PAUSE: Duration = Duration::from_micros(30);

/// How long to wait for another guardian that holds the same process.
pub(super) const RIVAL: Duration = Duration::from_millis(250);
/// Time between two tries.
pub(super) const RIVAL_PAUSE: Duration = Duration::from_millis(1);
/// How long to wait for a thread that is in the middle of an exec.
const EXEC: Duration = Duration::from_millis(5);

/// Why a thread cannot be seized.
#[derive(Debug)]
enum Refusal {
    /// It will not be any better.
    Final(String),
    /// The guardian of another snapshot holds it, and will let it go soon.
    Rival(Pid),
}

impl Refusal {
    fn answer(self) -> Answer {
        Answer::Not(match self {
            Refusal::Final(cause) => cause,
            Refusal::Rival(tracer) => format!(
                "another snapshot holds it, by snapshim ({tracer}), and did not let it go within {} ms; try again",
                RIVAL.as_millis()
            ),
        })
    }
}

/// What is known of a seized thread.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Told to stop.
    Coming,
    /// Stopped; the signal to give back.
    Stopped(i32),
    /// Waits in vfork for its child, and will stop before it runs again.
    Waiting,
}

/// The threads that are traced.
#[derive(Debug, Default)]
pub(super) struct Tracer {
    /// By thread; with its process.
    tracees: BTreeMap<Pid, (Pid, State)>,
    is_privileged: Option<bool>,
}

impl Tracer {
    /// Stops all threads of each target.
    pub(super) fn stop(&mut self, targets: &[Target], watch: &Watch) -> Vec<(Target, Answer)> {
        let mut answers = Vec::new();
        let mut open: BTreeSet<Target> = BTreeSet::new();
        let patience = Instant::now() + RIVAL;
        let goes_on = || watch.goes_on() && Instant::now() < patience;
        for target in targets {
            match self.seize_in_turn(*target, goes_on) {
                Ok(()) => {
                    open.insert(*target);
                }
                Err(answer) => answers.push((*target, answer)),
            }
        }
        let mut quiet = 0_u32;
        while !open.is_empty() {
            let moved = self.collect();
            for target in open.clone() {
                if let Some(answer) = self.confirm(target) {
                    open.remove(&target);
                    answers.push((target, answer));
                }
            }
            if open.is_empty() {
                break;
            }
            if !watch.goes_on() {
                for target in std::mem::take(&mut open) {
                    answers.push((target, Answer::Not(self.laggard(target))));
                    self.let_go(target.pid);
                }
                break;
            }
            quiet = if moved { 0 } else { quiet + 1 };
            if quiet > 0 {
                self.look_at_sleepers();
            }
            if quiet < 5 {
                // They may need this very CPU to come to their stop.
                std::thread::yield_now();
            } else {
                std::thread::sleep(PAUSE);
            }
        }
        answers
    }

    /// Seizes all threads of a process there are now; waits for another guardian that has
    /// them.
    fn seize_in_turn(&mut self, target: Target, goes_on: impl Fn() -> bool) -> Result<(), Answer> {
        loop {
            let rival = match self.seize(target)? {
                None => return Ok(()),
                Some(rival) => rival,
            };
            // Of two that have some threads each, one must give way.
            let gives_way = rival < std::process::id();
            if gives_way || !goes_on() {
                self.let_go(target.pid);
            }
            if !goes_on() {
                return Err(Refusal::Rival(rival).answer());
            }
            std::thread::sleep(RIVAL_PAUSE);
        }
    }

    /// Seizes all threads of a process there are now, or meets another guardian.
    fn seize(&mut self, target: Target) -> Result<Option<Pid>, Answer> {
        let pid = target.pid;
        if !target.is_there() {
            return Err(Answer::Gone);
        }
        for tid in process::threads(pid).map_err(|why| Answer::Not(unlisted(&why)))? {
            match self.attach(pid, tid) {
                Ok(()) => {}
                Err(Refusal::Rival(rival)) => return Ok(Some(rival)),
                Err(refusal) => {
                    self.let_go(pid);
                    return Err(match target.is_there() {
                        true => refusal.answer(),
                        false => Answer::Gone,
                    });
                }
            }
        }
        // Between the two looks the id may have become another process's.
        if process::start_time(pid) != Some(target.start) {
            self.let_go(pid);
            return Err(Answer::Gone);
        }
        Ok(None)
    }

    /// Seizes one thread, unless that is done, or needs no doing.
    fn attach(&mut self, pid: Pid, tid: Pid) -> Result<(), Refusal> {
        if self.tracees.contains_key(&tid) {
            return Ok(());
        }
        // Workers of an io_uring run none of its code; what they have begun shall end.
        if process::task(pid, tid).is_some_and(|t| t.is_io_worker) {
            return Ok(());
        }
        match process::tracer(pid, tid) {
            // Made by a thread that is traced.
            Some(tracer) if tracer == std::process::id() => {
                self.tracees.insert(tid, (pid, State::Coming));
                return Ok(());
            }
            Some(0) | None => {}
            Some(tracer) => {
                if is_guardian(tracer) {
                    return Err(Refusal::Rival(tracer));
                }
                return Err(Refusal::Final(format!(
                    "{} ({tracer}) traces it already; end that, or allow --outside freezer",
                    process::name(tracer)
                )));
            }
        }
        if !self.is_privileged() {
            wait_for_exec(pid, tid);
        }
        let options =
            libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK;
        match request(libc::PTRACE_SEIZE, tid, options as usize) {
            Ok(()) => {}
            Err(Errno::ESRCH) => return Ok(()),
            Err(cause) => {
                return match process::task(pid, tid) {
                    None => Ok(()),
                    // The dead cannot be traced.
                    Some(task) if matches!(task.state, 'Z' | 'X') => Ok(()),
                    Some(_) => Err(Refusal::Final(refusal(cause))),
                };
            }
        }
        match request(libc::PTRACE_INTERRUPT, tid, 0) {
            Ok(()) => {
                self.tracees.insert(tid, (pid, State::Coming));
                Ok(())
            }
            Err(Errno::ESRCH) => Ok(()),
            Err(cause) => Err(Refusal::Final(refusal(cause))),
        }
    }

    /// Whether a set-user-id program that a traced thread executes gets its privileges.
    fn is_privileged(&mut self) -> bool {
        const CAP_SYS_PTRACE: u64 = 1 << 19;
        let look = || process::capabilities(std::process::id());
        *self
            .is_privileged
            .get_or_insert_with(|| look().is_some_and(|all| all & CAP_SYS_PTRACE != 0))
    }

    /// Takes note of threads that have stopped or ended; whether there were any.
    fn collect(&mut self) -> bool {
        let coming: Vec<(Pid, Pid)> = self
            .tracees
            .iter()
            .filter(|(_, (_, state))| !matches!(state, State::Stopped(_)))
            .map(|(tid, (pid, _))| (*tid, *pid))
            .collect();
        let mut moved = false;
        for (tid, pid) in coming {
            match look(tid) {
                Look::Nothing => continue,
                Look::Ended => {
                    self.tracees.remove(&tid);
                }
                Look::Stopped { signal, child } => {
                    self.tracees.insert(tid, (pid, State::Stopped(signal)));
                    if let Some(child) = child {
                        // A process, or a thread, which the list of threads shows.
                        let of = process::group(child).unwrap_or(child);
                        self.tracees.entry(child).or_insert((of, State::Coming));
                    }
                }
            }
            moved = true;
        }
        moved
    }

    /// Of threads that do not come: the first thread of a process may have ended
    /// before the others, which no wait tells; and one that waits in vfork stops only
    /// when its child, which may be stopped itself, goes on.
    fn look_at_sleepers(&mut self) {
        let mut dead = Vec::new();
        for (tid, (pid, state)) in &mut self.tracees {
            if *state != State::Coming {
                continue;
            }
            match process::task(*pid, *tid).map(|t| t.state) {
                None | Some('Z' | 'X') => dead.push(*tid),
                Some('D') if is_in_vfork(*pid, *tid) => *state = State::Waiting,
                Some(_) => {}
            }
        }
        for tid in dead {
            self.tracees.remove(&tid);
        }
    }

    /// Whether a process is stopped as a whole: every thread there is now. A list of threads
    /// may end early where one ends as it is read; so their number, and a second list,
    /// must agree with it.
    fn confirm(&mut self, target: Target) -> Option<Answer> {
        let pid = target.pid;
        let is_coming = |(of, state): &(Pid, State)| *of == pid && *state == State::Coming;
        if self.tracees.values().any(is_coming) {
            return None;
        }
        let mut threads = 0;
        let mut all = true;
        let listed = match process::threads(pid) {
            Ok(listed) => listed,
            Err(why) => {
                self.let_go(pid);
                return Some(Answer::Not(unlisted(&why)));
            }
        };
        for tid in listed.iter().copied() {
            let task = process::task(pid, tid);
            let state = self.tracees.get(&tid).map(|(_, state)| *state);
            match (state, task.map(|t| t.state)) {
                (_, None | Some('Z' | 'X')) => {}
                (Some(State::Stopped(_)), Some('t')) => threads += 1,
                (Some(State::Waiting), Some('D')) => threads += 1,
                // Another thread took this one's place by an exec.
                (Some(_), _) => {
                    let _ = request(libc::PTRACE_INTERRUPT, tid, 0);
                    self.tracees.insert(tid, (pid, State::Coming));
                    all = false;
                }
                (None, Some(_)) => {
                    if let Err(refusal) = self.attach(pid, tid) {
                        self.let_go(pid);
                        return Some(refusal.answer());
                    }
                    all &= !self.tracees.contains_key(&tid);
                }
            }
        }
        if !all {
            return None;
        }
        let count = process::thread_count(pid);
        let is_whole =
            count == Some(listed.len()) && process::threads(pid).is_ok_and(|again| again == listed);
        if !is_whole && target.is_there() {
            return None;
        }
        if threads == 0 {
            return Some(Answer::Gone);
        }
        Some(Answer::Held(Held {
            method: Method::Ptrace,
            threads,
        }))
    }

    /// Why a process did not stop in time.
    fn laggard(&self, target: Target) -> String {
        let late = self
            .tracees
            .iter()
            .find(|(_, (pid, state))| *pid == target.pid && *state == State::Coming);
        let Some((tid, _)) = late else {
            return "it makes threads faster than they can be stopped; try again with a longer --max-hold".into();
        };
        let state = process::task(target.pid, *tid).map_or('?', |t| t.state);
        format!(
            "its thread {tid} did not stop in time (state {state}): its device or file system may be slow; try again with a longer --max-hold"
        )
    }

    /// Lets one process go. A thread that has not stopped yet cannot be let go
    /// before it has, or this process ends.
    fn let_go(&mut self, pid: Pid) {
        self.collect();
        self.tracees.retain(|tid, (of, state)| {
            if *of != pid {
                return true;
            }
            match state {
                State::Stopped(signal) => {
                    let _ = request(libc::PTRACE_DETACH, *tid, *signal as usize);
                    false
                }
                State::Coming | State::Waiting => true,
            }
        });
    }

    /// Lets everybody go.
    pub(super) fn release(&mut self) {
        for (tid, (_, state)) in std::mem::take(&mut self.tracees) {
            let signal = match (state, look(tid)) {
                (State::Stopped(signal), _) | (_, Look::Stopped { signal, .. }) => signal,
                _ => continue,
            };
            let _ = request(libc::PTRACE_DETACH, tid, signal as usize);
        }
    }
}

/// Waits a little for a thread that sleeps in an exec. A program that is executed while a
/// tracer without CAP_SYS_PTRACE is there does not get its set-user-id privileges. One
/// that is on a CPU does not tell what it does: see docs/limitations.md.
fn wait_for_exec(pid: Pid, tid: Pid) {
    let until = Instant::now() + EXEC;
    let is_in_exec = || {
        matches!(process::doing(pid, tid), Doing::Call { number, .. }
            if number == libc::SYS_execve || number == libc::SYS_execveat)
    };
    while is_in_exec() && Instant::now() < until {
        std::thread::sleep(PAUSE);
    }
}

/// Whether a tracer is the guardian of another snapshot.
pub(super) fn is_guardian(tracer: Pid) -> bool {
    process::name(tracer).as_bytes() == guardian::NAME.to_bytes()
}

fn unlisted(why: &Unreadable) -> String {
    format!("its threads cannot be listed: {why}")
}

/// Whether a thread is asleep in a call that makes a child and waits for it.
fn is_in_vfork(pid: Pid, tid: Pid) -> bool {
    matches!(process::doing(pid, tid), Doing::Call { number, .. } if calls::makes_process(number))
}

/// What a wait says of a thread.
#[derive(Debug)]
enum Look {
    Nothing,
    Ended,
    Stopped { signal: i32, child: Option<Pid> },
}

fn look(tid: Pid) -> Look {
    // SAFETY: all-zero is a value of siginfo_t; waitid fills it.
    let (result, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WSTOPPED | libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        (libc::waitid(libc::P_PID, tid, &mut info, flags), info)
    };
    if result != 0 {
        // No child of ours any more: an exec in another thread ended it.
        return match Errno::last() {
            Errno::ECHILD => Look::Ended,
            _ => Look::Nothing,
        };
    }
    // SAFETY: waitid has filled these fields, or left them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Look::Nothing;
    }
    match info.si_code {
        libc::CLD_TRAPPED | libc::CLD_STOPPED => {
            let event = status >> 8;
            let is_birth = matches!(
                event,
                libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK
            );
            Look::Stopped {
                // Only a plain stop is for a signal.
                signal: if event == 0 { status & 0x7f } else { 0 },
                child: if is_birth { born(tid) } else { None },
            }
        }
        _ => {
            // Taken off our hands: only then is its parent told of its end.
            // SAFETY: as above; nothing is asked for.
            unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOHANG | libc::__WALL;
                libc::waitid(libc::P_PID, tid, &mut info, flags);
            }
            Look::Ended
        }
    }
}

/// The child whose making a thread has stopped for.
fn born(tid: Pid) -> Option<Pid> {
    let mut child: libc::c_ulong = 0;
    // SAFETY: the kernel writes one word to where `child` is.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_GETEVENTMSG,
            tid as libc::pid_t,
            std::ptr::null_mut::<libc::c_void>(),
            &raw mut child,
        )
    };
    (result == 0 && child != 0).then_some(child as Pid)
}

/// A ptrace request whose last argument is a number.
fn request(request: libc::c_uint, tid: Pid, data: usize) -> Result<(), Errno> {
    // SAFETY: none of the requests made here reads or writes memory of this process.
    let result = unsafe {
        libc::ptrace(
            request as _,
            tid as libc::pid_t,
            std::ptr::null_mut::<libc::c_void>(),
            data as *mut libc::c_void,
        )
    };
    Errno::result(result).map(drop)
}

/// Why the kernel says no, and what would help.
fn refusal(cause: Errno) -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    match scope.as_deref().map(str::trim) {
        Ok(scope) if scope != "0" && cause == Errno::EPERM => format!(
            "it may not be traced: {} (kernel.yama.ptrace_scope is {scope}); run this as root, or set that to 0",
            cause.desc()
        ),
        _ => format!(
            "it may not be traced: {}; run this as root, or as the user it runs as",
            cause.desc()
        ),
    }
}
