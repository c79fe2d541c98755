//! The retention policy against an independent model of it, over random histories; and
//! that the comparison finds a policy that is wrong.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use snapshim_coordinator::store::policy::{Candidate, Class, Count, Policy, judge};
use snapshim_tests::retention::{RULES, Rules, Shot, model, use_zone};
use snapshim_tests::{Random, rounds};

/// Summer time by an hour and by half of one, at midnight, a minute after it, twice a year, never, and a
/// day that was left out.
const ZONES: [&str; 10] = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "America/Havana",
    "America/St_Johns",
    "Africa/Casablanca",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "Pacific/Chatham",
];

/// One thing to judge.
#[derive(Clone, Debug)]
struct Case {
    shots: Vec<Shot>,
    latest: Option<String>,
    rules: Rules,
    zone: &'static str,
}

fn case(random: &mut Random, zone: &'static str) -> Case {
    let is_in = |random: &mut Random, n| random.below(n) == 0;
    let count = match random.below(10) {
        0 => random.below(3),
        1 => 60 + random.below(60),
        _ => 3 + random.below(30),
    };
    // From 2005 to 2030.
    let mut time = 1_104_537_600 + random.below(25 * 365 * 86400) as i64;
    let scale = [60, 3600, 86400, 7 * 86400, 40 * 86400][random.below(5) as usize];
    let mut shots = Vec::new();
    for n in 0..count {
        time += match random.below(12) {
            0 => 0,
            1 => -(random.below(3 * scale) as i64),
            2 => random.below(60) as i64,
            3 => random.below(10 * scale) as i64,
            _ => random.below(2 * scale) as i64,
        };
        shots.push(Shot {
            id: format!("{n:05}"),
            time,
            class: [2, 2, 2, 1, 0][random.below(5) as usize],
            pinned: is_in(random, 12),
        });
    }
    let good = shots.iter().rev().find(|shot| shot.class == 2);
    let latest = match random.below(4) {
        0 => shots.first().map(|shot| shot.id.clone()),
        1 => None,
        _ => good.map(|shot| shot.id.clone()),
    };
    let mut rules = Rules::default();
    for (name, _) in RULES {
        if is_in(random, 3) {
            let most = (!is_in(random, 6)).then(|| 1 + random.below(8) as u32);
            rules.counts.push((name, most));
        }
    }
    if is_in(random, 3) {
        let mut within = [0; 7];
        let most = [3, 14, 5, 40, 50, 100, 100];
        for _ in 0..1 + random.below(2) {
            let unit = random.below(7) as usize;
            within[unit] = 1 + random.below(most[unit]) as i64;
        }
        // So that some snapshot is exactly that old.
        if is_in(random, 3) && shots.len() > 1 {
            let age = shots[shots.len() - 1].time - shots[0].time;
            if (1..60_000).contains(&age) {
                within = [0, 0, 0, 0, 0, 0, age];
            }
        }
        rules.within = Some(within);
    }
    // The function takes them in any order.
    if is_in(random, 2) {
        for i in (1..shots.len()).rev() {
            shots.swap(i, random.below(i as u64 + 1) as usize);
        }
    }
    Case {
        shots,
        latest,
        rules,
        zone,
    }
}

fn policy(rules: &Rules) -> Policy {
    let count = |name: &str| {
        let (_, most) = rules.counts.iter().find(|(n, _)| *n == name)?;
        Some(most.map_or(Count::All, Count::Only))
    };
    Policy {
        last: count("last"),
        hourly: count("hourly"),
        daily: count("daily"),
        weekly: count("weekly"),
        monthly: count("monthly"),
        yearly: count("yearly"),
        within: rules
            .within_text()
            .map(|text| text.parse().expect("a span")),
        min_free: None,
    }
}

