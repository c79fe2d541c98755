//! `snapshim restore`: what comes back is what was there, whatever it is; in place each entry is
//! the old or the new one whenever the restore is killed; and nothing is replaced that
//! must not be.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::Value;
use snapshim_tests::process::Ended;
use snapshim_tests::{
    Certificate, Fs, Lab, Proc, Random, fs as kinds, full, process, rounds, tree,
};

const STAGING: &str = ".snapshim-restore";

fn lab(name: &str, kind: Fs) -> Option<Lab> {
    Lab::new(
        name,
        kind,
        Duration::from_secs(if full() { 900 } else { 240 }),
    )
}

/// Takes a snapshot of the lab's data, with no program about.
#[track_caller]
fn snap(lab: &Lab, options: &[&str]) -> Certificate {
    let mut command = lab.snapshim(&["snap", "--json", "--name", lab.set()]);
    command.arg(lab.data()).arg("--store").arg(lab.store());
    command.args(options);
    let ended = process::run(command, Duration::from_secs(60));
    assert!(matches!(ended.code(), 0 | 5), "{}", ended.err());
    Certificate(serde_json::from_str(&ended.out()).unwrap())
}

fn restore_command(lab: &Lab, options: &[&str]) -> std::process::Command {
    let mut command = lab.snapshim(&["restore"]);
    command.args(options).arg("--store").arg(lab.store());
    command
}

fn restore(lab: &Lab, options: &[&str]) -> Ended {
    process::run(restore_command(lab, options), Duration::from_secs(60))
}

