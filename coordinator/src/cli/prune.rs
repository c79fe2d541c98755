//! `snapshim prune`: the snapshots that a policy does not keep go.

use std::process::ExitCode;

use serde::Serialize;

use crate::Result;
use crate::store::manifest::{Pin, VERSION};
use crate::store::policy::{Policy, Why};
use crate::store::retention::{Judged, Retired};

use super::args::PruneArgs;
use super::list::{pin_mark, state};
use super::table::{Cell, Table};
use super::{output, snapshots, style, usage};

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    set: &'a str,
    policy: &'a Policy,
    dry_run: bool,
    snapshots: Vec<Line>,
    /// What was removed.
    removed: &'a [String],
    /// What was to be removed, but is being read.
    busy: &'a [String],
    /// Bytes free on the store's file system, before and after.
    free_before: u64,
    free_after: u64,
}

/// What the policy says of one snapshot.
#[derive(Serialize)]
struct Line {
    id: String,
    keep: bool,
    why: Vec<Why>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<bool>,
    /// The sum of the sizes of its files. What they share with others is not freed.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pin: Option<Pin>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

impl From<Judged> for Line {
    fn from(judged: Judged) -> Line {
        let keep = judged.is_kept();
        let (head, damage) = match judged.listed.head {
            Ok(head) => (Some(head), None),
            Err(damage) => (None, Some(damage)),
        };
        Line {
            id: judged.listed.id,
            keep,
            why: judged.why,
            verified: head.as_ref().map(|head| head.verified),
            bytes: head.as_ref().map(|head| head.totals.bytes),
            pin: head.and_then(|head| head.pin),
            damage,
        }
    }
}

/// Runs the command.
pub fn run(args: &PruneArgs) -> Result<ExitCode> {
    let found = snapshots::find(args.name.as_deref(), args.store.as_deref())?;
    let policy = args.keep.policy().or(&found.policy);
    if policy == Policy::default() {
        return Err(usage(
            format!("there is no policy for the snapshots of {}", found.set),
            "say which to keep (--keep-last 10 --keep-daily 7, or --min-free 10%), here or when \
             the set is started",
        ));
    }
    let store = &found.store;
    let lock = (!args.dry_run).then(|| found.lock()).transpose()?;
    let free_before = store.free()?;
    let judged = store.judge(&policy)?;
    let old = judged.iter().filter(|judged| !judged.is_kept());
    let old: Vec<String> = old.map(|judged| judged.listed.id.clone()).collect();
    let mut lines: Vec<Line> = judged.into_iter().map(Line::from).collect();
    let mut retired = Retired::default();
    let mut short = None;
    if let Some(lock) = lock {
        retired = store.retire(&lock, &old)?;
        if let Some(room) = policy.min_free {
            let (removed, space) = store.make_room(&lock, room, &policy)?;
            for line in lines.iter_mut().filter(|line| removed.contains(&line.id)) {
                line.keep = false;
                line.why = vec!["to make room".into()];
            }
            short = space
                .is_short()
                .then(|| store.no_room(room, space, &removed));
            retired.ids.extend(removed);
        }
        drop(lock);
        found.clear();
    }
    let report = Report {
        version: VERSION,
        set: &found.set,
        policy: &policy,
        dry_run: args.dry_run,
        snapshots: lines,
        removed: &retired.ids,
        busy: &retired.busy,
        free_before,
        free_after: store.free()?,
    };
    match args.output.json {
        true => output::json(&report)?,
        false => tell(&report)?,
    }
    short.map_or(Ok(ExitCode::SUCCESS), Err)
}

fn tell(report: &Report<'_>) -> Result<()> {
    let mut table = Table::new(&["ID", "STATE", "SIZE", "", "WHY"]);
    for line in &report.snapshots {
        let action = match line.keep {
            true => Cell::new("keep"),
            false => Cell::new("remove").styled(style::DOUBTFUL),
        };
        // A note says why it is pinned, a damage why it cannot be judged.
        let mut why = line.why.join(", ");
        if let Some(pin) = &line.pin {
            why = why.replace("pinned", &pin_mark(pin));
        }
        if let Some(damage) = &line.damage {
            why = format!("{why}: {}", output::name(damage));
        }
        table.row([
            Cell::new(&line.id).styled(style::NAME),
            line.verified
                .map_or_else(|| Cell::new("damaged").styled(style::BAD), state),
            line.bytes.map_or_else(|| Cell::new(""), Cell::size),
            action,
            Cell::new(why),
        ]);
    }
    table.print()?;
    for id in report.busy {
        output::note(&format!("snapshim: left {id}: somebody reads it"));
    }
    if report.dry_run && report.policy.min_free.is_some() {
        output::note("snapshim: what --min-free removes shows only when it is removed");
    }
    let kept = report.snapshots.iter().filter(|line| line.keep).count();
    output::note(&match report.dry_run {
        true => format!(
            "snapshim: {} would be removed, {kept} kept ({}); nothing was done",
            report.snapshots.len() - kept,
            report.policy
        ),
        false => format!(
            "snapshim: {} removed, {} kept ({}); {} free, {} before",
            report.removed.len(),
            report.snapshots.len() - report.removed.len(),
            report.policy,
            output::size(report.free_after),
            output::size(report.free_before)
        ),
    });
    Ok(())
}
