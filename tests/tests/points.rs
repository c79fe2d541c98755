//! Commit points: no snapshot in the middle of what the program does as a unit, or the
//! certificate says that the point was not reached.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshim_tests::{Fs, Lab, Proc, lab, process, product, rounds};

const LIMIT: Duration = Duration::from_secs(1800);
/// Files, and numbers in each, of a unit.
const FILES: &str = "3";
const PIECES: &str = "4";

/// Whether all numbers in all files are the same, and nothing waits to be put in
/// place: a whole unit.
fn is_whole(dir: &Path) -> bool {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("new") {
            return false;
        }
        if entry.file_name().to_string_lossy().starts_with('f') {
            let bytes = fs::read(entry.path()).unwrap();
            numbers.extend(bytes.chunks(8).map(<[u8]>::to_vec));
        }
    }
    numbers.windows(2).all(|pair| pair[0] == pair[1])
}

/// Programs at work on their units.
fn start(lab: &Lab, mode: &str, files: &str, pause: &str, programs: usize) -> Vec<Proc> {
    let program = product::program("units");
    let dir = lab.data();
    let args = [mode, dir.to_str().unwrap(), files, PIECES, pause];
    let programs = (0..programs)
        .map(|_| lab.run(&[], &program, &args))
        .collect();
    let begun = process::wait_until(Duration::from_secs(20), || {
        dir.join("f0").metadata().is_ok_and(|m| m.len() >= 32)
    });
    assert!(begun, "{mode}: the program writes nothing");
    programs
}

/// Snapshots at a point: how many were taken, were torn, and did not reach it.
struct Count {
    taken: usize,
    torn: usize,
    missed: usize,
}

fn count(lab: &Lab, at: &[&str], rounds: usize) -> Count {
    let mut count = Count {
        taken: 0,
        torn: 0,
        missed: 0,
    };
    let mut args = vec!["--keep-last", "1"];
    args.extend(at);
    for _ in 0..rounds {
        let outcome = lab.checkpoint(&args);
        if outcome.code == 3 {
            count.missed += 1;
            continue;
        }
        let certificate = outcome.certificate();
        if at.first() == Some(&"--at") && certificate.0["commit_point"] != at[1] {
            count.missed += 1;
            continue;
        }
        count.taken += 1;
        count.torn += usize::from(!is_whole(&certificate.copy_of(&lab.data())));
    }
    count
}

