//! What once went wrong, and must not again: each test is one defect, by what it
//! showed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use snapshim_tests::lab::Outcome;
use snapshim_tests::process::{self, Proc, tool};
use snapshim_tests::records::{self, Shape};
use snapshim_tests::{Fs, Lab, Random, lab, product};

const LIMIT: Duration = Duration::from_secs(60);
/// How long a program may take to come up or to go.
const PATIENCE: Duration = Duration::from_secs(20);

/// The records `defects` writes.
const SHAPE: Shape = Shape {
    files: 2,
    lanes: 1,
    record: 4096,
};
/// And in modes with two threads or processes.
const SHAPE_OF_TWO: Shape = Shape { lanes: 2, ..SHAPE };

/// Runs `defects MODE` under the shim until it has written.
fn defects(lab: &Lab, mode: &str) -> Proc {
    let data = lab.data();
    let args = [mode, data.to_str().unwrap()];
    let mut writer = lab.run(&[], &product::program("defects"), &args);
    lab.wait_for_beats(&mut writer, 10);
    writer
}

/// Tells a program to end, and expects that it does, and well.
#[track_caller]
fn conclude(mut writer: Proc) {
    writer.signal(Signal::SIGTERM);
    writer.wait(PATIENCE).ok("the program");
}

/// A checkpoint whose copy is of one instant.
#[track_caller]
fn verified(lab: &Lab, shape: Shape) {
    let outcome = lab.checkpoint(&[]);
    let copy = outcome.verified().copy_of(&lab.data());
    let verdict = records::check(&copy, shape);
    assert!(verdict.is_consistent(), "verified, and yet {verdict:?}");
}

/// A checkpoint that is not verified for the reason `code`.
#[track_caller]
fn unverified(outcome: &Outcome, code: &str) {
    let reasons = outcome.unverified().reasons();
    assert!(
        reasons.iter().any(|(c, _)| c == code),
        "no {code}: {reasons:?}"
    );
}

/// A slot of the gate, as its file has it.
#[derive(Debug)]
struct Slot {
    pid: i32,
    tid: i32,
    namespace: u64,
    seq: u32,
}

/// The slots that somebody owns; none while there is no gate.
fn slots(lab: &Lab) -> Vec<Slot> {
    const PID: u64 = (1 << 22) - 1;
    let bytes = fs::read(lab.gate()).unwrap_or_default();
    bytes
        .chunks_exact(128)
        .skip(13696 / 128)
        .map(|slot| {
            let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap());
            (word(32), word(8) as u32)
        })
        .filter(|(owner, _)| *owner != 0 && *owner != u64::MAX)
        .map(|(owner, seq)| Slot {
            pid: (owner >> 22 & PID) as i32,
            tid: (owner & PID) as i32,
            namespace: owner >> 44,
            seq,
        })
        .collect()
}

/// What `status --json` says.
fn status(lab: &Lab) -> serde_json::Value {
    let command = lab.snapshim(&["status", lab.set(), "--json"]);
    let ended = process::run(command, PATIENCE).ok("status");
    serde_json::from_slice(&ended.stdout).expect("one JSON object")
}

/// One process is alive; it has `threads` slots, each of a thread that is there.
/// (Slots of dead processes stay until somebody needs them.)
#[track_caller]
fn owners_are_alive(lab: &Lab, threads: usize) {
    let (status, mut slots) = (status(lab), slots(lab));
    let writers = status["writers"].as_array().into_iter().flatten();
    let alive: Vec<_> = writers.filter(|w| w["alive"] == true).collect();
    let [writer] = alive[..] else {
        panic!("{status:#}");
    };
    assert_eq!(writer["threads"], threads, "{status:#}\n{slots:?}");
    slots.retain(|slot| writer["pid"] == slot.pid);
    let tids: BTreeSet<i32> = slots.iter().map(|slot| slot.tid).collect();
    assert_eq!((slots.len(), tids.len()), (threads, threads), "{slots:?}");
    for slot in slots {
        let task = format!("/proc/{}/task/{}", slot.pid, slot.tid);
        assert!(Path::new(&task).exists(), "no such thread: {slot:?}");
    }
}

#[test]
fn stores_into_mappings_that_are_writable_only_meanwhile() {
    let _alone = lab::serial();
    for fs_kind in [Fs::Tmpfs, Fs::Ext4] {
        let Some(lab) = Lab::new("regressions-toggled", fs_kind, LIMIT) else {
            continue;
        };
        let writer = defects(&lab, "toggled");
        for _ in 0..20 {
            let outcome = lab.checkpoint(&["--outside", "none"]);
            unverified(&outcome, "mapped-writable");
            lab.checkpoint(&[]).verified();
        }
        conclude(writer);
    }
}

