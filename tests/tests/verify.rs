//! Digests, `snapshim verify`, and commands that a snapshot has to pass.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use snapshim_tests::process::{self, Ended};
use snapshim_tests::{Certificate, Fs, Lab, Outcome, Random, lab};

const LIMIT: Duration = Duration::from_secs(120);

/// A snapshot of this test's data, without a set.
#[track_caller]
fn snap(lab: &Lab, options: &[&str]) -> Outcome {
    let mut command = lab.snapshim(&["snap", "--json", "--name", lab.set(), "--store"]);
    command.arg(lab.store()).args(options).arg(lab.data());
    lab::outcome(process::run(command, Duration::from_secs(60)))
}

#[track_caller]
fn verify(lab: &Lab, options: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["verify", lab.set(), "--store"]);
    command.arg(lab.store()).args(options);
    process::run(command, Duration::from_secs(60))
}

/// `verify --json` and its exit code.
#[track_caller]
fn verified(lab: &Lab, options: &[&str]) -> (i32, Value) {
    let ended = verify(lab, &[&["--json"], options].concat());
    let value = serde_json::from_str(&ended.out())
        .unwrap_or_else(|e| panic!("not one JSON object: {e}\n{}\n{}", ended.out(), ended.err()));
    (ended.code(), value)
}

/// What was found of the only snapshot looked at: path and what, sorted.
#[track_caller]
fn damage(lab: &Lab, options: &[&str]) -> Vec<(String, String)> {
    let (code, report) = verified(lab, options);
    let found = report["snapshots"][0]["damage"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let found: Vec<_> = found
        .map(|d| (text(&d["path"]), text(&d["what"])))
        .collect();
    assert_eq!(code, i32::from(!found.is_empty()), "{report:#}");
    assert_eq!(report["good"], found.is_empty());
    found
}

fn latest(lab: &Lab) -> Option<String> {
    let target = fs::read_link(lab.store().join(lab.set()).join("latest")).ok()?;
    Some(target.to_str().unwrap().to_owned())
}

/// The digest in a manifest of the file that is `live` in the live tree.
#[track_caller]
fn recorded(certificate: &Certificate, live: &Path) -> String {
    let files = certificate.0["files"].as_array().unwrap();
    let file = files.iter().find(|f| f["path"] == live.to_str().unwrap());
    file.unwrap()["digest"]
        .as_str()
        .unwrap_or("none")
        .to_owned()
}

/// The digest of a file by the plain function.
fn plain(path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut fs::File::open(path).unwrap(), &mut hasher).unwrap();
    format!("blake3:{}", hasher.finalize().to_hex())
}

/// Every digest in a certificate against the plain function over the copy.
#[track_caller]
fn check_digests(certificate: &Certificate) -> usize {
    let mut count = 0;
    for file in certificate.0["files"].as_array().unwrap() {
        if file["kind"] != "file" {
            assert!(file["digest"].is_null(), "{file}");
            continue;
        }
        let live = Path::new(file["path"].as_str().unwrap());
        let copy = certificate.copy_of(live);
        assert_eq!(file["digest"], plain(&copy), "{}", live.display());
        count += 1;
    }
    count
}

fn fill(path: &Path, seed: u64, bytes: usize) {
    let mut random = Random(seed);
    let content: Vec<u8> = (0..bytes.div_ceil(8))
        .flat_map(|_| random.number().to_le_bytes())
        .take(bytes)
        .collect();
    fs::write(path, content).unwrap();
}

/// Waits until a stat would tell a change from what was before.
fn next_tick() {
    std::thread::sleep(Duration::from_millis(20));
}

#[test]
fn only_what_changed_is_hashed_again_xfs() {
    only_what_changed_is_hashed_again(Fs::Xfs);
}

#[test]
fn only_what_changed_is_hashed_again_btrfs() {
    only_what_changed_is_hashed_again(Fs::Btrfs);
}

