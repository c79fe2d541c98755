//! Capture by one snapshot of the btrfs subvolume: of one instant, and in the store like any
//! other; what cannot be captured so is refused, and what is left half done goes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use snapshim_tests::process::{run, tool, wait_until};
use snapshim_tests::records::{self, Shape};
use snapshim_tests::stats::distribution;
use snapshim_tests::{Fs, Lab, Proc, Random, lab, product, rounds, tree};

const LIMIT: Duration = Duration::from_secs(900);
const SOON: Duration = Duration::from_secs(60);
const SUBVOLUME: [&str; 2] = ["--capture", "subvolume"];

/// Writers of the records of [`records`].
const SHAPE: Shape = Shape {
    files: 16,
    lanes: 8,
    record: 4096,
};

fn writer_args(dir: &Path) -> Vec<String> {
    let numbers = ["16", "4", "2", "4096", "100", "900"].map(str::to_owned);
    [&[dir.display().to_string()][..], &numbers].concat()
}

/// Makes the data directory a subvolume of its own.
fn make_subvolume(dir: &Path) {
    let _ = fs::remove_dir(dir);
    tool("btrfs", &["subvolume", "create", dir.to_str().unwrap()]).ok("a subvolume");
}

/// The paths of all subvolumes of the file system `at` is on.
fn subvolumes(at: &Path) -> Vec<String> {
    let listed = tool("btrfs", &["subvolume", "list", at.to_str().unwrap()]).ok("list");
    let path = |line: &str| line.split_once(" path ").map(|(_, path)| path.to_owned());
    listed.out().lines().filter_map(path).collect()
}

fn start(lab: &Lab) -> Proc {
    let args = writer_args(&lab.data());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut writer = lab.run(&[], &product::program("ordered"), &args);
    lab.wait_for_beats(&mut writer, 3);
    writer
}

/// Copies of what is written without the gate, by freezing and by cloning file by file; how many
/// could not be of one instant. One snapshot of a subvolume is of one instant but for what is
/// between two calls of one thread: the control is what is done without it.
fn control(lab: &Lab) -> (usize, usize) {
    let (live, copy) = (lab.beside("control"), lab.beside("control-copy"));
    fs::create_dir_all(&live).unwrap();
    fs::create_dir_all(&copy).unwrap();
    let mut command = lab.command(product::program("ordered"));
    command.args(writer_args(&live));
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    let (mut bad, mut copies) = (0, 0);
    while copies < 20 || (bad == 0 && copies < 1000) {
        for index in 0..SHAPE.files {
            let (from, to) = (records::file(&live, index), records::file(&copy, index));
            tree::copy_plainly(&from, &to).expect("a copy");
        }
        copies += 1;
        bad += usize::from(!records::check(&copy, SHAPE).is_consistent());
    }
    writer.end();
    fs::remove_dir_all(&live).unwrap();
    fs::remove_dir_all(&copy).unwrap();
    fs::remove_file(lab.stats().path()).unwrap();
    (bad, copies)
}

/// What is watched is the subvolume itself, or a directory in the one that has the store, too.
#[test]
fn one_snapshot_of_the_subvolume_is_of_one_instant() {
    let _serial = lab::serial();
    for (name, own) in [("subvolume-itself", true), ("subvolume-inside", false)] {
        let Some(lab) = Lab::new(name, Fs::Btrfs, LIMIT) else {
            return;
        };
        if own {
            make_subvolume(&lab.data());
        }
        let (bad, copies) = control(&lab);
        let mut writer = start(&lab);
        let before = subvolumes(&lab.store().parent().unwrap().join("data"));
        let (mut torn, mut progress, mut holds) = (0, 0, Vec::new());
        let count = rounds(500, 60);
        for _ in 0..count {
            let options = [&SUBVOLUME[..], &["--keep-last", "2", "--no-digest"]].concat();
            let outcome = lab.checkpoint(&options);
            let certificate = outcome.verified();
            assert_eq!(certificate.capture(), "subvolume");
            let verdict = records::check(&certificate.copy_of(&lab.data()), SHAPE);
            torn += usize::from(!verdict.is_consistent());
            assert!(verdict.progress >= progress, "older than the one before");
            progress = verdict.progress;
            holds.push(certificate.hold_us());
        }
        writer.signal(Signal::SIGTERM);
        writer.wait(SOON).ok("the writer");
        println!(
            "{name}: {torn} of {count} inconsistent, hold {}; file by file without the gate {bad} of {copies}",
            distribution(&holds)
        );
        assert_eq!(torn, 0);
        assert!(bad > 0, "the control shows nothing");
        assert!(progress > 0);
        // Nothing that was frozen stays.
        assert_eq!(subvolumes(&lab.data()), before);
    }
}

