//! Sets of many files: only what has changed since the last look is looked at under the hold, and
//! what has not changed since the previous snapshot is shared with it.
//!
//! `rounds` changes its files one after the other, so of a snapshot it can be said whether it is of
//! one instant: no file may be newer than one that comes before it in the round.
//!
//! `SNAPSHIM_TEST_FULL=1` takes 1,000 snapshots.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use snapshim_tests::lab::{Certificate, Outcome};
use snapshim_tests::process::Proc;
use snapshim_tests::stats::distribution;
use snapshim_tests::{Fs, Lab, lab, process, product, rounds};

/// More than are looked at one by one.
const FILES: u64 = 600;

/// The directory and name of a file.
fn file(number: u64) -> String {
    format!("d{}/f{number}", number / 50)
}

/// The last number in a file; `None` if it is not there, 0 if it is empty.
fn last(dir: &Path, number: u64) -> Option<u64> {
    let text = fs::read_to_string(dir.join(file(number))).ok()?;
    let last = text.lines().next_back().unwrap_or("0");
    Some(last.parse().unwrap_or_else(|_| panic!("torn: {text:?}")))
}

/// Why a copy is not of one instant, if it is not.
fn fault(dir: &Path) -> Option<String> {
    let found: Vec<Option<u64>> = (0..FILES).map(|number| last(dir, number)).collect();
    let newest = found.iter().flatten().copied().max().unwrap_or(0);
    // The next one that is changed may be half done: missing, empty, or by its other name as well.
    let next = (newest.max(FILES - 1) + 1..).find(|k| k % FILES % 4 != 3)?;
    for number in 0..FILES {
        let expected = match newest / FILES * FILES + number {
            _ if number % 4 == 3 => 0,
            k if k <= newest => k,
            k => k.saturating_sub(FILES),
        };
        // Those of the first round.
        let expected = if expected < FILES { 0 } else { expected };
        let found = found[number as usize];
        if found == Some(expected) || number == next % FILES && matches!(found, None | Some(0)) {
            continue;
        }
        return Some(format!(
            "after {newest}: file {number} has {found:?}, not {expected}"
        ));
    }
    None
}

fn start(lab: &Lab) -> Proc {
    let args = [&lab.data().display().to_string(), &FILES.to_string(), "50"];
    let options = ["--keep-last", "3", "--max-hold", "5s"];
    let mut writer = lab.run(&options, &product::program("rounds"), &args);
    lab.wait_for_beats(&mut writer, 2 * FILES);
    writer
}

/// Of copies made without the gate: how many are not of one instant.
fn control(lab: &Lab) -> (usize, usize) {
    let (mut bad, mut copies) = (0, 0);
    while copies < 8 || bad == 0 && copies < 100 {
        copies += 1;
        let copy = lab.beside("copy");
        let mut cp = Command::new("cp");
        // Names come and go meanwhile.
        cp.arg("-r").arg(lab.data()).arg(&copy);
        process::run(cp, Duration::from_secs(60));
        bad += usize::from(fault(&copy).is_some());
        fs::remove_dir_all(copy).unwrap();
    }
    (bad, copies)
}

/// The files of a snapshot by how they were captured.
fn captured(certificate: &Certificate) -> BTreeMap<String, Vec<PathBuf>> {
    let mut by = BTreeMap::<String, Vec<PathBuf>>::new();
    for entry in certificate.0["files"].as_array().unwrap() {
        if let Some(how) = entry["capture"].as_str() {
            let path = PathBuf::from(entry["path"].as_str().unwrap());
            by.entry(how.to_owned()).or_default().push(path);
        }
    }
    by
}

