//! Which snapshots a policy keeps: a pure function of their times, in the words and with
//! the meaning of restic's `forget`.
//!
//! A snapshot is kept if any rule keeps it. A rule for hours, days, ISO weeks, months or
//! years keeps the newest snapshot of each of the last N of them *that have one*; while it
//! has some of its N left, the oldest snapshot counts as well. The calendar is that of a
//! time zone. The order is that of the ids, in which the snapshots were made; the calendar
//! looks at the time of the cut. So a clock that was set back neither makes new snapshots
//! look old, nor puts a month of them into one hour.
//!
//! Snapshots of different [`Class`] are judged apart, as if each class had a store of its own:
//! a worse one never pushes out a better one.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use serde::{Deserialize, Serialize};

use super::manifest::{Manifest, Reason};

/// Codes of reasons that say a check found the snapshot bad.
const FAILED_CHECKS: [&str; 2] = ["verify-command", "damaged-content"];

/// What is to be kept; no rule at all keeps everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The newest so many.
    #[serde(rename = "keep_last", default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Count>,
    /// One of each of so many hours.
    #[serde(
        rename = "keep_hourly",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub hourly: Option<Count>,
    /// One of each of so many days.
    #[serde(
        rename = "keep_daily",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub daily: Option<Count>,
    /// One of each of so many ISO weeks.
    #[serde(
        rename = "keep_weekly",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub weekly: Option<Count>,
    /// One of each of so many months.
    #[serde(
        rename = "keep_monthly",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub monthly: Option<Count>,
    /// One of each of so many years.
    #[serde(
        rename = "keep_yearly",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub yearly: Option<Count>,
    /// All that are younger than this, counted back from the newest.
    #[serde(
        rename = "keep_within",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub within: Option<Within>,
    /// What must be free on the store's file system. Not a rule: it removes, whatever the
    /// rules keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_free: Option<Room>,
}

impl Policy {
    /// Whether there is a rule, that is, whether anything may be removed for its age.
    pub fn has_rules(&self) -> bool {
        self.within.is_some() || self.counts().iter().any(|(_, _, count)| count.is_some())
    }

    /// These rules, or those of `usual` if there are none; likewise the room to be free.
    #[must_use]
    pub fn or(self, usual: &Policy) -> Policy {
        let min_free = self.min_free.or(usual.min_free);
        let rules = if self.has_rules() {
            self
        } else {
            usual.clone()
        };
        Policy { min_free, ..rules }
    }

    fn counts(&self) -> [(&'static str, Period, Option<Count>); 6] {
        [
            ("last", Period::Each, self.last),
            ("hourly", Period::Hour, self.hourly),
            ("daily", Period::Day, self.daily),
            ("weekly", Period::Week, self.weekly),
            ("monthly", Period::Month, self.monthly),
            ("yearly", Period::Year, self.yearly),
        ]
    }
}

/// As on a command line.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut flags = Vec::new();
        for (name, _, count) in self.counts() {
            flags.extend(count.map(|count| format!("--keep-{name} {count}")));
        }
        flags.extend(self.within.map(|within| format!("--keep-within {within}")));
        flags.extend(self.min_free.map(|room| format!("--min-free {room}")));
        f.write_str(&flags.join(" "))
    }
}

/// How many a rule keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "CountForm", into = "CountForm")]
pub enum Count {
    /// So many, at least one.
    Only(u32),
    /// However many there are.
    All,
}

/// A number, or a word.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum CountForm {
    Number(u32),
    Word(String),
}

impl TryFrom<CountForm> for Count {
    type Error = String;

    fn try_from(form: CountForm) -> Result<Count, String> {
        match form {
            CountForm::Number(number) => number.to_string().parse(),
            CountForm::Word(word) => word.parse(),
        }
    }
}

impl From<Count> for CountForm {
    fn from(count: Count) -> CountForm {
        match count {
            Count::Only(number) => CountForm::Number(number),
            Count::All => CountForm::Word("all".into()),
        }
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Count, String> {
        match text {
            // restic's word.
            "all" | "unlimited" => Ok(Count::All),
            _ => match text.parse() {
                Ok(0) => Err("it must be at least 1, or leave the flag out".into()),
                Ok(number) => Ok(Count::Only(number)),
                Err(_) => Err("say how many, or all".into()),
            },
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Count::Only(number) => number.fmt(f),
            Count::All => f.write_str("all"),
        }
    }
}

/// A time span of the calendar: a month is as long as that month was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Within {
    /// In the order of [`UNITS`].
    parts: [u16; UNITS.len()],
}

