//! Which snapshots stay: prune, delete, pin, free space; ten thousand of them; and that
//! a removal that was interrupted is completed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use snapshim_tests::process::{Ended, run};
use snapshim_tests::retention::{Rules, Shot, model, use_zone};
use snapshim_tests::{Fs, Lab, Proc, Random, lab, process, rounds};

const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(60);
/// The zone of every test here, so that the model's and the product's are the same.
const ZONE: &str = "Europe/Berlin";

/// A lab with a small set of data.
fn furnished(name: &str, kind: Fs) -> Option<Lab> {
    use_zone(ZONE);
    let lab = Lab::new(name, kind, LIMIT)?;
    fs::write(lab.data().join("file"), "content\n").unwrap();
    fs::write(lab.data().join("other"), "more\n").unwrap();
    Some(lab)
}

fn snap(lab: &Lab, options: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["snap", "--name", lab.set(), "--json", "--store"]);
    command.arg(lab.store()).args(options).arg(lab.data());
    run(command, SOON)
}

/// A command over the store.
fn over(lab: &Lab, command: &str, args: &[&str]) -> Command {
    let mut line = lab.snapshim(&[command, lab.set(), "--store"]);
    line.arg(lab.store()).args(args);
    line
}

fn object(ended: Ended) -> Value {
    let ended = ended.ok("a command");
    serde_json::from_slice(&ended.stdout).unwrap()
}

fn id(of: &Value) -> String {
    of["id"].as_str().unwrap().to_owned()
}

/// The names in the set's directory: published snapshots, and what should not be there.
fn names(lab: &Lab) -> (Vec<String>, Vec<String>) {
    let dir = lab.store().join(lab.set());
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".lock" && name != "latest")
        .collect();
    names.sort();
    names.into_iter().partition(|name| !name.starts_with('.'))
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

fn utc(time: i64, format: &str) -> String {
    let tm = unsafe {
        // SAFETY: all-zero is a value; both point to live values.
        let mut tm: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&time, &mut tm);
        tm
    };
    let format = std::ffi::CString::new(format).unwrap();
    let mut text = [0_u8; 64];
    // SAFETY: writes at most so many bytes.
    let length =
        unsafe { libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), &tm) };
    String::from_utf8(text[..length].to_vec()).unwrap()
}

/// Makes snapshots of these classes and times out of a real one, which goes; returns
/// what the model has to know of them.
fn populate(lab: &Lab, mut shots: Vec<Shot>) -> Vec<Shot> {
    let real = object(snap(lab, &[]));
    let dir = lab.store().join(lab.set());
    let original = dir.join(id(&real));
    let manifest: Value =
        serde_json::from_slice(&fs::read(original.join("manifest.json")).unwrap()).unwrap();
    for (n, shot) in shots.iter_mut().enumerate() {
        shot.id = utc(shot.time, &format!("%Y%m%dT%H%M%S.{n:06}Z"));
        let mut manifest = manifest.clone();
        manifest["id"] = json!(shot.id);
        manifest["time"] = json!(utc(shot.time, "%Y-%m-%dT%H:%M:%SZ"));
        manifest["verified"] = json!(shot.class == 2);
        let reason = |code: &str| json!([{"code": code, "text": "made up"}]);
        manifest["reasons"] = match shot.class {
            2 => json!([]),
            1 => reason("foreign-writer"),
            _ => reason(["verify-command", "damaged-content"][n % 2]),
        };
        if shot.pinned {
            manifest["pin"] = json!({"note": "", "time": "2026-01-01T00:00:00Z"});
        }
        let to = dir.join(&shot.id);
        fs::create_dir(&to).unwrap();
        copy_dir(&original.join("tree"), &to.join("tree"));
        fs::write(
            to.join("manifest.json"),
            serde_json::to_vec_pretty(&manifest).unwrap(),
        )
        .unwrap();
    }
    fs::remove_dir_all(original).unwrap();
    let _ = fs::remove_file(dir.join("latest"));
    let newest_good = shots
        .iter()
        .filter(|shot| shot.class == 2)
        .max_by_key(|shot| &shot.id);
    if let Some(good) = newest_good {
        std::os::unix::fs::symlink(&good.id, dir.join("latest")).unwrap();
    }
    shots
}