/// What stopping the program and cloning or copying its files gives: torn copies.
fn stopped(lab: &Lab, program: Pid, rounds: usize) -> usize {
    let copy = lab.data().parent().unwrap().join("stopped");
    let torn = |_: &usize| {
        std::thread::sleep(Duration::from_micros(1_700));
        kill(program, Signal::SIGSTOP).unwrap();
        let _ = fs::remove_dir_all(&copy);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(lab.data()).unwrap().flatten() {
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        kill(program, Signal::SIGCONT).unwrap();
        !is_whole(&copy)
    };
    (0..rounds).filter(torn).count()
}

/// The program itself, below `snapshim run`.
fn child(of: &Proc) -> Pid {
    let pid = of.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    Pid::from_raw(children.split_whitespace().next().unwrap().parse().unwrap())
}

/// No snapshot at `point` is in the middle of a unit; some at `write` and some of a stopped
/// program are.
fn units(mode: &str, point: &str, fs: Fs, files: &str) {
    let lab = Lab::new(&format!("points-{mode}"), fs, LIMIT).unwrap();
    let programs = start(&lab, mode, files, "150", 1);
    let rounds = rounds(1000, 60);
    let found = count(&lab, &["--at", point], rounds);
    let control = count(&lab, &["--at", "write"], rounds.min(100));
    let stopped = stopped(&lab, child(&programs[0]), rounds.min(100));
    println!(
        "{mode} at {point} on {fs:?}: {} torn of {} ({} not reached); at write {} of {}; \
         SIGSTOP and copy {stopped} of {}",
        found.torn,
        found.taken,
        found.missed,
        control.torn,
        control.taken,
        rounds.min(100)
    );
    assert_eq!(found.torn, 0);
    assert!(found.taken >= rounds * 9 / 10, "hardly ever reached");
    assert!(control.torn > 0 && stopped > 0, "the controls show nothing");
    for mut program in programs {
        program.end();
    }
}

#[test]
fn sync_is_between_units() {
    let _serial = lab::serial();
    units("sync", "sync", Fs::Xfs, FILES);
}

#[test]
fn lock_is_between_units() {
    let _serial = lab::serial();
    units("lock", "lock", Fs::Ext4, FILES);
    units("flock", "lock", Fs::Tmpfs, FILES);
}

/// A mapping that is gone when the point is reached is no reason to stop the program, nor to be
/// content with `write`; stores into one that came and went since are changes.
#[test]
fn lock_is_between_units_of_stores() {
    let _serial = lab::serial();
    units("map", "lock", Fs::Xfs, FILES);
}

/// Inode numbers are small: a file of another file system has the number of a member. A program
/// that maps that one, and unmaps it while it is looked at, is nobody's business.
#[test]
fn a_mapping_elsewhere_with_the_same_inode_number() {
    use std::os::unix::fs::MetadataExt;
    let _serial = lab::serial();
    let lab = Lab::new("points-inode", Fs::Tmpfs, LIMIT).unwrap();
    let programs = start(&lab, "lock", FILES, "150", 1);
    let number = fs::metadata(lab.data().join("f0")).unwrap().ino();
    let small = Fs::Tmpfs.mount_small("inode", 64 << 20).unwrap();
    let dir = small.path().join("elsewhere");
    fs::create_dir(&dir).unwrap();
    let named = (0..20_000).any(|nth| {
        let path = small.path().join(format!("n{nth}"));
        let ino = fs::File::create(&path).unwrap().metadata().unwrap().ino();
        ino == number && fs::hard_link(&path, dir.join("f0")).is_ok()
    });
    assert!(named, "no file with the inode number {number}");
    let args = ["map", dir.to_str().unwrap(), "1", PIECES, "20"];
    let mut other = lab.command(product::program("units"));
    other.args(args);
    let mut other = Proc::piped(other);
    let rounds = rounds(100, 20);
    let mut disturbed = 0;
    for _ in 0..rounds {
        let at = ["--at", "lock", "--else", "write", "--max-hold", "10s"];
        let outcome = lab.checkpoint(&at);
        let certificate = outcome.certificate();
        disturbed += usize::from(certificate.blames(other.pid()));
    }
    println!("{disturbed} of {rounds} took a file elsewhere for a member");
    // Where it cannot be told which file it was, it is taken for a member: rather one warning
    // too many.
    assert!(disturbed <= rounds / 5, "{disturbed} of {rounds}");
    other.end();
    for mut program in programs {
        program.end();
    }
}

#[test]
fn close_rename_and_unit_are_between_units() {
    let _serial = lab::serial();
    units("close", "close", Fs::Btrfs, FILES);
    units("rename", "rename", Fs::Xfs, "1");
    units("unit", "unit", Fs::Ext4, FILES);
}

/// What a command prints with `--json`.
fn json(lab: &Lab, args: &[&str]) -> serde_json::Value {
    let ended = process::run(lab.snapshim(args), Duration::from_secs(60));
    serde_json::from_str(&ended.out()).unwrap_or_else(|e| panic!("{e}: {}", ended.err()))
}

/// What `status` and `doctor` say that `auto` would take is what it takes, and they say why.
#[test]
fn what_is_observed_is_shown() {
    let _serial = lab::serial();
    for (mode, point, counter) in [
        ("lock", "lock", "locked_changes"),
        ("sync", "sync", "syncs"),
        ("rename", "rename", "renames"),
        ("close", "close", "closes"),
        ("unit", "unit", "units"),
    ] {
        let lab = Lab::new(&format!("points-shown-{mode}"), Fs::Xfs, LIMIT).unwrap();
        let files = if mode == "rename" { "1" } else { FILES };
        let programs = start(&lab, mode, files, "150", 1);
        let status = || json(&lab, &["status", lab.set(), "--json"])["points"].clone();
        if mode != "unit" {
            // Nothing was waited for, so nothing is known.
            let before = status();
            assert_eq!(before["offered"], serde_json::json!([]), "{mode}");
            assert_eq!(before["auto"]["point"], "idle:100ms", "{mode}");
        }
        assert!(status()["auto"]["last"].is_null());
        let outcome = lab.checkpoint(&["--at", "auto"]);
        let taken = outcome.certificate().clone();
        assert_eq!(taken.0["commit_point"], point, "{mode}");
        let after = status();
        assert_eq!(after["auto"]["point"], point, "{mode}: {after}");
        assert_eq!(after["offered"][0], point, "{mode}: {after}");
        assert_eq!(after["auto"]["claim"], taken.0["claim"], "{mode}");
        assert_eq!(after["auto"]["last"]["point"], point, "{mode}");
        assert_eq!(after["auto"]["last"]["id"], taken.id(), "{mode}");
        let counted = &after["observed"][counter];
        assert!(
            *counted == true || counted.as_u64() > Some(0),
            "{mode}: {after}"
        );
        for text in ["why", "limits"] {
            assert!(!after["auto"][text].as_str().unwrap().is_empty(), "{mode}");
        }
        let pid = child(&programs[0]).to_string();
        let doctor = json(&lab, &["doctor", &pid, "--json"]);
        assert_eq!(
            doctor["subjects"][0]["points"]["auto"]["point"], point,
            "{mode}"
        );
        let shown = process::run(lab.snapshim(&["status", lab.set()]), LIMIT)
            .ok("status")
            .out();
        for label in ["observed", "auto", "claims", "does not", "auto took"] {
            assert!(
                shown.lines().any(|l| l.starts_with(label)),
                "{label}: {shown}"
            );
        }
        for mut program in programs {
            program.end();
        }
    }
}

#[test]
fn auto_finds_the_point() {
    let _serial = lab::serial();
    for (mode, point) in [("lock", "lock"), ("sync", "sync"), ("unit", "unit")] {
        let lab = Lab::new(&format!("points-auto-{mode}"), Fs::Xfs, LIMIT).unwrap();
        let programs = start(&lab, mode, FILES, "150", 1);
        for _ in 0..10 {
            let outcome = lab.checkpoint(&["--at", "auto"]);
            let certificate = outcome.verified();
            assert_eq!(certificate.0["commit_point"], point, "{mode}");
            assert_eq!(certificate.0["commit_point_asked"], "auto");
            assert!(is_whole(&certificate.copy_of(&lab.data())), "{mode}");
        }
        for mut program in programs {
            program.end();
        }
    }
}

/// Several at once: at a lock, none in the middle; at sync, reached or not, but never
/// said to be what it is not (what was changed is durable, whoever changed it).
#[test]
fn several_programs_at_once() {
    let _serial = lab::serial();
    let rounds = rounds(1000, 60);
    for mode in ["lock", "flock"] {
        let lab = Lab::new(&format!("points-many-{mode}"), Fs::Tmpfs, LIMIT).unwrap();
        let programs = start(&lab, mode, FILES, "20", 4);
        let found = count(&lab, &["--at", "lock"], rounds);
        println!(
            "4 programs, {mode}: {} torn of {} ({} not reached)",
            found.torn, found.taken, found.missed
        );
        assert_eq!(found.torn, 0);
        assert!(found.taken >= rounds * 9 / 10, "hardly ever reached");
        for mut program in programs {
            program.end();
        }
    }
}

/// A program that never reaches the point: not reached, or the fallback, in time; and the
/// program is not kept waiting.
#[test]
fn a_point_that_is_never_reached() {
    let _serial = lab::serial();
    let lab = Lab::new("points-never", Fs::Xfs, LIMIT).unwrap();
    let programs = start(&lab, "none", FILES, "100", 1);
    for point in ["sync", "lock", "rename", "unit", "idle:300ms"] {
        let outcome = lab.checkpoint(&["--at", point, "--wait", "1s", "--max-hold", "200ms"]);
        assert_eq!(outcome.code, 3, "{point}: {}", outcome.stderr);
        assert!(
            outcome.stderr.contains("was not reached"),
            "{}",
            outcome.stderr
        );
        assert!(
            outcome.wall < Duration::from_secs(4),
            "{point}: {:?}",
            outcome.wall
        );
        let outcome = lab.checkpoint(&["--at", point, "--wait", "300ms", "--else", "write"]);
        let certificate = outcome.verified();
        assert_eq!(certificate.0["commit_point"], "write");
        assert_eq!(certificate.0["commit_point_asked"], point);
    }
    let status = process::run(
        lab.snapshim(&["status", lab.set(), "--json"]),
        Duration::from_secs(20),
    );
    let status: serde_json::Value = serde_json::from_str(&status.out()).unwrap();
    let writers = status["writers"].as_array().unwrap();
    let longest = writers
        .iter()
        .filter_map(|writer| writer["longest_wait_us"].as_u64())
        .max()
        .unwrap();
    println!("longest wait of a call: {longest} µs");
    assert!(longest < 1_200_000, "longer than the bound");
    for mut program in programs {
        program.end();
    }
}

/// Nothing happens: idle at once, and what uses locks is unlocked.
#[test]
fn an_idle_program() {
    let _serial = lab::serial();
    let lab = Lab::new("points-idle", Fs::Xfs, LIMIT).unwrap();
    let script = "exec 9>l; flock 9; echo 1 > f0; flock -u 9; sleep 1000";
    let mut program = lab.run(
        &[],
        Path::new("sh"),
        &["-c", &format!("cd {}; {script}", lab.data().display())],
    );
    std::thread::sleep(Duration::from_millis(500));
    let outcome = lab.checkpoint(&["--at", "idle:100ms", "--wait", "5s"]);
    assert_eq!(outcome.verified().0["commit_point"], "idle:100ms");
    assert!(outcome.wall < Duration::from_secs(3), "{:?}", outcome.wall);
    program.end();
}

/// `snapshim hold`: any command takes the snapshot, here a copy, and on btrfs a snapshot of
/// the subvolume.
#[test]
fn a_command_under_the_hold() {
    let _serial = lab::serial();
    let lab = Lab::new("points-hold", Fs::Btrfs, LIMIT).unwrap();
    let data = lab.data();
    fs::remove_dir(&data).unwrap();
    process::tool("btrfs", &["subvolume", "create", data.to_str().unwrap()]).ok("a subvolume");
    let programs = start(&lab, "lock", FILES, "150", 1);
    let copy = data.parent().unwrap().join("copy");
    let copied = |hold: bool, command: &[&str]| {
        let _ = fs::remove_dir_all(&copy);
        let held = ["hold", lab.set(), "--at", "lock", "--json", "--"];
        let ended = match hold {
            true => process::run(lab.snapshim(&[&held[..], command].concat()), LIMIT),
            false => process::tool(command[0], &command[1..]),
        };
        let ended = ended.ok("the copy");
        if hold {
            let report: serde_json::Value = serde_json::from_str(&ended.out()).unwrap();
            assert_eq!(report["commit_point"], "lock", "{report}");
            assert_eq!(report["verified"], true, "{report}");
            assert_eq!(report["status"], 0);
        }
        is_whole(&copy)
    };
    let (from, to) = (data.to_str().unwrap(), copy.to_str().unwrap());
    let cp = ["cp", "-r", from, to];
    let rounds = rounds(200, 25);
    let torn = (0..rounds).filter(|_| !copied(true, &cp)).count();
    let control = (0..rounds).filter(|_| !copied(false, &cp)).count();
    println!("cp under a hold: {torn} torn of {rounds}; without: {control}");
    assert_eq!(torn, 0);
    assert!(control > 0, "the control shows nothing");
    fs::remove_dir_all(&copy).unwrap();
    let snapshot = ["btrfs", "subvolume", "snapshot", "-r", from, to];
    for _ in 0..5 {
        let held = ["hold", lab.set(), "--at", "lock", "--"];
        process::run(lab.snapshim(&[&held[..], &snapshot].concat()), LIMIT).ok("a snapshot");
        assert!(is_whole(&copy));
        process::tool("btrfs", &["subvolume", "delete", to]).ok("delete");
    }
    // What fails is said; what takes too long is ended, and the program goes on.
    let hold = |args: &[&str]| process::run(lab.snapshim(args), LIMIT);
    assert_eq!(hold(&["hold", lab.set(), "--", "false"]).code(), 1);
    assert_eq!(hold(&["hold", lab.set(), "--", "/nonexistent"]).code(), 1);
    let ended = hold(&[
        "hold",
        lab.set(),
        "--max-hold",
        "200ms",
        "--",
        "sleep",
        "30",
    ]);
    assert_eq!(ended.code(), 4, "{}", ended.err());
    lab.checkpoint(&[]).verified();
    for mut program in programs {
        program.end();
    }
}

/// Commands before and after the cut: what fails or hangs keeps the snapshot from being
/// made, never the program from going on; what is to be done afterwards is.
#[test]
fn hooks_on_either_side_of_the_cut() {
    let _serial = lab::serial();
    let lab = Lab::new("points-hooks", Fs::Tmpfs, LIMIT).unwrap();
    let programs = start(&lab, "sync", FILES, "100", 1);
    let log = lab.data().parent().unwrap().join("log");
    let before = format!("echo before $SNAPSHIM_SET >> {}", log.display());
    let after = format!("echo after >> {}", log.display());
    let said = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(&log);
        text
    };
    let hooks = ["--before-cut", &before, "--after-cut", &after];
    lab.checkpoint(&hooks).verified();
    assert_eq!(said(), format!("before {}\nafter\n", lab.set()));
    let stored = lab.stored().len();
    // A failing one.
    let outcome = lab.checkpoint(&["--before-cut", "exit 7", "--after-cut", &after]);
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.stderr.contains("ended with status 7"),
        "{}",
        outcome.stderr
    );
    assert_eq!(said(), "after\n");
    let outcome = lab.checkpoint(&["--after-cut", "exit 7"]);
    assert_eq!(outcome.code, 1, "{}", outcome.stderr);
    // One that hangs.
    let outcome = lab.checkpoint(&["--before-cut", "sleep 60", "--hook-timeout", "300ms"]);
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.stderr.contains("did not end within"),
        "{}",
        outcome.stderr
    );
    assert!(outcome.wall < Duration::from_secs(20), "{:?}", outcome.wall);
    // A point that is not reached.
    let args = ["--at", "unit", "--wait", "300ms", "--after-cut", &after];
    assert_eq!(lab.checkpoint(&args).code, 3);
    assert_eq!(said(), "after\n");
    assert_eq!(lab.stored().len(), stored, "something was published");
    lab.checkpoint(&[]).verified();
    for mut program in programs {
        program.end();
    }
}