/// A file system mounted for one test, and unmounted when dropped.
struct Mount {
    at: PathBuf,
    image: Option<PathBuf>,
}

impl Mount {
    /// `kind`, made by `mkfs` in an image, or by the kernel alone.
    fn new(at: PathBuf, kind: &str, mkfs: &[&str]) -> Mount {
        fs::create_dir_all(&at).unwrap();
        let mut mount = Mount { at, image: None };
        let mut command = Command::new("mount");
        command.args(["-t", kind]);
        match mkfs.split_first() {
            None => {
                command.arg(kind);
            }
            Some((program, options)) => {
                // Named so that the next run sweeps it up, should this one be killed.
                let pid = std::process::id();
                let start = process::start_time(pid as i32).unwrap();
                let name = format!("snapshim-test-{pid}-{start}.{kind}-regressions-image");
                let image = std::env::temp_dir().join(name);
                fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
                mount.image = Some(image.clone());
                let image = image.to_str().unwrap();
                tool(program, &[options, &["-q", "-F", image]].concat());
                command.args(["-o", "loop,noatime", image]);
            }
        }
        command.arg(&mount.at);
        process::run(command, PATIENCE).ok(&format!("mounting {kind}"));
        mount
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for options in [&["-d"][..], &["-d", "--lazy"]] {
            let mut command = Command::new("umount");
            command.args(options).arg(&self.at);
            if process::run(command, PATIENCE).code() == 0 {
                break;
            }
        }
        if let Some(image) = &self.image {
            let _ = fs::remove_file(image);
        }
    }
}

/// A program that writes through stdio below `at`, where ctimes prove nothing, is
/// never verified.
fn never_verified_on(kind: &str, mkfs: &[&str], below: &str) {
    if std::env::var_os("SNAPSHIM_TEST_NO_MOUNTS").is_some_and(|v| !v.is_empty() && v != "0") {
        eprintln!("SKIPPED on {kind}: SNAPSHIM_TEST_NO_MOUNTS is set");
        return;
    }
    let _alone = lab::serial();
    let Some(lab) = Lab::new(&format!("regressions-{kind}"), Fs::Tmpfs, LIMIT) else {
        return;
    };
    let mount = Mount::new(lab.data().join(below), kind, mkfs);
    let program = product::compiled("cc", "suspect", "suspect-plain", &["-pthread"]);
    let at = mount.at.to_str().unwrap();
    let mut writer = lab.run(&[], &program, &["stdio", at, "600"]);
    lab.wait_for_beats(&mut writer, 10);
    // The store is on another file system: that is refused unless asked for.
    let refused = lab.checkpoint(&[]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("another file system"),
        "{}",
        refused.stderr
    );
    for _ in 0..10 {
        unverified(&lab.checkpoint(&["--capture", "copy"]), "no-fine-ctime");
    }
    conclude(writer);
}

#[test]
fn ext4_whose_inodes_have_no_room_for_fractions_of_a_second() {
    never_verified_on("ext4", &["mkfs.ext4", "-I", "128"], "");
}

#[test]
fn ext2() {
    never_verified_on("ext2", &["mkfs.ext2"], "");
}

#[test]
fn ramfs_below_tmpfs() {
    never_verified_on("ramfs", &[], "below");
}

#[test]
fn a_child_of_vfork_makes_the_first_call() {
    let _alone = lab::serial();
    for mode in ["vfork-write", "vfork-exec"] {
        let Some(lab) = Lab::new(&format!("regressions-{mode}"), Fs::Tmpfs, LIMIT) else {
            return;
        };
        let writer = defects(&lab, mode);
        owners_are_alive(&lab, 1);
        for _ in 0..10 {
            verified(&lab, SHAPE);
        }
        conclude(writer);
    }
}

#[test]
fn a_child_of_vfork_leaves_no_slot_to_the_next_threads() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-vfork-blocked", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let data = lab.data();
    let args = ["vfork-blocked", data.to_str().unwrap()];
    let mut writer = lab.run(&[], &product::program("defects"), &args);
    // Both threads, each in a call that does not end.
    let are_blocked = || {
        let programs = lab.processes_named("defects");
        let Some(pid) = programs.first() else {
            return false;
        };
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter();
        let calls = tasks.flatten().flatten().map(|task| {
            let call = fs::read_to_string(task.path().join("syscall"));
            call.unwrap_or_default()
        });
        // write
        calls.filter(|call| call.starts_with("1 ")).count() == 2
    };
    assert!(
        process::wait_until(PATIENCE, are_blocked) && writer.is_running(),
        "the program blocked nowhere"
    );
    owners_are_alive(&lab, 2);
}