/// Snapshots at random times before one in 2026, the oldest first.
fn random_shots(random: &mut Random, count: usize) -> Vec<Shot> {
    let mut time = 1_780_000_000;
    let mut shots: Vec<Shot> = (0..count)
        .map(|_| {
            time -= 1 + random.below(7200) as i64;
            Shot {
                id: String::new(),
                time,
                class: [2, 2, 2, 1, 0][random.below(5) as usize],
                pinned: random.below(200) == 0,
            }
        })
        .collect();
    shots.reverse();
    shots
}

fn latest(lab: &Lab) -> Option<String> {
    let link = fs::read_link(lab.store().join(lab.set()).join("latest")).ok()?;
    Some(link.to_str().unwrap().to_owned())
}

#[test]
fn ten_thousand_snapshots() {
    let _alone = lab::serial();
    let Some(lab) = furnished("many", Fs::Xfs) else {
        return;
    };
    const COUNT: usize = 10_000;
    let mut random = Random(4);
    let shots = populate(&lab, random_shots(&mut random, COUNT));

    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..5 {
        let ended = run(over(&lab, "list", &[]), SOON).ok("list");
        assert_eq!(ended.out().lines().count(), COUNT);
        times.push(ended.wall);
    }
    println!("list of {COUNT} snapshots: {times:.0?}");
    // One second on an idle machine; this one may be busy and slow.
    assert!(
        times.iter().min() < Some(&Duration::from_secs(4)),
        "{times:?}"
    );

    let rules = Rules {
        counts: vec![
            ("last", Some(20)),
            ("hourly", Some(48)),
            ("daily", Some(30)),
            ("weekly", Some(20)),
            ("monthly", None),
        ],
        within: Some([0, 0, 0, 3, 12, 0, 0]),
    };
    let latest = latest(&lab);
    let expected = model(&shots, latest.as_deref(), &rules);
    let kept: Vec<String> = shots
        .iter()
        .zip(&expected)
        .filter(|(_, why)| !why.is_empty())
        .map(|(shot, _)| shot.id.clone())
        .collect();
    let flags = rules.flags();
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    flags.push("--json");
    let check = |report: &Value| {
        let lines = report["snapshots"].as_array().unwrap();
        assert_eq!(lines.len(), COUNT);
        for ((line, shot), why) in lines.iter().zip(&shots).zip(&expected) {
            let said = line["why"].as_array().unwrap();
            let said: BTreeSet<&str> = said.iter().map(|w| w.as_str().unwrap()).collect();
            assert_eq!(line["id"], shot.id.as_str());
            assert_eq!(
                said,
                why.iter().map(String::as_str).collect(),
                "{}",
                shot.id
            );
            assert_eq!(line["keep"], !why.is_empty());
        }
    };
    let dry: Vec<&str> = [&flags[..], &["--dry-run"]].concat();
    let began = Instant::now();
    check(&object(run(over(&lab, "prune", &dry), SOON)));
    println!("prune --dry-run: {:.0?}", began.elapsed());
    assert_eq!(names(&lab).0.len(), COUNT, "a dry run removes nothing");

    let began = Instant::now();
    let report = object(run(over(&lab, "prune", &flags), LIMIT));
    println!(
        "prune: {} of {COUNT} removed in {:.1?}",
        COUNT - kept.len(),
        began.elapsed()
    );
    check(&report);
    assert_eq!(
        report["removed"].as_array().unwrap().len(),
        COUNT - kept.len()
    );
    assert_eq!(names(&lab), (kept, vec![]));
    // Once more: nothing is left to do.
    let report = object(run(over(&lab, "prune", &flags), SOON));
    assert_eq!(report["removed"], json!([]));
}

