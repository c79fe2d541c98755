//! What each way to capture would take, file by file, before anything is held: what `auto`
//! decides by, and what certificates and `status` show beside what it took.
//!
//! | module | |
//! |---|---|
//! | `facts` | what a file is like now: dirty bytes, extents, whether it is being overwritten |
//! | `costs` | what that makes each method take |
//! | `choose` | which is taken, and why |
//! | [`now`] | the same for `status`, without preparing anything |
//! | `outcome` | what it took in the end |

mod choose;
mod costs;
pub(super) mod facts;
pub mod now;
mod outcome;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use super::Method;
use super::prepare::{Known, Plan, Scan, Way};
use super::rehearse::MANY;
use crate::store::manifest::PathName;
use crate::store::prediction::{Dominant, Expected, Prediction};
use choose::{Choice, LARGE, Weighed, human};
use costs::Cost;
use facts::{Facts, FileSystem};

/// Files smaller than this, bytes, are not looked at: they have few extents, and little to write back.
const SMALL: u64 = 1 << 20;
/// Of the others, so many of the largest are looked at one by one.
const LOOKED_AT: usize = 1_000;
/// So many files are named in a prediction.
const NAMED: usize = 5;
/// Of a hold that is shorter than this, no cause is told.
const NOTABLE: Duration = Duration::from_micros(200);

/// When what is dirty is written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// It was, since the scan.
    Done,
    /// It would be before the hold.
    ToCome,
    /// Some time before the hold, perhaps.
    Unknown,
}

/// What may be done, as far as it is not seen from the files.
pub(super) struct Means<'a> {
    pub(super) method: Method,
    /// Whether the subvolume can be frozen, and is worth it.
    pub(super) can_freeze: bool,
    /// Room in the store, bytes, if that is known.
    pub(super) room: Option<u64>,
    /// What becomes of what is dirty.
    pub(super) flush: Flush,
    /// Files that only grew before that, as far as it was seen.
    pub(super) appended: Option<&'a Appended>,
    /// A file that was written to within this time, ns, is taken to be written to still.
    pub(super) fresh: i64,
    /// Why the set cannot be captured after the cut; asked only if it matters.
    pub(super) not_guarded: &'a mut dyn FnMut() -> Option<String>,
}

/// Files that were seen to be written to only at their end, by their index in the scan.
pub(super) type Appended = HashSet<usize>;

/// A prediction, and whether to capture after the cut.
pub(super) struct Predicted {
    pub(super) prediction: Prediction,
    pub(super) appended: Appended,
    pub(super) is_guarded: bool,
}

/// A member and what it costs.
struct Item<'a> {
    known: &'a Known,
    facts: Facts,
    way: Way,
    under: Cost,
}

/// The sums for all files.
#[derive(Default)]
struct Sums {
    files: u64,
    clones: u64,
    under: Cost,
    copy: Cost,
    guarded: Cost,
    frozen: Cost,
    breaking: usize,
    /// Whether all of them are looked at at the cut.
    is_looked_at: bool,
}

