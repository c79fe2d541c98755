//! `snapshim checkpoint`: one snapshot, now.

use std::process::ExitCode;

use serde::Serialize;

use crate::checkpoint::{Outcome, checkpoint};
use crate::hold::set::{self, Set};
use crate::store::manifest::{Manifest, PathName, Totals};
use crate::store::pace::Pace;
use crate::{Exit, Result};

use super::args::CheckpointArgs;
use super::progress::Meter;
use super::watch::Watch;
use super::{output, style, usage};

/// A snapshot's certificate and where its files are.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    #[serde(flatten)]
    pub(super) manifest: &'a Manifest,
    #[serde(flatten)]
    pub(super) path: PathName,
    /// Snapshots removed under the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pruned: Option<&'a [String]>,
}

/// Runs the command.
pub fn run(args: &CheckpointArgs) -> Result<ExitCode> {
    let set = Set::open(args.name.as_deref())?;
    let mut options = args.how.options(&set, &args.limits, args.wait);
    options.pin = args.pin.note.clone();
    if let Some(only) = &args.only {
        let only = set::resolve(only)?;
        if !set.config.roots.iter().any(|root| only.starts_with(root)) {
            return Err(usage(
                format!("{} is not watched by the set {}", only.display(), set.name),
                format!("`snapshim status {}` shows what it watches", set.name),
            ));
        }
        options.only = Some(only);
    }
    let json = args.output.json;
    let watch = Watch::start(&options.tally, json);
    let outcome = checkpoint(&set, &options, &mut Meter::new(json))?;
    drop(watch);
    report(outcome, args.output.json)
}

/// Says what came of it.
pub(super) fn report(outcome: Outcome, json: bool) -> Result<ExitCode> {
    let Outcome {
        manifest,
        path,
        pruned,
        notes,
        ..
    } = &outcome;
    for line in notes {
        output::note(&format!("snapshim: {}", output::name(line)));
    }
    output::reasons(manifest);
    if json {
        output::json(&Report {
            manifest,
            path: PathName(path.clone()),
            pruned: Some(pruned),
        })?;
    } else {
        let mut text = summary(manifest);
        text.push_str(&format!("{}\n", output::name(&path.to_string_lossy())));
        output::text(&text)?;
    }
    // After all was said. The snapshot is there: what goes wrong now is not its failure.
    if let Err(error) = outcome.clear(&mut Pace::gentle(&|_| false)) {
        output::note(&format!("snapshim: {error}"));
    }
    Ok(ExitCode::from(match manifest.verified {
        true => Exit::Verified as u8,
        false => Exit::Unverified as u8,
    }))
}

/// A snapshot in one line.
fn summary(manifest: &Manifest) -> String {
    let totals = Totals::of(&manifest.files);
    let shared = match totals.shared_files {
        Some(count) if count < totals.files => format!(", {count} of them shared"),
        _ => String::new(),
    };
    format!(
        "{}  {}  held {} (drained in {})  {} files, {}, {}{shared}\n",
        style::paint(&manifest.id, style::NAME, style::on_stdout()),
        output::state(manifest.verified),
        output::micros(manifest.hold_us),
        output::micros(manifest.drain_us),
        totals.files,
        output::size(totals.bytes),
        manifest.capture,
    )
}
