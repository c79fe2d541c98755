//! `snapshim pin` and `snapshim unpin`.

use std::process::ExitCode;

use serde::Serialize;

use crate::Result;
use crate::error::Context;
use crate::store::manifest::{Pin, VERSION};

use super::args::{PinOneArgs, TargetArgs, UnpinArgs};
use super::{output, snapshots};

#[derive(Serialize)]
struct Report {
    version: u32,
    set: String,
    id: String,
    pin: Option<Pin>,
}

/// Runs `snapshim pin`.
pub fn pin(args: &PinOneArgs) -> Result<ExitCode> {
    set_pin(&args.target, Some(Pin::now(&args.note)), args.output.json)
}

/// Runs `snapshim unpin`.
pub fn unpin(args: &UnpinArgs) -> Result<ExitCode> {
    set_pin(&args.target, None, args.output.json)
}

fn set_pin(target: &TargetArgs, pin: Option<Pin>, json: bool) -> Result<ExitCode> {
    let (name, id) = target.set_and_id();
    let found = snapshots::find(name, target.store.as_deref())?;
    let lock = found.lock()?;
    let id = found.store.find(id)?.id;
    let value = pin.as_ref().map(serde_json::to_value).transpose();
    let value = value.context(|| "write JSON".into())?;
    found.store.annotate(&lock, &id, &[("pin", value)])?;
    drop(lock);
    if json {
        output::json(&Report {
            version: VERSION,
            set: found.set.clone(),
            id,
            pin,
        })?;
    } else {
        let done = if pin.is_some() { "pinned" } else { "unpinned" };
        output::text(&format!("{done} {id}\n"))?;
    }
    found.clear();
    Ok(ExitCode::SUCCESS)
}
