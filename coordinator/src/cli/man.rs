//! `snapshim man`: manual pages, from the definition of the flags.

use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::Result;
use crate::error::Context;

use super::args::{Cli, ManArgs};
use super::output;

/// Runs the command.
pub fn run(args: &ManArgs) -> Result<ExitCode> {
    // A page for `help` would say what each command's own says.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let Some(dir) = &args.dir else {
        output::bytes(&page(&command)?)?;
        return Ok(ExitCode::SUCCESS);
    };
    let what = |path: &Path| format!("write the manual to {}", path.display());
    std::fs::create_dir_all(dir).context(|| what(dir))?;
    for command in std::iter::once(&command).chain(command.get_subcommands()) {
        let path = dir.join(format!("{}.1", full_name(command)));
        std::fs::write(&path, page(command)?).context(|| what(&path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `snapshim-list` for `list`.
fn full_name(command: &Command) -> &str {
    command.get_display_name().unwrap_or(command.get_name())
}

fn page(command: &Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command.clone())
        .title(full_name(command))
        .source(concat!("snapshim ", env!("CARGO_PKG_VERSION")))
        .manual("snapshim")
        .render(&mut page)
        .context(|| "write the manual".into())?;
    Ok(page)
}