/// The units of [`Within`], the longest first.
const UNITS: [&str; 7] = ["y", "mo", "w", "d", "h", "min", "s"];

impl Within {
    /// The moment so long before `newest`. A day that the month has not (31 March less a
    /// month) is its last one.
    fn before(self, newest: Timestamp, zone: &TimeZone) -> Timestamp {
        let [years, months, weeks, days, hours, minutes, seconds] = self.parts;
        let span = Span::new()
            .years(years.min(19_000))
            .months(months)
            .weeks(weeks)
            .days(days)
            .hours(hours)
            .minutes(minutes)
            .seconds(seconds);
        let then = newest.to_zoned(zone.clone()).checked_sub(span);
        // Before all time: everything is younger.
        then.map_or(Timestamp::MIN, |then| then.timestamp())
    }
}

impl FromStr for Within {
    type Err = String;

    fn from_str(text: &str) -> Result<Within, String> {
        let wrong = || "say numbers and units (y, mo, w, d, h, min, s): 7d, 1y6mo".to_owned();
        let mut within = Within {
            parts: [0; UNITS.len()],
        };
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let (number, after) = rest.split_at(digits);
            let letters = after.find(|c: char| !c.is_ascii_alphabetic());
            let (unit, after) = after.split_at(letters.unwrap_or(after.len()));
            if unit == "m" {
                return Err("m may be minutes or months: say min or mo".into());
            }
            let at = UNITS.iter().position(|u| *u == unit).ok_or_else(wrong)?;
            let number: u16 = number.parse().map_err(|_| wrong())?;
            within.parts[at] = within.parts[at].checked_add(number).ok_or_else(wrong)?;
            rest = after;
        }
        match within.parts.iter().all(|part| *part == 0) {
            true => Err(wrong()),
            false => Ok(within),
        }
    }
}

impl TryFrom<String> for Within {
    type Error = String;

    fn try_from(text: String) -> Result<Within, String> {
        text.parse()
    }
}

impl From<Within> for String {
    fn from(within: Within) -> String {
        within.to_string()
    }
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts.iter().zip(UNITS).filter(|(part, _)| **part != 0);
        for (part, unit) in parts {
            write!(f, "{part}{unit}")?;
        }
        Ok(())
    }
}

/// What must be free of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Room {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of its size.
    Percent(u8),
}

impl Room {
    /// In bytes, on a file system of `size` bytes.
    pub fn of(self, size: u64) -> u64 {
        match self {
            Room::Bytes(bytes) => bytes,
            Room::Percent(percent) => {
                let part = u128::from(size) * u128::from(percent) / 100;
                u64::try_from(part).unwrap_or(u64::MAX)
            }
        }
    }
}

impl FromStr for Room {
    type Err = String;

    fn from_str(text: &str) -> Result<Room, String> {
        let wrong = || "say a size (500MiB, 10GiB) or a share of the disk (10%)".to_owned();
        let digits = text.find(|c: char| !c.is_ascii_digit());
        let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let shift = match unit {
            "%" if (1..=99).contains(&number) => return Ok(Room::Percent(number as u8)),
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(wrong()),
        };
        match number.checked_mul(1 << shift) {
            Some(0) | None => Err(wrong()),
            Some(bytes) => Ok(Room::Bytes(bytes)),
        }
    }
}

impl TryFrom<String> for Room {
    type Error = String;

    fn try_from(text: String) -> Result<Room, String> {
        text.parse()
    }
}

impl From<Room> for String {
    fn from(room: Room) -> String {
        room.to_string()
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match self {
            Room::Percent(percent) => write!(f, "{percent}%"),
            Room::Bytes(bytes) => {
                let whole = UNITS
                    .iter()
                    .find(|(shift, _)| bytes.trailing_zeros() >= *shift);
                match whole {
                    Some((shift, unit)) => write!(f, "{}{unit}", bytes >> shift),
                    None => bytes.fmt(f),
                }
            }
        }
    }
}

/// How good a snapshot is; the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A check found it bad.
    Failed,
    /// Of one file alone (`--only`): nothing to go back to, however well it was made.
    Partial,
    /// Nothing is known against it, but not all was proved.
    Unverified,
    /// Verified, and no check found it bad.
    Good,
}

