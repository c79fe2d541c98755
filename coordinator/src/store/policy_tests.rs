use super::*;

#[test]
fn counts_spans_and_rooms_as_text() {
    for (text, count) in [("7", Count::Only(7)), ("all", Count::All)] {
        assert_eq!(text.parse(), Ok(count));
        assert_eq!(count.to_string(), text);
    }
    assert_eq!("unlimited".parse(), Ok(Count::All));
    for text in ["0", "-1", "", "many", "1.5", "4294967296"] {
        assert!(text.parse::<Count>().is_err(), "{text}");
    }
    for text in ["7d", "1y6mo", "2w3h", "90s", "15min"] {
        assert_eq!(text.parse::<Within>().unwrap().to_string(), text);
    }
    assert_eq!("1d1y1d".parse::<Within>().unwrap().to_string(), "1y2d");
    let ambiguous = "3m".parse::<Within>().unwrap_err();
    assert!(ambiguous.contains("min or mo"), "{ambiguous}");
    for text in [
        "", "d", "7", "7 d", "-7d", "1.5d", "0d", "99999d", "7D", "1é",
    ] {
        assert!(text.parse::<Within>().is_err(), "{text}");
    }
    for (text, room, shown) in [
        ("10%", Room::Percent(10), "10%"),
        ("5GiB", Room::Bytes(5 << 30), "5GiB"),
        ("5G", Room::Bytes(5 << 30), "5GiB"),
        ("1000", Room::Bytes(1000), "1000"),
        ("2048K", Room::Bytes(2 << 20), "2MiB"),
    ] {
        assert_eq!(text.parse(), Ok(room));
        assert_eq!(room.to_string(), shown);
    }
    for text in [
        "",
        "%",
        "0%",
        "100%",
        "5GB",
        "5g",
        "-5G",
        "0",
        "99999999T",
        "1.5G",
    ] {
        assert!(text.parse::<Room>().is_err(), "{text}");
    }
    assert_eq!(Room::Percent(10).of(u64::MAX), u64::MAX / 10);
}

#[test]
fn policies_in_files() {
    let old: Policy = serde_json::from_str(r#"{"keep_last": 3}"#).unwrap();
    assert_eq!(old.last, Some(Count::Only(3)));
    let text = r#"{"keep_daily":"all","keep_within":"1y6mo","min_free":"10%"}"#;
    let policy: Policy = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&policy).unwrap(), text);
    let shown = "--keep-daily all --keep-within 1y6mo --min-free 10%";
    assert_eq!(policy.to_string(), shown);
    for bad in [
        r#"{"keep_last": 0}"#,
        r#"{"keep_last": -1}"#,
        r#"{"keep_within": "1m"}"#,
        r#"{"min_free": "0"}"#,
    ] {
        assert!(serde_json::from_str::<Policy>(bad).is_err(), "{bad}");
    }
    // Rules replace rules; the room is a matter of its own.
    let asked = Policy {
        last: Some(Count::Only(1)),
        ..Policy::default()
    };
    let both = asked.clone().or(&policy);
    assert_eq!(both.to_string(), "--keep-last 1 --min-free 10%");
    assert_eq!(Policy::default().or(&policy), policy);
    assert!(!Policy::default().has_rules());
}

/// Snapshots at these times, in the order they were made.
fn history(times: &[&str]) -> Vec<Candidate> {
    let made = |(i, time): (usize, &&str)| Candidate {
        id: format!("{i:04}"),
        time: time.parse().unwrap(),
        class: Class::Good,
        is_pinned: false,
    };
    times.iter().enumerate().map(made).collect()
}

fn policy(flags: &str) -> Policy {
    let mut policy = Policy::default();
    let words: Vec<&str> = flags.split_whitespace().collect();
    for pair in words.chunks(2) {
        let count = || Some(pair[1].parse().unwrap());
        match pair[0] {
            "last" => policy.last = count(),
            "hourly" => policy.hourly = count(),
            "daily" => policy.daily = count(),
            "weekly" => policy.weekly = count(),
            "monthly" => policy.monthly = count(),
            "yearly" => policy.yearly = count(),
            "within" => policy.within = Some(pair[1].parse().unwrap()),
            other => panic!("{other}"),
        }
    }
    policy
}

fn kept(history: &[Candidate], flags: &str, zone: &str) -> Vec<String> {
    let zone = TimeZone::get(zone).unwrap();
    let why = judge(history, None, &policy(flags), &zone);
    why.iter().map(|why| why.join(", ")).collect()
}