fn of_one_instant(fs: Fs, count: usize) {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("many", fs, Duration::from_secs(1500)) else {
        return;
    };
    let mut writer = start(&lab);
    let (bad, copies) = control(&lab);
    let (mut verified, mut shared, mut holds, mut guarded) = (0, 0, Vec::new(), 0);
    let mut others = BTreeMap::<String, usize>::new();
    let mut inconsistent = 0;
    for turn in 0..count {
        // One in four while nothing is guarded.
        let method = match turn % 4 {
            3 => "auto",
            _ => "copy-before-write",
        };
        let outcome = lab.checkpoint(&["--capture", method]);
        let Some(certificate) = &outcome.certificate else {
            let error = format!("exit {}: {}", outcome.code, outcome.stderr);
            *others.entry(error).or_default() += 1;
            continue;
        };
        holds.push(certificate.hold_us());
        guarded += usize::from(certificate.0["guard_us"].is_u64());
        shared += captured(certificate).get("shared").map_or(0, Vec::len);
        for (code, text) in certificate.reasons() {
            *others.entry(format!("{code}: {text}")).or_default() += 1;
        }
        if certificate.is_verified() {
            verified += 1;
            if let Some(fault) = fault(&certificate.copy_of(&lab.data())) {
                eprintln!("{} on {}: {fault}", certificate.id(), fs.name());
                inconsistent += 1;
            }
        }
    }
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(30)).ok("rounds");
    println!(
        "{}: {count} snapshots, {verified} verified, {inconsistent} of them inconsistent; {guarded} guarded; {} files \
         of each shared; hold {}; without the gate {bad} of {copies} copies inconsistent; else {others:?}",
        fs.name(),
        shared / count,
        distribution(&holds),
    );
    assert_eq!(inconsistent, 0);
    assert!(bad > 0, "the control shows nothing");
    assert!(
        verified * 10 >= count * 8,
        "{verified} of {count}: {others:?}"
    );
    // Of all that never change.
    let may_share = fs != Fs::Tmpfs;
    assert_eq!(shared / count >= FILES as usize / 8, may_share);
    // Whatever happened to later ones, those that are there are what they were.
    for (path, certificate) in lab.stored() {
        let ended = process::run(
            lab.snapshim(&["verify", lab.set(), certificate.id()]),
            Duration::from_secs(60),
        );
        assert_eq!(ended.code(), 0, "{}: {}", path.display(), ended.err());
        if certificate.is_verified() {
            let below = lab.data().strip_prefix("/").unwrap().to_owned();
            assert_eq!(fault(&path.join("tree").join(below)), None);
        }
    }
}

#[test]
fn of_one_instant_on_xfs() {
    of_one_instant(Fs::Xfs, rounds(250, 25));
}

#[test]
fn of_one_instant_on_ext4() {
    of_one_instant(Fs::Ext4, rounds(250, 20));
}

#[test]
fn of_one_instant_on_btrfs() {
    of_one_instant(Fs::Btrfs, rounds(250, 20));
}

#[test]
fn of_one_instant_on_tmpfs() {
    of_one_instant(Fs::Tmpfs, rounds(250, 20));
}

/// What a test of shared files begins with: 20 files that were left alone.
fn quiet(fs: Fs) -> Option<Lab> {
    let lab = Lab::new("shared", fs, Duration::from_secs(300))?;
    fs::create_dir(lab.data().join("d")).unwrap();
    for number in 0..20 {
        fs::write(lab.data().join(format!("d/f{number}")), vec![b'x'; 30_000]).unwrap();
    }
    fs::hard_link(lab.data().join("d/f0"), lab.data().join("link")).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    lab.env(&[]);
    Some(lab)
}

fn inode(certificate: &Certificate, path: &Path) -> u64 {
    fs::metadata(certificate.copy_of(path)).unwrap().ino()
}

