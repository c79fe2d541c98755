//! Commit points for `status` and `doctor`: what was observed, what `auto` makes of it, and what
//! that claims.

use serde::Serialize;

use crate::commit::CommitPoint;
use crate::commit::observed::Observed;
use crate::hold::evidence;
use crate::hold::set::Set;
use crate::hold::sites::layer::Looker;
use crate::store::Store;

/// What is known of a set.
#[derive(Debug, Serialize)]
pub(super) struct Points {
    /// On files of the set, by all its processes, while the gate was armed.
    observed: Seen,
    /// The points that go with it, the strongest first.
    offered: Vec<String>,
    auto: Auto,
}

#[derive(Debug, Serialize)]
struct Seen {
    locks: u32,
    unlocks: u32,
    locked_changes: u32,
    syncs: u32,
    closes: u32,
    renames: u32,
    units: bool,
}

/// What `--at auto` would take now.
#[derive(Debug, Serialize)]
struct Auto {
    point: String,
    why: String,
    claim: &'static str,
    limits: &'static str,
    last: Option<Last>,
}

/// The newest snapshot that was asked for with `auto`.
#[derive(Debug, Serialize)]
struct Last {
    id: String,
    point: String,
}

impl Points {
    pub(super) fn of(set: &Set) -> Points {
        let observed = Observed::of(&set.gate);
        let counts = observed.as_noted(is_partly_seen(set));
        let choice = counts.choice();
        let text = |point: &CommitPoint| point.to_string();
        let store = Store::open(&set.config.store, &set.name).ok();
        let last = store.and_then(|store| store.last_asked(&CommitPoint::Auto.to_string()));
        Points {
            offered: counts.offered().iter().map(text).collect(),
            auto: Auto {
                point: choice.to_string(),
                why: counts.why(),
                claim: choice.claim(),
                limits: choice.limits(),
                last: last.map(|(id, point)| Last { id, point }),
            },
            observed: Seen {
                locks: observed.locks,
                unlocks: observed.unlocks,
                locked_changes: observed.locked_changes,
                syncs: observed.syncs,
                closes: observed.closes,
                renames: observed.renames,
                units: observed.units,
            },
        }
    }

    /// Lines of a label and its value.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let seen = &self.observed;
        let counts = [
            (seen.locks, "write locks"),
            (seen.unlocks, "unlocks"),
            (seen.locked_changes, "changes under a lock"),
            (seen.syncs, "syncs"),
            (seen.closes, "closes"),
            (seen.renames, "renames"),
        ];
        let seen = counts.iter().filter(|(count, _)| *count > 0);
        let mut seen: Vec<String> = seen.map(|(n, what)| format!("{n} {what}")).collect();
        if self.observed.units {
            seen.push("units".to_owned());
        }
        let seen = match seen.is_empty() {
            true => "nothing yet: it is noted while a point is waited for".to_owned(),
            false => seen.join(", "),
        };
        let auto = &self.auto;
        let mut rows = vec![
            ("observed", seen),
            ("auto", format!("{}: {}", auto.point, auto.why)),
            ("claims", auto.claim.to_owned()),
            ("does not", auto.limits.to_owned()),
        ];
        if let Some(last) = &auto.last {
            rows.push(("auto took", format!("{}, for {}", last.point, last.id)));
        }
        let row = |(label, value): (&str, String)| vec![label.to_owned(), value];
        rows.into_iter().map(row).collect()
    }
}

/// Whether a program of the set is held by symbols alone, so that its changes are noted in part.
fn is_partly_seen(set: &Set) -> bool {
    let looker = Looker::default();
    let mut attached = evidence::attached_here(&set.gate).into_iter();
    attached.any(|pid| looker.look(pid).not_sites.is_some())
}

/// What a process was seen to use, from its counters: the calls, whatever their files.
pub(super) fn uses(count: impl Fn(&str) -> u64, in_unit: bool) -> Vec<&'static str> {
    let calls = ["lock", "sync", "close", "rename"];
    let used = calls.into_iter().filter(|call| count(call) > 0);
    used.chain(in_unit.then_some("unit")).collect()
}