#[test]
fn each_rule() {
    let days = history(&[
        "2026-01-01T10:00:00Z",
        "2026-01-01T11:00:00Z",
        "2026-01-02T10:00:00Z",
        "2026-01-04T10:00:00Z",
        "2026-01-04T10:30:00Z",
    ]);
    assert_eq!(
        kept(&days, "last 2", "UTC"),
        ["", "", "", "last", "last, newest"]
    );
    assert_eq!(
        kept(&days, "hourly 2", "UTC"),
        ["", "", "hourly", "", "hourly, newest"]
    );
    assert_eq!(
        kept(&days, "daily 2", "UTC"),
        ["", "", "daily", "", "daily, newest"]
    );
    assert_eq!(
        kept(&days, "daily 4", "UTC"),
        ["oldest daily", "daily", "daily", "", "daily, newest"],
        "the oldest, while there is room"
    );
    assert_eq!(
        kept(&days, "monthly all", "UTC"),
        ["oldest monthly", "", "", "", "monthly, newest"]
    );
    assert_eq!(
        kept(&days, "within 2d", "UTC"),
        ["", "", "", "within 2d", "within 2d, newest"]
    );
    assert_eq!(
        kept(&days, "within 2d30min", "UTC"),
        ["", "", "", "within 2d30min", "within 2d30min, newest"],
        "what is as old as that is not within"
    );
    assert!(
        kept(&days, "", "UTC")
            .iter()
            .all(|why| why.contains("no rule"))
    );
}

#[test]
fn the_calendar_is_that_of_the_zone() {
    let night = history(&["2026-01-01T22:30:00Z", "2026-01-01T23:30:00Z"]);
    let in_paris = ["oldest daily", "daily, newest"];
    assert_eq!(kept(&night, "daily 1", "UTC")[0], "");
    assert_eq!(kept(&night, "daily 2", "UTC")[0], in_paris[0]);
    assert_eq!(kept(&night, "daily 2", "Europe/Paris")[0], "daily");
    // 02:30 comes twice when the clocks go back: it is one hour of the day.
    let twice = history(&[
        "2026-10-25T00:15:00Z",
        "2026-10-25T00:30:00Z",
        "2026-10-25T01:30:00Z",
    ]);
    assert_eq!(
        kept(&twice, "hourly 1", "Europe/Paris"),
        ["", "", "hourly, newest"]
    );
    assert_eq!(
        kept(&twice, "hourly 2", "UTC"),
        ["", "hourly", "hourly, newest"]
    );
    // The week of the new year is one.
    let weeks = history(&["2026-12-30T12:00:00Z", "2027-01-01T12:00:00Z"]);
    assert_eq!(kept(&weeks, "weekly 1", "UTC")[0], "");
}

#[test]
fn a_clock_that_was_set_back() {
    let back = history(&[
        "2026-03-01T10:00:00Z",
        "2099-01-01T00:00:00Z",
        "2026-03-02T10:00:00Z",
        "2026-03-03T10:00:00Z",
    ]);
    assert_eq!(
        kept(&back, "last 2", "UTC"),
        ["", "", "last", "last, newest"]
    );
    assert_eq!(
        kept(&back, "within 2d", "UTC"),
        ["", "within 2d", "within 2d", "within 2d, newest"]
    );
}

#[test]
fn a_worse_one_pushes_no_better_one_out() {
    let mut mixed = history(&["2026-01-01T10:00:00Z"; 6]);
    mixed[2].class = Class::Failed;
    mixed[3].class = Class::Unverified;
    mixed[4].class = Class::Failed;
    mixed[5].class = Class::Unverified;
    mixed[0].is_pinned = true;
    let rules = policy("last 1");
    let why = judge(&mixed, Some("0001"), &rules, &TimeZone::UTC);
    let why: Vec<String> = why.iter().map(|why| why.join(", ")).collect();
    assert_eq!(
        why,
        ["pinned", "last, latest", "", "", "last", "last, newest"]
    );
}

#[test]
fn classes() {
    let reason = |code: &str| Reason {
        code: code.to_owned(),
        text: String::new(),
        pid: None,
    };
    assert_eq!(Class::of(true, &[], false), Class::Good);
    assert_eq!(Class::of(true, &[], true), Class::Partial);
    assert_eq!(Class::of(false, &[reason("aio")], false), Class::Unverified);
    for code in FAILED_CHECKS {
        assert_eq!(
            Class::of(false, &[reason("aio"), reason(code)], false),
            Class::Failed
        );
        assert_eq!(Class::of(true, &[reason(code)], true), Class::Failed);
    }
}
