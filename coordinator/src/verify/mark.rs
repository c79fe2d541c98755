//! What a check found, written into the manifest of a published snapshot.

use serde_json::{Value, to_value};

use crate::Result;
use crate::error::Context;
use crate::store::manifest::{Check, Reason};
use crate::store::{Store, StoreLock};

/// Most checks that are kept of a snapshot.
const MOST: usize = 20;

/// Writes down a check of the snapshot `id` and what speaks against the snapshot.
///
/// An earlier check of the same kind (and command) is replaced. What spoke against the
/// snapshot for such a check is taken back once no check of the kind has failed. A content
/// that is as it should be is not worth a line, unless it was not before.
///
/// Then `latest` points to the newest good snapshot again.
///
/// # Errors
///
/// The manifest cannot be read any more, or the store not be written.
pub fn mark(
    store: &Store,
    lock: &StoreLock,
    id: &str,
    check: &Check,
    code: &str,
    reason: Option<&Reason>,
) -> Result<()> {
    // As values, not as what we know of them: whatever else is in them is kept.
    let [checks, reasons, verified] = store.fields(lock, id, ["checks", "reasons", "verified"])?;
    let mut checks = list(checks);
    let mut reasons = list(reasons);
    let was = (checks.clone(), reasons.clone());
    let is_same = |other: &Value| {
        other["kind"] == check.kind.as_str()
            && other["command"].as_str() == check.command.as_deref()
    };
    let replaced = checks.iter().any(is_same);
    checks.retain(|other| !is_same(other));
    let is_worth_it = replaced || check.kind == "command" || reason.is_some();
    if is_worth_it {
        let value = to_value(check).context(|| "write JSON".into())?;
        checks.push(value);
        let surplus = checks.len().saturating_sub(MOST);
        checks.drain(..surplus);
    }
    let has_failed =
        |other: &Value| other["kind"] == check.kind.as_str() && other["passed"] == false;
    let before = reasons.len();
    if reason.is_some() || !checks.iter().any(has_failed) {
        reasons.retain(|other| other["code"] != code);
    }
    let is_lifted = reasons.len() < before;
    if let Some(reason) = reason {
        reasons.push(to_value(reason).context(|| "write JSON".into())?);
    }
    let was_verified = verified == Some(Value::Bool(true));
    let is_verified = reasons.is_empty() && (was_verified || is_lifted);
    if was != (checks.clone(), reasons.clone()) {
        let changes = [
            ("checks", Some(Value::Array(checks))),
            ("reasons", Some(Value::Array(reasons))),
            ("verified", Some(Value::Bool(is_verified))),
        ];
        if !is_verified {
            store.leave_latest(lock, id)?;
        }
        store.annotate(lock, id, &changes)?;
    }
    store.settle_latest(lock).map(|_| ())
}

fn list(value: Option<Value>) -> Vec<Value> {
    match value {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    }
}