/// A restore that must be refused, with the message.
#[track_caller]
fn refused(lab: &Lab, options: &[&str]) -> String {
    let ended = restore(lab, options);
    assert_eq!(ended.code(), 1, "{options:?}: {}", ended.err());
    ended.err()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn set_time(path: &Path, seconds: u64) {
    let time = UNIX_EPOCH + Duration::new(seconds, 123_456_789);
    fs::File::open(path).unwrap().set_modified(time).unwrap();
}

/// Fills `dir` with one of everything a directory can hold.
fn furnish(dir: &Path) {
    let at = |name: &str| dir.join(name);
    let mode = |name: &str, mode| {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    for name in ["sub/deep/deeper", "empty", "sticky", "closed"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::write(at("plain"), "plain\n").unwrap();
    fs::write(at("nothing"), "").unwrap();
    fs::write(at("large"), vec![7; 3 << 20]).unwrap();
    fs::write(at("sub/deep/deeper/file"), "deep\n").unwrap();
    fs::write(at("closed/inside"), "inside\n").unwrap();
    let sparse = fs::File::create(at("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"middle", 32 << 20).unwrap();
    fs::File::create(at("hole"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();

    symlink("plain", at("link")).unwrap();
    symlink("/nowhere/at all", at("dangling")).unwrap();
    symlink("sub", at("link-to-dir")).unwrap();
    let special = |name: &str, kind, bits, device| {
        let bits = Mode::from_bits_truncate(bits);
        mknod(&at(name), kind, bits, device).unwrap();
    };
    special("fifo", SFlag::S_IFIFO, 0o620, 0);
    special("socket", SFlag::S_IFSOCK, 0o700, 0);
    special("char", SFlag::S_IFCHR, 0o640, makedev(1, 3));
    special("block", SFlag::S_IFBLK, 0o600, makedev(7, 77));
    for name in ["plain", "large", "link", "fifo", "socket", "char", "block"] {
        fs::hard_link(at(name), at(&format!("sub/{name}-again"))).unwrap();
    }

    for (name, bits) in [
        ("read-only", 0o400),
        ("setuid", 0o4755),
        ("setgid", 0o2755),
        ("none", 0),
    ] {
        fs::write(at(name), name).unwrap();
        mode(name, bits);
    }
    fs::write(at("owned"), "owned\n").unwrap();
    chown(at("owned"), Some(1234), Some(4321)).unwrap();
    fs::write(at("owned-setuid"), "x\n").unwrap();
    chown(at("owned-setuid"), Some(1234), Some(4321)).unwrap();
    mode("owned-setuid", 0o6755);
    for name in ["dangling", "fifo", "socket", "char"] {
        std::os::unix::fs::lchown(at(name), Some(12), Some(34)).unwrap();
    }
    mode("sticky", 0o1777);
    mode("closed", 0o500);
    fs::write(
        dir.join(OsStr::from_bytes(b"not \xff\xfe UTF-8")),
        "bytes\n",
    )
    .unwrap();
    fs::write(dir.join(OsStr::from_bytes(b"new\nline \" \\ '")), "odd\n").unwrap();
    fs::write(at(&"n".repeat(255)), "long\n").unwrap();
    let mut deep = at("deep");
    for _ in 0..30 {
        deep = deep.join("d".repeat(60));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "bottom\n").unwrap();

    let script = "import os,sys\n\
        d = sys.argv[1]\n\
        os.setxattr(d + '/plain', 'user.colour', b'\\x00green\\xff')\n\
        os.setxattr(d + '/sub', 'user.of', b'dir')\n\
        os.setxattr(d + '/link', 'trusted.t', b'link', follow_symlinks=False)\n\
        os.setxattr(d + '/fifo', 'trusted.t', b'fifo')\n";
    process::tool("python3", &["-c", script, text(dir)]);
    process::tool(
        "setfacl",
        &["-m", "u:1234:rw", text(&at("owned")), text(&at("fifo"))],
    );
    process::tool("setfacl", &["-d", "-m", "g:4321:rx", text(&at("sub"))]);
    for name in [
        "plain",
        "large",
        "sub/deep/deeper/file",
        "sub/deep",
        "sub",
        "empty",
        "closed",
        "",
    ] {
        set_time(&at(name), 1_000_000_000);
    }
}

/// What rsync finds different, either way round.
fn difference(a: &Path, b: &Path) -> String {
    tree::rsync_difference(a, b) + &tree::rsync_difference(b, a)
}

/// Blocks taken by each file.
fn blocks(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    each(dir, &mut |path, meta| {
        if meta.is_file() {
            found.insert(path.to_owned(), meta.blocks() * 512);
        }
    });
    found
}

/// Calls `seen` for all there is below `dir`, with paths relative to it.
fn each(dir: &Path, seen: &mut dyn FnMut(&Path, &fs::Metadata)) {
    let mut pending = vec![dir.to_owned()];
    while let Some(at) = pending.pop() {
        for entry in fs::read_dir(&at).unwrap().flatten() {
            let path = entry.path();
            let meta = fs::symlink_metadata(&path).unwrap();
            seen(path.strip_prefix(dir).unwrap(), &meta);
            if meta.is_dir() {
                pending.push(path);
            }
        }
    }
}

fn comes_back(kind: Fs) {
    let Some(lab) = lab("restore-everything", kind) else {
        return;
    };
    let data = lab.data();
    furnish(&data);
    let id = snap(&lab, &[]).id().to_owned();

    // Elsewhere.
    let out = lab.beside("out");
    let what = format!("{id}:{}", text(&data));
    restore(&lab, &[&what, "--to", text(&out)]).ok("restore");
    assert_eq!(difference(&data, &out), "", "{}", kind.name());
    assert!(!out.join(STAGING).exists());
    for (path, live) in blocks(&data) {
        let copy = blocks(&out)[&path];
        assert!(
            copy <= live + (1 << 16),
            "{path:?}: {copy} bytes instead of {live}"
        );
    }
    // The controls: one thing is different, and the comparison says so.
    type Change<'a> = (&'a str, &'a dyn Fn(&Path));
    let changes: [Change<'_>; 4] = [
        ("fifo", &|p| {
            drop(process::tool("setfacl", &["-b", text(p)]))
        }),
        ("char", &|p| {
            std::os::unix::fs::lchown(p, Some(0), Some(0)).unwrap()
        }),
        ("nothing", &|p| set_time(p, 5)),
        ("sub/link-again", &|p| {
            fs::remove_file(p).unwrap();
            symlink("plain", p).unwrap();
        }),
    ];
    for (name, change) in changes {
        change(&out.join(name));
        assert_ne!(difference(&data, &out), "", "{name}");
        restore(&lab, &[&what, "--to", text(&out), "--overwrite"]).ok("restore over it");
        set_time(&out, 1_000_000_000);
        assert_eq!(difference(&data, &out), "", "{name} on {}", kind.name());
    }
    // With absolute paths.
    let whole = lab.beside("whole");
    restore(&lab, &[&id, "--to", text(&whole)]).ok("restore");
    let below = whole.join(data.strip_prefix("/").unwrap());
    assert_eq!(difference(&data, &below), "", "{}", kind.name());
    assert!(refused(&lab, &[&id, "--to", text(&whole)]).contains("is not empty"));

    // In place, from a tree that is different in every way.
    let before = lab.beside("before");
    copy(&data, &before);
    for name in ["plain", "large", "sub/deep/deeper/file", "sparse"] {
        fs::write(data.join(name), "changed").unwrap();
    }
    for name in [
        "link",
        "fifo",
        "char",
        "sub/socket-again",
        "hole",
        "owned-setuid",
    ] {
        fs::remove_file(data.join(name)).unwrap();
    }
    fs::create_dir_all(data.join("link/now/a/dir")).unwrap();
    fs::remove_dir_all(data.join("deep")).unwrap();
    fs::write(data.join("deep"), "now a file").unwrap();
    fs::remove_dir_all(data.join("sub/deep")).unwrap();
    fs::write(data.join("extra"), "extra").unwrap();
    fs::create_dir_all(data.join("more/of/it")).unwrap();
    fs::write(data.join("more/of/it/x"), "extra").unwrap();
    fs::set_permissions(data.join("empty"), fs::Permissions::from_mode(0o711)).unwrap();
    process::tool("setfacl", &["-k", "-b", text(&data.join("sub"))]);
    process::tool("setfacl", &["-d", "-m", "u:99:rwx", text(&data)]);
    assert_ne!(difference(&before, &data), "");
    restore(&lab, &[&id, "--in-place"]).ok("restore in place");
    assert_eq!(difference(&before, &data), "", "{}", kind.name());
    assert!(!lab.beside(STAGING).exists());
    let again = restore(&lab, &[&id, "--in-place", "--json"]).ok("again");
    let report: Value = serde_json::from_str(&again.out()).unwrap();
    let actions: BTreeSet<&str> = actions(&report).map(|(_, action)| action).collect();
    assert_eq!(actions, BTreeSet::from(["unchanged"]), "{}", kind.name());
}

fn actions(report: &Value) -> impl Iterator<Item = (&str, &str)> {
    let entries = report["entries"].as_array().unwrap().iter();
    entries.map(|e| (e["path"].as_str().unwrap(), e["action"].as_str().unwrap()))
}

/// An independent copy.
fn copy(from: &Path, to: &Path) {
    let slash = |path: &Path| format!("{}/", text(path));
    process::tool(
        "rsync",
        &[
            "-aHAXS",
            "--modify-window=-1",
            "--numeric-ids",
            "--delete",
            &slash(from),
            &slash(to),
        ],
    );
}

#[test]
fn everything_comes_back() {
    for kind in kinds::ALL {
        comes_back(kind);
    }
}

/// What an entry is: all that matters of it.
type Print = (u32, u32, u32, u64, i64, i64, Vec<u8>);

/// Each entry below `dir` but staging directories. Of directories, only that they are.
fn prints(dir: &Path) -> BTreeMap<PathBuf, Print> {
    let mut found = BTreeMap::new();
    each(dir, &mut |path, meta| {
        let whole = dir.join(path);
        let print = if meta.is_dir() {
            (meta.mode() & 0o170_000, 0, 0, 0, 0, 0, Vec::new())
        } else {
            let body = if meta.is_file() {
                fs::read(&whole).unwrap()
            } else if meta.is_symlink() {
                fs::read_link(&whole)
                    .unwrap()
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
            } else {
                Vec::new()
            };
            let (uid, gid) = (meta.uid(), meta.gid());
            let (s, ns) = (meta.mtime(), meta.mtime_nsec());
            (meta.mode(), uid, gid, meta.len(), s, ns, body)
        };
        found.insert(path.to_owned(), print);
    });
    found
}

/// Makes two states of the data: the first is in the snapshot, the second is there now.
fn two_states(lab: &Lab, files: usize) -> String {
    let data = lab.data();
    let at = |i: usize| data.join(format!("d{}/f{i}", i % 20));
    for i in 0..20 {
        fs::create_dir_all(data.join(format!("d{i}"))).unwrap();
    }
    for i in 0..files {
        fs::write(at(i), format!("old {i}").repeat(i % 400 + 1)).unwrap();
        set_time(&at(i), 1_000_000_000 + i as u64);
    }
    for i in (0..files).step_by(50) {
        fs::hard_link(at(i), data.join(format!("link{i}"))).unwrap();
        symlink(format!("to {i}"), data.join(format!("sym{i}"))).unwrap();
    }
    fs::create_dir_all(data.join("gone/below")).unwrap();
    fs::write(data.join("gone/below/it"), "gone").unwrap();
    let id = snap(lab, &[]).id().to_owned();
    for i in 0..files {
        match i % 7 {
            0 => fs::remove_file(at(i)).unwrap(),
            1 => {}
            2 => set_time(&at(i), 5),
            _ => fs::write(at(i), format!("now {i}").repeat(i % 300 + 2)).unwrap(),
        }
    }
    for i in 0..files / 10 {
        fs::write(data.join(format!("d{}/extra{i}", i % 20)), "extra").unwrap();
    }
    fs::create_dir_all(data.join("came/below")).unwrap();
    fs::write(data.join("came/below/it"), "came").unwrap();
    fs::remove_dir_all(data.join("gone")).unwrap();
    fs::set_permissions(data.join("d3"), fs::Permissions::from_mode(0o700)).unwrap();
    id
}

fn state_of(journal: &Path) -> Option<String> {
    let text = fs::read(journal).ok()?;
    // The beginning is enough, and cheaper than all of it.
    let head = String::from_utf8_lossy(&text[..text.len().min(80)]).into_owned();
    let (_, rest) = head.split_once("\"state\":\"")?;
    Some(rest.split('"').next()?.to_owned())
}

fn killed(kind: Fs, count: usize) {
    let Some(lab) = lab("restore-killed", kind) else {
        return;
    };
    let data = lab.data();
    let files = 600;
    let id = two_states(&lab, files);
    let (old, new) = (lab.beside("old"), lab.beside("new"));
    copy(&data, &old);
    restore(
        &lab,
        &[&format!("{id}:{}", text(&data)), "--to", text(&new)],
    )
    .ok("restore");
    let (old_prints, new_prints) = (prints(&old), prints(&new));
    assert_ne!(old_prints, new_prints);
    let begun = Instant::now();
    restore(&lab, &[&id, "--in-place"]).ok("a restore that is not killed");
    let whole = begun.elapsed();
    assert_eq!(difference(&new, &data), "");

    let journal = lab.beside(STAGING).join("journal.json");
    let mut random = Random(0x5eed + kind as u64);
    let (mut mixed, mut nothing, mut complete, mut undone) = (0, 0, 0, 0);
    for round in 0..count {
        copy(&old, &data);
        assert_eq!(difference(&old, &data), "");
        let mut run = Proc::piped(restore_command(&lab, &[&id, "--in-place"]));
        if round % 3 == 0 {
            // Any moment.
            let micros = random.below(whole.as_micros() as u64);
            std::thread::sleep(Duration::from_micros(micros));
        } else {
            // A moment at which things are put into place.
            process::wait_until(Duration::from_secs(20), || {
                state_of(&journal).is_some_and(|s| s == "swapping") || !run.is_running()
            });
            std::thread::sleep(Duration::from_micros(random.below(30_000)));
        }
        run.signal(Signal::SIGKILL);
        run.wait(Duration::from_secs(20));

        let there = prints(&data);
        let all: BTreeSet<&PathBuf> = there
            .keys()
            .chain(old_prints.keys())
            .chain(new_prints.keys())
            .collect();
        let (mut olds, mut news) = (0, 0);
        for path in all {
            let (is, was, comes) = (there.get(path), old_prints.get(path), new_prints.get(path));
            assert!(
                is == was || is == comes,
                "{} round {round}: {path:?} is neither the old nor the new one",
                kind.name()
            );
            if was != comes {
                olds += usize::from(is == was);
                news += usize::from(is == comes);
            }
        }
        match (olds, news) {
            (0, _) => complete += 1,
            (_, 0) => nothing += 1,
            _ => mixed += 1,
        }
        // The next run says which is which.
        let look = restore(&lab, &[&id, "--in-place", "--dry-run", "--json"]).ok("a look");
        let report: Value = serde_json::from_str(&look.out()).unwrap();
        let found = report["unfinished"].as_array().cloned().unwrap_or_default();
        if olds > 0 && news > 0 {
            assert!(!found.is_empty(), "{}", look.err());
            assert!(
                look.err().contains("did not come to its end"),
                "{}",
                look.err()
            );
        }
        for entry in &found {
            let path = Path::new(entry["path"].as_str().unwrap());
            let path = path.strip_prefix(&data).unwrap();
            let expected = match entry["state"].as_str().unwrap() {
                "new" => new_prints.get(path),
                "old" => old_prints.get(path),
                other => panic!("{path:?}: {other}"),
            };
            assert_eq!(there.get(path), expected, "{path:?}");
        }
        assert_eq!(prints(&data), there, "a look has changed something");
        if round % 2 == 0 {
            restore(&lab, &[&id, "--in-place"]).ok("the restore, again");
            assert_eq!(difference(&new, &data), "", "{} round {round}", kind.name());
        } else {
            let ended = restore(&lab, &["--undo", "--path", text(&data)]);
            if ended.code() == 0 {
                undone += 1;
                assert_eq!(difference(&old, &data), "", "{} round {round}", kind.name());
            } else {
                assert!(olds == 0 || news == 0, "{}", ended.err());
                // What is left of it, if anything, goes now.
                restore(&lab, &[&id, "--in-place"]).ok("the restore, again");
                assert_eq!(difference(&new, &data), "");
            }
        }
        assert!(!lab.beside(STAGING).exists(), "round {round}");
    }
    println!(
        "{}: killed {count} times in {:.0?} of work: {mixed} with some entries new and some old, \
         {nothing} with none new, {complete} with all new; {undone} undone; \
         no entry that was neither",
        kind.name(),
        whole
    );
    assert!(mixed > 0, "no kill came while things were put into place");
}

#[test]
fn killed_at_any_moment_on_xfs() {
    killed(Fs::Xfs, rounds(100, 12));
}

#[test]
fn killed_at_any_moment_on_ext4() {
    killed(Fs::Ext4, rounds(100, 12));
}

#[test]
fn killed_at_any_moment_on_btrfs() {
    killed(Fs::Btrfs, rounds(100, 6));
}

#[test]
fn a_signal_ends_it_between_two_entries() {
    let Some(lab) = lab("restore-signal", Fs::Xfs) else {
        return;
    };
    let id = two_states(&lab, 1500);
    let (data, old) = (lab.data(), lab.beside("old"));
    copy(&data, &old);
    let journal = lab.beside(STAGING).join("journal.json");
    let mut seen = Vec::new();
    for _ in 0..10 {
        let mut run = Proc::piped(restore_command(&lab, &[&id, "--in-place"]));
        process::wait_until(Duration::from_secs(20), || {
            state_of(&journal).is_some_and(|s| s == "swapping") || !run.is_running()
        });
        run.signal(Signal::SIGTERM);
        let ended = run.wait(Duration::from_secs(20));
        let is_between = ended.err().contains("interrupted: ");
        seen.push(is_between);
        if is_between {
            assert_eq!(ended.code(), 1);
            assert!(
                ended.err().contains("are still the old ones"),
                "{}",
                ended.err()
            );
            restore(&lab, &["--undo", "--path", text(&data)]).ok("undo");
            break;
        }
        if ended.code() != 0 {
            assert!(ended.err().contains("nothing was"), "{}", ended.err());
        }
        copy(&old, &data);
    }
    assert!(seen.contains(&true), "no signal came in time: {seen:?}");
    assert_eq!(difference(&old, &data), "");
    assert!(!lab.beside(STAGING).exists());
}

#[test]
fn what_was_replaced_can_be_kept_and_put_back() {
    let Some(lab) = lab("restore-kept", Fs::Btrfs) else {
        return;
    };
    let (data, old) = (lab.data(), lab.beside("old"));
    let id = two_states(&lab, 60);
    copy(&data, &old);
    let before = old_state(&data);
    restore(&lab, &[&id, "--in-place", "--keep-replaced"]).ok("restore");
    assert_ne!(difference(&old, &data), "");
    let message = refused(&lab, &[&id, "--in-place"]);
    assert!(message.contains("--undo"), "{message}");
    lab.env(&[]);
    let status = process::run(
        lab.snapshim(&["status", lab.set()]),
        Duration::from_secs(30),
    );
    let status = status.ok("status").out();
    assert!(status.contains("what it replaced is kept"), "{status}");
    // A snapshot has none of what was replaced.
    let certificate = snap(&lab, &[]);
    let paths = certificate.0["files"].to_string();
    assert!(!paths.contains(STAGING));
    restore(&lab, &["--undo", lab.set()]).ok("undo");
    assert_eq!(difference(&old, &data), "");
    // The very same files.
    assert_eq!(old_state(&data), before);
    let message = refused(&lab, &["--undo", lab.set()]);
    assert!(message.contains("no restore to undo"), "{message}");
}

/// Inodes of all files.
fn old_state(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    each(dir, &mut |path, meta| {
        found.insert(path.to_owned(), meta.ino());
    });
    found
}

#[test]
fn a_file_that_is_written_to_is_not_replaced() {
    let Some(lab) = lab("restore-writer", Fs::Xfs) else {
        return;
    };
    let file = lab.data().join("file");
    fs::write(&file, "then").unwrap();
    let id = snap(&lab, &[]).id().to_owned();
    fs::write(&file, "now").unwrap();
    let mut command = lab.command("bash");
    command
        .args(["-c", "exec 3>>\"$1\"; echo ready; exec sleep 600", "bash"])
        .arg(&file);
    let mut writer = Proc::piped(command);
    let is_open = || process::has_open(writer.pid(), &file);
    assert!(process::wait_until(Duration::from_secs(20), is_open));
    let message = refused(&lab, &[&id, "--in-place"]);
    assert!(
        message.contains(&format!("({})", writer.pid())),
        "{message}"
    );
    assert!(
        message.contains(text(&file)) && message.contains("--force"),
        "{message}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "now");
    assert!(!lab.beside(STAGING).exists());
    restore(&lab, &[&id, "--in-place", "--force"]).ok("with --force");
    assert_eq!(fs::read_to_string(&file).unwrap(), "then");
    writer.end();

    // Mapped, and no longer open.
    fs::write(&file, "now!").unwrap();
    let script = "import mmap,os,sys,time\n\
        f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0); os.close(f)\n\
        print('ready', flush=True); time.sleep(600)";
    let mut command = lab.command("python3");
    command.args(["-c", script]).arg(&file);
    let mut writer = Proc::piped(command);
    let is_mapped = || {
        let maps = fs::read_to_string(format!("/proc/{}/maps", writer.pid()));
        maps.is_ok_and(|maps| maps.contains(text(&file)))
    };
    assert!(process::wait_until(Duration::from_secs(20), is_mapped));
    let message = refused(&lab, &[&id, "--in-place"]);
    assert!(
        message.contains("mapped") && message.contains(text(&file)),
        "{message}"
    );
    writer.end();
    restore(&lab, &[&id, "--in-place"]).ok("when it has ended");
}

#[test]
fn a_dry_run_changes_nothing() {
    let Some(lab) = lab("restore-dry", Fs::Ext4) else {
        return;
    };
    let id = two_states(&lab, 60);
    let listing = || {
        let mut lines = Vec::new();
        let base = lab.data().parent().unwrap().to_owned();
        each(&base, &mut |path, m| {
            // Read when the link is: there is no way around it.
            let atime = if m.is_symlink() {
                0
            } else {
                m.atime_nsec() + m.atime()
            };
            let times = (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec(), atime);
            lines.push((
                path.to_owned(),
                m.ino(),
                m.mode(),
                m.len(),
                m.blocks(),
                times,
            ));
        });
        lines.sort();
        lines
    };
    let before = listing();
    let ended = restore(&lab, &[&id, "--in-place", "--dry-run", "--json"]).ok("dry run");
    assert_eq!(listing(), before);
    let report: Value = serde_json::from_str(&ended.out()).unwrap();
    assert_eq!(
        (&report["version"], &report["dry_run"]),
        (&1.into(), &true.into())
    );
    let known: BTreeMap<&str, &str> = actions(&report).collect();
    let path = |name: &str| text(&lab.data().join(name)).to_owned();
    for (name, action) in [
        ("d0/f0", "add"),
        ("d1/f1", "unchanged"),
        ("d2/f2", "metadata"),
        ("d3/f3", "replace"),
        ("d3", "metadata"),
        ("d0/extra0", "remove"),
        ("came/below/it", "remove"),
        ("gone/below/it", "add"),
    ] {
        assert_eq!(known.get(path(name).as_str()), Some(&action), "{name}");
    }
    let dir = lab.beside("not-made");
    restore(&lab, &[&id, "--to", text(&dir), "--dry-run"]).ok("dry run to a directory");
    assert_eq!(listing(), before);
}

#[test]
fn files_subtrees_and_links() {
    let Some(lab) = lab("restore-parts", Fs::Xfs) else {
        return;
    };
    let data = lab.data();
    let write = |name: &str, bytes: &str| fs::write(data.join(name), bytes).unwrap();
    fs::create_dir_all(data.join("a/b")).unwrap();
    write("a/file", "file");
    write("a/b/deep", "deep");
    write("other", "other");
    write("linked", "linked");
    fs::hard_link(data.join("linked"), data.join("a/linked")).unwrap();
    // A store inside what is watched.
    let inside = data.join(".snapshim");
    let mut command = lab.snapshim(&["snap", "--json", "--name", "in"]);
    command.arg(&data).arg("--store").arg(&inside);
    process::run(command, Duration::from_secs(30)).ok("snap");
    let run = |options: &[&str]| {
        let mut command = lab.snapshim(&["restore", "in"]);
        command.args(options).arg("--store").arg(&inside);
        process::run(command, Duration::from_secs(30))
    };
    let read = |path: &Path| fs::read_to_string(path).unwrap();

    // One file, elsewhere: under its own name.
    let out = lab.beside("out");
    run(&[
        &format!("latest:{}", text(&data.join("a/file"))),
        "--to",
        text(&out),
    ])
    .ok("a file");
    assert_eq!(read(&out.join("file")), "file");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    // A relative path, below what was watched.
    let out = lab.beside("out2");
    run(&["latest:a/b", "--to", text(&out)]).ok("a directory");
    assert_eq!(read(&out.join("deep")), "deep");

    // One file, in place: nothing else is touched.
    for name in ["a/file", "a/b/deep", "other", "a/more"] {
        write(name, "changed");
    }
    run(&["latest:a/file", "--in-place"]).ok("a file in place");
    assert_eq!(read(&data.join("a/file")), "file");
    assert_eq!(read(&data.join("a/b/deep")), "changed");
    assert_eq!(read(&data.join("a/more")), "changed");
    // A directory that is gone, with a file in it.
    fs::remove_dir_all(data.join("a/b")).unwrap();
    run(&["latest", "--path", "a/b/deep", "--in-place"]).ok("a file in a directory that is gone");
    assert_eq!(read(&data.join("a/b/deep")), "deep");
    // A subtree: what is too much goes, outside of it nothing.
    run(&["latest:a", "--in-place"]).ok("a subtree in place");
    assert!(!data.join("a/more").exists());
    assert_eq!(read(&data.join("other")), "changed");
    assert!(
        run(&["latest:a/nothing", "--in-place"])
            .err()
            .contains("is not in the snapshot")
    );

    // All names of a file, or none.
    fs::remove_file(data.join("a/linked")).unwrap();
    write("a/linked", "linked");
    let ended = run(&["latest:linked", "--in-place"]).ok("one name of two");
    assert!(ended.err().contains("another name"), "{}", ended.err());
    let ino = |name: &str| fs::metadata(data.join(name)).unwrap().ino();
    assert_eq!(ino("linked"), ino("a/linked"));
    // Two files that have become one.
    fs::remove_file(data.join("other")).unwrap();
    write("other", "other");
    fs::remove_file(data.join("a/file")).unwrap();
    fs::hard_link(data.join("other"), data.join("a/file")).unwrap();
    run(&["latest", "--in-place"]).ok("all of it");
    assert_ne!(ino("other"), ino("a/file"));
    assert_eq!(
        (read(&data.join("other")), read(&data.join("a/file"))),
        ("other".into(), "file".into())
    );
    // The store was never in the way, and is whole.
    assert_eq!(run(&["latest", "--in-place", "--json"]).code(), 0);
    assert!(inside.join("in/latest/manifest.json").exists());

    // What cannot be replaced is found before anything is.
    write("other", "changed");
    write("a/file", "changed");
    process::tool("chattr", &["+i", text(&data.join("other"))]);
    let ended = run(&["latest", "--in-place"]);
    process::tool("chattr", &["-i", text(&data.join("other"))]);
    assert_eq!(ended.code(), 1);
    assert!(ended.err().contains("immutable") && ended.err().contains("chattr -i"));
    assert_eq!(read(&data.join("a/file")), "changed");
}

/// Changes a snapshot's manifest behind snapshim's back.
fn edit(lab: &Lab, id: &str, change: impl Fn(&mut Value)) {
    let path = lab.store().join(lab.set()).join(id).join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

fn record<'a>(manifest: &'a mut Value, path: &Path) -> &'a mut Value {
    let files = manifest["files"].as_array_mut().unwrap();
    files.iter_mut().find(|f| f["path"] == text(path)).unwrap()
}

#[test]
fn damage_is_found_before_anything_is_replaced() {
    /// Of no bytes at all; from BLAKE3's test vectors.
    const EMPTY: &str = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
    for kind in [Fs::Btrfs, Fs::Ext4] {
        let Some(lab) = lab("restore-damage", kind) else {
            return;
        };
        let (a, z) = (lab.data().join("a"), lab.data().join("z"));
        fs::write(&a, "").unwrap();
        fs::write(&z, "the last").unwrap();
        let id = snap(&lab, &[]).id().to_owned();
        let change = || {
            fs::write(&a, "changed").unwrap();
            fs::write(&z, "changed").unwrap();
        };
        change();
        let unchanged = || {
            assert_eq!(fs::read_to_string(&a).unwrap(), "changed");
            assert_eq!(fs::read_to_string(&z).unwrap(), "changed");
            assert!(!lab.beside(STAGING).exists());
        };
        // The control: a right one.
        edit(&lab, &id, |m| record(m, &a)["digest"] = EMPTY.into());
        edit(&lab, &id, |m| {
            record(m, &z).as_object_mut().unwrap().remove("digest");
        });
        restore(&lab, &[&id, "--in-place"]).ok("with a right digest");
        assert_eq!(fs::read_to_string(&z).unwrap(), "the last");
        change();
        edit(&lab, &id, |m| record(m, &z)["digest"] = EMPTY.into());
        let message = refused(&lab, &[&id, "--in-place"]);
        assert!(
            message.contains("digest") && message.contains("/z"),
            "{message}"
        );
        unchanged();
        let out = lab.beside("out");
        refused(&lab, &[&id, "--to", text(&out)]);
        assert!(!out.exists());
        // Another size; missing; a link instead.
        edit(&lab, &id, |m| {
            record(m, &z).as_object_mut().unwrap().remove("digest");
        });
        let tree = lab.store().join(lab.set()).join(&id).join("tree");
        let stored = tree.join(z.strip_prefix("/").unwrap());
        fs::write(&stored, "longer than it was").unwrap();
        assert!(refused(&lab, &[&id, "--in-place"]).contains("bytes instead of"));
        unchanged();
        fs::remove_file(&stored).unwrap();
        assert!(refused(&lab, &[&id, "--in-place"]).contains("is missing"));
        unchanged();
        symlink("/etc/passwd", &stored).unwrap();
        assert!(refused(&lab, &[&id, "--in-place"]).contains("leads elsewhere"));
        unchanged();
    }
}

/// A small ext4, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn new(lab: &Lab, megabytes: u64) -> Small {
        let (image, point) = (lab.beside("image"), lab.beside("small"));
        fs::File::create(&image)
            .unwrap()
            .set_len(megabytes << 20)
            .unwrap();
        process::tool("mkfs.ext4", &["-q", "-F", "-m", "0", text(&image)]);
        fs::create_dir(&point).unwrap();
        process::tool("mount", &["-o", "loop", text(&image), text(&point)]);
        Small(point)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("umount");
        command.arg(&self.0);
        process::run(command, Duration::from_secs(30));
    }
}

#[test]
fn without_room_nothing_is_replaced() {
    let Some(lab) = lab("restore-full", Fs::Xfs) else {
        return;
    };
    let small = Small::new(&lab, 56);
    let data = small.0.join("data");
    fs::create_dir(&data).unwrap();
    for name in ["a", "b", "c"] {
        fs::write(data.join(name), vec![1; 10 << 20]).unwrap();
    }
    let mut command = lab.snapshim(&["snap", "--json", "--name", lab.set(), "--capture", "copy"]);
    command.arg(&data).arg("--store").arg(lab.store());
    process::run(command, Duration::from_secs(60)).ok("snap");
    for name in ["a", "b", "c"] {
        fs::write(data.join(name), vec![2; 10 << 20]).unwrap();
    }
    let before = prints(&small.0);
    let message = refused(&lab, &["latest", "--in-place"]);
    assert!(
        message.contains("no room") && message.contains("31457280 bytes"),
        "{message}"
    );
    assert_eq!(prints(&small.0), before);
    // Less is needed, but still too much.
    fs::write(data.join("a"), vec![1; 10 << 20]).unwrap();
    let before = prints(&small.0);
    let message = refused(&lab, &["latest", "--in-place"]);
    assert!(message.contains("no room"), "{message}");
    assert_eq!(prints(&small.0), before);
    restore(
        &lab,
        &["latest", "--path", text(&data.join("b")), "--in-place"],
    )
    .ok("one of them");
    assert_eq!(fs::read(data.join("b")).unwrap(), vec![1; 10 << 20]);
    assert!(!small.0.join(STAGING).exists());
}

/// Something mounted in a directory, or a subvolume of its own.
enum Below {
    Bind(PathBuf, #[allow(dead_code)] Small),
    Subvolume,
}

impl Below {
    fn new(lab: &Lab, kind: Fs, path: &Path) -> Below {
        if kind == Fs::Btrfs {
            process::tool("btrfs", &["subvolume", "create", text(path)]);
            return Below::Subvolume;
        }
        let small = Small::new(lab, 48);
        fs::create_dir(path).unwrap();
        process::tool("mount", &["--bind", text(&small.0), text(path)]);
        Below::Bind(path.to_owned(), small)
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        if let Below::Bind(path, _) = self {
            let mut command = std::process::Command::new("umount");
            command.arg(path);
            process::run(command, Duration::from_secs(30));
        }
    }
}

#[test]
fn mounts_and_subvolumes_have_staging_directories_of_their_own() {
    for kind in [Fs::Ext4, Fs::Btrfs] {
        let Some(lab) = lab("restore-mounts", kind) else {
            return;
        };
        let data = lab.data();
        let below = data.join("below");
        let kept = Below::new(&lab, kind, &below);
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        let both = || (read(below.join("file")), read(data.join("file")));
        let all = |word: &str| (word.to_owned(), word.to_owned());
        fs::write(below.join("file"), "then").unwrap();
        fs::write(data.join("file"), "then").unwrap();
        snap(&lab, &["--capture", "copy"]);
        fs::write(below.join("file"), "now").unwrap();
        fs::write(below.join("extra"), "now").unwrap();
        fs::write(data.join("file"), "now").unwrap();
        restore(&lab, &["latest", "--in-place", "--keep-replaced"]).ok("restore");
        assert_eq!(both(), all("then"));
        assert!(!below.join("extra").exists());
        assert!(below.join(STAGING).exists() && lab.beside(STAGING).exists());
        // Found from below as well.
        restore(&lab, &["--undo", "--path", text(&below.join("file"))]).ok("undo");
        assert_eq!(both(), all("now"));
        assert_eq!(read(below.join("extra")), "now");
        assert!(!below.join(STAGING).exists() && !lab.beside(STAGING).exists());
        drop(kept);
    }
}

#[test]
fn a_link_swapped_in_leads_nowhere() {
    let Some(lab) = lab("restore-attack", Fs::Xfs) else {
        return;
    };
    let (data, victim) = (lab.data(), lab.beside("victim"));
    fs::create_dir_all(data.join("sub/inner")).unwrap();
    for i in 0..40 {
        fs::write(data.join(format!("sub/inner/f{i}")), "from the snapshot").unwrap();
    }
    snap(&lab, &[]);
    fs::create_dir_all(victim.join("inner")).unwrap();
    for i in 0..40 {
        fs::write(victim.join(format!("inner/f{i}")), "precious").unwrap();
    }
    fs::write(victim.join("inner/extra"), "precious").unwrap();
    let before = tree::listing(&victim, &[]);
    let stop = AtomicBool::new(false);
    let (mut done, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| {
            let (sub, away) = (data.join("sub"), data.join("away"));
            let mut swaps = 0;
            while !stop.load(Ordering::Relaxed) {
                if fs::rename(&sub, &away).is_ok() {
                    let _ = symlink(&victim, &sub);
                    std::thread::sleep(Duration::from_micros(300));
                    let _ = fs::remove_file(&sub);
                    let _ = fs::rename(&away, &sub);
                    swaps += 1;
                }
                std::thread::sleep(Duration::from_micros(700));
            }
            swaps
        });
        for round in 0..rounds(200, 40) {
            for i in 0..40 {
                let _ = fs::write(data.join(format!("away/inner/f{i}")), format!("{round}"));
            }
            match restore(&lab, &["latest", "--in-place"]).code() {
                0 => done += 1,
                _ => failed += 1,
            }
            if lab.beside(STAGING).exists() {
                let _ = restore(&lab, &["--undo", "--force", "--path", text(&data)]);
                let _ = fs::remove_dir_all(lab.beside(STAGING));
            }
        }
        stop.store(true, Ordering::Relaxed);
        let swaps = attack.join().unwrap();
        println!(
            "{done} restores done, {failed} failed, while a link was swapped in {swaps} times"
        );
        assert!(swaps > 10);
    });
    assert_eq!(tree::listing(&victim, &[]), before);
}

#[test]
fn somebody_elses_store_gives_nobody_rights() {
    const SOMEBODY: u32 = 65534;
    let Some(lab) = lab("restore-foreign", Fs::Xfs) else {
        return;
    };
    let data = lab.data();
    fs::write(data.join("program"), "#!/bin/sh\n").unwrap();
    fs::write(data.join("file"), "file\n").unwrap();
    let id = snap(&lab, &[]).id().to_owned();
    process::tool(
        "chown",
        &["-Rh", "65534:65534", text(&lab.store().join(lab.set()))],
    );
    let hostile = |m: &mut Value| {
        let program = record(m, &data.join("program"));
        program["mode"] = 0o6755.into();
        program["uid"] = 0.into();
        program["gid"] = 0.into();
        let mut device = record(m, &data.join("file")).clone();
        device["path"] = text(&data.join("zero")).into();
        device["kind"] = "device".into();
        device["ino"] = 1.into();
        device["size"] = 0.into();
        device["device"] = serde_json::json!({"kind": "char", "major": 1, "minor": 5});
        m["files"].as_array_mut().unwrap().push(device);
    };
    edit(&lab, &id, hostile);
    let out = lab.beside("out");
    let ended = restore(
        &lab,
        &[&format!("{id}:{}", text(&data)), "--to", text(&out)],
    );
    let ended = ended.ok("restore");
    assert!(
        ended.err().contains("1 device nodes are not made"),
        "{}",
        ended.err()
    );
    let meta = fs::metadata(out.join("program")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o6000),
        (SOMEBODY, SOMEBODY, 0)
    );
    assert!(!out.join("zero").exists());
    // Where its files go is not for its manifest to say.
    let message = refused(&lab, &[&id, "--in-place"]);
    assert!(message.contains("belongs to another user"), "{message}");
    // Nor is a file that was asked for also one that was not.
    let planted = lab.beside("planted");
    fs::write(&planted, "precious").unwrap();
    edit(&lab, &id, |m| {
        let mut other = record(m, &data.join("file")).clone();
        other["path"] = text(&planted).into();
        m["files"].as_array_mut().unwrap().push(other);
        let root = serde_json::json!({"path": text(&planted)});
        m["roots"].as_array_mut().unwrap().push(root);
    });
    fs::write(data.join("file"), "changed").unwrap();
    let file = format!("{id}:{}", text(&data.join("file")));
    restore(&lab, &[&file, "--in-place"]).ok("a file that is named");
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "file\n");
    assert_eq!(fs::read_to_string(&planted).unwrap(), "precious");
    chown(data.join("file"), Some(0), Some(0)).unwrap();
    // The control: of one's own, all of it comes back.
    process::tool("chown", &["-Rh", "0:0", text(&lab.store().join(lab.set()))]);
    let own = lab.beside("own");
    restore(
        &lab,
        &[&format!("{id}:{}", text(&data)), "--to", text(&own)],
    )
    .ok("restore");
    let meta = fs::metadata(own.join("program")).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o6000), (0, 0o6000));
    assert!(
        fs::metadata(own.join("zero"))
            .unwrap()
            .file_type()
            .is_char_device()
    );
    // A manifest that contradicts itself, or leads out of what was watched.
    for (path, what) in [
        (data.join("file/below"), "damaged"),
        (data.join("absent/below"), "damaged"),
        (PathBuf::from("/etc/snapshim-test-planted"), "damaged"),
        (data.join("file"), "damaged"),
    ] {
        let id = snap(&lab, &[]).id().to_owned();
        edit(&lab, &id, |m| {
            let mut planted = record(m, &data.join("file")).clone();
            planted["path"] = text(&path).into();
            planted["ino"] = 2.into();
            m["files"].as_array_mut().unwrap().push(planted);
        });
        fs::write(data.join("file"), "changed").unwrap();
        let message = refused(&lab, &[&id, "--in-place"]);
        assert!(message.contains(what), "{path:?}: {message}");
        assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "changed");
        fs::write(data.join("file"), "file\n").unwrap();
    }
    assert!(!Path::new("/etc/snapshim-test-planted").exists());
}