#[test]
fn what_has_not_changed_is_shared() {
    for fs in [Fs::Xfs, Fs::Ext4, Fs::Btrfs] {
        let _alone = lab::serial();
        let Some(lab) = quiet(fs) else { continue };
        let path = |number: u32| lab.data().join(format!("d/f{number}"));
        let first = lab.checkpoint(&[]);
        let first = first.verified();
        assert!(!captured(first).contains_key("shared"));

        // One in each way that a file changes; times are put back where that is possible.
        fs::write(path(1), vec![b'y'; 30_000]).unwrap();
        let touched = Command::new("touch")
            .arg("-r")
            .arg(path(2))
            .arg(path(1))
            .status();
        assert!(touched.unwrap().success());
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(path(3), mode).unwrap();
        fs::rename(path(4), path(40)).unwrap();
        fs::write(lab.data().join("new"), vec![b'x'; 30_000]).unwrap();
        fs::rename(lab.data().join("new"), path(5)).unwrap();
        fs::remove_file(path(6)).unwrap();
        let set = Command::new("setfattr")
            .args(["-n", "user.a", "-v", "1"])
            .arg(path(7))
            .status();
        assert!(set.unwrap().success());

        std::thread::sleep(Duration::from_millis(100));
        let second = lab.checkpoint(&["-v"]);
        let second = second.verified();
        let shared = &captured(second)["shared"];
        let expected = (1..20).filter(|n| ![1, 3, 4, 5, 6, 7].contains(n));
        // What is directly in a root comes first, so of two names of a file this.
        let expected: Vec<PathBuf> = std::iter::once(lab.data().join("link"))
            .chain(expected.map(path))
            .collect();
        let mut found = shared.clone();
        found.sort_by_key(|path| expected.iter().position(|other| other == path));
        assert_eq!(found, expected, "{}", fs.name());
        for path in shared {
            assert_eq!(inode(first, path), inode(second, path));
        }
        for number in [1, 3, 5, 7] {
            assert_ne!(inode(first, &path(number)), inode(second, &path(number)));
        }
        assert_eq!(second.0["totals"]["shared_files"], 14);
        assert_eq!(
            fs::read(first.copy_of(&path(1))).unwrap(),
            vec![b'x'; 30_000]
        );
        assert_eq!(
            fs::read(second.copy_of(&path(1))).unwrap(),
            vec![b'y'; 30_000]
        );
        // Bytes and metadata, by somebody else.
        let mut rsync = Command::new("rsync");
        let from = format!("{}/", lab.data().display());
        let to = format!("{}/", second.copy_of(&lab.data()).display());
        rsync.args(["-naHAXSc", "--delete", "--itemize-changes", &from, &to]);
        let ended = process::run(rsync, Duration::from_secs(60)).ok("rsync");
        assert_eq!(ended.out(), "");

        // Digests came along, and files larger than those that are hashed again at once are
        // known the next time, too.
        assert!(second.0["hashed_bytes"].as_u64().unwrap() < 10 * 30_000);
        let third = lab.checkpoint(&[]);
        assert_eq!(third.verified().0["capture"], "shared");
        assert_eq!(third.verified().0["hashed_bytes"], 0);

        // Somebody has written to a snapshot: its file is not shared, and the damage is told.
        fs::write(third.verified().copy_of(&path(9)), b"?").unwrap();
        let fourth = lab.checkpoint(&[]);
        let all = captured(fourth.verified());
        assert!(!all["shared"].contains(&path(9)) && all["shared"].contains(&path(10)));
        assert_eq!(
            fs::read(fourth.verified().copy_of(&path(9))).unwrap(),
            vec![b'x'; 30_000]
        );

        // Not if it is not wanted; and not with what is not verified.
        let full = lab.checkpoint(&["--full"]);
        assert!(!captured(full.verified()).contains_key("shared"));

        // Taking out the others leaves it what it is.
        let prune = ["prune", lab.set(), "--keep-last", "1"];
        process::run(lab.snapshim(&prune), Duration::from_secs(60)).ok("prune");
        let verify = lab.snapshim(&["verify", lab.set()]);
        process::run(verify, Duration::from_secs(60)).ok("verify");
    }
}

/// A file that is mapped and stored into is always captured, though its ctime may stand.
#[test]
fn what_is_mapped_is_captured() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("shared-mapped", Fs::Ext4, Duration::from_secs(120)) else {
        return;
    };
    let script = "import mmap,sys,time
f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),4096)
n=0
while True:
    n+=1; m[0:8]=b'%08d'%n; time.sleep(0.001)
