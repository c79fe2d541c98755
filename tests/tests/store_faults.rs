//! What a review of the store found, one test each.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use snapshim_tests::process::{Ended, run, tool, wait_until};
use snapshim_tests::{Fs, Lab, Proc};

const SOON: Duration = Duration::from_secs(60);

fn furnished(name: &str) -> Option<Lab> {
    let lab = Lab::new(name, Fs::Xfs, Duration::from_secs(120))?;
    fs::write(lab.data().join("file"), "content\n").unwrap();
    Some(lab)
}

fn snap(lab: &Lab, options: &[&str]) -> Ended {
    let mut command = lab.snapshim(&["snap", "--name", lab.set(), "--json", "--store"]);
    command.arg(lab.store()).args(options).arg(lab.data());
    run(command, SOON)
}

#[track_caller]
fn id(ended: Ended) -> String {
    let value: Value = serde_json::from_slice(&ended.stdout)
        .unwrap_or_else(|cause| panic!("{cause}: {}", ended.err()));
    value["id"].as_str().unwrap().to_owned()
}

fn over(lab: &Lab, command: &str, args: &[&str]) -> Ended {
    let mut line = lab.snapshim(&[command, lab.set(), "--store"]);
    line.arg(lab.store()).args(args);
    run(line, SOON)
}

fn dir(lab: &Lab) -> PathBuf {
    lab.store().join(lab.set())
}

fn latest(lab: &Lab) -> String {
    let link = fs::read_link(dir(lab).join("latest")).unwrap();
    link.to_str().unwrap().to_owned()
}

/// Something mounted, until it is dropped.
struct Bound(PathBuf);

impl Bound {
    #[track_caller]
    fn new(what: &Path, at: &Path) -> Bound {
        let (what, path) = (what.to_str().unwrap(), at.to_str().unwrap());
        tool("mount", &["--bind", what, path]);
        Bound(at.to_owned())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        command.arg(&self.0);
        run(command, SOON);
    }
}

