//! `snapshim status`: a set as it is now.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use serde::Serialize;

use snapshim_gate::reap::Claimed;
use snapshim_gate::slot::{Owner, SEEN, Seen, Slot};
use snapshim_gate::word;

use crate::Result;
use crate::hold::locate::Locator;
use crate::hold::process;
use crate::hold::set::Set;
use crate::hold::sites::layer::{Layer, Looker};
use crate::restore;
use crate::store::Store;
use crate::store::manifest::{PathName, VERSION};

use super::args::StatusArgs;
use super::forecast::Forecast;
use super::points::{self, Points};
use super::table::{Cell, Table};
use super::waits::Waits;
use super::{output, style};

/// The counters of a slot, by name.
const COUNTERS: [(Seen, &str); 7] = [
    (Seen::Sync, "sync"),
    (Seen::Lock, "lock"),
    (Seen::Close, "close"),
    (Seen::Rename, "rename"),
    (Seen::Map, "map"),
    (Seen::Submit, "submit"),
    (Seen::Sandbox, "sandbox"),
];
const _: () = assert!(COUNTERS.len() <= SEEN);

#[derive(Serialize)]
struct Report {
    version: u32,
    set: String,
    #[serde(serialize_with = "output::plain")]
    gate: PathName,
    /// Device and inode, as programs are told in the environment.
    gate_id: String,
    state: &'static str,
    epoch: u32,
    in_use: bool,
    /// The process that makes a checkpoint now.
    coordinator: Option<u32>,
    bound_ms: u64,
    slots_used: usize,
    slots: usize,
    /// Threads that found no slot.
    overflow: u32,
    /// Holds that a waiting program broke.
    breaks: u32,
    last_hold_us: u64,
    waits: Waits,
    writers: Vec<Writer>,
    roots: Vec<PathName>,
    excludes: Vec<PathName>,
    #[serde(serialize_with = "output::plain")]
    store: PathName,
    latest: Option<String>,
    points: Points,
    /// What capturing takes.
    capture: Forecast,
    /// A restore in place that did not come to its end, or keeps what it replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    restore: Option<String>,
}

/// A process that is attached to the gate.
#[derive(Serialize)]
struct Writer {
    /// In its own pid namespace.
    pid: u32,
    /// In ours, if it is in another one that can be seen from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid_here: Option<u32>,
    /// Empty if it cannot be looked at.
    name: String,
    /// Whether it is in another pid namespace.
    elsewhere: bool,
    alive: bool,
    /// `sites` or `symbols`; absent if it cannot be looked at from here.
    layer: Option<&'static str>,
    /// Why not a better layer, and what else is known of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    threads: u32,
    /// Threads that are waiting at the gate.
    parked: u32,
    waits: u64,
    longest_wait_us: u64,
    waited_us: u64,
    breaks: u64,
    seen: BTreeMap<&'static str, u64>,
    /// Which of the calls that commit points are told from it was seen to make.
    uses: Vec<&'static str>,
    /// It is in a unit of its own now.
    #[serde(skip)]
    in_unit: bool,
}

