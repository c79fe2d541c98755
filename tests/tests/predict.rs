//! What each method is expected to take, what `auto` makes of it, and what it took:
//! in the certificate, in `status`, `show` and with `--verbose`; on every file system.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::Value;
use snapshim_tests::process::{run, wait_until};
use snapshim_tests::{Fs, Lab, Outcome, Proc, Random, lab, process};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// Overwrites random pages of the file in its first argument, some 2,000 a second.
const OVERWRITE: &str = "import os,random,sys,time
f = os.open(sys.argv[1], os.O_RDWR); n = os.fstat(f).st_size // 4096; b = os.urandom(4096)
while True: os.pwrite(f, b, random.randrange(n) * 4096); time.sleep(0.0003)";
/// Only appends to it.
const APPEND: &str = "import os,sys,time
f = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
while True: os.write(f, b'x' * 512); time.sleep(0.0003)";
/// Has it mapped, too.
const MAPPED: &str = "import mmap,os,sys,time
f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0)
while True: m[0:4] = b'abcd'; time.sleep(0.01)";

fn lab(name: &str, fs: Fs) -> Option<Lab> {
    Lab::new(name, fs, Duration::from_secs(240))
}

/// A file of so many bytes, on disk, and left alone for a while.
fn file(lab: &Lab, name: &str, bytes: u64) -> PathBuf {
    let path = lab.data().join(name);
    let mut random = Random(bytes);
    let block: Vec<u8> = (0..MIB / 8)
        .flat_map(|_| random.below(u64::MAX).to_le_bytes())
        .collect();
    let file = fs::File::create(&path).unwrap();
    for at in (0..bytes).step_by(block.len()) {
        let len = block.len().min((bytes - at) as usize);
        file.write_all_at(&block[..len], at).unwrap();
    }
    file.sync_all().unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(60);
    file.set_modified(old).unwrap();
    path
}

/// A program of the set: python with `script`, on `path`.
fn program(lab: &Lab, script: &str, path: &Path) -> Proc {
    let args = ["-c", script, path.to_str().unwrap()];
    let mut program = lab.run(&["--keep-last", "2"], Path::new("/usr/bin/python3"), &args);
    let before = fs::metadata(path).unwrap().modified().unwrap();
    let wrote = || fs::metadata(path).is_ok_and(|m| m.modified().unwrap() != before);
    assert!(
        wait_until(Duration::from_secs(20), wrote) && program.is_running(),
        "the program does not write"
    );
    program
}

fn idle(lab: &Lab) -> Proc {
    let mut idle = lab.run(&[], Path::new("/bin/sleep"), &["600"]);
    let ready = wait_until(Duration::from_secs(20), || {
        !lab.processes_named("sleep").is_empty() && lab.gate().exists()
    });
    assert!(ready && idle.is_running());
    std::thread::sleep(Duration::from_millis(100));
    idle
}

fn status(lab: &Lab) -> Value {
    let ended = run(lab.snapshim(&["status", lab.set(), "--json"]), LIMIT).ok("status");
    serde_json::from_slice(&ended.stdout).unwrap()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

fn method<'a>(prediction: &'a Value, name: &str) -> Option<&'a Value> {
    let methods = prediction["methods"].as_array().expect("methods");
    methods.iter().find(|method| method["method"] == name)
}

fn hold_of(prediction: &Value, name: &str) -> f64 {
    let found = method(prediction, name);
    number(&found.unwrap_or_else(|| panic!("no {name}: {prediction}"))["hold_us"])
}

/// The prediction of a certificate, in itself as it has to be.
#[track_caller]
fn prediction(outcome: &Outcome) -> Value {
    let certificate = &outcome.certificate().0;
    let prediction = certificate["prediction"].clone();
    let took = &prediction["outcome"];
    assert_eq!(took["method"], certificate["capture"], "{prediction}");
    assert_eq!(took["hold_us"], certificate["hold_us"], "{prediction}");
    assert!(number(&took["wall_us"]) > 0.0, "{prediction}");
    let choice = prediction["choice"].as_str().unwrap();
    assert!(method(&prediction, choice).is_some(), "{prediction}");
    assert!(!prediction["why"].as_str().unwrap().is_empty());
    let is_kept = took["method"] == prediction["choice"] && took["instead"].is_null();
    assert!(is_kept || took["instead"].is_string(), "{prediction}");
    prediction
}

