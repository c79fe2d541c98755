//! `diff` and `show ID:PATH`: what differs, exactly, as comparing every byte of both trees
//! finds it; between snapshots, and from the live files.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use snapshim_tests::process::{self, Ended, run, tool};
use snapshim_tests::{Certificate, Fs, Lab, Random, rounds};

const LIMIT: Duration = Duration::from_secs(120);
const KINDS: [Fs; 3] = [Fs::Xfs, Fs::Btrfs, Fs::Ext4];

/// A set without programs: nobody writes but the test.
fn lab(name: &str, fs_kind: Fs, options: &[&str]) -> Option<Lab> {
    let lab = Lab::new(name, fs_kind, Duration::from_secs(300))?;
    lab.env(options);
    Some(lab)
}

fn diff(lab: &Lab, args: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["diff"]);
    command.args(args);
    run(command, LIMIT)
}

#[track_caller]
fn json(lab: &Lab, args: &[&str]) -> Value {
    let ended = diff(lab, &[args, &["--json"]].concat()).ok("diff --json");
    serde_json::from_slice(&ended.stdout).expect("one JSON object")
}

/// The bytes of a path in `--json`.
fn path_of(entry: &Value) -> PathBuf {
    match entry["path_hex"].as_str() {
        Some(hex) => {
            let byte = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
            OsString::from_vec((0..hex.len()).step_by(2).map(byte).collect()).into()
        }
        None => entry["path"].as_str().unwrap().into(),
    }
}

fn entries(report: &Value) -> BTreeMap<PathBuf, Value> {
    let entries = report["entries"].as_array().expect("entries");
    let map: BTreeMap<_, _> = entries.iter().map(|e| (path_of(e), e.clone())).collect();
    assert_eq!(map.len(), entries.len(), "a path stands twice");
    map
}

/// Where two files differ, byte by byte: blocks of 4 KiB of what both have, and what only
/// one has.
fn expected_ranges(a: &[u8], b: &[u8]) -> Vec<(u64, u64)> {
    let common = a.len().min(b.len());
    let mut differs = vec![false; a.len().max(b.len())];
    differs[common..].fill(true);
    for i in (0..common).filter(|i| a[*i] != b[*i]) {
        let block = i / 4096 * 4096;
        differs[block..(block + 4096).min(common)].fill(true);
    }
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for i in (0..differs.len()).filter(|i| differs[*i]) {
        match ranges.last_mut() {
            Some((start, length)) if *start + *length == i as u64 => *length += 1,
            _ => ranges.push((i as u64, 1)),
        }
    }
    ranges
}

/// Changes a file in one of many ways.
fn mutate(path: &Path, random: &mut Random) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let size = file.metadata().unwrap().len();
    for _ in 0..1 + random.below(4) {
        let at = random.below(size.max(1));
        let length = 1 + random.below(9000);
        match random.below(8) {
            0 => file.set_len(random.below(size + 1)).unwrap(),
            1 => file.set_len(size + random.below(20_000)).unwrap(),
            2 => file.write_all_at(b"end", size).unwrap(),
            // The same bytes once more: a new extent, no difference.
            3 | 4 => {
                let mut same = vec![0; length as usize];
                let got = file.read_at(&mut same, at).unwrap();
                file.write_all_at(&same[..got], at).unwrap();
            }
            5 => {
                let args = ["-p", "-o", &at.to_string(), "-l", &length.to_string()];
                tool(
                    "fallocate",
                    &[&args[..], &[path.to_str().unwrap()]].concat(),
                );
            }
            6 => file.write_all_at(&[0], at).unwrap(),
            _ => file
                .write_all_at(&vec![random.number() as u8; length as usize], at)
                .unwrap(),
        }
    }
}