#[test]
fn a_prune_that_is_killed_is_completed_by_the_next() {
    let _alone = lab::serial();
    let Some(lab) = furnished("killed", Fs::Xfs) else {
        return;
    };
    for n in 0..60 {
        fs::write(lab.data().join(format!("file {n}")), "x").unwrap();
    }
    let mut random = Random(5);
    let (mut killed, mut midway) = (0, 0);
    for round in 0..rounds(60, 12) {
        let shots = populate(&lab, random_shots(&mut random, 60));
        let rules = Rules {
            counts: vec![("last", Some(3)), ("weekly", Some(1))],
            within: None,
        };
        let why = model(&shots, latest(&lab).as_deref(), &rules);
        let judged = shots.iter().zip(&why);
        let kept = judged.filter(|(_, why)| !why.is_empty());
        let kept: Vec<String> = kept.map(|(shot, _)| shot.id.clone()).collect();
        let flags = rules.flags();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut prune = Proc::piped(over(&lab, "prune", &flags));
        std::thread::sleep(Duration::from_micros(random.below(150_000)));
        let signal = [Signal::SIGKILL, Signal::SIGINT][round % 2];
        prune.signal(signal);
        killed += usize::from(prune.wait(SOON).code() != 0);
        let (there, left) = names(&lab);
        midway += usize::from(!left.is_empty());
        assert!(
            kept.iter().all(|id| there.contains(id)),
            "a kept one is gone"
        );
        let list = object(run(over(&lab, "list", &["--json"]), SOON));
        for line in list["snapshots"].as_array().unwrap() {
            assert!(line["damage"].is_null(), "{line}");
            let tree = PathBuf::from(line["path"].as_str().unwrap());
            let data = tree.join(lab.data().strip_prefix("/").unwrap());
            assert_eq!(
                fs::read_dir(data).unwrap().count(),
                62,
                "half removed, and listed"
            );
        }
        run(over(&lab, "prune", &flags), SOON).ok("the next prune");
        assert_eq!(names(&lab), (kept, vec![]));
        // A checkpoint does as well; and the store is empty for the next round.
        for id in names(&lab).0 {
            fs::remove_dir_all(lab.store().join(lab.set()).join(id)).unwrap();
        }
    }
    println!("killed {killed} prunes, {midway} of them midway: each completed by the next");
    assert!(midway > 0, "none was killed midway");
}

#[test]
fn a_checkpoint_completes_what_a_prune_left() {
    let Some(lab) = furnished("left", Fs::Ext4) else {
        return;
    };
    let first = object(snap(&lab, &[]));
    let dir = lab.store().join(lab.set());
    let second = object(snap(&lab, &[]));
    fs::rename(
        dir.join(id(&first)),
        dir.join(format!(".del-{}", id(&first))),
    )
    .unwrap();
    fs::create_dir_all(dir.join(".tmp-20200101T000000.000000Z/tree")).unwrap();
    fs::write(dir.join(".tmp-manifest.json"), "{").unwrap();
    let third = object(snap(&lab, &[]));
    assert_eq!(names(&lab), (vec![id(&second), id(&third)], vec![]));
}

#[test]
fn one_that_is_read_is_left() {
    let Some(lab) = furnished("busy", Fs::Xfs) else {
        return;
    };
    let made: Vec<String> = (0..4).map(|_| id(&object(snap(&lab, &[])))).collect();
    let dir = lab.store().join(lab.set());
    let open = fs::File::open(dir.join(&made[1])).unwrap();
    let reader = Flock::lock(open, FlockArg::LockSharedNonblock).unwrap();
    let ended = run(over(&lab, "prune", &["--keep-last", "1", "--json"]), SOON);
    let report = object(ended);
    assert_eq!(report["busy"], json!([made[1]]));
    assert_eq!(report["removed"], json!([made[0], made[2]]));
    assert_eq!(
        names(&lab),
        (vec![made[1].clone(), made[3].clone()], vec![])
    );
    let ended = run(over(&lab, "prune", &["--keep-last", "1"]), SOON).ok("prune");
    assert!(ended.err().contains("somebody reads it"), "{}", ended.err());
    let refused = run(over(&lab, "delete", &[&made[1]]), SOON);
    assert_eq!(refused.code(), 1);
    assert!(
        refused.err().contains("somebody reads"),
        "{}",
        refused.err()
    );
    // A checkpoint is not kept from its work by that.
    let next = snap(&lab, &["--keep-last", "1"]);
    assert!(next.err().contains(&made[1]), "{}", next.err());
    let next = object(next);
    assert_eq!(next["pruned"], json!([made[3]]));
    drop(reader);
    run(over(&lab, "prune", &["--keep-last", "1"]), SOON).ok("prune");
    assert_eq!(names(&lab), (vec![id(&next)], vec![]));
}