";
    fs::write(lab.data().join("mapped"), vec![b'0'; 4096]).unwrap();
    fs::write(lab.data().join("quiet"), vec![b'0'; 4096]).unwrap();
    let path = lab.data().join("mapped");
    let mut writer = lab.run(
        &[],
        Path::new("python3"),
        &["-c", script, path.to_str().unwrap()],
    );
    let number = |path: &Path| String::from_utf8(fs::read(path).unwrap()[..8].to_vec()).unwrap();
    assert!(process::wait_until(Duration::from_secs(20), || number(
        &path
    )
        > "00000100".into()));
    let mut before = number(&path);
    for _ in 0..4 {
        let outcome = lab.checkpoint(&[]);
        let certificate = outcome.verified();
        let found = number(&certificate.copy_of(&path));
        assert!(found > before, "{found} after {before}");
        assert!(!captured(certificate).contains_key("shared"));
        before = number(&path);
    }
    writer.end();
}

/// The number at the beginning of a file; 0 if there is none.
fn number(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.get(..16)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// Whether a copy of the files of `byways` is of one instant.
fn is_of_one_instant(data: &Path, how: &str) -> bool {
    let y = number(&data.join("z/y"));
    if how != "again" {
        let x = number(&data.join("a/x"));
        // The sleep of `outside` ends with another number.
        return x == y || x == y + 1 || how == "outside" && x > y && x <= y + 61;
    }
    // After y was written its file is there, until `gone` says that it is about to go.
    number(&data.join("z/gone")) >= y || data.join(format!("k7/d/{y}")).exists()
}

/// Changes that are not reported by the name of the file are seen all the same, or told.
fn changed_by_ways(fs: Fs, how: &str) {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("byways", fs, Duration::from_secs(300)) else {
        return;
    };
    let args = [&lab.data().display().to_string(), how];
    let options = ["--keep-last", "2", "--max-hold", "5s"];
    let mut writer = lab.run(&options, &product::program("byways"), &args);
    lab.wait_for_beats(&mut writer, 100);
    let (mut verified, mut torn, mut others) = (0, 0, BTreeMap::<String, usize>::new());
    let count = rounds(60, 8);
    for _ in 0..count {
        let outcome = lab.checkpoint(&["--capture", "copy-before-write"]);
        let Some(certificate) = &outcome.certificate else {
            let error = format!("exit {}: {}", outcome.code, outcome.stderr);
            *others.entry(error).or_default() += 1;
            continue;
        };
        for (code, text) in certificate.reasons() {
            *others.entry(format!("{code}: {text}")).or_default() += 1;
        }
        if certificate.is_verified() {
            verified += 1;
            torn += usize::from(!is_of_one_instant(&certificate.copy_of(&lab.data()), how));
        }
    }
    writer.signal(Signal::SIGTERM);
    writer.wait(Duration::from_secs(30)).ok("byways");
    println!(
        "{how} on {}: {torn} of {verified} verified of {count} torn; else {others:?}",
        fs.name()
    );
    assert_eq!(torn, 0);
}

#[test]
fn by_a_file_that_had_no_name() {
    changed_by_ways(Fs::Ext4, "tmpfile");
}

#[test]
fn by_a_name_that_is_another_files() {
    changed_by_ways(Fs::Xfs, "renamed");
}

#[test]
fn by_a_name_elsewhere() {
    changed_by_ways(Fs::Xfs, "outside");
}

#[test]
fn by_a_mapping_that_is_gone() {
    changed_by_ways(Fs::Ext4, "mapped");
}

#[test]
fn in_a_directory_that_is_made_again() {
    changed_by_ways(Fs::Ext4, "again");
}

/// A FIFO that has come is recorded, and not opened: to whoever waits for a reader, that would be
/// one. And files that come and go directly in a root are nothing special.
#[test]
fn what_comes_is_not_opened_before_it_is_known_to_be_a_file() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("many-fifo", Fs::Xfs, Duration::from_secs(120)) else {
        return;
    };
    for number in 0..300 {
        fs::write(lab.data().join(format!("f{number}")), "x").unwrap();
    }
    let script = "cd \"$1\"; while :; do mkfifo p; sleep 0.01; rm p; : > t; mv t u; done";
    let data = lab.data().display().to_string();
    let mut writer = lab.run(&[], Path::new("bash"), &["-c", script, "bash", &data]);
    let came = process::wait_until(Duration::from_secs(20), || lab.data().join("u").exists());
    assert!(came);
    let is_over = AtomicBool::new(false);
    let opened = std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut opened = 0;
            while !is_over.load(Relaxed) {
                // ENXIO as long as nobody has it open for reading.
                let mut fifo = fs::OpenOptions::new();
                fifo.write(true).custom_flags(nix::libc::O_NONBLOCK);
                opened += usize::from(fifo.open(lab.data().join("p")).is_ok());
            }
            opened
        });
        for _ in 0..rounds(100, 25) {
            let outcome = lab.checkpoint(&["--capture", "copy-before-write", "--keep-last", "2"]);
            assert_ne!(outcome.code, 1, "{}", outcome.stderr);
        }
        is_over.store(true, Relaxed);
        looking.join().unwrap()
    });
    writer.end();
    assert_eq!(opened, 0, "a FIFO was opened");
}

