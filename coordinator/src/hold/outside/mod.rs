//! Holding processes that no gate can hold: from outside, by stopping them.
//!
//! A stop is total, so it must never be left behind. The one who stops is a
//! separate process, the *guardian* ([`guardian`]); it lets go when it is told to, when
//! its pipe ends (the coordinator died), and at the bound; the kernel kills it a
//! moment after the bound, even if it is stopped itself. With ptrace, the kernel lets go of
//! everything when the tracer ends, however it ends: that is why it is the default.
//! A frozen cgroup, or SIGSTOP, would outlive a guardian *and* a coordinator
//! that are both killed at that moment; these two are only used when asked for.
//!
//! | module | what it does |
//! |---|---|
//! | [`guardian`] | the process that stops others |
//! | `guard` | the coordinator's end of the pipes |
//! | `protocol` | the lines on them |
//! | `trace`, `freezer`, `sigstop` | the three methods |
//! | `rings` | what an io_uring still does when nothing is submitted any more |

pub(super) mod freezer;
mod guard;
pub mod guardian;
mod protocol;
mod rings;
mod sigstop;
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::process::{self, Pid};
use crate::{Error, Result};

use guard::Guard;
use protocol::Answer;

/// A way to stop a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// As a debugger does. Nobody but the process's own debugger can tell.
    Ptrace,
    /// The process's cgroup is frozen (cgroup v2).
    Freezer,
    /// SIGSTOP; the process's parent may see it.
    Sigstop,
}

impl Method {
    /// Its name on the command line and in a certificate.
    pub fn name(self) -> &'static str {
        match self {
            Method::Ptrace => "ptrace",
            Method::Freezer => "freezer",
            Method::Sigstop => "sigstop",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Method, String> {
        [Method::Ptrace, Method::Freezer, Method::Sigstop]
            .into_iter()
            .find(|m| m.name() == text)
            .ok_or_else(|| {
                "say ptrace, freezer, sigstop (or several: ptrace,freezer), or none".into()
            })
    }
}

/// The ways that may be used, in the order they are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Methods(Vec<Method>);

impl Default for Methods {
    fn default() -> Methods {
        Methods(vec![Method::Ptrace])
    }
}

impl FromStr for Methods {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Methods, String> {
        if text == "none" {
            return Ok(Methods(Vec::new()));
        }
        let methods = text
            .split(',')
            .map(str::parse)
            .collect::<std::result::Result<Vec<Method>, _>>()?;
        Ok(Methods(methods))
    }
}

impl fmt::Display for Methods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.0.iter().map(|m| m.name()).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(","))
    }
}

/// A process to stop. Its start time keeps another one that got its id from being
/// taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Its id.
    pub pid: Pid,
    /// When it started, as `/proc` says.
    pub start: u64,
}

impl Target {
    /// Whether the process is still there and has not ended.
    fn is_there(self) -> bool {
        process::start_time(self.pid) == Some(self.start) && process::is_alive(self.pid)
    }
}

/// A process that was stopped.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// By which method.
    pub method: Method,
    /// How many threads it had.
    pub threads: u32,
}

/// What came of the stops.
#[derive(Debug, Default)]
pub struct Report {
    /// Stopped from before the capture to its end.
    held: BTreeMap<Target, Held>,
    /// Ended before they could be stopped.
    gone: BTreeSet<Target>,
    /// Not stopped, and why.
    failed: BTreeMap<Target, String>,
    /// Of processes with an io_uring: whether it had nothing in flight, or what.
    rings: BTreeMap<Target, std::result::Result<(), String>>,
    /// The longest stop.
    pub longest: Option<Duration>,
}

impl Report {
    /// How a process was held.
    pub fn held(&self, target: Target) -> Option<Held> {
        self.held.get(&target).copied()
    }

    /// Whether a process needs no excuse: it was held, or had ended before the cut.
    pub fn is_settled(&self, target: Target) -> bool {
        self.held.contains_key(&target) || self.gone.contains(&target)
    }

    /// Whether a process had ended before the cut.
    pub fn is_gone(&self, target: Target) -> bool {
        self.gone.contains(&target)
    }

    /// Why a process was not held, to go behind what it did: empty, or ", and …".
    pub fn cause(&self, target: Target) -> String {
        match self.failed.get(&target) {
            Some(cause) => format!(", and could not be held from outside ({cause})"),
            None => String::new(),
        }
    }

    /// What speaks against the io_uring of a process, held or not; `None` if nothing does.
    pub fn ring(&self, target: Target) -> Option<String> {
        if self.gone.contains(&target) {
            return None;
        }
        match self.rings.get(&target) {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(why.clone()),
            None => Some("writes it submitted may still be on their way".into()),
        }
    }
}

