//! `snapshim run`: a program in a set.
//!
//! The program must not be able to tell that we stand beside it: it inherits
//! what we inherited, gets the signals meant for it once, and its end is ours.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;

use crate::error::Context;
use crate::hold::elf;
use crate::hold::set::{self, Set};
use crate::hold::shim_file;
use crate::{Result, hooks};

use super::args::RunArgs;
use super::periodic::Periodic;
use super::restart::{Crashes, Next};
use super::signals::{self, Signals};
use super::{inherited, output, preload, usage};

/// How long a periodic checkpoint tries for its commit point.
const WAIT: Duration = Duration::from_secs(10);

/// How long a program may take to end after it was told to.
const TO_END: Duration = Duration::from_secs(60);

/// Runs the command.
pub fn run(mut args: RunArgs) -> Result<ExitCode> {
    if let (None, Some(flag)) = (args.every, args.how.given()) {
        return Err(usage(
            format!("{flag} says how --every takes its snapshots, and there is no --every"),
            "add --every, or give it to `snapshim checkpoint`",
        ));
    }
    let Some((app, arguments)) = args.command.split_first() else {
        return Err(usage(
            "there is no program to run",
            "name one: snapshim run -- APP ARGS",
        ));
    };
    let program = match elf::check_program(app) {
        Ok(program) => program,
        Err(refusal) => {
            output::error(&format!("snapshim: {refusal}\n  {}", refusal.next()));
            return Ok(ExitCode::from(refusal.exit_code()));
        }
    };
    if args.set.watch.is_empty() {
        args.set.watch.push(PathBuf::from("."));
    }
    let name = match &args.set.name {
        Some(name) => name.clone(),
        None => set::name_from(Path::new(app)),
    };
    let set = Arc::new(Set::create_or_open(&name, &args.set.wanted()?)?);
    let shim = shim_file::unpack(set.place())?;

    let environment = preload::environment(&set, &shim, Some(&program));

    let options = || args.how.options(&set, &args.set.limits, WAIT);
    let mut crashes = Crashes::new(&args.crash, &set, options())?;
    let signals = Signals::block().context(|| "block signals".into())?;
    loop {
        let child = match spawn(app, &program, arguments, &environment) {
            Ok(child) => child,
            Err(cause) => {
                let app = Path::new(app).display();
                output::error(&format!("snapshim: cannot start {app}: {cause}"));
                return Ok(ExitCode::from(126));
            }
        };
        crashes.started(child.id());
        let periodic = args.every.and_then(|every| {
            let options = options();
            // The program runs already, and shall not suffer for it.
            Periodic::start(Arc::clone(&set), options, every)
                .map_err(|error| output::error(&format!("snapshim: {error}")))
                .ok()
        });
        let (status, asked) = attend(child, &signals, periodic.as_ref())?;
        if let Some(periodic) = &periodic {
            finish(&signals, periodic);
        }
        match crashes.ended(status, asked) {
            Next::End => return Ok(end_as(status)),
            Next::Start(pause) if signals.ends_within(pause) => return Ok(end_as(status)),
            Next::Start(_) => {}
        }
    }
}

fn spawn(
    app: &OsStr,
    program: &Path,
    arguments: &[OsString],
    environment: &[(&'static str, OsString)],
) -> std::io::Result<Child> {
    // What was checked is what is run; the program sees the name that was typed.
    let mut command = Command::new(program);
    let environment = environment.iter().map(|(name, value)| (name, value));
    command.arg0(app).args(arguments).envs(environment);
    preload::hide_internals(&mut command);
    inherited::restore_in(&mut command);
    command.spawn()
}

/// Passes signals on until the program ends. Also returns whether one of them told it to.
fn attend(
    mut child: Child,
    signals: &Signals,
    periodic: Option<&Periodic>,
) -> Result<(ExitStatus, bool)> {
    let pid = child.id() as i32;
    // The last signal that commonly asks for the end, and when.
    let mut asked: Option<(i32, Instant)> = None;
    // A stop that waits for a checkpoint to be finished.
    let mut stop = None;
    loop {
        if let Some(signal) = stop
            && periodic.is_none_or(Periodic::pause)
        {
            stop = None;
            signals.stop(signal);
            if let Some(periodic) = periodic {
                periodic.resume();
            }
        }
        let taken = signals.next();
        // Before it is waited for: afterwards its id may be another's.
        taken.forward(pid);
        if taken.is_end() {
            asked = Some((taken.signal, Instant::now()));
        }
        if taken.is_stop() {
            stop = Some(taken.signal);
        } else if taken.signal == libc::SIGCONT
            && stop.take().is_some()
            && let Some(periodic) = periodic
        {
            periodic.resume();
        } else if taken.signal == libc::SIGCHLD
            && let Some(status) = child.try_wait().context(|| "wait for the program".into())?
        {
            // It ended by that very signal, or soon after it: not because of what it did hours later.
            let was_asked = asked.is_some_and(|(signal, when)| {
                status.signal() == Some(signal) || signal != libc::SIGHUP && when.elapsed() < TO_END
            });
            return Ok((status, was_asked));
        }
    }
}

/// Waits for the last checkpoint to be finished, or its wait for a commit point to be given up, unless somebody insists: what
/// is left half done then is swept by the next one.
fn finish(signals: &Signals, periodic: &Periodic) {
    periodic.end();
    let mut insists = None;
    while !periodic.has_ended() {
        let taken = signals.next();
        if taken.is_end() {
            insists = Some(taken.signal);
        }
        // A command that undoes what another one did is run whoever insists.
        if let Some(signal) = insists
            && !hooks::is_owed()
        {
            signals::die_by(signal);
        }
    }
}

/// Ends as the program did.
fn end_as(status: ExitStatus) -> ExitCode {
    if let Some(signal) = status.signal() {
        signals::die_by(signal);
        return ExitCode::from(128_u8.saturating_add(signal as u8));
    }
    ExitCode::from(status.code().unwrap_or(1) as u8)
}