impl Class {
    /// The class of a snapshot with this verdict; `is_partial`: of one file alone.
    pub fn of(verified: bool, reasons: &[Reason], is_partial: bool) -> Class {
        let is_failed = |reason: &Reason| FAILED_CHECKS.contains(&reason.code.as_str());
        match (reasons.iter().any(is_failed), verified) {
            (true, _) => Class::Failed,
            _ if is_partial => Class::Partial,
            (false, false) => Class::Unverified,
            (false, true) => Class::Good,
        }
    }
}

impl Manifest {
    /// How good the snapshot is.
    pub fn class(&self) -> Class {
        Class::of(self.verified, &self.reasons, self.only.is_some())
    }
}

/// A snapshot, as a policy sees it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its id; the order of ids is the order in which they were made.
    pub id: String,
    /// When it was cut.
    pub time: Timestamp,
    /// How good it is.
    pub class: Class,
    /// Whether somebody said that it stays.
    pub is_pinned: bool,
}

/// Why a snapshot is kept: `last`, `hourly`, `oldest daily`, `within 7d`, `pinned`, …
pub type Why = Cow<'static, str>;

/// Judges snapshots, in any order: for each of them, in the order given, why it is
/// kept; nothing if it is to be removed.
///
/// Whatever the rules say, pinned ones stay, the one `latest` points to, and the newest.
pub fn judge(
    history: &[Candidate],
    latest: Option<&str>,
    policy: &Policy,
    zone: &TimeZone,
) -> Vec<Vec<Why>> {
    let mut kept: Vec<Vec<Why>> = vec![Vec::new(); history.len()];
    let mut newest_first: Vec<usize> = (0..history.len()).collect();
    newest_first.sort_unstable_by(|a, b| history[*b].id.cmp(&history[*a].id));
    for class in [
        Class::Failed,
        Class::Partial,
        Class::Unverified,
        Class::Good,
    ] {
        let of_class = newest_first.iter().copied();
        let of_class: Vec<usize> = of_class.filter(|i| history[*i].class == class).collect();
        apply(&of_class, history, policy, zone, &mut kept);
    }
    for (why, candidate) in kept.iter_mut().zip(history) {
        if !policy.has_rules() {
            why.push("no rule".into());
        }
        if candidate.is_pinned {
            why.push("pinned".into());
        }
        if latest == Some(&candidate.id) {
            why.push("latest".into());
        }
    }
    if let Some(newest) = newest_first.first() {
        kept[*newest].push("newest".into());
    }
    kept
}

/// Notes which of those in `order`, the newest first, the rules keep.
fn apply(
    order: &[usize],
    history: &[Candidate],
    policy: &Policy,
    zone: &TimeZone,
    kept: &mut [Vec<Why>],
) {
    let (Some(newest), Some(oldest)) = (order.first(), order.last()) else {
        return;
    };
    let time = |i: usize| history[i].time;
    for (name, period, count) in policy.counts() {
        let mut left = match count {
            None => continue,
            Some(Count::All) => u32::MAX,
            Some(Count::Only(count)) => count,
        };
        let mut seen = HashSet::new();
        for (nth, i) in order.iter().enumerate() {
            if left == 0 {
                break;
            }
            if seen.insert(period.of(nth, time(*i), zone)) {
                kept[*i].push(name.into());
            } else if i == oldest {
                kept[*i].push(format!("oldest {name}").into());
            } else {
                continue;
            }
            left -= 1;
        }
    }
    if let Some(within) = policy.within {
        let then = within.before(time(*newest), zone);
        for i in order.iter().filter(|i| time(**i) > then) {
            kept[*i].push(format!("within {within}").into());
        }
    }
}

/// What a rule keeps one of.
#[derive(Clone, Copy)]
enum Period {
    Each,
    Hour,
    Day,
    Week,
    Month,
    Year,
}

impl Period {
    /// Which of its kind `time` is in; of [`Period::Each`], the snapshot's own number.
    fn of(self, nth: usize, time: Timestamp, zone: &TimeZone) -> (usize, i16, i8, i8, i8) {
        let civil = zone.to_datetime(time);
        let (year, month, day) = (civil.year(), civil.month(), civil.day());
        match self {
            Period::Each => (nth, 0, 0, 0, 0),
            Period::Hour => (0, year, month, day, civil.hour()),
            Period::Day => (0, year, month, day, 0),
            Period::Week => {
                let week = civil.date().iso_week_date();
                (0, week.year(), week.week(), 0, 0)
            }
            Period::Month => (0, year, month, 0, 0),
            Period::Year => (0, year, 0, 0, 0),
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