/// What `status` says now, with `certificate`'s of the last.
#[track_caller]
fn now(lab: &Lab, last: &Outcome) -> Value {
    let status = status(lab);
    let (id, certificate) = (last.certificate().id(), &last.certificate().0);
    assert_eq!(status["capture"]["last"]["id"], id);
    let of_last = &status["capture"]["last"]["prediction"];
    assert_eq!(*of_last, certificate["prediction"]);
    status["capture"]["now"].clone()
}

#[test]
fn what_is_clean_is_cloned_on_xfs() {
    let Some(lab) = lab("predict-clean", Fs::Xfs) else {
        return;
    };
    let path = file(&lab, "file", 64 * MIB);
    fs::write(lab.data().join("small"), "x").unwrap();
    let _idle = idle(&lab);
    let before = lab.stored().len();
    let first: Value = status(&lab)["capture"].clone();
    assert_eq!(first["now"]["choice"], "reflink");
    assert!(first["last"].is_null());
    assert_eq!(lab.stored().len(), before, "status makes nothing");

    let outcome = lab.checkpoint(&[]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "reflink");
    assert_eq!(
        (&expected["files"], &expected["looked_at"]),
        (&2.into(), &1.into())
    );
    assert_eq!(expected["outcome"]["bytes"], 0);
    assert!(hold_of(&expected, "reflink") < 1_000.0, "{expected}");
    assert!(hold_of(&expected, "copy") > 10_000.0, "{expected}");
    for name in ["copy", "copy-before-write"] {
        let bytes = number(&method(&expected, name).unwrap()["bytes"]);
        assert_eq!(bytes, (64 * MIB + 1) as f64, "{name}: {expected}");
    }
    let largest = &expected["dominant"][0];
    assert_eq!(largest["path"], path.to_str().unwrap());
    assert_eq!(largest["file_system"], "xfs");
    assert_eq!(largest["overwritten"], false);
    assert!(number(&largest["extents"]) >= 1.0);
    assert_eq!(now(&lab, &outcome)["choice"], "reflink");

    // What was asked for is told, too, and what a copy wrote.
    let outcome = lab.checkpoint(&["--capture", "copy", "--full"]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy");
    assert_eq!(expected["why"], "it was asked for");
    assert_eq!(number(&expected["outcome"]["bytes"]), (64 * MIB + 1) as f64);

    // For people.
    let ended = run(
        lab.snapshim(&["checkpoint", lab.set(), "-v", "--full"]),
        LIMIT,
    )
    .ok("checkpoint -v");
    assert!(
        ended.err().contains("snapshim: chose reflink: "),
        "{}",
        ended.err()
    );
    assert!(
        ended.err().contains("; expected of reflink: "),
        "{}",
        ended.err()
    );
    // What has not changed since would be shared, and is nothing to tell of.
    file(&lab, "file", 64 * MIB);
    let shown = run(lab.snapshim(&["status", lab.set()]), LIMIT)
        .ok("status")
        .out();
    for words in [
        "capture\twould be reflink",
        "expected\tcopy: held ",
        "captured\t2",
        "holds for\t",
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    let shown = run(lab.snapshim(&["show", "latest"]), LIMIT)
        .ok("show")
        .out();
    assert!(shown.contains("chosen\treflink: "), "{shown}");
    assert!(shown.contains("captured\tby reflink: held "), "{shown}");
}

/// Extents of a file on XFS: `fsx_nextents`.
fn extents(path: &Path) -> u32 {
    const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
    let file = fs::File::open(path).unwrap();
    let mut attributes = [0u32; 7];
    // SAFETY: the structure has 28 bytes, which the kernel writes.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, attributes.as_mut_ptr()) };
    assert_eq!(done, 0);
    attributes[2]
}

#[test]
fn what_is_overwritten_is_not_broken_up_on_xfs() {
    let _alone = lab::serial();
    let Some(lab) = lab("predict-overwritten", Fs::Xfs) else {
        return;
    };
    let path = file(&lab, "file", 128 * MIB);
    let fresh = extents(&path);
    let mut writer = program(&lab, OVERWRITE, &path);
    for _ in 0..5 {
        let outcome = lab.checkpoint(&["--no-digest"]);
        let expected = prediction(&outcome);
        assert_eq!(expected["choice"], "copy-before-write", "{expected}");
        assert_eq!(outcome.certificate().capture(), "copy-before-write");
        assert_eq!(number(&expected["outcome"]["bytes"]), (128 * MIB) as f64);
        assert_eq!(expected["dominant"][0]["overwritten"], true);
        std::thread::sleep(Duration::from_millis(300));
        let now = now(&lab, &outcome);
        assert_eq!(now["choice"], "copy-before-write", "{now}");
        assert!(number(&now["dominant"][0]["dirty"]) > 0.0, "{now}");
        assert!(hold_of(&now, "reflink") > hold_of(&now, "copy-before-write"));
    }
    let after = extents(&path);
    // The control: clones of the live file do break it up.
    for _ in 0..3 {
        lab.checkpoint(&[
            "--no-digest",
            "--full",
            "--capture",
            "reflink",
            "--max-hold",
            "10s",
        ])
        .certificate();
        std::thread::sleep(Duration::from_millis(300));
    }
    let cloned = extents(&path);
    println!("extents: {fresh}, after 5 checkpoints {after}, after 3 clones {cloned}");
    assert!(after <= fresh + 16, "{fresh} extents became {after}");
    assert!(cloned > after + 200, "the control shows nothing: {cloned}");
    writer.end();

    // In many pieces, but left alone: what a clone takes is told from these.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.sync_all().unwrap();
    std::thread::sleep(Duration::from_millis(1_500));
    let _idle = idle(&lab);
    let outcome = lab.checkpoint(&[
        "--no-digest",
        "--full",
        "--capture",
        "reflink",
        "--max-hold",
        "10s",
    ]);
    let expected = prediction(&outcome);
    let (told, took) = (
        hold_of(&expected, "reflink"),
        outcome.certificate().hold_us(),
    );
    println!(
        "{} extents: expected {told} µs, took {took} µs",
        extents(&path)
    );
    assert!(
        told > 1_000.0 && told < took * 8.0 && took < told * 8.0,
        "{told} µs expected, {took} µs"
    );
    let outcome = lab.checkpoint(&["--no-digest", "--full"]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy-before-write");
    assert!(
        expected["why"].as_str().unwrap().contains(" extents"),
        "{expected}"
    );
}

/// Overwrites the first half of it once, and then a page of that over and over.
const FIRST_HALF: &str = "import os,sys,time
f = os.open(sys.argv[1], os.O_RDWR); n = os.fstat(f).st_size // 2 // 65536; b = os.urandom(65536)
for i in range(n): os.pwrite(f, b, i * 65536)
while True: os.pwrite(f, b[:4096], 0); time.sleep(0.001)";

/// Bytes of a file that are in memory only. `None` before Linux 6.5.
fn dirty(path: &Path) -> Option<u64> {
    in_memory(path).map(|(_, dirty)| dirty)
}

/// Bytes of a file that are in memory, and in memory only: cachestat(2).
fn in_memory(path: &Path) -> Option<(u64, u64)> {
    const CACHESTAT: libc::c_long = 451;
    let file = fs::File::open(path).unwrap();
    let range = [0, file.metadata().unwrap().len()];
    // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
    let mut pages = [0u64; 5];
    let at = pages.as_mut_ptr();
    // SAFETY: both structures are as large as the kernel's; it writes to the second.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), at, 0) };
    (done == 0).then_some((pages[0] * 4096, (pages[1] + pages[2]) * 4096))
}

/// Starts a program, and waits until more than so many bytes of the file are dirty.
fn dirtying(lab: &Lab, script: &str, path: &Path, least: u64) -> Option<Proc> {
    let program = program(lab, script, path);
    if dirty(path).is_none() {
        println!("this kernel has no cachestat: skipped");
        return None;
    }
    let is_dirty = || dirty(path).is_some_and(|bytes| bytes > least);
    assert!(wait_until(Duration::from_secs(20), is_dirty));
    Some(program)
}

/// Whoever writes to a file waits while it is written back: so that is not done ahead of a copy.
#[test]
fn what_is_copied_after_the_cut_is_not_written_back_on_xfs() {
    let _alone = lab::serial();
    let Some(lab) = lab("predict-dirty", Fs::Xfs) else {
        return;
    };
    let path = file(&lab, "file", 64 * MIB);
    let Some(_writer) = dirtying(&lab, FIRST_HALF, &path, 31 * MIB) else {
        return;
    };
    // Some may be written back because it is time.
    let most = 24 * MIB;
    let outcome = lab.checkpoint(&[]);
    let left = dirty(&path).unwrap();
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy-before-write", "{expected}");
    assert_eq!(expected["outcome"]["method"], "copy-before-write");
    assert!(
        number(&expected["dominant"][0]["dirty"]) > most as f64,
        "{expected}"
    );
    assert!(left > most, "{left} bytes are dirty still");
    // The control: a clone needs it.
    lab.checkpoint(&["--capture", "reflink", "--full", "--max-hold", "10s"])
        .certificate();
    let left = dirty(&path).unwrap();
    // The kernel keeps pages in larger folios, which are dirty as a whole.
    assert!(left < 4 * MIB, "{left} bytes are dirty after a clone");
}

/// The same, with the file mapped.
const FIRST_HALF_MAPPED: &str = "import mmap,os,sys,time
f = os.open(sys.argv[1], os.O_RDWR); n = os.fstat(f).st_size // 2 // 65536; b = os.urandom(65536)
m = mmap.mmap(f, 0)
for i in range(n): os.pwrite(f, b, i * 65536)
while True: m[0:4] = b'abcd'; os.pwrite(f, b[:4096], 0); time.sleep(0.001)";

/// If it turns out that programs cannot be asked to wait, clones are made after all, and what they need is written
/// back before the hold, not under it.
#[test]
fn what_is_cloned_after_all_is_written_back_before_on_xfs() {
    let _alone = lab::serial();
    let Some(lab) = lab("predict-after-all", Fs::Xfs) else {
        return;
    };
    // What that takes.
    let other = file(&lab, "other", 256 * MIB);
    let out = lab.data().parent().unwrap().join("other");
    fs::rename(other, &out).unwrap();
    let half = fs::File::options().write(true).open(&out).unwrap();
    for at in (0..128 * MIB).step_by(65_536) {
        half.write_all_at(&[1; 65_536], at).unwrap();
    }
    let begun = std::time::Instant::now();
    half.sync_data().unwrap();
    let flush = begun.elapsed();

    let path = file(&lab, "file", 256 * MIB);
    let Some(_writer) = dirtying(&lab, FIRST_HALF_MAPPED, &path, 120 * MIB) else {
        return;
    };
    let outcome = lab.checkpoint(&["--max-hold", "10s", "--outside", "none"]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy-before-write", "{expected}");
    assert_eq!(expected["outcome"]["method"], "reflink");
    let instead = expected["outcome"]["instead"].as_str().unwrap();
    assert!(instead.contains("has a member mapped"), "{instead}");
    let hold = Duration::from_micros(outcome.certificate().hold_us() as u64);
    println!("held for {hold:?}; to write back 128 MiB takes {flush:?}");
    assert!(hold < flush / 5, "{hold:?}, and {flush:?}");
}

/// Overwrites the beginnings of ten files in turn, some 2,000 a second.
const TEN: &str = "import os,sys,time
at = os.path.dirname(sys.argv[1])
f = [os.open(f'{at}/{i}', os.O_RDWR) for i in range(10)]; b = os.urandom(64)
while True:
    for i in f: os.pwrite(i, b, 0); time.sleep(0.0003)";

/// A clone waits until what is dirty is written back, of small files as well.
#[test]
fn small_files_that_are_written_to_are_not_cloned_on_xfs() {
    let _alone = lab::serial();
    let Some(lab) = lab("predict-small", Fs::Xfs) else {
        return;
    };
    let all: Vec<PathBuf> = (0..10).map(|i| file(&lab, &i.to_string(), 4096)).collect();
    let mut writer = program(&lab, TEN, &all[9]);
    let outcome = lab.checkpoint(&[]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy-before-write", "{expected}");
    let cause = expected["dominant"][0]["cause"].as_str().unwrap();
    assert_eq!(cause, "4.0 KiB being written to");
    let now = now(&lab, &outcome);
    assert_eq!(now["choice"], "copy-before-write", "{now}");
    writer.end();
    std::thread::sleep(Duration::from_millis(1_500));
    let _idle = idle(&lab);
    let expected = prediction(&lab.checkpoint(&["--full"]));
    assert_eq!(expected["choice"], "reflink", "{expected}");
}

#[test]
fn what_only_grows_is_cloned_on_xfs() {
    let Some(lab) = lab("predict-appended", Fs::Xfs) else {
        return;
    };
    let path = file(&lab, "log", 64 * MIB);
    let _writer = program(&lab, APPEND, &path);
    let outcome = lab.checkpoint(&[]);
    let expected = prediction(&outcome);
    assert_eq!(expected["dominant"][0]["overwritten"], false, "{expected}");
    assert_eq!(expected["outcome"]["method"], "reflink", "{expected}");
    // A program that has not come to write since the flush cannot be told from one that overwrites.
    let right = (0..10).filter(|_| {
        let before = fs::metadata(&path).unwrap().len();
        let goes_on = || fs::metadata(&path).unwrap().len() > before;
        assert!(wait_until(Duration::from_secs(20), goes_on));
        now(&lab, &outcome)["dominant"][0]["overwritten"] == false
    });
    let right = right.count();
    assert!(right > 5, "told {right} times of 10");
}

/// What is copied under the hold is in memory by then.
#[test]
fn what_is_copied_under_the_hold_is_read_before_it_on_ext4() {
    let _alone = lab::serial();
    let Some(lab) = lab("predict-cold", Fs::Ext4) else {
        return;
    };
    let path = file(&lab, "file", 64 * MIB);
    let Some((read, _)) = in_memory(&path) else {
        println!("this kernel has no cachestat: skipped");
        return;
    };
    assert_eq!(read, 64 * MIB);
    let _idle = idle(&lab);
    for (method, is_read) in [("copy", true), ("copy-before-write", false)] {
        forget(&path);
        let before = in_memory(&path).unwrap().0;
        assert!(before < MIB, "{before} bytes are in memory");
        // Between the look at what there is and the cut.
        let (reached, go) = (lab.beside("reached"), lab.beside("go"));
        let (there, until) = (reached.display(), go.display());
        let line = format!("touch {there}; until [ -e {until} ]; do sleep 0.01; done");
        let args = [
            "checkpoint",
            lab.set(),
            "--json",
            "--full",
            "--capture",
            method,
        ];
        let checkpoint = [&args[..], &["--before-cut", &line]].concat();
        let checkpoint = Proc::piped(lab.snapshim(&checkpoint));
        assert!(wait_until(Duration::from_secs(20), || reached.exists()));
        let then = in_memory(&path).unwrap().0;
        fs::write(&go, "").unwrap();
        let outcome = lab::outcome(checkpoint.wait(LIMIT));
        assert_eq!(outcome.certificate().capture(), method);
        for made in [reached, go] {
            fs::remove_file(made).unwrap();
        }
        let expected = if is_read {
            60 * MIB..=64 * MIB
        } else {
            0..=MIB
        };
        assert!(expected.contains(&then), "{method}: {then} bytes");
    }
}

/// Takes a file out of memory.
fn forget(path: &Path) {
    let file = fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Without clones: a large file is copied after the cut, small ones under the hold.
fn without_reflink(fs_kind: Fs) {
    let name = format!("predict-{}", fs_kind.name());
    let Some(lab) = lab(&name, fs_kind) else {
        return;
    };
    file(&lab, "small", 4096);
    let _idle = idle(&lab);
    let expected = prediction(&lab.checkpoint(&[]));
    assert_eq!(expected["choice"], "copy", "{expected}");
    assert!(method(&expected, "reflink").is_none(), "{expected}");

    file(&lab, "large", 128 * MIB);
    let outcome = lab.checkpoint(&[]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy-before-write", "{expected}");
    let why = expected["why"].as_str().unwrap();
    assert!(why.contains("/large: 128.0 MiB to be copied"), "{why}");
    assert_eq!(expected["dominant"][0]["file_system"], fs_kind.name());
    assert!(outcome.certificate().hold_us() < hold_of(&expected, "copy"));
    assert_eq!(now(&lab, &outcome)["choice"], "copy-before-write");
}

#[test]
fn ext4_and_tmpfs_have_no_reflink() {
    without_reflink(Fs::Ext4);
    without_reflink(Fs::Tmpfs);
}

#[test]
fn btrfs_clones_copies_or_freezes() {
    let Some(lab) = lab("predict-btrfs", Fs::Btrfs) else {
        return;
    };
    let path = file(&lab, "file", 64 * MIB);
    let _idle = idle(&lab);
    let options = ["--max-hold", "10s", "--no-digest"];
    let outcome = lab.checkpoint(&options);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "reflink", "{expected}");
    assert!(method(&expected, "subvolume").is_none());
    // Now it will be shared.
    assert_eq!(now(&lab, &outcome)["choice"], "reflink");
    // In one piece it would be cloned at once; in many, each of which is a record to be made, it is copied.
    let open = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for at in (0..64 * MIB).step_by(16 << 10) {
        open.write_all_at(&[1; 4096], at).unwrap();
    }
    open.sync_all().unwrap();
    drop(open);
    let pieces = now(&lab, &outcome);
    assert_eq!(pieces["choice"], "copy-before-write", "{pieces}");
    let cause = pieces["dominant"][0]["cause"].as_str().unwrap();
    assert!(cause.ends_with(" extents"), "{cause}");
    assert!(hold_of(&pieces, "reflink") > 10_000.0, "{pieces}");

    for i in 0..1_200 {
        fs::write(lab.data().join(i.to_string()), "x").unwrap();
    }
    // What was changed just before is captured again the next time.
    std::thread::sleep(Duration::from_millis(200));
    let outcome = lab.checkpoint(&options);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "subvolume", "{expected}");
    assert!(hold_of(&expected, "subvolume") < hold_of(&expected, "reflink"));
    assert_eq!(expected["outcome"]["bytes"], 0);
    // By now all of them are shared, and to look at them under the hold takes longer than not to.
    assert_eq!(now(&lab, &outcome)["choice"], "copy-before-write");
}

#[test]
fn what_could_not_be_done_is_told() {
    let Some(lab) = lab("predict-mapped", Fs::Ext4) else {
        return;
    };
    let path = file(&lab, "file", 16 * MIB);
    let _writer = program(&lab, MAPPED, &path);
    let outcome = lab.checkpoint(&["--max-hold", "10s", "--outside", "none"]);
    let expected = prediction(&outcome);
    assert_eq!(expected["choice"], "copy-before-write", "{expected}");
    assert_eq!(expected["outcome"]["method"], "copy");
    let instead = expected["outcome"]["instead"].as_str().unwrap();
    assert!(instead.contains("has a member mapped"), "{instead}");
    // Now it is known before.
    let now = now(&lab, &outcome);
    assert_eq!(now["choice"], "copy", "{now}");
    let why_not = method(&now, "copy-before-write").unwrap()["why_not"].as_str();
    assert!(why_not.unwrap().contains("has a member mapped"), "{now}");
    let shown = process::run(lab.snapshim(&["status", lab.set()]), LIMIT).out();
    assert!(shown.contains("; not copy-before-write: "), "{shown}");
}
