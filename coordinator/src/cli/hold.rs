//! `snapshim hold`: any command while the programs of a set are held.

use std::process::{Command, ExitCode};

use serde::Serialize;

use crate::checkpoint::hold;
use crate::child;
use crate::hold::set::Set;
use crate::store::manifest::{Foreign, Manifest, PathName, Reason, Writer};
use crate::{Exit, Result};

use super::args::HoldArgs;
use super::progress::Meter;
use super::{output, usage};

/// The certificate of the hold, and how the command ended.
#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    set: &'a str,
    time: &'a str,
    commit_point: &'a str,
    commit_point_asked: &'a str,
    claim: Option<&'a str>,
    verified: bool,
    reasons: &'a [Reason],
    assumptions: &'a [String],
    hold_us: u64,
    drain_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_us: Option<u64>,
    roots: &'a [PathName],
    writers: &'a [Writer],
    foreign: &'a [Foreign],
    /// The command's exit status; null if a signal ended it.
    status: Option<i32>,
}

/// Runs the command.
pub fn run(args: &HoldArgs) -> Result<ExitCode> {
    let set = Set::open(args.name.as_deref())?;
    let options = args.how.options(&set, &args.limits, args.wait);
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(usage(
            "there is no command to run",
            "name one: snapshim hold -- CMD ARGS",
        ));
    };
    let mut command = Command::new(program);
    command.args(arguments).env("SNAPSHIM_SET", &set.name);
    child::leave_sets(&mut command);
    let (manifest, status) = hold(&set, &options, command, &mut Meter::new(args.output.json))?;
    output::reasons(&manifest);
    if args.output.json {
        output::json(&report(&manifest, status.code()))?;
    } else {
        output::note(&format!(
            "snapshim: held at {} for {} (drained in {}), {}",
            manifest.commit_point,
            output::micros(manifest.hold_us),
            output::micros(manifest.drain_us),
            match manifest.verified {
                true => "verified",
                false => "NOT VERIFIED",
            }
        ));
    }
    Ok(match status.code() {
        Some(0) if manifest.verified => ExitCode::SUCCESS,
        Some(0) => ExitCode::from(Exit::Unverified as u8),
        _ => {
            output::error("snapshim: the command failed: what it made is worth nothing");
            ExitCode::from(Exit::Failure as u8)
        }
    })
}

fn report(manifest: &Manifest, status: Option<i32>) -> Report<'_> {
    Report {
        version: manifest.version,
        set: &manifest.set,
        time: &manifest.time,
        commit_point: &manifest.commit_point,
        commit_point_asked: &manifest.commit_point_asked,
        claim: manifest.claim.as_deref(),
        verified: manifest.verified,
        reasons: &manifest.reasons,
        assumptions: &manifest.assumptions,
        hold_us: manifest.hold_us,
        drain_us: manifest.drain_us,
        stop_us: manifest.stop_us,
        roots: &manifest.roots,
        writers: &manifest.writers,
        foreign: &manifest.foreign,
        status,
    }
}