#[test]
fn python_fails_to_start_a_program() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-python", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let script = r#"
import os, subprocess, sys
try:
    subprocess.run(["/nonexistent/program"])
except FileNotFoundError:
    pass
files = [os.open(f, os.O_RDWR | os.O_CREAT) for f in ("a", "b")]
k = 0
while True:
    k += 1
    for f in files:
        os.pwrite(f, b"%016d" % k, 0)
"#;
    let mut command = lab.run_command(&[]);
    command
        .args(["python3", "-c", script])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(lab.data());
    let mut writer = Proc::piped(command);
    let number = |dir: &Path, name: &str| -> Option<u64> {
        fs::read_to_string(dir.join(name)).ok()?.parse().ok()
    };
    let data = lab.data();
    let came = process::wait_until(PATIENCE, || number(&data, "b").is_some());
    assert!(came && writer.is_running(), "python wrote nothing");
    owners_are_alive(&lab, 1);
    for _ in 0..20 {
        let outcome = lab.checkpoint(&[]);
        let copy = outcome.verified().copy_of(&data);
        let (a, b) = (number(&copy, "a").unwrap(), number(&copy, "b").unwrap());
        assert!(a == b || a == b + 1, "verified, and yet {a}, {b}");
    }
}

#[test]
fn a_program_that_only_asks_for_a_sandbox() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-probe", Fs::Tmpfs, LIMIT) else {
        return;
    };
    // Without the shim, to compare.
    let mut command = lab.command(product::program("defects"));
    command.arg("probe").arg(lab.data());
    let mut plain = Proc::piped(command);
    lab.wait_for_beats(&mut plain, 1);
    plain.signal(Signal::SIGTERM);
    let plain = plain.wait(PATIENCE).ok("without the shim").out();
    assert!(plain.contains("prctl -1 14"), "no EFAULT: {plain}");
    fs::remove_file(lab.stats().path()).unwrap();

    let mut writer = defects(&lab, "probe");
    for _ in 0..20 {
        verified(&lab, SHAPE_OF_TWO);
    }
    writer.signal(Signal::SIGTERM);
    assert_eq!(writer.wait(PATIENCE).ok("the program").out(), plain);
}

#[test]
fn a_sandbox_that_kills_for_any_call_but_a_few() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-sandbox", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let mut writer = defects(&lab, "sandbox");
    let stats = lab.stats();
    assert!(process::wait_until(PATIENCE, || stats.turns() == 1));
    for _ in 0..20 {
        verified(&lab, SHAPE);
        let beats = stats.beats();
        let goes_on = process::wait_until(PATIENCE, || {
            stats.beats() > beats + 2 || !writer.is_running()
        });
        assert!(goes_on && writer.is_running(), "killed in its sandbox");
    }
    conclude(writer);
}