/// The processes held from outside during one hold. Dropping it lets them go.
#[derive(Debug)]
pub struct Outside {
    methods: Methods,
    guard: Option<Guard>,
    report: Report,
}

impl Outside {
    /// Nobody is held yet.
    pub fn new(methods: &Methods) -> Outside {
        Outside {
            methods: methods.clone(),
            guard: None,
            report: Report::default(),
        }
    }

    /// Whether anything may be done.
    pub fn is_enabled(&self) -> bool {
        !self.methods.0.is_empty()
    }

    /// Whether somebody is held.
    pub fn is_used(&self) -> bool {
        !self.report.held.is_empty()
    }

    /// Whether this process is held.
    pub fn holds(&self, pid: Pid) -> bool {
        self.report.held.keys().any(|t| t.pid == pid)
    }

    /// What came of it.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The same, for good; lets everybody go that is still held.
    pub fn into_report(mut self) -> Report {
        std::mem::take(&mut self.report)
    }

    /// Starts the guardian, which takes some milliseconds: to be called before
    /// anything is held. One that cannot be started is a cause why nobody is held.
    pub fn prepare(&mut self) -> Result<()> {
        self.guard().map(drop)
    }

    fn guard(&mut self) -> Result<&mut Guard> {
        match &mut self.guard {
            Some(guard) => Ok(guard),
            none => Ok(none.insert(Guard::spawn()?)),
        }
    }

    /// Stops those of `targets` that were not asked for yet; everybody is let go in
    /// `left` at the latest. Whether there were any.
    pub fn stop(&mut self, targets: &BTreeSet<Target>, left: Duration) -> bool {
        let report = &self.report;
        let new: Vec<Target> = targets
            .iter()
            .filter(|t| !report.is_settled(**t) && !report.failed.contains_key(t))
            .copied()
            .collect();
        if new.is_empty() || !self.is_enabled() {
            return false;
        }
        let methods = self.methods.clone();
        let answers = self
            .guard()
            .and_then(|guard| guard.stop(&new, &methods, left))
            .unwrap_or_else(|e| not_for(&new, &e.message));
        for (target, answer) in answers {
            match answer {
                Answer::Held(held) => {
                    self.report.held.insert(target, held);
                }
                Answer::Gone => {
                    self.report.gone.insert(target);
                }
                Answer::Not(cause) => {
                    self.report.failed.insert(target, cause);
                }
            }
        }
        true
    }

    /// Whether those that were stopped are still held, as far as can be told before the end.
    pub fn stands(&self) -> bool {
        !self.is_used() || self.guard.as_ref().is_some_and(Guard::is_there)
    }

    /// Waits, for at most `left`, until `rings` have nothing in flight: those of processes
    /// that are held, or whose submissions wait at the gate (`true`). Of others it is
    /// only asked what speaks against them.
    pub fn drain_rings(&mut self, rings: &BTreeMap<Target, bool>, left: Duration) {
        let now = Instant::now();
        for (target, waits) in rings {
            let submits = !waits && !self.report.held.contains_key(target);
            let until = if submits { now } else { now + left };
            let drained = rings::drain(target.pid, until);
            if drained.is_err() || !submits {
                self.report.rings.insert(*target, drained);
            }
        }
    }

    /// Lets everybody go.
    ///
    /// # Errors
    ///
    /// Somebody was let go before: the bound was reached, or the guardian was killed. What
    /// was captured is then not of one instant.
    pub fn release(&mut self) -> Result<()> {
        let Some(guard) = self.guard.take() else {
            return Ok(());
        };
        let longest = guard.release().map_err(|e| {
            Error::aborted(format!(
                "programs that were stopped went on before everything was captured: {}",
                e.message
            ))
            .next("nothing was published; try again, or allow a longer hold with --max-hold")
        })?;
        if self.is_used() {
            self.report.longest = Some(longest);
        }
        Ok(())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.give_up();
        }
    }
}

fn not_for(targets: &[Target], cause: &str) -> Vec<(Target, Answer)> {
    let not = |t: &Target| (*t, Answer::Not(cause.to_owned()));
    targets.iter().map(not).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods() {
        let parse = |text: &str| text.parse::<Methods>();
        assert_eq!(parse("ptrace"), Ok(Methods::default()));
        assert_eq!(parse("none"), Ok(Methods(Vec::new())));
        let both = parse("freezer,ptrace").unwrap();
        assert_eq!(both, Methods(vec![Method::Freezer, Method::Ptrace]));
        assert_eq!(both.to_string(), "freezer,ptrace");
        assert_eq!(parse("none").unwrap().to_string(), "none");
        assert!(parse("").is_err() && parse("ptrace,none").is_err());
    }
}