#[test]
fn pins_and_latest() {
    let Some(lab) = furnished("pins", Fs::Btrfs) else {
        return;
    };
    let first = object(snap(&lab, &["--pin=before the upgrade"]));
    assert_eq!(first["pin"]["note"], "before the upgrade");
    let first = id(&first);
    let second = object(snap(&lab, &["--pin"]));
    assert_eq!(second["pin"]["note"], "");
    let second = id(&second);
    let third = id(&object(snap(&lab, &["--keep-last", "1"])));
    let fourth = id(&object(snap(&lab, &["--keep-last", "1"])));
    assert_eq!(
        names(&lab).0,
        [first.clone(), second.clone(), fourth.clone()],
        "{third} is not pinned"
    );
    let listed = run(over(&lab, "list", &[]), SOON).ok("list").out();
    assert!(listed.contains("pinned: before the upgrade"), "{listed}");
    let shown = run(over(&lab, "show", &[&first]), SOON).ok("show").out();
    assert!(shown.contains("before the upgrade"), "{shown}");

    let refused = run(over(&lab, "delete", &[&first]), SOON);
    assert_eq!(refused.code(), 1);
    assert!(refused.err().contains("unpin"), "{}", refused.err());
    run(over(&lab, "unpin", &[&first]), SOON).ok("unpin");
    assert!(!run(over(&lab, "list", &[]), SOON).out().contains("upgrade"));
    run(over(&lab, "pin", &["latest", "--note", "läuft"]), SOON).ok("pin");
    let listed = object(run(over(&lab, "list", &["--json"]), SOON));
    assert_eq!(listed["snapshots"][2]["pin"]["note"], "läuft");
    run(over(&lab, "unpin", &["latest"]), SOON).ok("unpin");

    // `latest` goes back to the newest good one, and in the end away.
    assert_eq!(latest(&lab), Some(fourth.clone()));
    let report = object(run(over(&lab, "delete", &["latest", "--json"]), SOON));
    assert_eq!(report["removed"], json!([fourth]));
    assert_eq!(latest(&lab), Some(second.clone()));
    run(over(&lab, "delete", &[&first]), SOON).ok("delete");
    run(over(&lab, "unpin", &[&second]), SOON).ok("unpin");
    run(over(&lab, "delete", &[&second]), SOON).ok("delete");
    assert_eq!(latest(&lab), None);
    assert_eq!(names(&lab), (vec![], vec![]));
    let nothing = run(over(&lab, "prune", &[]), SOON);
    assert_eq!(nothing.code(), 2, "no policy: {}", nothing.err());
}