/// What is mounted in a directory on its way out is not the store's; and what cannot be
/// removed keeps nobody from making snapshots, nor keeps what can be removed.
#[test]
fn what_is_mounted_in_a_left_over_is_left_alone() {
    let Some(lab) = furnished("mounted") else {
        return;
    };
    let old = id(snap(&lab, &[]).ok("snap"));
    let precious = lab.beside("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "of somebody\n").unwrap();
    let mut bounds = Vec::new();
    for name in [
        ".tmp-20200101T000000.000000Z",
        ".del-20200101T000000.000000Z",
    ] {
        let at = dir(&lab).join(name).join("tree");
        fs::create_dir_all(&at).unwrap();
        bounds.push(Bound::new(&precious, &at));
    }
    for name in [
        ".tmp-20210101T000000.000000Z",
        ".del-20210101T000000.000000Z",
    ] {
        fs::create_dir_all(dir(&lab).join(name).join("tree/x")).unwrap();
    }
    let ended = snap(&lab, &[]);
    let of_somebody = fs::read_to_string(precious.join("file"));
    assert_eq!(of_somebody.unwrap_or_default(), "of somebody\n");
    assert_eq!(ended.code(), 0, "{}", ended.err());
    assert!(
        ended.err().contains("something is mounted in it"),
        "{}",
        ended.err()
    );
    over(&lab, "delete", &[&old]).ok("delete");
    for name in [
        ".tmp-20210101T000000.000000Z",
        ".del-20210101T000000.000000Z",
    ] {
        assert!(!dir(&lab).join(name).exists(), "{name}");
    }
    assert!(!dir(&lab).join(format!(".del-{old}")).exists());
    drop(bounds);
    snap(&lab, &[]).ok("snap");
    let left = fs::read_dir(dir(&lab)).unwrap();
    let mut left = left.map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(left.all(|name| !name.starts_with(".tmp") && !name.starts_with(".del")));
}

/// A command that leaves its copy in a state that cannot be removed has still passed.
#[test]
fn a_copy_that_cannot_be_removed_says_nothing_of_the_snapshot() {
    let Some(lab) = furnished("mounted-copy") else {
        return;
    };
    let precious = lab.beside("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "of somebody\n").unwrap();
    let line = format!(
        "mkdir \"$SNAPSHIM_ROOT/m\" && mount --bind '{}' \"$SNAPSHIM_ROOT/m\"",
        precious.display()
    );
    let ended = snap(&lab, &["--verify", &line, "--writable"]);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let of_lab = |line: &&str| line.contains("/mounted-copy/") && line.contains(".tmp-verify-");
    let left: Vec<PathBuf> = mounts
        .lines()
        .filter(of_lab)
        .map(|line| line.split(' ').nth(1).unwrap().into())
        .collect();
    let bounds: Vec<Bound> = left.into_iter().map(Bound).collect();
    assert_eq!(bounds.len(), 1, "{}", ended.err());
    let of_somebody = fs::read_to_string(precious.join("file")).unwrap_or_default();
    drop(bounds);
    assert_eq!(of_somebody, "of somebody\n");
    assert_eq!(ended.code(), 0, "{}", ended.err());
    assert!(
        ended.err().contains("something is mounted in it"),
        "{}",
        ended.err()
    );
}

/// No snapshot goes for room that there cannot be.
#[test]
fn room_larger_than_the_disk_costs_nothing() {
    let Some(lab) = furnished("too-much-room") else {
        return;
    };
    let made: Vec<String> = (0..4).map(|_| id(snap(&lab, &[]).ok("snap"))).collect();
    for ended in [
        over(&lab, "prune", &["--min-free", "100TiB"]),
        snap(&lab, &["--min-free", "100TiB"]),
    ] {
        assert_eq!(ended.code(), 1, "{}", ended.err());
        assert!(ended.err().contains("in all"), "{}", ended.err());
    }
    for id in made {
        assert!(dir(&lab).join(&id).exists(), "{id} is gone");
    }
}

/// Whatever a crash left of `latest` is mended by the next command.
#[test]
fn latest_is_mended() {
    let Some(lab) = furnished("latest-mended") else {
        return;
    };
    let made: Vec<String> = (0..3).map(|_| id(snap(&lab, &[]).ok("snap"))).collect();
    let link = dir(&lab).join("latest");
    let point = |to: &str| {
        let _ = fs::remove_file(&link);
        symlink(to, &link).unwrap();
    };
    // Published, and not pointed to yet.
    point(&made[1]);
    over(&lab, "pin", &[&made[0]]).ok("pin");
    assert_eq!(latest(&lab), made[2]);
    // Found to be bad, and still pointed to.
    let manifest = dir(&lab).join(&made[2]).join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let bad = text.replacen("\"verified\": true", "\"verified\": false", 1);
    fs::write(&manifest, bad).unwrap();
    over(&lab, "pin", &[&made[0]]).ok("pin");
    assert_eq!(latest(&lab), made[1]);
    // Deleted, while somebody reads it: it is still there, and still the one.
    fs::write(&manifest, text).unwrap();
    over(&lab, "pin", &[&made[0]]).ok("pin");
    let reader = fs::File::open(dir(&lab).join(&made[2])).unwrap();
    reader.lock_shared().unwrap();
    assert_eq!(over(&lab, "delete", &[&made[2]]).code(), 1);
    assert_eq!(latest(&lab), made[2]);
    drop(reader);
    over(&lab, "delete", &[&made[2]]).ok("delete");
    assert_eq!(latest(&lab), made[1]);
}

/// A snapshot of one file alone is nothing to go back to: it is not `latest`, and takes no place
/// of a whole one.
#[test]
fn one_file_alone_pushes_nothing_out() {
    let Some(lab) = furnished("only-one") else {
        return;
    };
    fs::write(lab.data().join("other"), "more\n").unwrap();
    let mut program = lab.run(&[], Path::new("/bin/sleep"), &["60"]);
    let gate = lab.gate();
    assert!(wait_until(SOON, || gate.exists()));
    let whole = lab
        .checkpoint(&["--wait", "10s"])
        .verified()
        .id()
        .to_owned();
    let file = lab.data().join("file");
    let only = ["--only", file.to_str().unwrap(), "--keep-last", "1"];
    let part = lab.checkpoint(&only).verified().id().to_owned();
    program.end();
    assert_eq!(latest(&lab), whole);
    over(&lab, "prune", &["--keep-last", "1"]).ok("prune");
    for id in [&whole, &part] {
        assert!(dir(&lab).join(id).exists(), "{id} is gone");
    }
    assert_eq!(latest(&lab), whole);
}

/// A store that was copied over an older copy may have a snapshot and what is left of it.
#[test]
fn a_snapshot_beside_its_own_remains_can_go() {
    let Some(lab) = furnished("remains") else {
        return;
    };
    let made: Vec<String> = (0..2).map(|_| id(snap(&lab, &[]).ok("snap"))).collect();
    fs::create_dir_all(dir(&lab).join(format!(".del-{}/tree", made[0]))).unwrap();
    over(&lab, "delete", &[&made[0]]).ok("delete");
    for name in [made[0].clone(), format!(".del-{}", made[0])] {
        assert!(!dir(&lab).join(&name).exists(), "{name}");
    }
}

/// However many files others have open: what is published can be read.
#[test]
fn many_open_files_leave_a_manifest_that_can_be_read() {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    const FILES: usize = 3000;
    let Some(lab) = furnished("many-open") else {
        return;
    };
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let open: Vec<OwnedFd> = (0..FILES)
        .map(|n| {
            let path = lab.data().join(format!("{n:04}-{}", "n".repeat(230)));
            let file = fs::File::create(path).unwrap();
            // One that a child inherits.
            // SAFETY: duplicates a descriptor, which is then ours alone.
            unsafe { OwnedFd::from_raw_fd(libc::dup(file.as_raw_fd())) }
        })
        .collect();
    let sleepers: Vec<Proc> = (0..5)
        .map(|_| Proc::piped(lab.command_with("sleep", &["60"])))
        .collect();
    let ended = snap(&lab, &["--outside", "none"]);
    drop((sleepers, open));
    assert_eq!(ended.code(), 5, "{}", ended.err());
    let id = id(ended);
    over(&lab, "verify", &[&id]).ok("verify");
    let manifest = fs::read(dir(&lab).join(&id).join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let foreign = manifest["foreign"].as_array().unwrap();
    let mut pids: Vec<i64> = foreign.iter().map(|f| f["pid"].as_i64().unwrap()).collect();
    pids.dedup();
    // The sleepers and this very process.
    assert!(pids.len() >= 6, "{pids:?}");
}