/// What the product says.
fn product(case: &Case) -> Vec<BTreeSet<String>> {
    let candidates: Vec<Candidate> = case
        .shots
        .iter()
        .map(|shot| Candidate {
            id: shot.id.clone(),
            time: Timestamp::from_second(shot.time).expect("a time"),
            class: [Class::Failed, Class::Unverified, Class::Good][usize::from(shot.class)],
            is_pinned: shot.pinned,
        })
        .collect();
    let zone = TimeZone::get(case.zone).expect("a time zone: apt-get install tzdata");
    let latest = case.latest.as_deref();
    let why = judge(&candidates, latest, &policy(&case.rules), &zone);
    why.into_iter()
        .map(|why| {
            let reasons: BTreeSet<String> = why.iter().map(|w| w.to_string()).collect();
            assert_eq!(reasons.len(), why.len(), "a reason twice: {why:?}");
            reasons
        })
        .collect()
}

/// A policy that is wrong in one way: what it makes of a case before it judges it.
type Mutant = fn(&mut Case);

const MUTANTS: [(&str, Mutant); 10] = [
    ("one history for all classes", |case| {
        case.shots.iter_mut().for_each(|shot| shot.class = 2);
    }),
    ("failed is unverified", |case| {
        case.shots
            .iter_mut()
            .for_each(|shot| shot.class = shot.class.max(1));
    }),
    ("pins do not matter", |case| {
        case.shots.iter_mut().for_each(|shot| shot.pinned = false);
    }),
    ("latest does not matter", |case| case.latest = None),
    ("the calendar of UTC", |case| case.zone = "UTC"),
    ("one too many", |case| {
        for (_, most) in &mut case.rules.counts {
            *most = most.map(|most| most + 1);
        }
    }),
    ("all is twelve", |case| {
        for (_, most) in &mut case.rules.counts {
            *most = most.or(Some(12));
        }
    }),
    ("order by the clock", |case| {
        let mut by_time: Vec<usize> = (0..case.shots.len()).collect();
        by_time.sort_by_key(|i| (case.shots[*i].time, case.shots[*i].id.clone()));
        let latest = case.latest.clone();
        for (rank, i) in by_time.into_iter().enumerate() {
            if latest.as_ref() == Some(&case.shots[i].id) {
                case.latest = Some(format!("{rank:05}"));
            }
            case.shots[i].id = format!("{rank:05}");
        }
    }),
    ("within takes in its end", |case| {
        if let Some(within) = &mut case.rules.within {
            within[6] += 1;
        }
    }),
    ("an hour of summer time ignored", |case| {
        case.shots.iter_mut().for_each(|shot| shot.time += 3600);
    }),
];

#[test]
fn the_policy_is_that_of_the_model() {
    let mut random = Random(2026);
    let mut caught: BTreeMap<&str, u32> = BTreeMap::new();
    let (mut histories, mut snapshots, mut removed) = (0, 0, 0);
    let per_zone = rounds(20_000, 1_000);
    for zone in ZONES {
        use_zone(zone);
        for _ in 0..per_zone {
            let case = case(&mut random, zone);
            let expected = model(&case.shots, case.latest.as_deref(), &case.rules);
            assert_eq!(product(&case), expected, "{case:#?}");
            histories += 1;
            snapshots += expected.len();
            removed += expected.iter().filter(|why| why.is_empty()).count();
            let kept = |why: &[BTreeSet<String>]| -> Vec<bool> {
                why.iter().map(|why| !why.is_empty()).collect()
            };
            for (name, mutate) in MUTANTS {
                let mut wrong = case.clone();
                mutate(&mut wrong);
                if kept(&product(&wrong)) != kept(&expected) {
                    *caught.entry(name).or_default() += 1;
                }
            }
        }
    }
    println!("{histories} histories, {snapshots} snapshots, {removed} removed: as the model");
    for (name, _) in MUTANTS {
        let times = caught.get(name).copied().unwrap_or(0);
        println!("wrong on purpose: {name}: differs in {times}");
        assert!(times > 0, "the histories do not tell apart: {name}");
    }
    assert!(
        removed > snapshots / 10,
        "hardly anything was to be removed"
    );
}
