//! `snapshim completions`: for shells, from the definition of the flags.

use std::process::ExitCode;

use clap::CommandFactory;

use crate::Result;

use super::args::{Cli, CompletionsArgs};
use super::output;

/// Runs the command.
pub fn run(args: &CompletionsArgs) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "snapshim", &mut script);
    output::bytes(&script)?;
    Ok(ExitCode::SUCCESS)
}
