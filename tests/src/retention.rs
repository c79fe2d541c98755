//! An independent model of the retention policy: written from what the documentation says,
//! by brute force, with libc's calendar. It shares no code with the product.

use std::collections::BTreeSet;
use std::ffi::CString;

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Shot {
    /// Its id; the order of ids is that in which they were made.
    pub id: String,
    /// When it was cut, seconds since 1970.
    pub time: i64,
    /// 0 failed, 1 unverified, 2 good.
    pub class: u8,
    /// Whether it is pinned.
    pub pinned: bool,
}

/// How many a rule keeps; `None` for all.
pub type Most = Option<u32>;

/// What is to be kept.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The rules that count: name (`last`, `hourly`, …) and how many.
    pub counts: Vec<(&'static str, Most)>,
    /// Numbers of units (y, mo, w, d, h, min, s).
    pub within: Option<[i64; 7]>,
}

/// The names of the rules that count, and what a calendar calls their periods.
pub const RULES: [(&str, &str); 6] = [
    ("last", ""),
    ("hourly", "%Y-%m-%d %H"),
    ("daily", "%Y-%m-%d"),
    ("weekly", "%G-W%V"),
    ("monthly", "%Y-%m"),
    ("yearly", "%Y"),
];

impl Rules {
    /// The rules as flags of `snapshim prune`.
    pub fn flags(&self) -> Vec<String> {
        let mut flags: Vec<String> = self
            .counts
            .iter()
            .flat_map(|(name, most)| {
                let most = most.map_or("all".to_owned(), |n| n.to_string());
                [format!("--keep-{name}"), most]
            })
            .collect();
        if let Some(within) = self.within_text() {
            flags.extend(["--keep-within".to_owned(), within]);
        }
        flags
    }

    /// The span of `--keep-within`.
    pub fn within_text(&self) -> Option<String> {
        let units = ["y", "mo", "w", "d", "h", "min", "s"];
        let parts = self.within?;
        let parts = parts.iter().zip(units).filter(|(n, _)| **n > 0);
        Some(parts.map(|(n, unit)| format!("{n}{unit}")).collect())
    }
}

/// Makes `zone` the time zone of this process, which the model uses.
pub fn use_zone(zone: &str) {
    // SAFETY: std's own readers of the environment take turns with this; the only other reader
    // is the calendar of this module.
    unsafe { std::env::set_var("TZ", zone) };
    unsafe extern "C" {
        fn tzset();
    }
    // SAFETY: reads TZ, see above.
    unsafe { tzset() };
}

fn local(time: i64) -> libc::tm {
    // SAFETY: all-zero is a value of the structure, which the call fills.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both point to live values.
    let filled = unsafe { libc::localtime_r(&time, &mut tm) };
    assert!(!filled.is_null(), "a time out of range: {time}");
    tm
}

/// What the calendar calls the period of `time`.
fn period(time: i64, format: &str) -> String {
    let tm = local(time);
    let format = CString::new(format).expect("a format");
    let mut text = [0_u8; 64];
    // SAFETY: writes at most so many bytes, and a zero at the end.
    let length =
        unsafe { libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), &tm) };
    String::from_utf8(text[..length].to_vec()).expect("ASCII")
}

/// Seconds since 1970 of a local time as if it were UTC.
fn as_utc(tm: &libc::tm) -> i64 {
    let mut tm = *tm;
    // SAFETY: reads and normalises a live value.
    unsafe { libc::timegm(&mut tm) }
}

/// The moment `within` before `newest`.
fn span_before(newest: i64, within: [i64; 7]) -> i64 {
    let [years, months, weeks, days, hours, minutes, seconds] = within;
    let clock = hours * 3600 + minutes * 60 + seconds;
    if [years, months, weeks, days] == [0; 4] {
        return newest - clock;
    }
    let mut tm = local(newest);
    let month = i64::from(tm.tm_year) * 12 + i64::from(tm.tm_mon) - years * 12 - months;
    tm.tm_year = month.div_euclid(12) as i32;
    tm.tm_mon = month.rem_euclid(12) as i32;
    // A month has not as many days: its last one, that is, the latest that stays in it.
    let day = tm.tm_mday;
    tm.tm_mday = (28..=31)
        .rev()
        .find(|last| {
            let mut probe = tm;
            probe.tm_mday = *last;
            let back = as_utc(&probe);
            // SAFETY: all-zero is a value; both point to live values.
            let found = unsafe {
                let mut found: libc::tm = std::mem::zeroed();
                libc::gmtime_r(&back, &mut found);
                found
            };
            found.tm_mon == tm.tm_mon
        })
        .map_or(day, |last| day.min(last));
    let wall = as_utc(&tm) - (weeks * 7 + days) * 86400;
    // The moments whose wall clock shows that; in a gap, as if the clock had gone on.
    let offset = |time: i64| local(time).tm_gmtoff;
    let (before, after) = (offset(wall - 36 * 3600), offset(wall + 36 * 3600));
    let shows = |time: &i64| as_utc(&local(*time)) == wall;
    let moment = [wall - before, wall - after]
        .into_iter()
        .filter(shows)
        .min();
    moment.unwrap_or(wall - before) - clock
}

/// For each snapshot why it is kept: no reason, and it goes.
pub fn model(shots: &[Shot], latest: Option<&str>, rules: &Rules) -> Vec<BTreeSet<String>> {
    let no_rules = rules.counts.is_empty() && rules.within.is_none();
    let reasons = |shot: &Shot| {
        let mut why = BTreeSet::new();
        let mut because = |reason: &str, holds: bool| {
            if holds {
                why.insert(reason.to_owned());
            }
        };
        because("no rule", no_rules);
        because("pinned", shot.pinned);
        because("latest", latest == Some(&shot.id));
        because("newest", shots.iter().all(|other| other.id <= shot.id));
        let class: Vec<&Shot> = shots.iter().filter(|o| o.class == shot.class).collect();
        let is_oldest = class.iter().all(|other| other.id >= shot.id);
        for (name, most) in &rules.counts {
            let (_, format) = RULES.iter().find(|(n, _)| n == name).expect("a rule");
            let period = |s: &Shot| match format.is_empty() {
                true => s.id.clone(),
                false => period(s.time, format),
            };
            let newer = class.iter().filter(|other| other.id > shot.id);
            let periods: BTreeSet<String> = newer.map(|other| period(other)).collect();
            let has_room = most.is_none_or(|most| (periods.len() as u32) < most);
            let is_first = !periods.contains(&period(shot));
            because(name, has_room && is_first);
            because(
                &format!("oldest {name}"),
                has_room && !is_first && is_oldest,
            );
        }
        if let (Some(within), Some(text)) = (rules.within, rules.within_text()) {
            let newest = class.iter().max_by_key(|other| &other.id).expect("itself");
            let then = span_before(newest.time, within);
            because(&format!("within {text}"), shot.time > then);
        }
        why
    };
    shots.iter().map(reasons).collect()
}