/// How long a program is held for 10,000 files, one way and the other.
#[test]
fn the_hold_does_not_grow_with_the_files() {
    let _serial = lab::serial();
    let Some(lab) = Lab::new("subvolume-many", Fs::Btrfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    for dir in 0..100 {
        fs::create_dir(data.join(format!("d{dir}"))).unwrap();
        for file in 0..100 {
            let path = data.join(format!("d{dir}/{file}"));
            fs::write(path, vec![7; 100 * (file + 1)]).unwrap();
        }
    }
    let mut writer = start(&lab);
    let mut holds = Vec::new();
    for method in ["reflink", "subvolume", "auto"] {
        let held: Vec<f64> = (0..rounds(20, 5))
            .map(|_| {
                let options = ["--max-hold", "10s", "--keep-last", "2", "--no-digest"];
                let outcome = lab.checkpoint(&[&options[..], &["--capture", method]].concat());
                let certificate = outcome.verified();
                let files = certificate.0["totals"]["files"].as_u64().unwrap();
                assert_eq!(files, 10_000 + SHAPE.files as u64);
                // Files that have not changed are shared with the snapshot before; then there are few to
                // capture.
                let expected = match method {
                    "auto" => "copy-before-write",
                    _ => method,
                };
                assert_eq!(certificate.capture(), expected);
                let verdict = records::check(&certificate.copy_of(&data), SHAPE);
                assert!(verdict.is_consistent(), "{verdict:?}");
                certificate.hold_us()
            })
            .collect();
        println!(
            "10,016 files, --capture {method}: hold {}",
            distribution(&held)
        );
        holds.push(held.iter().sum::<f64>() / held.len() as f64);
    }
    writer.end();
    assert!(holds[1] < holds[0] / 2.0, "{holds:?}");
}

/// Everything that is done with a snapshot, and what is left out of it.
#[test]
fn it_is_a_snapshot_like_any_other() {
    let _serial = lab::serial();
    let Some(lab) = Lab::new("subvolume-store", Fs::Btrfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    make_subvolume(&data);
    fs::create_dir_all(data.join("cache/deep")).unwrap();
    fs::write(data.join("cache/deep/x"), "left out").unwrap();
    fs::write(data.join("file"), "one\n").unwrap();
    fs::hard_link(data.join("file"), data.join("hard")).unwrap();
    // The store is inside what is watched, and so is a subvolume that is left out.
    let nested = data.join("cache/nested");
    make_subvolume(&nested);
    let store = data.join(".snapshim");
    let at = |path: &Path| path.to_str().unwrap().to_owned();
    let mut command = lab.snapshim(&["env", "--name", lab.set(), "--watch", &at(&data)]);
    command.args([
        "--store",
        &at(&store),
        "--exclude",
        &at(&data.join("cache")),
    ]);
    run(command, SOON).ok("env");
    let first = lab.checkpoint(&SUBVOLUME).verified().clone();
    assert_eq!(
        first.0["path"],
        at(&store.join(lab.set()).join(first.id()).join("tree"))
    );
    let copy = first.copy_of(&data);
    let names = tree::listing(&copy, &[]).join("\n");
    assert!(
        !names.contains("snapshim") && !names.contains("cache"),
        "{names}"
    );
    let inode = |name: &str| fs::metadata(copy.join(name)).unwrap().ino();
    assert_eq!(inode("file"), inode("hard"));
    let live = fs::metadata(data.join("file")).unwrap();
    let recorded = first.0["files"].as_array().unwrap();
    let recorded = recorded
        .iter()
        .find(|f| f["path"] == at(&data.join("file")));
    let recorded = recorded.unwrap();
    // What the manifest has is of the live file.
    assert_eq!(recorded["dev"], live.dev());
    assert_eq!(recorded["ino"], live.ino());
    assert!(recorded["digest"].is_string());

    fs::write(data.join("file"), "two\n").unwrap();
    let second = lab.checkpoint(&SUBVOLUME).verified().clone();
    let ask = |args: &[&str]| run(lab.snapshim(args), SOON);
    let shown = ask(&[
        "show",
        lab.set(),
        &format!("latest:{}", at(&data.join("file"))),
    ]);
    assert_eq!(shown.ok("show").out(), "two\n");
    let diff = ask(&["diff", lab.set(), first.id(), second.id()])
        .ok("diff")
        .out();
    assert!(diff.contains("file"), "{diff}");
    ask(&["verify", lab.set(), "--all"]).ok("verify");
    ask(&["restore", lab.set(), first.id(), "--in-place"]).ok("restore");
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "one\n");
    assert_eq!(
        fs::read_to_string(data.join("cache/deep/x")).unwrap(),
        "left out"
    );
    let latest = fs::read_link(store.join(lab.set()).join("latest")).unwrap();
    assert_eq!(latest, Path::new(second.id()));
    ask(&["delete", lab.set(), first.id()]).ok("delete");
    assert!(!store.join(lab.set()).join(first.id()).exists());
    assert_eq!(subvolumes(&data).len(), 2, "{:?}", subvolumes(&data));
    // Of files that nobody has, too.
    lab.checkpoint(&[&SUBVOLUME[..], &["--only", &at(&data.join("hard"))]].concat())
        .verified();
}

/// What a snapshot of a subvolume does not have is refused, with the cause, and left to
/// clones if nothing else was asked for.
#[test]
fn what_it_cannot_capture_is_refused() {
    let _serial = lab::serial();
    let Some(lab) = Lab::new("subvolume-refused", Fs::Btrfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    for file in 0..1_200 {
        fs::write(data.join(file.to_string()), "x").unwrap();
    }
    lab.env(&[]);
    assert_eq!(lab.checkpoint(&[]).verified().capture(), "subvolume");
    let refused = |cause: &str| {
        let outcome = lab.checkpoint(&SUBVOLUME);
        assert_eq!(outcome.code, 1, "{cause}: {}", outcome.stderr);
        assert!(
            outcome.stderr.contains(cause),
            "{cause}: {}",
            outcome.stderr
        );
        assert!(outcome.stderr.contains("--capture"), "{}", outcome.stderr);
        let else_how = lab.checkpoint(&[]);
        assert_ne!(else_how.verified().capture(), "subvolume", "{cause}");
    };
    let nested = data.join("nested");
    make_subvolume(&nested);
    fs::write(nested.join("in it"), "x").unwrap();
    refused("nested is on a subvolume or file system of its own");
    let outcome = lab.checkpoint(&[]);
    let copy = outcome.verified().copy_of(&nested.join("in it"));
    assert_eq!(fs::read_to_string(copy).unwrap(), "x");
    tool("btrfs", &["subvolume", "delete", nested.to_str().unwrap()]).ok("delete");

    // The same device, and yet another directory than the one in the subvolume.
    let (bound, other) = (data.join("a b"), data.join("other"));
    fs::create_dir(&bound).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("seen twice"), "x").unwrap();
    tool(
        "mount",
        &["--bind", other.to_str().unwrap(), bound.to_str().unwrap()],
    )
    .ok("mount");
    refused("something is mounted at");
    let outcome = lab.checkpoint(&[]);
    let copy = outcome.verified().copy_of(&bound.join("seen twice"));
    tool("umount", &[bound.to_str().unwrap()]).ok("umount");
    assert_eq!(fs::read_to_string(copy).unwrap(), "x");

    let Some(plain) = Lab::new("subvolume-elsewhere", Fs::Ext4, LIMIT) else {
        return;
    };
    plain.env(&[]);
    let outcome = plain.checkpoint(&SUBVOLUME);
    assert_eq!(outcome.code, 1, "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("is not on btrfs"),
        "{}",
        outcome.stderr
    );
}

/// Nothing is called verified that the gate did not hold: a program outside it that writes all the
/// time, and one whose calls inside libc may have been in flight.
#[test]
fn what_was_not_held_is_seen() {
    let _serial = lab::serial();
    let Some(lab) = Lab::new("subvolume-unheld", Fs::Btrfs, LIMIT) else {
        return;
    };
    let env = lab.env(&[]);
    let args = writer_args(&lab.data());
    let mut outsider = lab.command(product::program("ordered"));
    outsider.args(&args);
    let mut outsider = Proc::piped(outsider);
    lab.wait_for_beats(&mut outsider, 3);
    let outcome = lab.checkpoint(&[&SUBVOLUME[..], &["--outside", "none"]].concat());
    let codes: Vec<String> = outcome
        .unverified()
        .reasons()
        .into_iter()
        .map(|r| r.0)
        .collect();
    for code in ["foreign-writer", "changed-during-hold"] {
        assert!(codes.iter().any(|c| c == code), "{code}: {codes:?}");
    }
    // Stopped, it is as good as held.
    let outcome = lab.checkpoint(&SUBVOLUME);
    let copy = outcome.verified().copy_of(&lab.data());
    assert!(records::check(&copy, SHAPE).is_consistent());
    outsider.end();
    fs::remove_file(lab.stats().path()).unwrap();

    let mut without_tables = lab.command(product::program("ordered"));
    without_tables.args(&args).envs(env);
    without_tables.env("SNAPSHIM_SITES", lab.beside("no-tables"));
    let mut without_tables = Proc::piped(without_tables);
    lab.wait_for_beats(&mut without_tables, 3);
    let outcome = lab.checkpoint(&SUBVOLUME);
    let reasons = outcome.unverified().reasons();
    assert!(
        reasons
            .iter()
            .any(|(code, text)| code == "hidden-call" && text.contains("reflink")),
        "{reasons:?}"
    );
    for file in 0..1_200 {
        fs::write(lab.data().join(file.to_string()), "x").unwrap();
    }
    assert_eq!(lab.checkpoint(&[]).verified().capture(), "reflink");
    without_tables.end();
}

/// Killed at any moment, what it leaves goes with the next command; the frozen
/// subvolume, too.
#[test]
fn what_a_crash_leaves_goes() {
    let _serial = lab::serial();
    let Some(lab) = Lab::new("subvolume-crash", Fs::Btrfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    for file in 0..2_000 {
        fs::write(data.join(file.to_string()), "x").unwrap();
    }
    lab.env(&[]);
    let before = subvolumes(&data);
    let begun = Instant::now();
    lab.checkpoint(&SUBVOLUME).verified();
    let whole = begun.elapsed();
    let (mut random, mut frozen, mut rounds_left) = (Random(5), 0, rounds(100, 12));
    let drafts = || {
        let entries = fs::read_dir(lab.store().join(lab.set())).unwrap().flatten();
        let names = entries.map(|e| e.file_name().into_string().unwrap());
        names
            .filter(|name| name.starts_with('.') && name != ".lock")
            .collect::<Vec<_>>()
    };
    while rounds_left > 0 || frozen == 0 {
        assert!(begun.elapsed() < LIMIT / 2, "never killed in the middle");
        rounds_left = rounds_left.saturating_sub(1);
        let options = [&["checkpoint", lab.set()][..], &SUBVOLUME].concat();
        let mut proc = Proc::piped(lab.snapshim(&options));
        let moment = random.below(whole.as_micros() as u64);
        // Half of them the moment something is frozen.
        if rounds_left % 2 == 0 {
            wait_until(whole, || subvolumes(&data) != before);
        } else {
            std::thread::sleep(Duration::from_micros(moment));
        }
        proc.signal(Signal::SIGKILL);
        proc.wait(SOON);
        frozen += usize::from(subvolumes(&data) != before);
        lab.checkpoint(&["--keep-last", "2", "--capture", "reflink"])
            .verified();
        assert_eq!(drafts(), [""; 0]);
        assert_eq!(subvolumes(&data), before);
    }
    println!("killed {frozen} times with a frozen subvolume, which the next command removed");
    // One in a snapshot that is on its way out, with another in it.
    let stored = lab.stored().pop().unwrap().0;
    make_subvolume(&stored.join("tree/own"));
    make_subvolume(&stored.join("tree/own/deeper"));
    fs::write(stored.join("tree/own/deeper/file"), "x").unwrap();
    let id = stored.file_name().unwrap().to_str().unwrap().to_owned();
    run(lab.snapshim(&["delete", lab.set(), &id]), SOON).ok("delete");
    assert_eq!(subvolumes(&data), before);
}

/// A user who owns the subvolume, where the file system is mounted so that he may remove one.
#[test]
fn a_user_may_where_he_may_remove_it_again() {
    let _serial = lab::serial();
    let Some(small) = Fs::Btrfs.mount_small("subvolume-user", 512 << 20) else {
        return;
    };
    let Some(lab) = Lab::new("subvolume-user", Fs::Btrfs, LIMIT) else {
        return;
    };
    let user = Some(65534);
    let data = small.path().join("volume");
    make_subvolume(&data);
    fs::create_dir(data.join("data")).unwrap();
    fs::write(data.join("data/file"), "x").unwrap();
    for path in ["", "data", "data/file"] {
        chown(data.join(path), user, user).unwrap();
    }
    let gates = lab.gates().with_extension("user");
    fs::create_dir_all(&gates).unwrap();
    chown(&gates, user, user).unwrap();
    fs::set_permissions(gates.parent().unwrap(), fs::Permissions::from_mode(0o711)).unwrap();
    let binary = lab.gates().with_extension("snapshim");
    fs::copy(product::snapshim(), &binary).unwrap();
    let as_user = |args: &[&str]| {
        let mut command = lab.command("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(&binary).args(args);
        command.env("SNAPSHIM_DIR", &gates).env("HOME", &gates);
        run(command, SOON)
    };
    let (watched, store) = (data.join("data"), data.join("store"));
    let (watched, store) = (watched.to_str().unwrap(), store.to_str().unwrap());
    as_user(&[
        "env", "--name", "user", "--watch", watched, "--store", store,
    ])
    .ok("env");
    let checkpoint = ["checkpoint", "user", "--json", "--capture", "subvolume"];
    let before = subvolumes(small.path());
    let ended = as_user(&checkpoint);
    assert_eq!(ended.code(), 1, "{}", ended.err());
    assert!(
        ended.err().contains("user_subvol_rm_allowed"),
        "{}",
        ended.err()
    );
    let at = small.path().to_str().unwrap();
    tool("mount", &["-o", "remount,user_subvol_rm_allowed", at]).ok("remount");
    let ended = as_user(&checkpoint).ok("checkpoint");
    assert!(
        ended.out().contains("\"capture\": \"subvolume\""),
        "{}",
        ended.out()
    );
    assert_eq!(subvolumes(small.path()), before);
    chown(&data, Some(0), Some(0)).unwrap();
    let ended = as_user(&checkpoint);
    assert_eq!(ended.code(), 1, "{}", ended.err());
    assert!(
        ended.err().contains("belongs to somebody else"),
        "{}",
        ended.err()
    );
}