fn exact_ranges(fs_kind: Fs, capture: &str) {
    let name = format!("diff-ranges-{capture}");
    let Some(lab) = lab(&name, fs_kind, &[]) else {
        return;
    };
    let mut random = Random(u64::from(fs_kind.has_reflink()) + 7);
    let count = rounds(400, 60);
    let path = |i: usize| lab.data().join(format!("file-{i}"));
    for i in 0..count {
        let mut bytes = vec![0; random.below(200_000) as usize];
        bytes.iter_mut().for_each(|b| *b = random.number() as u8);
        fs::write(path(i), &bytes).unwrap();
        if random.below(3) == 0 {
            let file = OpenOptions::new().write(true).open(path(i)).unwrap();
            file.set_len(bytes.len() as u64 + 100_000).unwrap();
        }
    }
    let options = ["--capture", capture];
    let a = lab.checkpoint(&options).verified().clone();
    (0..count)
        .filter(|i| i % 5 > 0)
        .for_each(|i| mutate(&path(i), &mut random));
    let live = json(&lab, &["--live", lab.set(), a.id()]);
    let b = lab.checkpoint(&options).verified().clone();
    let between = json(&lab, &[lab.set(), a.id(), b.id()]);
    assert_eq!(live["entries"], between["entries"]);
    assert_eq!(
        (&live["b"], &between["b"]),
        (&Value::Null, &Value::from(b.id()))
    );

    let found = entries(&between);
    let (mut modified, mut rewritten, mut ranges_told) = (0, 0, 0);
    for i in 0..count {
        let read = |of: &Certificate| fs::read(of.copy_of(&path(i))).unwrap();
        let (old, new) = (read(&a), read(&b));
        let expected = expected_ranges(&old, &new);
        let entry = found.get(&path(i));
        let told: Vec<(u64, u64)> = entry
            .and_then(|e| serde_json::from_value(e["ranges"].clone()).ok())
            .unwrap_or_default();
        assert_eq!(
            told,
            expected,
            "{} on {}",
            path(i).display(),
            fs_kind.name()
        );
        if let Some(entry) = entry {
            let bytes: u64 = expected.iter().map(|(_, length)| length).sum();
            let is_modified = !expected.is_empty();
            assert_eq!(entry["change"] == "modified", is_modified, "{entry}");
            assert_eq!(entry["changed_bytes"].as_u64().unwrap_or(0), bytes);
            assert_eq!(entry["size_a"], old.len() as u64);
            assert_eq!(entry["size_b"], new.len() as u64);
            rewritten += usize::from(!is_modified);
        }
        modified += usize::from(!expected.is_empty());
        ranges_told += told.len();
    }
    println!(
        "{} {capture}: {modified} of {count} files modified in {ranges_told} ranges, {rewritten} rewritten with the same bytes, exact",
        fs_kind.name()
    );
    // What proves nothing if it does not happen.
    assert!(modified > count / 3 && rewritten > 0 && ranges_told > modified);
}

#[test]
fn ranges_are_exact() {
    for fs_kind in KINDS {
        exact_ranges(fs_kind, "copy");
        if fs_kind.has_reflink() {
            exact_ranges(fs_kind, "reflink");
        }
    }
}

fn set_xattr(path: &Path, value: &str) {
    tool(
        "setfattr",
        &["-n", "user.colour", "-v", value, path.to_str().unwrap()],
    );
}

