//! The benchmark against every other way to copy: does it run, and can it tell?
//!
//! Not for its figures, which the machine of a test run makes worthless.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::bench::method::{self, Guard, captures};
use snapshim_tests::{Fs, Proc, process, product};

const LIMIT: Duration = Duration::from_secs(200);

fn bench(out: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command
        .args(["peers", "--quick", "--out"])
        .arg(out)
        .args(args);
    // Built here if need be, not within the deadline.
    command.env("SNAPSHIM_BIN", product::snapshim());
    command
}

fn out(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("bench-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// Each window: its columns by name.
fn rows(out: &Path) -> Vec<BTreeMap<String, String>> {
    let text = fs::read_to_string(out.join("windows.tsv")).unwrap();
    let mut lines = text.lines().map(|l| l.split('\t').map(str::to_owned));
    let head: Vec<String> = lines.next().unwrap().collect();
    let row = |line| head.iter().cloned().zip(line).collect();
    lines.map(row).collect()
}

#[test]
fn every_method_runs_and_a_torn_copy_is_told() {
    if Fs::Xfs.mount().is_none() {
        return;
    }
    let out = out("methods");
    let args = [
        "--fs",
        "xfs",
        "--part",
        "consistency",
        "--workload",
        "ordered",
    ];
    let ended = process::run(bench(&out, &args), LIMIT).ok("bench peers");
    let rows = rows(&out);
    let sum = |method: &str, column: &str| -> u64 {
        let of = rows.iter().filter(|r| r["method"] == method);
        of.filter_map(|r| r[column].parse::<u64>().ok()).sum()
    };
    let mut methods = vec!["cp", "ficlone", "sigstop", "fsfreeze", "rsync", "restic"];
    let ours: Vec<String> = captures()
        .into_iter()
        .filter(|c| c != "subvolume")
        .map(|c| format!("snapshim-{c}"))
        .collect();
    assert!(ours.len() > 1, "{ours:?}");
    methods.extend(ours.iter().map(String::as_str));
    for method in &methods {
        assert!(sum(method, "looked") > 0, "{method}: {}", ended.err());
    }
    // Two windows of each; a fast copy may be lucky once, but not every time.
    assert!(
        sum("cp", "inconsistent") > 0,
        "cp tears nothing: {}",
        ended.err()
    );
    let whole = ["sigstop", "fsfreeze"];
    for method in whole.iter().copied().chain(ours.iter().map(String::as_str)) {
        assert_eq!(sum(method, "inconsistent"), 0, "{method}");
    }
    for row in rows.iter().filter(|r| r["method"] == "none") {
        assert!(row["calls"].parse::<u64>().unwrap() > 0, "{row:?}");
    }
    let report = fs::read_to_string(out.join("report.md")).unwrap();
    assert!(report.contains("| `cp -a` | **"), "{report}");
    fs::remove_dir_all(out).unwrap();
}

#[test]
fn nothing_stays_of_a_run_that_is_killed() {
    if Fs::Xfs.mount().is_none() {
        return;
    }
    let out = out("killed");
    let args = [
        "--fs",
        "ext4",
        "--part",
        "stall",
        "--method",
        "cp",
        "--method",
        "snapshim-auto",
    ];
    let mut parent = Proc::piped(bench(&out, &args));
    let measured =
        || fs::read_to_string(out.join("windows.tsv")).is_ok_and(|t| t.lines().count() > 1);
    assert!(process::wait_until(Duration::from_secs(60), measured));
    let child = process::descendants(parent.pid())
        .into_iter()
        .find(|pid| process::name(*pid) == "bench")
        .expect("the process that measures");
    let mine = format!("snapshim-test-{child}-");
    let mounted = || {
        fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&mine)
    };
    assert!(mounted());
    parent.signal(Signal::SIGTERM);
    assert_ne!(parent.wait(Duration::from_secs(60)).code(), 0);
    assert!(!mounted());
    for dir in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        let left: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .flatten()
            .map(|e| e.file_name().into_string().unwrap_or_default())
            .filter(|name| name.starts_with(&mine))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
    fs::remove_dir_all(out).unwrap();
}

/// As if the benchmark had been killed while a file system was frozen.
#[test]
fn a_frozen_file_system_is_thawed_when_its_guard_hears_no_more() {
    let Some(small) = Fs::Ext4.mount_small("frozen", 64 << 20) else {
        return;
    };
    let at = small.path().to_owned();
    assert_eq!(method::mount_of(&at.join("x")), at);
    let mut guard = Guard::new(&at);
    process::tool("fsfreeze", &["--freeze", at.to_str().unwrap()]);
    guard.lose();
    let writer = std::thread::spawn(move || fs::write(at.join("written"), "x"));
    let written = process::wait_until(Duration::from_secs(15), || writer.is_finished());
    drop(guard);
    assert!(written);
    writer.join().unwrap().unwrap();
}