#[test]
fn without_root_ones_own_files_come_back() {
    const SOMEBODY: u32 = 65534;
    let Some(lab) = lab("restore-user", Fs::Xfs) else {
        return;
    };
    lab.give_to("nobody");
    snapshim_tests::lab::give(lab.data().parent().unwrap(), "nobody");
    let as_somebody = |mut command: std::process::Command| {
        use std::os::unix::process::CommandExt;
        command.uid(SOMEBODY).gid(SOMEBODY);
        process::run(command, Duration::from_secs(60))
    };
    let data = lab.data();
    let shell = |script: &str| {
        let mut command = lab.command("bash");
        command.current_dir(&data).args(["-euc", script]);
        as_somebody(command).ok(script);
    };
    // Directories that their owner may not write to, in and below which there is work.
    shell(
        "mkdir -p locked/below gone/below plain; echo a >locked/a; echo b >locked/below/b; \
         echo c >gone/below/c; echo d >plain/d; ln -s d plain/link; mkfifo plain/fifo; \
         chmod 500 locked/below locked gone/below gone",
    );
    let mut command = lab.snapshim(&["snap", "--json", "--name", lab.set()]);
    command.arg(&data).arg("--store").arg(lab.store());
    let ended = as_somebody(command);
    assert!(matches!(ended.code(), 0 | 5), "{}", ended.err());
    let then = lab.beside("then");
    copy(&data, &then);
    shell(
        "chmod -R u+w locked gone; echo x >locked/a; rm locked/below/b; rm -r gone; \
         mkdir extra; echo x >extra/x; echo x >plain/d; chmod 500 locked/below locked extra",
    );
    let now = lab.beside("now");
    copy(&data, &now);
    as_somebody(restore_command(
        &lab,
        &["latest", "--in-place", "--keep-replaced"],
    ))
    .ok("restore");
    assert_eq!(difference(&then, &data), "");
    as_somebody(restore_command(&lab, &["--undo", "--path", text(&data)])).ok("undo");
    assert_eq!(difference(&now, &data), "");
    as_somebody(restore_command(&lab, &["latest", "--in-place"])).ok("restore, again");
    assert_eq!(difference(&then, &data), "");
    assert!(!lab.beside(STAGING).exists());
    let out = lab.beside("out");
    let what = format!("latest:{}", text(&data));
    as_somebody(restore_command(&lab, &[&what, "--to", text(&out)])).ok("elsewhere");
    assert_eq!(difference(&then, &out), "");
}

