//! `snapshim delete`: one snapshot goes.

use std::process::ExitCode;

use serde::Serialize;

use crate::store::manifest::VERSION;
use crate::{Error, Result};

use super::args::DeleteArgs;
use super::{output, snapshots};

#[derive(Serialize)]
struct Report {
    version: u32,
    set: String,
    removed: Vec<String>,
    /// What `latest` points to now.
    latest: Option<String>,
}

/// Runs the command.
pub fn run(args: &DeleteArgs) -> Result<ExitCode> {
    let (name, id) = args.target.set_and_id();
    let found = snapshots::find(name, args.target.store.as_deref())?;
    let lock = found.lock()?;
    let id = found.store.find(id)?.id;
    if found.store.is_pinned(&id) {
        return Err(Error::new(format!("the snapshot {id} is pinned"))
            .next(format!("`snapshim unpin {} {id}` first", found.set)));
    }
    let was_latest = found.store.latest().as_ref() == Some(&id);
    found.store.leave_latest(&lock, &id)?;
    let retired = found.store.retire(&lock, std::slice::from_ref(&id))?;
    if !retired.busy.is_empty() {
        found.store.settle_latest(&lock)?;
        return Err(Error::new(format!("somebody reads the snapshot {id}"))
            .next("wait until verify, restore or diff has ended and try again"));
    }
    drop(lock);
    found.clear();
    let report = Report {
        version: VERSION,
        set: found.set.clone(),
        removed: retired.ids,
        latest: found.store.latest(),
    };
    if args.output.json {
        output::json(&report)?;
    } else {
        output::text(&format!("removed {id}\n"))?;
        if was_latest {
            output::note(&match &report.latest {
                Some(latest) => format!("snapshim: latest is {latest} now"),
                None => "snapshim: there is no latest any more: no other snapshot is good".into(),
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}
