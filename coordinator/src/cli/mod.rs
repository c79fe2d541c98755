//! The commands.
//!
//! Each is a function of its parsed arguments that ends in an exit code or an
//! [`Error`]. What a command says goes to standard output: a table
//! or a line for people, or with `--json` one object and nothing else. All the
//! rest goes to standard error: [`output::error`] always, [`output::note`] unless
//! `--quiet`, [`output::detail`] with `--verbose`, and how far long work is
//! ([`progress::Meter`], [`watch::Watch`]). The shim never prints anything.

pub mod args;
pub mod checkpoint;
pub mod completions;
pub mod delete;
pub mod diff;
pub mod doctor;
pub mod env;
mod forecast;
pub mod help;
pub mod hold;
pub mod inherited;
pub mod list;
pub mod man;
mod offer;
pub mod output;
pub mod periodic;
pub mod pin;
mod points;
pub mod preload;
pub mod progress;
pub mod prune;
pub mod restart;
pub mod restore;
pub mod run;
pub mod show;
pub mod signals;
pub mod snap;
pub mod snapshots;
pub mod status;
pub mod style;
pub mod table;
pub mod verify;
mod waits;
pub mod watch;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::capture;
use crate::hold::outside::guardian;
use crate::{Error, Exit, Result, interrupt, urgency};

use args::{Cli, Command};

/// The whole program.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let hidden = guardian::main(&arguments).or_else(|| preload::load_test(&arguments));
    if let Some(code) = hidden {
        return code;
    }
    let result = preload::shed(&arguments).and_then(|()| match Cli::try_parse_from(&arguments) {
        Ok(cli) => {
            output::set_up(&cli.global);
            dispatch(cli.command)
        }
        Err(refusal) => Ok(refuse(&refusal)),
    });
    result.unwrap_or_else(|error| {
        output::error(&format!("snapshim: {error}"));
        // Everything is in order by now: what was asked for can happen.
        if let (true, Some(signal)) = (error.is_interruption, interrupt::came()) {
            signals::die_by(signal);
        }
        ExitCode::from(error.exit as u8)
    })
}

fn dispatch(command: Command) -> Result<ExitCode> {
    if matches!(
        command,
        Command::Run(_) | Command::Checkpoint(_) | Command::Snap(_) | Command::Hold(_)
    ) {
        // Now, while there are no threads.
        urgency::remember();
        if matches!(command, Command::Checkpoint(_)) {
            urgency::give_way();
        }
        capture::make_table();
    }
    match command {
        Command::Run(args) => run::run(args),
        Command::Checkpoint(args) => checkpoint::run(&args),
        Command::Snap(args) => snap::run(&args),
        Command::Hold(args) => hold::run(&args),
        Command::List(args) => list::run(&args),
        Command::Show(args) => show::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Prune(args) => prune::run(&args),
        Command::Delete(args) => delete::run(&args),
        Command::Pin(args) => pin::pin(&args),
        Command::Unpin(args) => pin::unpin(&args),
        Command::Restore(args) => restore::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Env(args) => env::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

/// Prints what the parser has to say: help to standard output, mistakes to standard error.
fn refuse(refusal: &clap::Error) -> ExitCode {
    // A closed pipe is no reason to say more.
    let _ = refusal.print();
    match refusal.use_stderr() {
        true => ExitCode::from(Exit::Usage as u8),
        false => ExitCode::SUCCESS,
    }
}

/// The error for a mistake that the parser cannot see.
fn usage(message: impl Into<String>, next: impl Into<String>) -> Error {
    Error::usage(message).next(next)
}
