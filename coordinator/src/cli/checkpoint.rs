//! `snapshim checkpoint`: one snapshot, now.

use std::process::ExitCode;

use serde::Serialize;

use crate::checkpoint::{Outcome, checkpoint};
use crate::hold::set::{self, Set};
use crate::store::manifest::{Kind, Manifest, PathName};
use crate::{Exit, Result};

use super::args::CheckpointArgs;
use super::progress::Lines;
use super::{output, usage};

/// A snapshot's certificate and where its files are.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    #[serde(flatten)]
    pub(super) manifest: &'a Manifest,
    #[serde(flatten)]
    pub(super) path: PathName,
    /// Snapshots deleted under `--keep-last`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pruned: Option<&'a [String]>,
}

/// Runs the command.
pub fn run(args: &CheckpointArgs) -> Result<ExitCode> {
    let set = Set::open(args.name.as_deref())?;
    let mut options = args.how.options(&set, &args.limits, args.wait);
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
    let outcome = checkpoint(&set, &options, &mut Lines)?;
    report(outcome, args.output.json)
}

/// Says what came of it.
pub(super) fn report(outcome: Outcome, json: bool) -> Result<ExitCode> {
    let Outcome {
        manifest,
        path,
        pruned,
    } = outcome;
    for reason in &manifest.reasons {
        output::note(&format!(
            "snapshim: not verified: {}",
            output::name(&reason.text)
        ));
    }
    if json {
        let path = PathName(path);
        output::json(&Report {
            manifest: &manifest,
            path,
            pruned: Some(&pruned),
        })?;
    } else {
        let mut text = summary(&manifest);
        text.push_str(&format!("{}\n", output::name(&path.to_string_lossy())));
        output::text(&text)?;
    }
    Ok(ExitCode::from(match manifest.verified {
        true => Exit::Verified as u8,
        false => Exit::Unverified as u8,
    }))
}

/// A snapshot in one line.
fn summary(manifest: &Manifest) -> String {
    let files = manifest.files.iter().filter(|f| f.kind == Kind::File);
    let (count, bytes) = files.fold((0_u64, 0_u64), |(n, sum), f| {
        (n + 1, sum.saturating_add(f.size))
    });
    format!(
        "{}  {}  held {} (drained in {})  {count} files, {}, {}\n",
        manifest.id,
        if manifest.verified {
            "verified"
        } else {
            "NOT VERIFIED"
        },
        output::micros(manifest.hold_us),
        output::micros(manifest.drain_us),
        output::size(bytes),
        manifest.capture,
    )
}
