//! `snapshim snap`: a snapshot of files of programs that no set holds.

use std::process::ExitCode;

use crate::Result;
use crate::checkpoint::snap;
use crate::hold::set;

use super::args::SnapArgs;
use super::checkpoint::report;
use super::progress::Meter;
use super::usage;
use super::watch::Watch;

/// Runs the command.
pub fn run(args: &SnapArgs) -> Result<ExitCode> {
    let config = args.wanted().resolve()?;
    // What a set watches may appear later; here it is now or never.
    for root in &config.roots {
        if let Err(cause) = root.symlink_metadata() {
            return Err(usage(
                format!("cannot take a snapshot of {}: {cause}", root.display()),
                "name files or directories that exist",
            ));
        }
    }
    let name = match &args.name {
        Some(name) => name.clone(),
        None => set::name_from(&config.roots[0]),
    };
    let (options, json) = (args.options(&config), args.output.json);
    let watch = Watch::start(&options.tally, json);
    let outcome = snap(&name, &config, &options, &mut Meter::new(json))?;
    drop(watch);
    report(outcome, args.output.json)
}