#[test]
fn programs_that_the_loader_is_named_for() {
    let Some(lab) = Lab::new("regressions-loader", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let env = lab.env(&[]);
    let musl = product::compiled("musl-gcc", "writes", "writes-musl", &[]);
    for (loader, program) in [
        ("/lib/ld-musl-x86_64.so.1", musl),
        ("/lib64/ld-linux-x86-64.so.2", product::program("writes")),
    ] {
        let member = lab.data().join(program.file_name().unwrap());
        let mut command = lab.command(loader);
        command
            .arg(program)
            .arg("1000")
            .arg(&member)
            .envs(env.clone());
        process::run(command, PATIENCE).ok(loader);
        assert_eq!(fs::metadata(&member).unwrap().len(), 1000, "{loader}");
    }
}

#[test]
fn two_libraries_with_an_io_uring_submit_of_their_own() {
    let Some(lab) = Lab::new("regressions-copies", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let copy = |number: u32| {
        let name = format!("libcopy-{number}.so");
        let define = format!("-DCOPY={number}");
        product::compiled("cc", "copies", &name, &["-shared", "-fPIC", &define])
    };
    let program = product::compiled("cc", "copies", "copies", &["-ldl"]);
    let mut command = lab.command(program);
    command.args([copy(1), copy(2)]).arg("200");
    command.envs(lab.env(&[]));
    let ended = process::run(command, PATIENCE).ok("copies");
    assert_eq!(ended.out(), "each its own\n");
}

#[test]
fn writers_that_die_or_exec_are_no_strangers() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-mayfly", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let member = lab.data().join("member");
    let mut command = lab.run_command(&[]);
    command.args(["sh", "-c", "while :; do \"$1\" \"$2\" 5; done", "sh"]);
    command.arg(product::program("mayfly")).arg(&member);
    let _writers = Proc::piped(command);
    assert!(process::wait_until(PATIENCE, || member.exists()));
    for _ in 0..30 {
        let outcome = lab.checkpoint(&[]);
        let certificate = outcome.certificate();
        let reasons = certificate.reasons();
        assert!(
            !reasons.iter().any(|(code, _)| code == "foreign-writer"),
            "{reasons:?}"
        );
    }
}

#[test]
fn a_gate_full_of_slots_of_other_namespaces() {
    const SLOTS: u32 = 4000;
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-full-gate", Fs::Tmpfs, LIMIT) else {
        return;
    };
    lab.env(&[]);
    fs::write(lab.data().join("member"), "x").unwrap();
    let others: Vec<Proc> = (0..50)
        .map(|_| {
            let mut command = Command::new("sleep");
            command.arg("60");
            Proc::piped(command)
        })
        .collect();
    let gate = fs::OpenOptions::new().write(true).open(lab.gate()).unwrap();
    let mut random = Random(5);
    for slot in 0..u64::from(SLOTS) {
        let at = 13696 + 128 * slot;
        let owner = random.number().clamp(1, u64::MAX - 1);
        gate.write_all_at(&owner.to_le_bytes(), at + 32).unwrap();
        let start = random.number();
        gate.write_all_at(&start.to_le_bytes(), at + 40).unwrap();
    }
    gate.write_all_at(&SLOTS.to_le_bytes(), 128 + 12).unwrap();
    let outcome = lab.checkpoint(&[]);
    println!("took {:?}, exit {}", outcome.wall, outcome.code);
    assert!(matches!(outcome.code, 0 | 5), "{}", outcome.stderr);
    assert!(
        outcome.wall < Duration::from_secs(3),
        "took {:?}",
        outcome.wall
    );
    drop(others);
}

#[test]
fn children_in_pid_namespaces_of_their_own() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-namespaces", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let writer = defects(&lab, "namespaces");
    // Each is process 1.
    let firsts = || -> Vec<Slot> { slots(&lab).into_iter().filter(|s| s.pid == 1).collect() };
    assert!(
        process::wait_until(PATIENCE, || firsts().len() >= 2),
        "{:?}",
        slots(&lab)
    );
    let before = firsts();
    let namespaces: BTreeSet<u64> = before.iter().map(|s| s.namespace).collect();
    assert_eq!((before.len(), namespaces.len()), (2, 2), "{before:?}");
    let mut codes = BTreeSet::new();
    for _ in 0..20 {
        let outcome = lab.checkpoint(&[]);
        codes.insert(outcome.code);
        let certificate = outcome.certificate();
        let verdict = records::check(&certificate.copy_of(&lab.data()), SHAPE_OF_TWO);
        match outcome.code {
            0 => assert!(verdict.is_consistent(), "verified, and yet {verdict:?}"),
            _ => drop(outcome.unverified()),
        }
    }
    println!("exit codes {codes:?}");
    let after = firsts();
    let mut moved = before.iter().zip(&after);
    assert!(
        after.len() == 2 && moved.all(|(a, b)| a.seq != b.seq),
        "{before:?} {after:?}"
    );
    conclude(writer);
}

#[test]
fn a_writer_stopped_in_its_loop() {
    let _alone = lab::serial();
    let Some(lab) = Lab::new("regressions-stopped", Fs::Tmpfs, LIMIT) else {
        return;
    };
    let writer = defects(&lab, "vfork-write");
    let pid = lab.processes_named("defects")[0];
    let pid = nix::unistd::Pid::from_raw(pid);
    let mut random = Random(6);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_micros(random.below(2000)));
        nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
        let is_stopped = || process::state(pid.as_raw()) == Some('T');
        assert!(process::wait_until(PATIENCE, is_stopped));
        let begin = Instant::now();
        verified(&lab, SHAPE);
        assert!(begin.elapsed() < Duration::from_secs(5));
        nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
    }
    conclude(writer);
}