/// Predicts what capturing `scan` would take.
pub(super) fn predict(scan: &Scan, plan: &Plan, means: Means<'_>) -> Predicted {
    let file_systems = file_systems(scan);
    let unknown = FileSystem {
        name: "unknown".to_owned(),
    };
    let on = |known: &Known| file_systems.get(&known.seen.id.dev).unwrap_or(&unknown);
    let looked = look(scan, &means, &on);
    let others = Density::of(looked.values());
    let mut sums = Sums {
        is_looked_at: scan.members.len() <= MANY,
        ..Sums::default()
    };
    let mut dominant: Vec<Item<'_>> = Vec::new();
    let mut breaking: Option<&Known> = None;
    let mut at_worst: Option<(&Known, Duration)> = None;
    let mut linked = HashSet::new();
    for (index, known) in scan.members.iter().enumerate() {
        // Further names become links.
        if known.seen.nlink > 1 && !linked.insert(known.seen.id) {
            continue;
        }
        if known.is_shared {
            let way = plan.way(known.seen.id.dev);
            sums.share(way);
            let is_larger = || at_worst.is_none_or(|(other, _)| other.seen.size < known.seen.size);
            if way == Way::Copy && is_larger() {
                let cost = costs::copy(&Facts::plain(&known.seen), on(known));
                at_worst = Some((known, cost.hold));
            }
            continue;
        }
        let facts = match looked.get(&index) {
            Some(facts) => *facts,
            None if known.seen.size >= SMALL => Facts {
                is_to_be_flushed: means.flush != Flush::Done,
                ..others.guess(known)
            },
            None if on(known).is_memory() => Facts::plain(&known.seen),
            None => Facts::small(&known.seen, &scan.times),
        };
        let way = plan.way(known.seen.id.dev);
        let item = sums.add(known, facts, way, on(known));
        let breaks = facts.is_overwritten && facts.size >= LARGE && !on(known).is_btrfs();
        if way != Way::Copy && breaks {
            sums.breaking += 1;
            if breaking.is_none_or(|first| first.seen.size < known.seen.size) {
                breaking = Some(known);
            }
        }
        keep_dominant(&mut dominant, item);
    }
    let mut weighed = Weighed {
        room: means.room,
        under: sums.under,
        guarded: sums.guarded,
        breaking: breaking.map(|known| (sums.breaking, scan.path(known).display().to_string())),
        at_worst: at_worst.map(|(known, hold)| (hold, scan.path(known).display().to_string())),
        can_freeze: means.can_freeze,
        cause: dominant
            .first()
            .filter(|item| item.under.hold >= NOTABLE)
            .map(|item| format!("{}: {}", scan.path(item.known).display(), item.cause())),
        not_guarded: None,
    };
    if weighed.asks_for_guard(means.method) {
        weighed.not_guarded = (means.not_guarded)();
    }
    let (choice, why) = weighed.choose(means.method);
    let under = sums.under_name();
    let name = match choice {
        Choice::Guarded => "copy-before-write",
        Choice::Subvolume => "subvolume",
        Choice::UnderHold => under,
    };
    let mut methods = Vec::new();
    if under != "copy" {
        methods.push(total(under, costs::base(), sums.under));
    }
    methods.push(total("copy", costs::base(), sums.copy));
    methods.push(Expected {
        why_not: weighed.not_guarded,
        ..total("copy-before-write", costs::base(), sums.guarded)
    });
    if means.can_freeze {
        methods.push(total("subvolume", costs::freeze(), sums.frozen));
    }
    let named = dominant
        .iter()
        .map(|item| item.named(scan, on(item.known), means.can_freeze));
    Predicted {
        is_guarded: choice == Choice::Guarded,
        prediction: Prediction {
            choice: name.to_owned(),
            why,
            files: sums.files,
            looked_at: looked.len() as u64,
            partial: false,
            methods,
            dominant: named.collect(),
            outcome: None,
        },
        appended: looked
            .iter()
            .filter(|(_, facts)| facts.is_appended)
            .map(|(index, _)| *index)
            .collect(),
    }
}

/// The file system of each device.
fn file_systems(scan: &Scan) -> BTreeMap<u64, FileSystem> {
    let mut file_systems = BTreeMap::new();
    for known in &scan.members {
        file_systems.entry(known.seen.id.dev).or_insert_with(|| {
            let opened = scan.open(known);
            opened.map_or(
                FileSystem {
                    name: "unknown".to_owned(),
                },
                FileSystem::of,
            )
        });
    }
    file_systems
}

/// Looks at the largest members, by index.
fn look<'a>(
    scan: &Scan,
    means: &Means<'_>,
    on: &impl Fn(&Known) -> &'a FileSystem,
) -> HashMap<usize, Facts> {
    let is_large = |index: &usize| {
        let known = &scan.members[*index];
        known.seen.size >= SMALL && !known.is_shared
    };
    let mut large: Vec<usize> = (0..scan.members.len()).filter(is_large).collect();
    large.sort_unstable_by_key(|index| Reverse(scan.members[*index].seen.size));
    large.truncate(LOOKED_AT);
    let facts = |index: usize| {
        let known = &scan.members[index];
        let file = scan.open(known).ok()?;
        let was_appended = means
            .appended
            .is_some_and(|appended| appended.contains(&index));
        let mut facts = Facts::of(&file, &known.seen, means.fresh, means.flush, was_appended);
        facts.is_to_be_flushed = match means.flush {
            Flush::ToCome => true,
            // Whoever writes to it will do so again.
            Flush::Unknown => !facts.is_overwritten,
            Flush::Done => false,
        };
        if on(known).is_memory() {
            facts.dirty = 0;
        } else if on(known).is_btrfs() {
            facts.extents = facts::sampled(&file, facts.size);
        }
        Some((index, facts))
    };
    large.into_iter().filter_map(facts).collect()
}

/// What is known of files on average, for those that were not looked at.
#[derive(Default)]
struct Density {
    size: u64,
    dirty: u64,
    extents: u64,
}

impl Density {
    fn of<'a>(facts: impl Iterator<Item = &'a Facts>) -> Density {
        facts.fold(Density::default(), |sum, facts| Density {
            size: sum.size.saturating_add(facts.size),
            dirty: sum.dirty.saturating_add(facts.dirty),
            extents: sum.extents + u64::from(facts.extents.unwrap_or(1)),
        })
    }

    fn guess(&self, known: &Known) -> Facts {
        let part = known.seen.size as f64 / self.size.max(1) as f64;
        Facts {
            dirty: (self.dirty as f64 * part) as u64,
            extents: Some((self.extents as f64 * part).max(1.0) as u32),
            ..Facts::plain(&known.seen)
        }
    }
}