#[test]
fn of_one_file_only_that_comes_back() {
    let Some(lab) = lab("restore-only", Fs::Ext4) else {
        return;
    };
    let data = lab.data();
    fs::create_dir_all(data.join("sub")).unwrap();
    let file = data.join("sub/file");
    fs::write(&file, "then").unwrap();
    // It has written something, so that it has a slot, and has nothing open.
    let script = "echo other >\"$1\"; sleep 600; true";
    let other = data.join("other");
    let mut idle = lab.run(
        &[],
        Path::new("/bin/bash"),
        &["-c", script, "bash", text(&other)],
    );
    let has_written = || fs::read(&other).is_ok_and(|bytes| bytes == b"other\n");
    assert!(process::wait_until(Duration::from_secs(20), has_written) && idle.is_running());
    let outcome = lab.checkpoint(&["--only", text(&file)]);
    let id = outcome.certificate().id();
    fs::write(&file, "now").unwrap();
    fs::write(data.join("other"), "now").unwrap();
    let ended = restore(&lab, &[lab.set(), id, "--in-place"]).ok("restore");
    assert!(ended.err().contains("are running"), "{}", ended.err());
    assert_eq!(fs::read_to_string(&file).unwrap(), "then");
    assert_eq!(fs::read_to_string(data.join("other")).unwrap(), "now");
    idle.end();
}