/// A snapshot of what is on a small file system, without a set.
#[track_caller]
fn snap(lab: &Lab, small: &Path, options: &[&str]) -> Outcome {
    let mut command = lab.snapshim(&["snap", "--json", "--name", lab.set(), "--store"]);
    command.arg(small.join("store")).args(options);
    command.arg(small.join("data"));
    lab::outcome(process::run(command, Duration::from_secs(60)))
}

/// What was overwritten and made durable by fdatasync(2), which leaves the times out, has the ctime it
/// had before when the power is lost.
#[test]
fn after_a_crash_nothing_is_shared() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("shared-crash", Fs::Xfs, Duration::from_secs(120)) else {
        return;
    };
    let small = Fs::Xfs.mount_small("crash", 512 << 20).unwrap();
    let data = small.path().join("data");
    fs::create_dir(&data).unwrap();
    let (file, other) = (data.join("file"), data.join("other"));
    fs::write(&file, vec![b'A'; 65_536]).unwrap();
    fs::write(&other, vec![b'A'; 65_536]).unwrap();
    nix::unistd::sync();
    std::thread::sleep(Duration::from_millis(100));
    // Overwriting a clone moves its extents, and with these the times would become durable.
    let first = snap(&lab, small.path(), &["--capture", "copy"]);
    let first = first.verified();
    let second = snap(&lab, small.path(), &["--capture", "copy"]);
    assert_eq!(captured(second.verified())["shared"].len(), 2);
    let times = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        let mtime = (meta.mtime(), meta.mtime_nsec());
        (meta.ctime(), meta.ctime_nsec(), mtime, meta.len())
    };
    let before = times(&file);
    std::thread::sleep(Duration::from_millis(100));
    let overwritten = fs::OpenOptions::new().write(true).open(&file).unwrap();
    overwritten.write_all_at(&[b'B'; 65_536], 0).unwrap();
    overwritten.sync_data().unwrap();
    assert_ne!(times(&file), before);
    drop(overwritten);
    small.crash();
    assert_eq!(fs::read(&file).unwrap(), vec![b'B'; 65_536]);
    assert_eq!(times(&file), before, "the control shows nothing");

    let third = snap(&lab, small.path(), &["--capture", "copy"]);
    let third = third.verified();
    assert!(!captured(third).contains_key("shared"));
    for (certificate, byte) in [(first, b'A'), (third, b'B')] {
        let copy = fs::read(certificate.copy_of(&file)).unwrap();
        assert_eq!(copy, vec![byte; 65_536]);
    }
    let digest = |certificate: &Certificate| {
        let files = certificate.0["files"].as_array().unwrap().iter();
        let found = files.clone().find(|f| f["path"] == file.to_str().unwrap());
        found.unwrap()["digest"].clone()
    };
    assert_ne!(digest(first), digest(third));
    // Since then nothing was lost.
    let fourth = snap(&lab, small.path(), &["--capture", "copy"]);
    assert_eq!(captured(fourth.verified())["shared"].len(), 2);
    small.mount_again();
    let fifth = snap(&lab, small.path(), &["--capture", "copy"]);
    assert!(!captured(fifth.verified()).contains_key("shared"));
}