/// Runs the command.
pub fn run(args: &StatusArgs) -> Result<ExitCode> {
    let set = Set::open(args.name.as_deref())?;
    let report = report(&set)?;
    if args.output.json {
        output::json(&report)?;
    } else {
        output::text(&describe(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn report(set: &Set) -> Result<Report> {
    let header = set.gate.header();
    let word = header.word.load(Acquire);
    let names = |paths: &[std::path::PathBuf]| paths.iter().cloned().map(PathName).collect();
    let slots = set.gate.used_slots();
    Ok(Report {
        version: VERSION,
        set: set.name.clone(),
        gate: PathName(set.gate_path.clone()),
        gate_id: format!("{}:{}", set.gate_id.dev, set.gate_id.ino),
        state: match word::state(word) {
            word::OPEN => "open",
            word::CLOSED => "closed",
            word::GUARDED => "guarded",
            word::ARMED => "armed",
            _ => "unknown",
        },
        epoch: word::epoch(word),
        in_use: set.is_in_use()?,
        coordinator: set.lock_holder(),
        bound_ms: set.gate.hold_bound_ns() / 1_000_000,
        slots_used: slots
            .iter()
            .filter(|s| Owner::unpack(s.owner.load(Acquire)).is_some())
            .count(),
        slots: set.gate.slots().len(),
        overflow: header.overflow.load(Relaxed),
        breaks: header.breaks.load(Relaxed),
        last_hold_us: header.last_hold_ns.load(Relaxed) / 1_000,
        waits: Waits::of(&set.gate),
        writers: writers(slots),
        points: Points::of(set),
        capture: Forecast::of(set),
        roots: names(&set.config.roots),
        excludes: names(&set.config.excludes),
        restore: restore::unfinished(&set.config.roots),
        latest: Store::open(&set.config.store, &set.name)
            .ok()
            .and_then(|s| s.latest()),
        store: PathName(set.config.store.clone()),
    })
}

/// The processes behind the slots. Sums saturate: the numbers are the programs'.
fn writers(slots: &[Slot]) -> Vec<Writer> {
    let claimed: Vec<(&Slot, Claimed)> = slots
        .iter()
        .filter_map(|slot| Some((slot, Claimed::read(slot)?)))
        .collect();
    let locator = Locator::default();
    let looker = Looker::default();
    let mut writers: BTreeMap<(u32, u32, u64), Writer> = BTreeMap::new();
    for (slot, claimed) in claimed {
        let Some(owner) = Owner::unpack(claimed.owner) else {
            continue;
        };
        let start = claimed.start_time;
        let writer = writers
            .entry((owner.pidns, owner.pid, start))
            .or_insert_with(|| {
                let elsewhere = !locator.is_own_namespace(owner);
                let alive = !locator.is_gone(owner, start);
                let here = locator.process(owner).filter(|_| alive);
                let layer = here.map(|pid| looker.look(pid));
                Writer {
                    pid: owner.pid,
                    pid_here: here.filter(|_| elsewhere),
                    name: here.map(process::name).unwrap_or_default(),
                    elsewhere,
                    alive,
                    layer: layer.as_ref().map(Layer::name),
                    notes: layer.map(|l| l.all_notes()).unwrap_or_default(),
                    threads: 0,
                    parked: 0,
                    waits: 0,
                    longest_wait_us: 0,
                    waited_us: 0,
                    breaks: 0,
                    seen: COUNTERS.iter().map(|(_, name)| (*name, 0)).collect(),
                    uses: Vec::new(),
                    in_unit: false,
                }
            });
        let add = |sum: &mut u64, value: u64| *sum = sum.saturating_add(value);
        writer.threads += 1;
        writer.parked += u32::from(slot.parked.load(Relaxed) != 0);
        add(&mut writer.waits, slot.waits.load(Relaxed).into());
        add(&mut writer.waited_us, slot.waited_us.load(Relaxed).into());
        add(&mut writer.breaks, slot.breaks.load(Relaxed).into());
        let longest = u64::from(slot.longest_wait_us.load(Relaxed));
        writer.longest_wait_us = writer.longest_wait_us.max(longest);
        writer.in_unit |= slot.units.load(Relaxed) > 0;
        for (counter, name) in COUNTERS {
            let sum = writer.seen.entry(name).or_default();
            add(sum, slot.seen[counter as usize].load(Relaxed).into());
        }
    }
    let mut writers: Vec<Writer> = writers.into_values().collect();
    for writer in &mut writers {
        let count = |call: &str| writer.seen.get(call).copied().unwrap_or(0);
        writer.uses = points::uses(count, writer.in_unit);
    }
    writers
}

fn describe(report: &Report) -> String {
    let path = |name: &PathName| output::name(&name.0.to_string_lossy());
    let mut rows = Vec::new();
    let mut row = |label: &str, value: String| rows.push(vec![label.to_owned(), value]);
    row("set", report.set.clone());
    row(
        "gate",
        format!("{} ({})", path(&report.gate), report.gate_id),
    );
    row("state", format!("{}, epoch {}", report.state, report.epoch));
    row(
        "in use",
        if report.in_use {
            "yes".into()
        } else {
            "no".into()
        },
    );
    if let Some(pid) = report.coordinator {
        row("coordinator", pid.to_string());
    }
    row("hold bound", format!("{} ms", report.bound_ms));
    row("last hold", output::micros(report.last_hold_us));
    row("broken holds", report.breaks.to_string());
    row(
        "slots",
        format!("{} of {}", report.slots_used, report.slots),
    );
    if report.overflow > 0 {
        row(
            "",
            format!(
                "{} threads found none: no snapshot can be verified",
                report.overflow
            ),
        );
    }
    for root in &report.roots {
        row("watched", path(root));
    }
    for exclude in &report.excludes {
        row("excluded", path(exclude));
    }
    row("store", path(&report.store));
    row(
        "latest",
        report.latest.clone().unwrap_or_else(|| "none".into()),
    );
    if let Some(restore) = &report.restore {
        row("restore", output::name(restore));
    }
    rows.extend(report.points.rows());
    rows.extend(report.capture.rows());
    let mut text = output::table(&rows);
    if report.writers.is_empty() {
        return text;
    }
    let mut table = Table::new(&[
        "PID", "NAME", "LAYER", "THREADS", "WAITS", "LONGEST", "SEEN",
    ]);
    for writer in &report.writers {
        let seen: Vec<String> = writer
            .seen
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let is_seen = !writer.elsewhere || writer.pid_here.is_some();
        let name = match (writer.alive, is_seen) {
            (false, _) => Cell::new("(ended)"),
            (true, false) => Cell::new("(in another pid namespace)"),
            (true, true) => Cell::name(&writer.name),
        };
        table.row([
            Cell::count(writer.pid_here.unwrap_or(writer.pid).into()).styled(style::NAME),
            name,
            Cell::new(writer.layer.unwrap_or("-")),
            Cell::count(writer.threads.into()),
            Cell::count(writer.waits),
            Cell::micros(writer.longest_wait_us),
            Cell::new(seen.join(", ")),
        ]);
    }
    text.push('\n');
    text.push_str(&table.to_text());
    for writer in &report.writers {
        for note in &writer.notes {
            let pid = writer.pid_here.unwrap_or(writer.pid);
            text.push_str(&format!("{pid}: {}\n", output::name(note)));
        }
    }
    text
}