/// Whoever is interrupted while it waits for a point opens the gate at once, and runs what is to
/// be run after the cut; what is to be run before it is ended.
#[test]
fn an_interrupted_coordinator_leaves_nothing_behind() {
    let _serial = lab::serial();
    let lab = Lab::new("points-interrupted", Fs::Tmpfs, LIMIT).unwrap();
    let programs = start(&lab, "none", FILES, "100", 1);
    let log = lab.data().parent().unwrap().join("log");
    let before = format!("echo before >> {}", log.display());
    let slow = format!("{before}; sleep 60");
    let after = format!("sleep 0.3; echo after >> {}", log.display());
    let said = || fs::read_to_string(&log).unwrap_or_default();
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    // While it waits, in hold and in checkpoint; in a command before the cut; while `auto` looks.
    let checkpoint = ["checkpoint", lab.set(), "--at", "lock", "--wait", "60s"];
    let hold = ["hold", lab.set(), "--at", "unit", "--wait", "60s"];
    let ways: [(&[&str], &str, &[&str]); 3] = [
        (&checkpoint, &before, &[]),
        (&hold, &before, &["--", "true"]),
        (&checkpoint, &slow, &[]),
    ];
    for signal in signals {
        for (command, before, rest) in ways {
            let _ = fs::remove_file(&log);
            let hooks = ["--before-cut", before, "--after-cut", &after];
            let args = [command, &hooks, rest].concat();
            let mut coordinator = Proc::piped(lab.snapshim(&args));
            assert!(process::wait_until(LIMIT, || said() == "before\n"));
            std::thread::sleep(Duration::from_millis(250));
            assert!(coordinator.is_running(), "{args:?}");
            coordinator.signal(signal);
            let sent = std::time::Instant::now();
            let is_waiting = before != slow;
            if is_waiting {
                let opened = process::wait_until(Duration::from_secs(10), || gate_is_open(&lab));
                assert!(opened, "{signal}: left the gate armed: {args:?}");
                assert!(said() == "before\n" || sent.elapsed() > Duration::from_millis(250));
            }
            // A second one does not keep it from its duty.
            std::thread::sleep(Duration::from_millis(50));
            coordinator.signal(signal);
            let ended = coordinator.wait(Duration::from_secs(20));
            let status = ended.status.expect("it ends");
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(status.signal(), Some(signal as i32), "{}", ended.err());
            assert!(ended.err().contains("interrupted"), "{}", ended.err());
            assert_eq!(said(), "before\nafter\n", "{args:?}");
            assert!(
                sent.elapsed() < Duration::from_secs(5),
                "{:?}",
                sent.elapsed()
            );
        }
    }
    assert!(lab.stored().is_empty(), "something was published");
    lab.checkpoint(&[]).verified();
    for mut program in programs {
        program.end();
    }
}