#[test]
fn what_cannot_be_read_stays() {
    let Some(lab) = furnished("unreadable", Fs::Tmpfs) else {
        return;
    };
    let made: Vec<String> = (0..4).map(|_| id(&object(snap(&lab, &[])))).collect();
    let manifest = |n: usize| {
        lab.store()
            .join(lab.set())
            .join(&made[n])
            .join("manifest.json")
    };
    fs::write(manifest(0), r#"{"version": 2, "pin": {"note": "x"}}"#).unwrap();
    fs::write(manifest(1), "{").unwrap();
    let ended = run(over(&lab, "prune", &["--keep-last", "1"]), SOON).ok("prune");
    for id in &made[..2] {
        let line = ended.out();
        let line = line.lines().find(|line| line.starts_with(id)).unwrap();
        assert!(line.contains("unreadable: manifest.json"), "{line}");
    }
    assert_eq!(
        names(&lab).0,
        [&made[0], &made[1], &made[3]].map(Clone::clone)
    );
    assert_eq!(
        run(over(&lab, "delete", &[&made[0]]), SOON).code(),
        1,
        "pinned"
    );
    run(over(&lab, "delete", &[&made[1]]), SOON).ok("delete of a damaged one");
}

/// A store on a file system of its own that is nearly full.
fn fill(lab: &Lab, kind: Fs, size: u64) {
    let Some(small) = kind.mount_small(&format!("full-{}", kind.name()), size) else {
        return;
    };
    const PART: u64 = 8 << 20;
    let data = small.path().join("data");
    let store = small.path().join("store");
    fs::create_dir(&data).unwrap();
    let file = fs::File::create(data.join("file")).unwrap();
    let mut random = Random(6);
    // New bytes each time, so that a clone shares nothing with the next.
    let mut rewrite = || {
        let bytes: Vec<u8> = (0..PART / 8)
            .flat_map(|_| random.number().to_le_bytes())
            .collect();
        file.write_all_at(&bytes, 0)
    };
    let snap = |options: &[&str]| {
        let mut command = lab.snapshim(&["snap", "--name", "full", "--json", "--store"]);
        command.arg(&store).args(options).arg(&data);
        run(command, SOON)
    };
    let free = || {
        let stat = nix::sys::statvfs::statvfs(small.path()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    };
    let ids = || -> Vec<String> {
        let names = fs::read_dir(store.join("full")).unwrap();
        let mut names: Vec<String> = names
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "latest" && name != ".lock")
            .collect();
        names.sort();
        names
    };

    // Without --min-free it is full in the end; that costs one snapshot and no other.
    rewrite().unwrap();
    let pinned = id(&object(snap(&["--pin=keep"])));
    let mut made = vec![pinned.clone()];
    loop {
        // Of a clone, new bytes need room of their own: there it is the program that is told.
        if let Err(cause) = rewrite() {
            assert!(kind.has_reflink(), "{cause}");
            break;
        }
        let ended = snap(&[]);
        if ended.code() != 0 {
            assert_eq!(ended.code(), 1, "{}", ended.err());
            assert!(ended.err().contains("full"), "{}", ended.err());
            break;
        }
        made.push(id(&object(ended)));
        assert!(made.len() < 200, "it does not fill");
    }
    assert_eq!(ids(), made, "aborted, and nothing else");

    // With it, the oldest go first, before the capture; and the room is there afterwards.
    let wanted = 3 * PART;
    let room = format!("{wanted}");
    for _ in 0..5 {
        if rewrite().is_err() {
            let mut prune = lab.snapshim(&["prune", "full", "--min-free", &room, "--store"]);
            prune.arg(&store);
            run(prune, SOON).ok("prune");
            rewrite().unwrap();
        }
        let ended = snap(&["--min-free", &room]);
        assert!(ended.err().contains("to make room"), "{}", ended.err());
        made.push(id(&object(ended)));
        assert!(free() >= wanted, "{} bytes are free", free());
        let there = ids();
        let expected: Vec<String> = [&pinned]
            .into_iter()
            .chain(&made[made.len() - (there.len() - 1)..])
            .cloned()
            .collect();
        assert_eq!(there, expected, "not the oldest ones");
    }
    let there = ids();
    println!(
        "{}: {} made, {} there, {} MiB free",
        kind.name(),
        made.len(),
        there.len(),
        free() >> 20
    );
    assert!(there.len() > 2, "far too much was removed");

    // Nothing that may go: an error with the figures, and all stays.
    for id in &there {
        let mut pin = lab.snapshim(&["pin", "full", id, "--store"]);
        pin.arg(&store);
        run(pin, SOON).ok("pin");
    }
    let refusal = snap(&["--min-free", "90%"]);
    assert_eq!(refusal.code(), 1);
    for part in ["bytes are free", "--min-free 90%", "unpin"] {
        assert!(refusal.err().contains(part), "{}", refusal.err());
    }
    assert_eq!(ids(), there);
    // Of what is not pinned, the newest good one stays.
    let newest = &there[there.len() - 1];
    for id in &there[1..] {
        let mut unpin = lab.snapshim(&["unpin", "full", id, "--store"]);
        unpin.arg(&store);
        run(unpin, SOON).ok("unpin");
    }
    let mut prune = lab.snapshim(&["prune", "full", "--min-free", "90%", "--store"]);
    prune.arg(&store);
    let refusal = run(prune, SOON);
    assert_eq!(refusal.code(), 1, "{}", refusal.err());
    assert_eq!(ids(), [pinned, newest.clone()]);
}

#[test]
fn room_is_made_on_a_full_file_system() {
    let Some(lab) = Lab::new("full", Fs::Tmpfs, LIMIT) else {
        return;
    };
    fill(&lab, Fs::Ext4, 96 << 20);
    fill(&lab, Fs::Xfs, 400 << 20);
}

#[test]
fn large_files_go_piece_by_piece_unless_somebody_has_them_open() {
    let Some(lab) = furnished("large", Fs::Xfs) else {
        return;
    };
    const SIZE: u64 = 600 << 20;
    let large = fs::File::create(lab.data().join("large")).unwrap();
    let part = vec![7_u8; 1 << 20];
    (0..SIZE >> 20).for_each(|n| large.write_all_at(&part, n << 20).unwrap());
    fs::hard_link(lab.data().join("large"), lab.data().join("linked")).unwrap();
    let made: Vec<Value> = (0..3)
        .map(|_| object(snap(&lab, &["--capture", "reflink"])))
        .collect();
    let copy = |n: usize| {
        let tree = PathBuf::from(made[n]["path"].as_str().unwrap());
        tree.join(lab.data().strip_prefix("/").unwrap())
            .join("large")
    };
    let pieces = |n: usize| {
        let mut command = lab.command("strace");
        command.args(["-f", "-qq", "-e", "trace=ftruncate"]);
        let mut traced = over(&lab, "delete", &[&id(&made[n])]);
        command.arg(traced.get_program()).args(traced.get_args());
        traced.env_clear();
        let ended = run(command, SOON).ok("delete under strace");
        ended.err().matches("ftruncate(").count()
    };
    assert_eq!(pieces(0), 2, "600 MiB in pieces of 256");
    // A reader goes on reading what he has open.
    let reader = fs::File::open(copy(1)).unwrap();
    assert_eq!(pieces(1), 0);
    assert_eq!(reader.metadata().unwrap().len(), SIZE);
    let mut end = [1_u8; 16];
    reader.read_exact_at(&mut end, SIZE - 16).unwrap();
    assert_eq!(end, [7; 16]);
    // Nor is what has a name elsewhere cut.
    let elsewhere = lab.beside("elsewhere");
    fs::hard_link(copy(2), &elsewhere).unwrap();
    assert_eq!(pieces(2), 0);
    assert_eq!(fs::metadata(&elsewhere).unwrap().len(), SIZE);
    assert_eq!(names(&lab), (vec![], vec![]));
}

#[test]
fn a_set_keeps_its_policy() {
    let Some(lab) = furnished("policy", Fs::Xfs) else {
        return;
    };
    let options = ["--every", "100ms", "--keep-last", "3", "--keep-daily", "2"];
    let mut program = lab.run(&options, Path::new("/bin/sleep"), &["60"]);
    let came = process::wait_until(SOON, || lab.stored().len() >= 3 && program.is_running());
    assert!(came, "no snapshots");
    // What the set was started with holds for a checkpoint by hand, unless that says otherwise.
    let mut pruned = 0;
    for _ in 0..6 {
        let outcome = lab.checkpoint(&[]);
        pruned += outcome.verified().0["pruned"].as_array().unwrap().len();
    }
    assert!(pruned > 0, "the policy of the set was not applied");
    // Besides what is on its way out.
    let published = |dir: &Path| !dir.file_name().unwrap().to_string_lossy().starts_with('.');
    let stored = lab.stored();
    let stored = stored.iter().filter(|(dir, _)| published(dir)).count();
    // The newest of the day is among the last three; one may be in the making.
    assert!(stored <= 5, "{stored}: more than the policy keeps");
    let mut prune = lab.snapshim(&["prune", lab.set(), "--json", "--dry-run"]);
    prune.arg("--quiet");
    let report = object(run(prune, SOON));
    assert_eq!(report["policy"], json!({"keep_last": 3, "keep_daily": 2}));
    // What was taken out goes while the program runs.
    assert!(
        process::wait_until(SOON, || names(&lab)
            .1
            .iter()
            .all(|name| !name.starts_with(".del-"))),
        "nothing clears what is on its way out"
    );
    assert!(program.is_running());
    program.signal(Signal::SIGTERM);
    program.wait(SOON);
    object(run(lab.snapshim(&["prune", lab.set(), "--json"]), SOON));
    assert_eq!(names(&lab).1, Vec::<String>::new());
}

#[test]
fn old_ones_go_after_the_report_and_at_idle_priority() {
    let Some(lab) = furnished("after", Fs::Xfs) else {
        return;
    };
    let first = id(&object(snap(&lab, &[])));
    let mut command = lab.command("strace");
    command
        .args(["-f", "-qq", "-s", "64", "-o"])
        .arg(lab.beside("trace"));
    command.args(["-e", "trace=write,ioprio_set,renameat,renameat2,unlinkat"]);
    let mut traced = lab.snapshim(&["snap", "--name", lab.set(), "--keep-last", "1", "--store"]);
    traced.arg(lab.store()).arg(lab.data());
    command.arg(traced.get_program()).args(traced.get_args());
    let second = run(command, SOON).ok("snap under strace").out();
    let second = second.split(' ').next().unwrap();
    let trace = fs::read_to_string(lab.beside("trace")).unwrap();
    let line = |parts: &[&str]| {
        let at = trace
            .lines()
            .position(|line| parts.iter().all(|part| line.contains(part)));
        at.unwrap_or_else(|| panic!("no {parts:?} in\n{trace}"))
    };
    let steps = [
        (
            "published",
            line(&["rename", &format!("\".tmp-{second}\""), second]),
        ),
        ("taken out", line(&["rename", &format!("\".del-{first}\"")])),
        ("reported", line(&["write(1,", second])),
        (
            "idle",
            line(&["ioprio_set(IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE"]),
        ),
        ("removed", line(&["unlinkat(", "\"manifest.json\""])),
    ];
    assert!(
        steps.is_sorted_by_key(|(_, line)| *line),
        "{steps:?}\n{trace}"
    );
    assert_eq!(names(&lab), (vec![second.to_owned()], vec![]));
}