fn only_what_changed_is_hashed_again(kind: Fs) {
    const MIB: u64 = 1 << 20;
    let Some(lab) = Lab::new("rehash", kind, LIMIT) else {
        return;
    };
    let big = lab.data().join("big");
    fill(&big, 1, 256 << 20);
    fill(&lab.data().join("medium"), 2, 700_000);
    fill(&lab.data().join("small"), 3, 100);
    fs::hard_link(&big, lab.data().join("hard")).unwrap();
    let hashed = |outcome: &Outcome| outcome.certificate().0["hashed_bytes"].as_u64().unwrap();

    let first = snap(&lab, &[]);
    assert_eq!(first.certificate().capture(), "reflink");
    assert_eq!(check_digests(first.verified()), 4);
    assert_eq!(
        hashed(&first),
        256 * MIB + 700_000 + 100,
        "a hard link, once"
    );

    // Nothing changed: all is shared, and with it the digests; else what is too small to be looked
    // up is hashed.
    let shared = snap(&lab, &[]);
    assert_eq!(hashed(&shared), 0);
    let same = snap(&lab, &["--full"]);
    assert_eq!(hashed(&same), 100);
    assert_eq!(recorded(same.verified(), &big), plain(&big));

    // 4 KiB in the middle; both the writer's and the neighbouring chunk, if it is on the edge.
    let file = fs::OpenOptions::new().write(true).open(&big).unwrap();
    file.write_all_at(&[7; 4096], 100 * MIB + 512 * 1024)
        .unwrap();
    let changed = snap(&lab, &[]);
    println!(
        "{}: 4 KiB changed in 256 MiB: {} bytes hashed, in all {:?}",
        kind.name(),
        hashed(&changed),
        changed.wall
    );
    assert_eq!(hashed(&changed), MIB + 100);
    assert_eq!(recorded(changed.verified(), &big), plain(&big));
    assert_ne!(
        recorded(changed.verified(), &big),
        recorded(same.certificate(), &big)
    );

    // Longer, shorter, and shorter by less than a chunk.
    for length in [260 * MIB + 5, 130 * MIB + 4096, 130 * MIB - 4096, 130 * MIB] {
        file.set_len(length).unwrap();
        let outcome = snap(&lab, &[]);
        assert_eq!(recorded(outcome.verified(), &big), plain(&big), "{length}");
        assert!(
            hashed(&outcome) <= 6 * MIB,
            "{length}: {}",
            hashed(&outcome)
        );
    }
    // A new file in its place has the same name and size.
    fill(&lab.data().join("new"), 4, 130 << 20);
    fs::rename(lab.data().join("new"), &big).unwrap();
    let replaced = snap(&lab, &[]);
    assert_eq!(recorded(replaced.verified(), &big), plain(&big));
    assert!(hashed(&replaced) >= 130 * MIB);
    assert_eq!(check_digests(replaced.certificate()), 4);

    let (code, report) = verified(&lab, &["--all"]);
    assert_eq!(code, 0, "{report:#}");
}

/// Of a snapshot that was written to, nothing is believed: a clone of it shares extents with
/// it, whose digests are of what was there before.
#[test]
fn a_predecessor_that_was_written_to_is_not_believed() {
    let Some(lab) = Lab::new("tampered", Fs::Xfs, LIMIT) else {
        return;
    };
    let live = lab.data().join("file");
    fill(&live, 1, 8 << 20);
    let first = snap(&lab, &[]);
    let copy = first.verified().copy_of(&live);
    next_tick();
    let file = fs::OpenOptions::new().write(true).open(&copy).unwrap();
    file.write_all_at(b"tampered", 3 << 20).unwrap();
    file.sync_all().unwrap();
    // The live file becomes a clone of it.
    snapshim_tests::tree::copy_plainly(&copy, &live).unwrap();
    let second = snap(&lab, &[]);
    assert_eq!(recorded(second.verified(), &live), plain(&live));
    assert_eq!(damage(&lab, &[second.certificate().id()]), []);
}