/// The manifest says from which boot and mounts files were read; one that does not is of no use.
#[test]
fn what_was_read_from_another_boot_or_mount_is_not_shared() {
    let _alone = lab::serial();
    let Some(lab) = quiet(Fs::Ext4) else { return };
    let forms: [fn(&mut Value); 5] = [
        |mounted| mounted["boot"] = "d0e1c2b3-0000-0000-0000-000000000000".into(),
        |mounted| {
            let mount = mounted["mounts"][0]["mount"].as_u64().unwrap();
            mounted["mounts"][0]["mount"] = (mount + 1).into();
        },
        |mounted| mounted["mounts"][0]["dev"] = 7.into(),
        |mounted| mounted["mounts"] = json!([]),
        |mounted| *mounted = Value::Null,
    ];
    lab.checkpoint(&[]).verified();
    for form in forms {
        let last = lab.checkpoint(&[]);
        let last = last.verified();
        assert_eq!(captured(last)["shared"].len(), 20);
        let path = last.tree().parent().unwrap().join("manifest.json");
        let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        form(&mut manifest["mounted"]);
        fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
        let next = lab.checkpoint(&[]);
        let next = captured(next.verified());
        assert!(!next.contains_key("shared"), "{}", manifest["mounted"]);
    }
}

/// `verify` of one snapshot with a command, and the line of it.
#[track_caller]
fn verify_with(lab: &Lab, id: &str, options: &[&str]) -> (Value, String) {
    let mut command = lab.snapshim(&["verify", lab.set(), id, "--json", "--verify"]);
    command.args(options);
    let ended = process::run(command, Duration::from_secs(60));
    let report: Value = serde_json::from_str(&ended.out()).expect("JSON");
    (report["snapshots"][0].clone(), ended.err())
}

/// A command that writes to the files of a snapshot in place would write to all that share them.
#[test]
fn a_command_does_not_write_to_other_snapshots() {
    for fs in [Fs::Xfs, Fs::Ext4] {
        let _alone = lab::serial();
        let Some(lab) = quiet(fs) else { continue };
        let path = lab.data().join("d/f3");
        let writes = "printf y >> \"$SNAPSHIM_ROOT/d/f3\"";
        let is_good = |certificate: &Certificate| {
            let (line, _) = verify_with(&lab, certificate.id(), &["true"]);
            line["good"] == true && fs::read(certificate.copy_of(&path)).unwrap() == [b'x'; 30_000]
        };
        let first = lab.checkpoint(&[]);
        let first = first.verified();
        // In place: nothing is shared, and what it does is noticed.
        let wrote = lab.checkpoint(&["--verify", writes]);
        let wrote = wrote.unverified();
        assert!(!captured(wrote).contains_key("shared"));
        let (code, text) = &wrote.reasons()[0];
        assert_eq!(code, "verify-command");
        assert!(
            text.contains("d/f3") && text.contains("--writable"),
            "{text}"
        );
        assert!(is_good(first));

        // It is the newest, and not good: the next shares nothing either.
        lab.checkpoint(&[]).verified();
        // On a copy.
        let second = lab.checkpoint(&["--writable", "--verify", writes]);
        let second = second.verified();
        assert_eq!(captured(second)["shared"].len(), 20);
        assert!(is_good(second));

        // One that is published, and shares files: on a copy, without being asked.
        let third = lab.checkpoint(&[]);
        let third = third.verified();
        assert_eq!(captured(third)["shared"].len(), 20);
        let (line, said) = verify_with(&lab, third.id(), &[writes]);
        assert_eq!(
            (&line["good"], &line["check"]["writable"]),
            (&true.into(), &true.into())
        );
        assert!(said.contains("works on a copy"), "{said}");
        assert!(is_good(second) && is_good(third));

        // One that shares nothing, in place.
        let full = lab.checkpoint(&["--full"]);
        let full = full.verified();
        let (line, said) = verify_with(&lab, full.id(), &["true"]);
        assert_eq!(
            (&line["good"], &line["check"]["writable"]),
            (&true.into(), &false.into())
        );
        assert!(!said.contains("works on a copy"), "{said}");
        // Longer, and of the same size.
        for writes in [
            writes,
            "printf y | dd of=\"$SNAPSHIM_ROOT/d/f4\" conv=notrunc",
        ] {
            let (line, _) = verify_with(&lab, full.id(), &[writes]);
            assert_eq!(
                (&line["good"], &line["check"]["passed"]),
                (&false.into(), &false.into())
            );
        }
        assert!(is_good(second) && is_good(third));
    }
}

