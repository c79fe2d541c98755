//! `snapshim man`: manual pages, from the definition of the flags.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_mangen::Man;

use crate::Result;
use crate::error::Context;

use super::args::{Cli, ManArgs};
use super::output;

/// Runs the command.
pub fn run(args: &ManArgs) -> Result<ExitCode> {
    match &args.dir {
        Some(dir) => {
            let what = || format!("write the manual to {}", dir.display());
            std::fs::create_dir_all(dir).context(what)?;
            clap_mangen::generate_to(Cli::command(), dir).context(what)?;
        }
        None => {
            let mut page = Vec::new();
            Man::new(Cli::command())
                .render(&mut page)
                .context(|| "write the manual".into())?;
            output::bytes(&page)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