fn every_change(fs_kind: Fs) {
    let Some(lab) = lab("diff-changes", fs_kind, &[]) else {
        return;
    };
    let data = lab.data();
    let at = |name: &str| data.join(name);
    let odd = data.join(OsStr::from_bytes(b"odd \xff\xfe\nname"));
    let mode = |name: &str, bits| {
        fs::set_permissions(at(name), fs::Permissions::from_mode(bits)).unwrap();
    };
    for name in [
        "same",
        "changed",
        "gone",
        "mode",
        "mtime",
        "xattr",
        "owner",
        "file-to-dir",
        "file-to-link",
        "file-to-fifo",
        "linked",
        "acl",
    ] {
        fs::write(at(name), format!("{name}\n")).unwrap();
    }
    fs::write(&odd, "odd").unwrap();
    fs::hard_link(at("linked"), at("linked-too")).unwrap();
    fs::hard_link(at("same"), at("same-too")).unwrap();
    for dir in ["dir", "dir-mode", "dir-gone", "dir-xattr"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::write(at("dir-gone/inside"), "x").unwrap();
    symlink("here", at("link")).unwrap();
    symlink("same", at("link-same")).unwrap();
    tool("mkfifo", &[at("fifo").to_str().unwrap()]);
    set_xattr(&at("xattr"), "green");
    set_xattr(&at("same"), "green");
    let a = lab.checkpoint(&[]).verified().clone();

    let none: [&str; 0] = [];
    let nothing = json(&lab, &[a.id()]);
    assert_eq!(
        nothing["entries"],
        serde_json::json!(none),
        "{}",
        fs_kind.name()
    );

    let keep_time = |name: &str, work: &dyn Fn()| {
        let time = fs::metadata(at(name)).unwrap().modified().unwrap();
        work();
        File::open(at(name)).unwrap().set_modified(time).unwrap();
    };
    keep_time("changed", &|| {
        fs::write(at("changed"), "CHANGED\n").unwrap()
    });
    fs::remove_file(at("gone")).unwrap();
    mode("mode", 0o640);
    let file = File::open(at("mtime")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    set_xattr(&at("xattr"), "red");
    set_xattr(&at("dir-xattr"), "red");
    tool("setfacl", &["-m", "u:1234:r", at("acl").to_str().unwrap()]);
    std::os::unix::fs::chown(at("owner"), Some(1234), Some(99)).unwrap();
    for name in ["file-to-dir", "file-to-link", "file-to-fifo"] {
        fs::remove_file(at(name)).unwrap();
    }
    fs::create_dir(at("file-to-dir")).unwrap();
    symlink("same", at("file-to-link")).unwrap();
    tool("mkfifo", &[at("file-to-fifo").to_str().unwrap()]);
    // Another file with the same content and times under the second name.
    let time = fs::metadata(at("linked")).unwrap().modified().unwrap();
    fs::remove_file(at("linked-too")).unwrap();
    fs::write(at("linked-too"), "linked\n").unwrap();
    File::open(at("linked-too"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    fs::write(&odd, "Odd").unwrap();
    fs::write(at("dir/new"), "new").unwrap();
    mode("dir-mode", 0o700);
    fs::remove_dir_all(at("dir-gone")).unwrap();
    fs::remove_file(at("link")).unwrap();
    symlink("there", at("link")).unwrap();

    let live = json(&lab, &[a.id()]);
    let b = lab.checkpoint(&[]).verified().clone();
    let between = json(&lab, &[a.id(), b.id()]);
    assert_eq!(live["entries"], between["entries"]);
    let expected: BTreeMap<PathBuf, (&str, Vec<&str>)> = [
        ("acl", "metadata", vec!["mode", "xattrs"]),
        ("changed", "modified", vec![]),
        ("dir-gone", "removed", vec![]),
        ("dir-gone/inside", "removed", vec![]),
        ("dir-mode", "metadata", vec!["mode"]),
        ("dir-xattr", "metadata", vec!["xattrs"]),
        ("dir/new", "added", vec![]),
        ("file-to-dir", "type", vec![]),
        ("file-to-fifo", "type", vec![]),
        ("file-to-link", "type", vec![]),
        ("gone", "removed", vec![]),
        ("link", "modified", vec!["mtime", "target"]),
        ("linked", "metadata", vec!["links"]),
        ("linked-too", "metadata", vec!["links"]),
        ("mode", "metadata", vec!["mode"]),
        ("mtime", "metadata", vec!["mtime"]),
        ("owner", "metadata", vec!["owner"]),
        ("xattr", "metadata", vec!["xattrs"]),
    ]
    .map(|(name, change, metadata)| (at(name), (change, metadata)))
    .into_iter()
    .chain([(odd.clone(), ("modified", vec!["mtime"]))])
    .collect();
    let found = entries(&between);
    let found: BTreeMap<PathBuf, (&str, Vec<&str>)> = found
        .iter()
        .map(|(path, entry)| {
            let words = entry["metadata"].as_array().unwrap();
            let words = words.iter().map(|word| word.as_str().unwrap()).collect();
            (path.clone(), (entry["change"].as_str().unwrap(), words))
        })
        .collect();
    // An ACL sets the group bits of the mode to its mask, which may be what they were.
    let without_mode = |mut map: BTreeMap<PathBuf, (&str, Vec<&str>)>| {
        map.entry(at("acl"))
            .and_modify(|(_, words)| words.retain(|word| *word != "mode"));
        format!("{map:#?}")
    };
    assert_eq!(
        without_mode(found),
        without_mode(expected),
        "{}",
        fs_kind.name()
    );
    assert_eq!(
        between["totals"],
        serde_json::json!({
            "added": 1, "removed": 3, "modified": 3, "metadata": 9, "type": 3,
            "changed_bytes": 8 + 3, "failed": 0
        })
    );
    // Backwards, what was added is removed.
    let backwards = json(&lab, &[b.id(), a.id()]);
    assert_eq!(backwards["totals"]["removed"], 1);
    assert_eq!(backwards["totals"]["added"], 3);
    // One path of it, in either form.
    for args in [
        vec![a.id(), b.id(), "--path", at("dir").to_str().unwrap()],
        vec![&format!("{}:{}", a.id(), at("dir").display()), b.id()],
    ] {
        let one = json(&lab, &args);
        assert_eq!(
            entries(&one).into_keys().collect::<Vec<_>>(),
            [at("dir/new")]
        );
    }
}

#[test]
fn every_change_has_its_letter() {
    for fs_kind in KINDS {
        every_change(fs_kind);
    }
}

#[test]
fn large_sparse_files_take_little_time_and_memory() {
    const GIB: u64 = 1 << 30;
    for fs_kind in KINDS {
        let Some(lab) = lab("diff-sparse", fs_kind, &[]) else {
            continue;
        };
        let sparse = File::create(lab.data().join("sparse")).unwrap();
        sparse.set_len(GIB).unwrap();
        sparse.write_all_at(b"some", 100 << 20).unwrap();
        // And one whose extents say nothing: copied, so that every byte is read.
        let dense = lab.data().join("dense");
        fs::write(&dense, vec![5; 64 << 20]).unwrap();
        let a = lab.checkpoint(&["--capture", "copy", "--max-hold", "10s"]);
        let a = a.certificate().clone();
        sparse.write_all_at(b"more", GIB / 2 + 5).unwrap();
        sparse.write_all_at(b"end", GIB - 3).unwrap();
        let file = OpenOptions::new().write(true).open(&dense).unwrap();
        file.write_all_at(&[6], (64 << 20) - 1).unwrap();
        // 96 MiB of address space, the program and its libraries included.
        let command = format!(
            "ulimit -v 98304; exec \"$SNAPSHIM_BIN\" diff --live {} {} --json",
            lab.set(),
            a.id()
        );
        let mut shell = lab.command_with("bash", &["-c", &command]);
        shell.env("SNAPSHIM_BIN", snapshim_tests::product::snapshim());
        let ended = run(shell, LIMIT).ok("diff");
        let found: Value = serde_json::from_slice(&ended.stdout).unwrap();
        let found = entries(&found);
        assert_eq!(
            found[&lab.data().join("sparse")]["ranges"],
            serde_json::json!([[GIB / 2, 4096], [GIB - 4096, 4096]])
        );
        assert_eq!(
            found[&dense]["ranges"],
            serde_json::json!([[(64 << 20) - 4096, 4096]])
        );
        println!(
            "{}: 1 GiB sparse and 64 MiB dense in {:?}",
            fs_kind.name(),
            ended.wall
        );
        assert!(ended.wall < Duration::from_secs(10), "{:?}", ended.wall);
    }
}

#[test]
fn a_patch_makes_one_of_the_other() {
    let Some(lab) = lab("diff-patch", Fs::Xfs, &[]) else {
        return;
    };
    let data = lab.data();
    let lines = |n: u32, odd: u32| -> String {
        (0..n)
            .map(|i| format!("line {}\n", if i % 50 == 7 { i + odd } else { i }))
            .collect()
    };
    let odd = data.join(OsStr::from_bytes(b"tab\there \xff \"quoted\""));
    fs::write(data.join("text"), lines(500, 0)).unwrap();
    fs::write(data.join("latin-1"), b"na\xefve\r\nend").unwrap();
    fs::write(data.join("carriage-return"), b"one\rtwo\r").unwrap();
    fs::write(data.join("two words"), "a\n").unwrap();
    fs::write(data.join("gone"), "bye\n").unwrap();
    fs::write(&odd, "a\nb\n").unwrap();
    fs::write(data.join("binary"), b"\0\x01").unwrap();
    fs::write(data.join("huge"), "x\n".repeat(5 << 20)).unwrap();
    let a = lab.checkpoint(&["--max-hold", "10s"]).certificate().clone();
    fs::write(data.join("text"), lines(520, 1000)).unwrap();
    fs::write(data.join("latin-1"), b"na\xefve!\r\nend").unwrap();
    fs::write(data.join("carriage-return"), b"one\rthree\r").unwrap();
    fs::write(data.join("two words"), "a\nb").unwrap();
    fs::remove_file(data.join("gone")).unwrap();
    fs::write(data.join("new"), "hello\n").unwrap();
    fs::write(&odd, "a\nc\n").unwrap();
    fs::write(data.join("binary"), b"\0\x02").unwrap();
    fs::write(data.join("huge"), "y\n".repeat(5 << 20)).unwrap();
    let b = lab.checkpoint(&["--max-hold", "10s"]).certificate().clone();

    let ended = diff(&lab, &["-u", lab.set(), a.id(), b.id()]).ok("diff -u");
    let text = ended.out();
    assert!(
        text.contains(&format!("M {}: binary", data.join("binary").display())),
        "{text}"
    );
    assert!(text.contains(&format!(
        "M {}: longer than 8.0 MiB",
        data.join("huge").display()
    )));
    assert!(!text.contains('\u{1b}'), "colours in a pipe");
    assert!(ended.stdout.len() < 20_000, "{} bytes", ended.stdout.len());

    for tool_name in ["patch", "git"] {
        let work = lab.beside(&format!("work-{tool_name}"));
        tool(
            "cp",
            &["-a", a.tree().to_str().unwrap(), work.to_str().unwrap()],
        );
        let file = lab.beside("the.patch");
        fs::write(&file, &ended.stdout).unwrap();
        let mut command = match tool_name {
            "patch" => lab.command_with("patch", &["-p1", "-E", "-i"]),
            _ => lab.command_with("git", &["apply", "-p1"]),
        };
        // Not in the repository that these tests may be in.
        command
            .env("GIT_CEILING_DIRECTORIES", "/")
            .current_dir(&work)
            .arg(&file);
        run(command, LIMIT).ok(tool_name);
        let relative = data.strip_prefix("/").unwrap();
        for entry in fs::read_dir(&data).unwrap().flatten() {
            let name = entry.file_name();
            if name == "binary" || name == "huge" {
                continue;
            }
            let patched = fs::read(work.join(relative).join(&name));
            assert_eq!(
                patched.unwrap_or_else(|e| panic!("{tool_name}: {name:?}: {e}")),
                fs::read(entry.path()).unwrap(),
                "{tool_name}: {name:?}"
            );
        }
        assert!(!work.join(relative).join("gone").exists(), "{tool_name}");
    }
}

#[test]
fn live_files_are_those_that_a_capture_would_take() {
    let Some(lab) = Lab::new("diff-live", Fs::Ext4, Duration::from_secs(120)) else {
        return;
    };
    let data = lab.data();
    fs::create_dir_all(data.join("cache")).unwrap();
    fs::write(data.join("kept"), "1").unwrap();
    fs::write(data.join("cache/left-out"), "1").unwrap();
    // The store inside what is watched, and something excluded.
    let inside = data.join("snapshots");
    let mut command = lab.snapshim(&["snap", "--name", "inside", "--store"]);
    command
        .arg(&inside)
        .arg("--exclude")
        .arg(&inside)
        .arg("--exclude")
        .arg(data.join("cache"))
        .arg(&data);
    let only = |paths: &[&str]| paths.iter().map(|p| data.join(p)).collect::<Vec<_>>();
    run(command, LIMIT).ok("snap");
    fs::write(data.join("cache/left-out"), "22").unwrap();
    fs::write(data.join("kept"), "22").unwrap();
    symlink("/etc", data.join("way-out")).unwrap();
    let store = ["--store", inside.to_str().unwrap()];
    let found = json(&lab, &[&store[..], &["latest"]].concat());
    let found: Vec<PathBuf> = entries(&found).into_keys().collect();
    assert_eq!(found, only(&["kept", "way-out"]));

    // A snapshot of one file says nothing of the others.
    lab.env(&[]);
    let kept = data.join("kept");
    let outcome = lab.checkpoint(&["--only", kept.to_str().unwrap()]);
    let id = outcome.verified().id();
    fs::write(&kept, "333").unwrap();
    let found = json(&lab, &["--live", lab.set(), id]);
    assert_eq!(
        entries(&found).into_keys().collect::<Vec<_>>(),
        only(&["kept"])
    );
}

#[test]
fn a_live_file_that_is_written_to_is_said_to_be() {
    let Some(lab) = lab("diff-unstable", Fs::Ext4, &[]) else {
        return;
    };
    let path = lab.data().join("busy");
    fs::write(&path, vec![1; 32 << 20]).unwrap();
    fs::write(lab.data().join("quiet"), vec![1; 1 << 20]).unwrap();
    lab.checkpoint(&["--max-hold", "10s"]).certificate();
    fs::write(lab.data().join("quiet"), vec![2; 1 << 20]).unwrap();
    let mut command = lab.command_with(
        "bash",
        &["-c", "while :; do printf x >>\"$1\"; done", "bash"],
    );
    command.arg(&path);
    let mut writer = process::Proc::piped(command);
    assert!(process::wait_until(Duration::from_secs(20), || {
        fs::metadata(&path).unwrap().len() > 32 << 20
    }));
    let found = entries(&json(&lab, &["latest"]));
    writer.end();
    assert_eq!(found[&path]["unstable"], true);
    assert_eq!(found[&lab.data().join("quiet")]["unstable"], false);
}

#[test]
fn names_are_understood_or_it_is_said_how() {
    let Some(lab) = lab("diff-names", Fs::Ext4, &[]) else {
        return;
    };
    let file = lab.data().join("file");
    let ids: Vec<String> = (0..3)
        .map(|i| {
            fs::write(&file, format!("{i}")).unwrap();
            lab.checkpoint(&[]).verified().id().to_owned()
        })
        .collect();
    fs::write(&file, "live").unwrap();
    let set = lab.set().to_owned();
    let between = |args: &[&str]| {
        let report = json(&lab, args);
        (
            report["a"].as_str().unwrap().to_owned(),
            report["b"].as_str().map(str::to_owned),
        )
    };
    let (first, second, third) = (&ids[0], &ids[1], &ids[2]);
    let to = |a: &String, b: Option<&String>| (a.clone(), b.cloned());
    assert_eq!(between(&["latest"]), to(third, None));
    assert_eq!(between(&["latest~1"]), to(second, None));
    assert_eq!(between(&[&set, first]), to(first, None));
    assert_eq!(between(&["--live", &set, first]), to(first, None));
    assert_eq!(between(&[first, "latest"]), to(first, Some(third)));
    assert_eq!(between(&["latest~2", "latest~"]), to(first, Some(second)));
    assert_eq!(
        between(&[&set, "latest~2", second]),
        to(first, Some(second))
    );
    // Without B, the prefix must be of one.
    for (args, code, words) in [
        (&["nosuch", "latest"][..], 2, &["nosuch", "set"][..]),
        (&["latest", "nosuch"], 1, &["nosuch", "there are"]),
        (&["latest~3"], 1, &["only 2", "latest"]),
        (&["latest~x"], 2, &["latest~1"]),
        (&[&ids[0][..4]], 1, &["3 snapshots"]),
        (&["--live", "latest", "latest", "latest"], 2, &["--live"]),
        (&["latest:/etc"], 1, &["neither side has /etc"]),
        (&["latest:"], 2, &["ID:PATH"]),
    ] {
        let ended = diff(&lab, args);
        assert_eq!(ended.code(), code, "{args:?}: {}", ended.err());
        for word in words {
            assert!(ended.err().contains(word), "{args:?}: {}", ended.err());
        }
    }
    // As git has it.
    assert_eq!(diff(&lab, &["latest"]).code(), 0);
    assert_eq!(diff(&lab, &["latest", "--exit-code"]).code(), 1);
    assert_eq!(diff(&lab, &["latest", "latest", "--exit-code"]).code(), 0);
    // With a second set that watches something else, a set must be named.
    let other = lab.beside("other");
    fs::create_dir(&other).unwrap();
    let mut command = lab.snapshim(&["env", "--name", "another", "--watch"]);
    command.arg(&other);
    run(command, LIMIT).ok("env");
    assert_eq!(diff(&lab, &["latest", second]).code(), 2);
    assert_eq!(between(&[&set, first, second]), to(first, Some(second)));
}

fn show(lab: &Lab, args: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["show"]);
    command.args(args).current_dir(lab.data());
    run(command, LIMIT)
}

#[test]
fn show_prints_what_a_path_was() {
    let Some(lab) = lab("show-path", Fs::Xfs, &[]) else {
        return;
    };
    let data = lab.data();
    let mut random = Random(1);
    let bytes: Vec<u8> = (0..3 << 20).map(|_| random.number() as u8).collect();
    fs::write(data.join("binary"), &bytes).unwrap();
    fs::create_dir_all(data.join("dir/sub")).unwrap();
    fs::write(data.join("dir/inside"), "x").unwrap();
    fs::write(data.join("dir/sub/deeper"), "x").unwrap();
    symlink("target of it", data.join("link")).unwrap();
    symlink("dir", data.join("way")).unwrap();
    let odd = OsStr::from_bytes(b"odd\xff");
    fs::write(data.join(odd), "odd").unwrap();
    lab.checkpoint(&["--max-hold", "10s"]).certificate();
    fs::remove_dir_all(data.join("dir")).unwrap();

    let at = |path: &str| format!("latest:{path}");
    assert_eq!(show(&lab, &[&at("binary")]).ok("relative").stdout, bytes);
    let absolute = data.join("binary");
    let absolute = at(absolute.to_str().unwrap());
    assert_eq!(
        show(&lab, &[lab.set(), &absolute]).ok("absolute").stdout,
        bytes
    );
    assert_eq!(
        show(&lab, &[&at("./dir/../dir/inside")])
            .ok("gone since")
            .out(),
        "x"
    );
    assert_eq!(
        show(&lab, &[&at("link")]).ok("link").out(),
        "target of it\n"
    );
    let listing = show(&lab, &[&at("dir")]).ok("dir").out();
    let paths: Vec<&str> = listing
        .lines()
        .map(|l| l.split('\t').nth(4).unwrap())
        .collect();
    let full = |name: &str| data.join(name).to_str().unwrap().to_owned();
    assert_eq!(paths, [full("dir/inside"), full("dir/sub")]);
    let mut command = lab.snapshim(&["show"]);
    let mut name = OsString::from("latest:");
    name.push(odd);
    command.arg(name).current_dir(&data);
    assert_eq!(run(command, LIMIT).ok("not UTF-8").out(), "odd");
    for (path, words) in [("nosuch", "has no nosuch"), ("/etc/passwd", "/etc/passwd")] {
        let ended = show(&lab, &[&at(path)]);
        assert_eq!((ended.code(), ended.out().as_str()), (1, ""));
        assert!(
            ended.err().contains(words) && ended.err().contains("it is of"),
            "{}",
            ended.err()
        );
    }
    let object = show(&lab, &[&at("dir"), "--json"]).ok("--json");
    let object: Value = serde_json::from_slice(&object.stdout).unwrap();
    assert_eq!(object["files"][0]["path"], full("dir/inside"));
    // Whoever has seen enough.
    let command = format!(
        "\"$0\" show {} | head -c 5 >/dev/null; echo ${{PIPESTATUS[0]}}",
        at("binary")
    );
    let mut shell = lab.command_with("bash", &["-c", &command]);
    shell
        .arg(snapshim_tests::product::snapshim())
        .current_dir(&data);
    let ended = run(shell, LIMIT).ok("head");
    assert!(
        ["0\n", "141\n"].contains(&ended.out().as_str()),
        "{}{}",
        ended.out(),
        ended.err()
    );
}

/// What somebody put into a tree leads nobody out of it, and nobody waits for it.
#[test]
fn a_tree_that_was_changed_leads_nowhere() {
    let Some(lab) = lab("diff-hostile", Fs::Ext4, &[]) else {
        return;
    };
    let data = lab.data();
    fs::create_dir(data.join("dir")).unwrap();
    for name in ["to-link", "to-fifo", "to-dir", "dir/file", "gone", "good"] {
        fs::write(data.join(name), "as it was").unwrap();
    }
    let a = lab.checkpoint(&[]).verified().clone();
    let copy = a.copy_of(&data);
    for name in ["to-link", "to-fifo", "to-dir", "gone"] {
        fs::remove_file(copy.join(name)).unwrap();
    }
    symlink("/etc/passwd", copy.join("to-link")).unwrap();
    tool("mkfifo", &[copy.join("to-fifo").to_str().unwrap()]);
    fs::create_dir(copy.join("to-dir")).unwrap();
    fs::remove_dir_all(copy.join("dir")).unwrap();
    symlink("/etc", copy.join("dir")).unwrap();
    fs::write(data.join("good"), "is now").unwrap();
    for name in ["to-link", "to-fifo", "to-dir", "gone", "dir/file"] {
        let ended = show(&lab, &[&format!("latest:{name}")]);
        assert_eq!((ended.code(), ended.out().as_str()), (1, ""), "{name}");
        assert!(ended.err().contains(name), "{}", ended.err());
    }
    for extra in ["--json", "--patch", "--quiet"] {
        let ended = diff(&lab, &["latest", extra]);
        assert_eq!(ended.code(), 1, "{}", ended.out());
        assert!(
            ended.err().contains("6 entries could not be compared"),
            "{}",
            ended.err()
        );
        assert!(ended.out().contains("good") && !ended.out().contains("root:"));
    }
}

/// The comparison above can fail.
#[test]
fn the_independent_comparison_finds_differences() {
    let a = vec![1; 10_000];
    let mut b = a.clone();
    assert!(expected_ranges(&a, &b).is_empty());
    b[4096] = 2;
    b[9_999] = 2;
    assert_eq!(expected_ranges(&a, &b), [(4096, 5904)]);
    b[4096] = 1;
    assert_eq!(expected_ranges(&a, &b), [(8192, 1808)]);
    b.truncate(5_000);
    assert_eq!(expected_ranges(&a, &b), [(5_000, 5_000)]);
    assert_eq!(expected_ranges(&b, &a), [(5_000, 5_000)]);
}