/// Names that come and go while a command looks at a snapshot are no change of it.
#[test]
fn names_that_come_and_go_are_no_damage() {
    let _alone = lab::serial();
    let Some(lab) = quiet(Fs::Xfs) else { return };
    let first = lab.checkpoint(&[]);
    let first = first.verified();
    let looks_at = |id: &str, options: &[&str], meanwhile: &dyn Fn(&Path)| {
        let (flag, go) = (lab.beside("looks"), lab.beside("goes"));
        for file in [&flag, &go] {
            let _ = fs::remove_file(file);
        }
        let line = format!(
            "touch '{}'; while ! test -e '{}'; do sleep 0.02; done",
            flag.display(),
            go.display()
        );
        std::thread::scope(|scope| {
            let id = id.to_owned();
            let lab = &lab;
            let verify =
                scope.spawn(move || verify_with(lab, &id, &[&[line.as_str()], options].concat()).0);
            let began = || flag.exists();
            assert!(process::wait_until(Duration::from_secs(20), began));
            meanwhile(&flag);
            fs::write(&go, "").unwrap();
            verify.join().unwrap()
        })
    };
    let links = |certificate: &Certificate| {
        fs::metadata(certificate.copy_of(&lab.data().join("d/f3")))
            .unwrap()
            .nlink()
    };
    let delete = |id: &str| {
        let delete = lab.snapshim(&["delete", lab.set(), id]);
        process::run(delete, Duration::from_secs(60)).ok("delete");
    };
    // One comes.
    let line = looks_at(first.id(), &[], &|_| {
        assert_eq!(lab.checkpoint(&[]).verified().capture(), "shared");
    });
    assert_eq!(links(first), 2);
    assert_eq!(
        (&line["good"], &line["check"]["writable"]),
        (&true.into(), &false.into())
    );
    // One goes.
    let second = lab.stored().pop().unwrap().1.id().to_owned();
    let line = looks_at(&second, &[], &|_| delete(first.id()));
    assert_eq!(
        (&line["good"], &line["check"]["writable"]),
        (&true.into(), &true.into())
    );
    // One comes and goes.
    let line = looks_at(&second, &[], &|_| {
        let third = lab.checkpoint(&[]);
        assert_eq!(third.verified().capture(), "shared");
        delete(third.verified().id());
    });
    assert_eq!(
        (&line["good"], &line["check"]["writable"]),
        (&true.into(), &false.into())
    );
    // A write in the middle of it is noticed.
    let tree = lab.stored()[0].0.join("tree");
    let copy = tree.join(lab.data().join("d/f3").strip_prefix("/").unwrap());
    let line = looks_at(&second, &[], &|_| {
        lab.checkpoint(&[]).verified();
        fs::write(&copy, vec![b'y'; 30_000]).unwrap();
    });
    assert_eq!(
        (&line["good"], &line["check"]["passed"]),
        (&false.into(), &false.into())
    );
}