impl Sums {
    fn add<'a>(&mut self, known: &'a Known, facts: Facts, way: Way, on: &FileSystem) -> Item<'a> {
        let copy = costs::copy(&facts, on);
        let under = match way {
            Way::Copy => copy,
            Way::Reflink | Way::Unknown => costs::reflink(&facts),
        };
        self.files += 1;
        self.clones += u64::from(way != Way::Copy);
        self.under += under;
        self.copy += copy;
        self.guarded += costs::copy_before_write(&facts, on, self.is_looked_at);
        self.frozen += costs::subvolume(&facts);
        Item {
            known,
            facts,
            way,
            under,
        }
    }

    /// A file that has not changed since the previous snapshot.
    fn share(&mut self, way: Way) {
        let [under, guarded] = costs::shared(self.is_looked_at);
        self.files += 1;
        self.clones += u64::from(way != Way::Copy);
        self.under += under;
        self.copy += under;
        self.guarded += guarded;
        self.frozen += costs::subvolume(&Facts::default());
    }

    /// What a capture under the hold is called.
    fn under_name(&self) -> &'static str {
        match self.clones {
            0 if self.files == 0 => "none",
            0 => "copy",
            all if all == self.files => "reflink",
            _ => "mixed",
        }
    }
}

/// Keeps the items with the longest holds.
fn keep_dominant<'a>(dominant: &mut Vec<Item<'a>>, item: Item<'a>) {
    if dominant.len() == NAMED && dominant[NAMED - 1].under.hold >= item.under.hold {
        return;
    }
    let at = dominant.partition_point(|other| other.under.hold >= item.under.hold);
    dominant.insert(at, item);
    dominant.truncate(NAMED);
}

impl Item<'_> {
    /// What makes its part of the hold what it is.
    fn cause(&self) -> String {
        let mib = |bytes: u64| match bytes {
            ..SMALL => format!("{:.1} KiB", bytes as f64 / f64::from(1 << 10)),
            _ => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        };
        let Facts {
            dirty,
            extents,
            size,
            ..
        } = self.facts;
        if self.way == Way::Copy {
            return format!("{} to be copied", mib(self.facts.data));
        }
        let of = |facts: Facts| costs::reflink(&facts).hold;
        let clean = Facts {
            dirty: 0,
            ..self.facts
        };
        let pieces = extents.map(|count| match count {
            1 => "1 extent".to_owned(),
            count => format!("{count} extents"),
        });
        match (self.under.hold.saturating_sub(of(clean)), pieces) {
            // Not looked at.
            (_, None) if size < SMALL && dirty > 0 => format!("{} being written to", mib(dirty)),
            (time, Some(pieces)) if time < self.under.hold / 2 => pieces,
            (time, None) if time < self.under.hold / 2 => format!("{} to be cloned", mib(size)),
            _ => format!("{} not written back yet", mib(dirty)),
        }
    }

    fn named(&self, scan: &Scan, on: &FileSystem, can_freeze: bool) -> Dominant {
        let is_looked_at = scan.members.len() <= MANY;
        let facts = self.facts;
        let mut methods = Vec::new();
        if self.way != Way::Copy {
            methods.push(expected("reflink", costs::reflink(&facts)));
        }
        methods.push(expected("copy", costs::copy(&facts, on)));
        methods.push(expected(
            "copy-before-write",
            costs::copy_before_write(&facts, on, is_looked_at),
        ));
        if can_freeze {
            methods.push(expected("subvolume", costs::subvolume(&facts)));
        }
        Dominant {
            path: PathName(scan.path(self.known)),
            size: facts.size,
            file_system: on.name.clone(),
            dirty: facts.dirty,
            extents: facts.extents.map(u64::from).filter(|_| !on.is_btrfs()),
            overwritten: facts.is_overwritten,
            cause: self.cause(),
            methods,
        }
    }
}

fn total(method: &str, base: Cost, files: Cost) -> Expected {
    let mut sum = base;
    sum += files;
    expected(method, sum)
}

fn expected(method: &str, cost: Cost) -> Expected {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Expected {
        method: method.to_owned(),
        hold_us: us(cost.hold),
        bytes: cost.bytes,
        wall_us: us(cost.wall),
        why_not: None,
    }
}

impl Prediction {
    /// What was expected, in a line.
    pub fn in_words(&self) -> String {
        let of = |expected: &Expected| {
            let hold = human(Duration::from_micros(expected.hold_us));
            let cannot = expected.why_not.as_ref().map_or("", |_| ", not possible");
            format!("{} {hold}{cannot}", expected.method)
        };
        let all: Vec<String> = self.methods.iter().map(of).collect();
        format!(
            "{}: {} (expected holds: {})",
            self.choice,
            self.why,
            all.join("; ")
        )
    }
}