#[test]
fn digests_without_reflink() {
    for kind in [Fs::Ext4, Fs::Tmpfs] {
        let Some(lab) = Lab::new(&format!("digests-{}", kind.name()), kind, LIMIT) else {
            continue;
        };
        for (i, size) in [0, 1, 1023, 1 << 20, (1 << 20) + 1, 5_000_000]
            .iter()
            .enumerate()
        {
            fill(&lab.data().join(format!("file{i}")), i as u64, *size);
        }
        let sparse = fs::File::create(lab.data().join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        sparse.write_all_at(b"middle", 33 << 20).unwrap();
        let outcome = snap(&lab, &[]);
        assert_eq!(check_digests(outcome.verified()), 7);
        assert_eq!(damage(&lab, &[]), []);
    }
}

#[test]
fn every_kind_of_damage_is_named() {
    let Some(lab) = Lab::new("damage", Fs::Xfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    for name in [
        "flip", "short", "long", "gone", "mode", "owner", "time", "kind", "a", "fine",
    ] {
        fill(&data.join(name), 9, 3_000_000);
    }
    fs::hard_link(data.join("a"), data.join("b")).unwrap();
    fs::create_dir_all(data.join("dir/deep")).unwrap();
    fill(&data.join("dir/deep/file"), 5, 10);
    symlink("fine", data.join("link")).unwrap();
    fs::create_dir(data.join("lost")).unwrap();
    fill(&data.join("lost/below"), 5, 10);
    let outcome = snap(&lab, &[]);
    let certificate = outcome.verified();
    assert_eq!(damage(&lab, &[]), []);
    assert_eq!(latest(&lab).as_deref(), Some(certificate.id()));

    let at = |name: &str| certificate.copy_of(&data.join(name));
    let open = |name: &str| fs::OpenOptions::new().write(true).open(at(name)).unwrap();
    // Damage moves no time: it is put back.
    let change = |name: &str, change: &dyn Fn(&fs::File)| {
        let before = fs::metadata(at(name)).unwrap().modified().unwrap();
        let file = open(name);
        change(&file);
        file.set_modified(before).unwrap();
    };
    change("flip", &|file| {
        let mut byte = [0];
        fs::File::open(at("flip"))
            .unwrap()
            .read_exact_at(&mut byte, 2_000_001)
            .unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], 2_000_001).unwrap();
    });
    change("short", &|file| file.set_len(2_999_999).unwrap());
    change("long", &|file| file.set_len(3_000_001).unwrap());
    fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(at("owner"), Some(4711), None).unwrap();
    open("time").set_modified(std::time::UNIX_EPOCH).unwrap();
    // In directories, whose times move with it.
    let times: Vec<_> = ["", "dir", "lost"]
        .map(|d| fs::metadata(at(d)).unwrap().modified().unwrap())
        .into();
    fs::remove_file(at("gone")).unwrap();
    fs::remove_file(at("kind")).unwrap();
    nix::unistd::mkfifo(&at("kind"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::remove_file(at("link")).unwrap();
    symlink("/etc/passwd", at("link")).unwrap();
    fs::copy(at("a"), at("b.new")).unwrap();
    fs::rename(at("b.new"), at("b")).unwrap();
    fill(&at("dir/extra"), 1, 1);
    fs::create_dir(at("more")).unwrap();
    fill(&at("more/not-entered"), 1, 1);
    fs::remove_dir_all(at("lost")).unwrap();
    for (name, time) in ["", "dir"].iter().zip(times) {
        fs::File::open(at(name))
            .unwrap()
            .set_modified(time)
            .unwrap();
    }

    let expected = [
        ("b", "link"),
        ("b", "mtime"),
        ("dir/extra", "extra"),
        ("flip", "content"),
        ("gone", "missing"),
        ("kind", "kind"),
        ("link", "mtime"),
        ("link", "target"),
        ("long", "size"),
        ("lost", "missing"),
        ("lost/below", "missing"),
        ("mode", "mode"),
        ("more", "extra"),
        ("owner", "owner"),
        ("short", "size"),
        ("time", "mtime"),
    ];
    let place = |name: &str| data.join(name).to_str().unwrap().to_owned();
    let expected: Vec<_> = expected
        .map(|(name, what)| (place(name), what.to_owned()))
        .into();
    let sorted = |mut found: Vec<(String, String)>| {
        found.sort();
        found
    };
    // What the bytes are is not looked at quickly; all else is.
    let mut quick = expected.clone();
    quick.retain(|(_, what)| what != "content");
    assert_eq!(sorted(damage(&lab, &["--quick", certificate.id()])), quick);
    assert_eq!(sorted(damage(&lab, &[certificate.id()])), expected);
    let text = verify(&lab, &[certificate.id()]).out();
    assert!(
        text.contains(&format!("{}: content: expected blake3:", place("flip"))),
        "{text}"
    );

    // It is marked, and nothing is the latest any more.
    let manifest = &lab.stored()[0].1;
    assert!(!manifest.is_verified());
    assert_eq!(manifest.reasons().len(), 1);
    let (code, text) = &manifest.reasons()[0];
    assert_eq!(code, "damaged-content");
    assert!(text.contains(&place("b")), "{text}");
    assert_eq!(manifest.0["checks"][0]["kind"], "content");
    assert_eq!(manifest.0["checks"][0]["damaged"], expected.len());
    assert_eq!(latest(&lab), None);
}

#[test]
fn a_damaged_snapshot_is_not_the_latest_until_it_is_whole_again() {
    let Some(lab) = Lab::new("marked", Fs::Btrfs, LIMIT) else {
        return;
    };
    let live = lab.data().join("file");
    fill(&live, 1, 2 << 20);
    let older = snap(&lab, &[]);
    // With a copy of its own.
    let newer = snap(&lab, &["--full"]);
    let (older, newer) = (older.verified(), newer.verified());
    let copy = newer.copy_of(&live);
    let before = fs::metadata(&copy).unwrap().modified().unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .read(true)
        .open(&copy)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 77).unwrap();
    let put = |value: u8| {
        file.write_all_at(&[value], 77).unwrap();
        file.set_modified(before).unwrap();
    };
    put(!byte[0]);

    let (code, report) = verified(&lab, &["--all"]);
    assert_eq!((code, &report["good"]), (1, &Value::Bool(false)));
    assert_eq!(report["snapshots"][0]["good"], true, "{report:#}");
    assert_eq!(report["snapshots"][1]["good"], false);
    assert_eq!(report["snapshots"][1]["marked"], true);
    assert_eq!(latest(&lab).as_deref(), Some(older.id()));
    // A quick look finds nothing, and takes nothing back.
    assert_eq!(damage(&lab, &[newer.id(), "--quick"]), []);
    assert_eq!(latest(&lab).as_deref(), Some(older.id()));
    // Found again, it is said once.
    assert_eq!(damage(&lab, &[newer.id()]).len(), 1);
    assert_eq!(lab.stored()[1].1.reasons().len(), 1);

    put(byte[0]);
    assert_eq!(damage(&lab, &[newer.id()]), []);
    assert_eq!(latest(&lab).as_deref(), Some(newer.id()));
    let manifest = &lab.stored()[1].1;
    assert!(manifest.is_verified() && manifest.reasons().is_empty());
    // The other was never touched.
    assert!(lab.stored()[0].1.0.get("checks").is_none());
}

#[test]
fn without_digests_it_says_what_was_not_checked() {
    let Some(lab) = Lab::new("undigested", Fs::Xfs, LIMIT) else {
        return;
    };
    let live = lab.data().join("file");
    fill(&live, 1, 2 << 20);
    let outcome = snap(&lab, &["--no-digest"]);
    let certificate = outcome.verified();
    assert_eq!(recorded(certificate, &live), "none");
    assert!(certificate.0.get("hashed_bytes").is_none());
    let (code, report) = verified(&lab, &[]);
    assert_eq!(
        (code, &report["snapshots"][0]["unchecked"]),
        (0, &Value::from(1))
    );
    let text = verify(&lab, &[]).out();
    assert!(
        text.contains("the content of 1 files was not checked"),
        "{text}"
    );
    fs::OpenOptions::new()
        .write(true)
        .open(certificate.copy_of(&live))
        .unwrap()
        .set_len(1)
        .unwrap();
    assert!(damage(&lab, &[]).contains(&(live.to_str().unwrap().into(), "size".into())));
}

#[test]
fn which_snapshot_is_meant() {
    let Some(lab) = Lab::new("which", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let none = verify(&lab, &[]);
    assert_eq!(none.code(), 1);
    fill(&lab.data().join("file"), 1, 10);
    let first = snap(&lab, &[]);
    let second = snap(&lab, &[]);
    let ids = |options: &[&str]| -> Vec<String> {
        let (_, report) = verified(&lab, options);
        let lines = report["snapshots"].as_array().unwrap().iter();
        lines
            .map(|line| line["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let (first, second) = (first.verified().id(), second.verified().id());
    assert_eq!(ids(&[]), [second]);
    assert_eq!(ids(&["latest"]), [second]);
    assert_eq!(ids(&[first]), [first]);
    assert_eq!(ids(&["--all"]), [first, second]);
    assert_eq!(verify(&lab, &["--all", first]).code(), 2);
    assert_eq!(verify(&lab, &["2031"]).code(), 1);
    // Without the set's name.
    let mut command = lab.snapshim(&["verify", first, "--store"]);
    command.arg(lab.store());
    let ended = process::run(command, Duration::from_secs(60)).ok("verify ID");
    assert!(ended.out().starts_with(first), "{}", ended.out());
}

/// The only check in a certificate.
#[track_caller]
fn check(certificate: &Certificate) -> &Value {
    let checks = certificate.0["checks"].as_array().expect("checks");
    assert_eq!(checks.len(), 1);
    &checks[0]
}

#[test]
fn a_command_decides() {
    let Some(lab) = Lab::new("command", Fs::Xfs, LIMIT) else {
        return;
    };
    fill(&lab.data().join("file"), 1, 1000);
    // A program, by its path: the tree is its argument, and there is no shell.
    let script = lab.beside("check.sh");
    let seen = lab.beside("seen");
    let text = format!(
        "#!/bin/sh\nset -e\n{{ echo \"$# $1\"; env; }} > '{}'\ntest ! -t 0\ntest -f \"$SNAPSHIM_ROOT/file\"\necho to stdout\necho to stderr >&2\n",
        seen.display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let outcome = snap(&lab, &["--verify", script.to_str().unwrap()]);
    let good = outcome.verified();
    let draft = lab
        .store()
        .join(lab.set())
        .join(format!(".tmp-{}", good.id()))
        .join("tree");
    let seen = fs::read_to_string(&seen).unwrap();
    let draft_data = draft.join(lab.data().strip_prefix("/").unwrap());
    assert!(
        seen.starts_with(&format!("1 {}\n", draft.display())),
        "{seen}"
    );
    for line in [
        format!("SNAPSHIM_PATH={}", draft.display()),
        format!("SNAPSHIM_ROOT={}", draft_data.display()),
        format!("SNAPSHIM_ID={}", good.id()),
        format!("SNAPSHIM_SET={}", lab.set()),
    ] {
        assert!(seen.lines().any(|l| l == line), "{line}\n{seen}");
    }
    assert!(
        !seen.contains("LD_PRELOAD") && !seen.contains("SNAPSHIM_GATE"),
        "{seen}"
    );
    assert!(outcome.stderr.contains("to stdout") && outcome.stderr.contains("to stderr"));
    let passed = check(good);
    assert_eq!(
        (&passed["kind"], &passed["passed"]),
        (&"command".into(), &true.into())
    );
    assert_eq!(passed["status"], 0);
    assert!(passed.get("output").is_none(), "{passed}");

    // A line for the shell, with the tree as $1. It fails: published, but not the latest.
    let line = "test -d \"$1\" && echo why it is bad; exit 3";
    let outcome = snap(&lab, &["--verify", line, "--keep-last", "1"]);
    let bad = outcome.unverified();
    let failed = check(bad);
    assert_eq!(
        (&failed["passed"], &failed["status"]),
        (&false.into(), &3.into())
    );
    assert_eq!(failed["output"], "why it is bad\n");
    assert_eq!(failed["command"], line);
    let (code, text) = &bad.reasons()[0];
    assert_eq!(code, "verify-command");
    assert!(
        text.contains("status 3") && text.contains("why it is bad"),
        "{text}"
    );
    assert_eq!(latest(&lab).as_deref(), Some(good.id()));
    assert_eq!(lab.stored().len(), 2, "the good one was not pushed out");
    assert!(bad.tree().is_dir());

    let outcome = snap(&lab, &["--verify", "kill -SEGV $$"]);
    assert_eq!(check(outcome.unverified())["signal"], 11);
    let outcome = snap(&lab, &["--verify", "/no/such/program"]);
    assert_eq!(check(outcome.unverified())["status"], 127);
    assert_eq!(latest(&lab).as_deref(), Some(good.id()));

    // On one that is published; a failed check is taken back by the same command.
    let flag = lab.beside("flag");
    let line = format!("test -e '{}'", flag.display());
    let (code, report) = verified(&lab, &["--verify", &line]);
    assert_eq!((code, &report["good"]), (1, &Value::Bool(false)));
    assert_eq!(report["snapshots"][0]["check"]["status"], 1);
    assert_eq!(latest(&lab), None);
    assert_eq!(verified(&lab, &[good.id(), "--verify", "true"]).0, 0);
    assert_eq!(latest(&lab), None, "another command's word does not count");
    fs::write(&flag, "").unwrap();
    assert_eq!(verified(&lab, &[good.id(), "--verify", &line]).0, 0);
    assert_eq!(latest(&lab).as_deref(), Some(good.id()));
}

#[test]
fn a_command_that_takes_too_long_is_ended_with_all_its_children() {
    let Some(lab) = Lab::new("too-long", Fs::Tmpfs, LIMIT) else {
        return;
    };
    fill(&lab.data().join("file"), 1, 10);
    let pids = lab.beside("pids");
    let line = format!("sleep 600 & echo $$ $! > '{}'; wait", pids.display());
    let outcome = snap(&lab, &["--verify", &line, "--verify-timeout", "400ms"]);
    let timed_out = check(outcome.unverified());
    assert_eq!(timed_out["timed_out"], true);
    assert!(timed_out["ms"].as_u64().unwrap() >= 400, "{timed_out}");
    assert!(
        outcome.certificate().reasons()[0]
            .1
            .contains("--verify-timeout")
    );
    let pids = fs::read_to_string(pids).unwrap();
    let pids: Vec<i32> = pids
        .split_whitespace()
        .map(|p| p.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 2);
    let ended = |pid: i32| matches!(process::state(pid), None | Some('Z'));
    let gone = process::wait_until(Duration::from_secs(10), || pids.iter().all(|p| ended(*p)));
    assert!(gone, "{pids:?}");
}

#[test]
fn a_command_that_changes_the_snapshot_has_to_say_so() {
    for kind in [Fs::Xfs, Fs::Ext4] {
        let Some(lab) = Lab::new(&format!("changes-{}", kind.name()), kind, LIMIT) else {
            continue;
        };
        let data = lab.data();
        fill(&data.join("file"), 1, 2_000_000);
        fs::hard_link(data.join("file"), data.join("hard")).unwrap();
        symlink("file", data.join("link")).unwrap();
        nix::unistd::mkfifo(&data.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        std::os::unix::fs::chown(data.join("file"), Some(12), Some(34)).unwrap();
        for (line, named) in [
            ("touch \"$SNAPSHIM_ROOT/new\"", "new"),
            ("printf x >> \"$SNAPSHIM_ROOT/file\"", "file"),
            ("chmod 600 \"$SNAPSHIM_ROOT/file\"", "file"),
            ("rm \"$SNAPSHIM_ROOT/link\"", "link"),
        ] {
            let outcome = snap(&lab, &["--verify", line]);
            let (code, text) = &outcome.unverified().reasons()[0];
            let path = data.join(named);
            assert_eq!(code, "verify-command");
            assert!(text.contains(path.to_str().unwrap()), "{text}");
            assert!(text.contains("--writable"), "{text}");
        }
        // On a copy, which has all of it, and is gone afterwards.
        let line = "set -e; cd \"$SNAPSHIM_ROOT\"; test file -ef hard; test -p fifo; \
                    test \"$(readlink link)\" = file; test \"$(stat -c %u:%g file)\" = 12:34; \
                    printf x >> file; rm link; pwd > pwd; cat pwd; exit 9";
        let outcome = snap(&lab, &["--writable", "--verify", line]);
        let certificate = outcome.unverified();
        assert_eq!(check(certificate)["status"], 9, "{certificate:?}");
        let place = PathBuf::from(check(certificate)["output"].as_str().unwrap().trim());
        assert!(
            place.starts_with(lab.store()) && !place.exists(),
            "{place:?}"
        );
        assert_eq!(damage(&lab, &[certificate.id()]), []);
        let names = fs::read_dir(lab.store().join(lab.set())).unwrap().flatten();
        for name in names.map(|entry| entry.file_name()) {
            assert!(!name.to_str().unwrap().starts_with(".tmp-"), "{name:?}");
        }
        // And on one that is published.
        let line = "rm \"$SNAPSHIM_ROOT/file\"";
        let (code, report) = verified(&lab, &["--writable", "--verify", line, certificate.id()]);
        assert_eq!(code, 0, "{report:#}");
        assert_eq!(damage(&lab, &[certificate.id()]), []);
    }
}

/// A database whose writer was killed in the middle of a transaction is recovered by whoever
/// opens it next: on a copy, not in the snapshot.
#[test]
fn a_database_recovers_on_a_copy() {
    let Some(lab) = Lab::new("recovery", Fs::Xfs, LIMIT) else {
        return;
    };
    let db = lab.data().join("db");
    let script = "import os, sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute('create table t(n integer, x)')
c.execute('begin')
c.executemany('insert into t values(?, zeroblob(500))', ((i,) for i in range(5000)))
c.execute('commit')
c.execute('pragma cache_size=5')
c.execute('begin')
c.execute('update t set n = n + 1000000')
os.kill(os.getpid(), 9)
";
    let mut command = lab.command_with("python3", &["-c", script]);
    command.arg(&db);
    assert_eq!(
        process::run(command, Duration::from_secs(60)).code(),
        128 + 9
    );
    assert!(lab.data().join("db-journal").exists(), "no hot journal");
    let line = "set -e; test \"$(sqlite3 \"$SNAPSHIM_ROOT/db\" 'pragma integrity_check')\" = ok; \
                test \"$(sqlite3 \"$SNAPSHIM_ROOT/db\" 'select max(n) from t')\" = 4999";
    let outcome = snap(&lab, &["--verify", line]);
    let (_, text) = &outcome.unverified().reasons()[0];
    assert!(
        text.contains("changed") && text.contains("--writable"),
        "{text}"
    );
    let outcome = snap(&lab, &["--writable", "--verify", line]);
    let certificate = outcome.verified();
    assert!(certificate.copy_of(&lab.data().join("db-journal")).exists());
    assert_eq!(check(certificate)["writable"], true);
    assert_eq!(latest(&lab).as_deref(), Some(certificate.id()));
}

#[test]
fn a_set_keeps_its_command() {
    let Some(lab) = Lab::new("kept", Fs::Xfs, LIMIT) else {
        return;
    };
    fill(&lab.data().join("file"), 1, 10);
    let flag = lab.beside("flag");
    let line = format!("test -e '{}'", flag.display());
    let options = ["--verify", &line, "--verify-timeout", "1m", "--writable"];
    let mut idle = lab.run(&options, Path::new("/bin/sleep"), &["600"]);
    let has_gate = || lab.gate().exists();
    assert!(process::wait_until(Duration::from_secs(30), has_gate));
    assert_eq!(check(lab.checkpoint(&[]).unverified())["writable"], true);
    // Another one, and none.
    assert_eq!(
        check(lab.checkpoint(&["--verify", "true"]).verified())["writable"],
        false
    );
    let none = lab.checkpoint(&["--verify", ""]);
    assert!(none.verified().0.get("checks").is_none());
    fs::write(&flag, "").unwrap();
    assert_eq!(check(lab.checkpoint(&[]).verified())["command"], line);
    idle.end();
}

#[test]
fn run_says_in_one_line_that_a_command_failed() {
    let Some(lab) = Lab::new("every", Fs::Xfs, LIMIT) else {
        return;
    };
    fill(&lab.data().join("file"), 1, 10);
    let good = snap(&lab, &[]);
    let good = good.verified().id();
    let options = [
        "--every",
        "300ms",
        "--verify",
        "echo much; echo more; exit 4",
    ];
    let ended = lab
        .run(&options, Path::new("/bin/sleep"), &["2"])
        .wait(Duration::from_secs(60));
    assert_eq!(ended.code(), 0);
    let stderr = ended.err();
    let stored = lab.stored();
    assert!(stored.len() > 1, "{stderr}");
    for (path, certificate) in &stored {
        if certificate.id() == good {
            continue;
        }
        let of_it: Vec<&str> = stderr
            .lines()
            .filter(|l| l.contains(certificate.id()))
            .collect();
        assert_eq!(of_it.len(), 1, "{}: {stderr}", path.display());
        assert!(of_it[0].contains("status 4"), "{stderr}");
        assert_eq!(check(certificate)["output"], "much\nmore\n");
    }
    assert_eq!(stderr.lines().count(), stored.len() - 1, "{stderr}");
    assert_eq!(latest(&lab).as_deref(), Some(good));
}

#[test]
fn run_ends_although_a_command_hangs() {
    let Some(lab) = Lab::new("hangs", Fs::Xfs, LIMIT) else {
        return;
    };
    fill(&lab.data().join("file"), 1, 10);
    let pid = lab.beside("pid");
    let line = format!("trap '' TERM; echo $$ > '{}'; sleep 600", pid.display());
    let begun = Instant::now();
    let ended = lab
        .run(
            &["--every", "200ms", "--verify", &line],
            Path::new("/bin/sleep"),
            &["1"],
        )
        .wait(Duration::from_secs(60));
    assert_eq!(ended.code(), 0, "{}", ended.err());
    println!(
        "run ended {:?} after it began, its program after 1 s",
        begun.elapsed()
    );
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    let pid: i32 = fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    assert!(matches!(process::state(pid), None | Some('Z')));
    // What it was about is kept, as what was not verified.
    let stored = lab.stored();
    assert_eq!(stored.len(), 1);
    let (code, text) = &stored[0].1.reasons()[0];
    assert_eq!(code, "verify-command");
    assert!(text.contains("the program ended"), "{text}");
    assert_eq!(latest(&lab), None);
}

/// What a killed command left to write to goes with the next snapshot, but never while
/// somebody is at work in it.
#[test]
fn copies_to_write_to_are_swept_when_nobody_uses_them() {
    let Some(lab) = Lab::new("swept", Fs::Xfs, LIMIT) else {
        return;
    };
    fill(&lab.data().join("file"), 1, 1_000_000);
    let outcome = snap(&lab, &[]);
    let id = outcome.verified().id();
    let copies = || -> Vec<PathBuf> {
        let names = fs::read_dir(lab.store().join(lab.set())).unwrap().flatten();
        let is_copy = |path: &PathBuf| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(".tmp-verify-")
        };
        names.map(|entry| entry.path()).filter(is_copy).collect()
    };
    let go = lab.beside("go");
    let line = format!(
        "while test ! -e '{}'; do sleep 0.05; done; test -f \"$SNAPSHIM_ROOT/file\"",
        go.display()
    );
    let start = || {
        let mut command = lab.snapshim(&["verify", lab.set(), id, "--writable"]);
        command
            .args(["--verify", &line, "--store"])
            .arg(lab.store());
        let proc = process::Proc::piped(command);
        let has_copy = || copies().iter().any(|dir| find(dir, "file"));
        assert!(process::wait_until(Duration::from_secs(30), has_copy));
        proc
    };
    let mut killed = start();
    killed.signal(nix::sys::signal::Signal::SIGKILL);
    drop(killed);
    assert_eq!(copies().len(), 1, "the kill left nothing to sweep");
    let swept = snap(&lab, &[]);
    swept.verified();
    assert_eq!(copies(), [] as [PathBuf; 0]);
    assert!(swept.stderr.contains(".tmp-verify-"), "{}", swept.stderr);

    let at_work = start();
    snap(&lab, &[]).verified();
    assert_eq!(copies().len(), 1, "taken away from under a command");
    fs::write(&go, "").unwrap();
    at_work.wait(Duration::from_secs(30)).ok("verify");
    assert_eq!(copies(), [] as [PathBuf; 0]);
}

/// Whether there is a file of that name somewhere below, complete.
fn find(dir: &Path, name: &str) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| match path.symlink_metadata() {
            Ok(meta) if meta.is_dir() => find(&path, name),
            Ok(meta) => path.ends_with(name) && meta.size() > 0,
            Err(_) => false,
        })
}