/// Whether calls pass the gate without a further look.
fn gate_is_open(lab: &Lab) -> bool {
    const WORD: std::ops::Range<usize> = 64..68;
    let file = fs::read(lab.gate()).unwrap();
    u32::from_ne_bytes(file[WORD].try_into().unwrap()) & 0xf == 0
}

/// A program that is held by symbols alone and writes by stdio, whose calls nobody notes: its
/// points are told in another way, or not at all.
#[test]
fn what_is_not_noted_is_not_claimed() {
    let _serial = lab::serial();
    let rounds = rounds(100, 12);
    let ways = [
        ("lock", "0", "lock"),
        ("lock", "0", "idle:100ms"),
        ("none", "1", "idle:100ms"),
        ("sync", "1", "sync"),
        ("rename", "1", "rename"),
    ];
    for (number, (mode, stdio, point)) in ways.into_iter().enumerate() {
        let lab = Lab::new(&format!("points-symbols-{number}"), Fs::Xfs, LIMIT).unwrap();
        let dir = lab.data();
        let mut command = lab.command(product::program("units"));
        command.args([mode, dir.to_str().unwrap(), "2", PIECES, "30000"]);
        command.envs(lab.env(&[])).env("UNITS_STDIO", stdio);
        command.env("SNAPSHIM_SITES", "/nonexistent");
        let mut program = Proc::piped(command);
        assert!(process::wait_until(Duration::from_secs(20), || {
            dir.join("f0").metadata().is_ok_and(|m| m.len() >= 32)
        }));
        let at = ["--at", point, "--wait", "2s", "--else", "write"];
        let found = count(&lab, &at, rounds);
        let certificate = &lab.stored().pop().expect("a snapshot").1;
        assert_eq!(certificate.0["writers"][0]["layer"], "symbols");
        println!(
            "symbols, {mode} by stdio at {point}: {} torn of {}, {} said to be at write",
            found.torn, found.taken, found.missed
        );
        assert_eq!(found.torn, 0, "{mode} at {point}");
        if matches!(point, "sync" | "rename") {
            assert_eq!(found.taken, 0, "{mode} at {point}");
            let outcome = lab.checkpoint(&["--at", point, "--wait", "2s"]);
            assert_eq!(outcome.code, 3, "{}", outcome.stderr);
            assert!(outcome.stderr.contains("not noted"), "{}", outcome.stderr);
        }
        program.end();
        // Nothing changes any more: quiet it is.
        let outcome = lab.checkpoint(&["--at", "idle:100ms", "--wait", "5s"]);
        assert_eq!(outcome.verified().0["commit_point"], "idle:100ms");
    }
}
