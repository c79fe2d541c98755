//! How far a capture is, told while it is made: to whom it serves, and without waiting for
//! anybody. Reading is made slow, so that there is something to tell.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use snapshim_tests::process::{self, Ended, run, wait_until};
use snapshim_tests::{Fs, Lab, Proc, lab, product};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;
const SIZE: usize = 16 * MIB;
const GUARDED: [&str; 5] = [
    "--no-digest",
    "--full",
    "--capture",
    "copy-before-write",
    "--json",
];
const COPIED: [&str; 7] = [
    "--no-digest",
    "--full",
    "--capture",
    "copy",
    "--max-hold",
    "10s",
    "--json",
];

/// A set with a program that does nothing, and a file of [`SIZE`].
struct Scene {
    lab: Lab,
    _idle: Proc,
}

impl Scene {
    fn new(name: &str) -> Option<Scene> {
        let lab = Lab::new(name, Fs::Ext4, Duration::from_secs(240))?;
        fs::write(lab.data().join("large"), vec![1; SIZE]).unwrap();
        let mut idle = lab.run(&[], Path::new("/bin/sleep"), &["600"]);
        let ready = wait_until(Duration::from_secs(20), || {
            !lab.processes_named("sleep").is_empty() && lab.gate().exists()
        });
        assert!(ready && idle.is_running());
        std::thread::sleep(Duration::from_millis(100));
        Some(Scene { lab, _idle: idle })
    }

    /// What makes each read take so long; a chunk has 64 KiB, a copy 256.
    fn slowly(us: u32) -> Vec<String> {
        let inject = format!("inject=pread64:delay_enter={us}");
        let words = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "signal=none",
            "-e",
            "trace=pread64",
            "-e",
            &inject,
            "-o",
            "/dev/null",
        ];
        words.map(str::to_owned).to_vec()
    }

    /// A checkpoint of which each read takes so long.
    fn slow(&self, us: u32, options: &[&str]) -> Command {
        let words = Scene::slowly(us);
        let mut command = self.lab.command(&words[0]);
        command
            .args(&words[1..])
            .arg(product::snapshim())
            .args(["checkpoint", self.lab.set()])
            .args(options)
            .env("TERM", "xterm");
        command
    }
}

#[track_caller]
fn certificate(ended: &Ended) -> Value {
    let object: Value = serde_json::from_slice(&ended.stdout)
        .unwrap_or_else(|e| panic!("not one object: {e}\n{}\n{}", ended.out(), ended.err()));
    assert_eq!(object["verified"], true, "{object}");
    object
}

#[test]
fn programs_are_told_by_events() {
    let _alone = lab::serial();
    let Some(scene) = Scene::new("progress-events") else {
        return;
    };
    // 256 chunks.
    let ended = run(scene.slow(20_000, &GUARDED), LIMIT).ok("checkpoint");
    let object = certificate(&ended);
    let guard = object["guard_us"].as_u64().expect("a guard") as f64 / 1e6;
    assert!(guard > 4.0, "{guard} s");
    let lines = ended.err();
    let events: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    let count = events.len() as f64;
    assert!(
        count >= 3.0 && count <= guard + 1.0,
        "{count} in {guard} s: {lines}"
    );
    let mut before = 0;
    for event in &events {
        assert_eq!(event["event"], "progress");
        assert_eq!(event["step"], "capturing");
        assert_eq!(event["total"], SIZE);
        let bytes = event["bytes"].as_u64().unwrap();
        assert!(bytes > before && bytes <= SIZE as u64, "{lines}");
        before = bytes;
        let rate = event["bytes_per_second"].as_f64().unwrap();
        let left = event["seconds_left"].as_f64().unwrap();
        let told = (SIZE as f64 - bytes as f64) / rate;
        assert!((told - left).abs() <= 1.0, "{event}");
    }
    // What takes no time is not worth an event.
    let ended = run(
        scene
            .lab
            .snapshim(&[&["checkpoint"], &GUARDED[..]].concat()),
        LIMIT,
    );
    certificate(&ended);
    assert_eq!(ended.err(), "");
    let quiet = [&GUARDED[..], &["--quiet"]].concat();
    assert_eq!(
        run(scene.slow(10_000, &quiet), LIMIT)
            .ok("checkpoint")
            .err(),
        ""
    );
}

#[test]
fn people_are_told_on_a_terminal_and_in_lines() {
    let _alone = lab::serial();
    let Some(scene) = Scene::new("progress-people") else {
        return;
    };
    let guarded = &GUARDED[..4];
    let command = format!(
        "stty cols 100; {} {} checkpoint {}",
        Scene::slowly(12_000).join(" "),
        product::snapshim().display(),
        guarded.join(" ")
    );
    let mut script = scene
        .lab
        .command_with("script", &["-qec", &command, "/dev/null"]);
    script.env("TERM", "xterm").env_remove("NO_COLOR");
    let shown = run(script, LIMIT).ok("script").out();
    assert!(
        shown.contains("\r\u{1b}[2Kcapturing: ") && shown.contains(" of 16.0 MiB ("),
        "{shown:?}"
    );
    assert!(
        shown.contains("/s, ") && shown.contains(" s left"),
        "{shown:?}"
    );
    // It is gone when the answer comes.
    let (before, answer) = shown.split_once("verified").expect(&shown);
    assert!(before.rfind("\u{1b}[2K").unwrap() > before.rfind("capturing: ").unwrap());
    assert!(!answer.contains("capturing: "), "{shown:?}");

    let lines = |options: &[&str]| {
        let command = scene.slow(20_000, &[guarded, options].concat());
        run(command, LIMIT).ok("checkpoint").err()
    };
    let told = lines(&["--verbose"]);
    let told: Vec<&str> = told.lines().filter(|l| l.contains(" left")).collect();
    assert!((2..=4).contains(&told.len()), "{told:?}");
    assert!(
        told.iter().all(|l| l.starts_with("snapshim: capturing: ")),
        "{told:?}"
    );
    // A line every ten seconds is none here.
    assert_eq!(lines(&[]), "");

    // Copied under the hold: told, too.
    let ended = run(scene.slow(60_000, &COPIED), LIMIT).ok("checkpoint");
    assert!(certificate(&ended)["hold_us"].as_u64().unwrap() > 3_000_000);
    assert!(
        ended.err().contains("\"step\":\"capturing\""),
        "{}",
        ended.err()
    );
}

/// A pipe that is full, and that nobody reads.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let fd = writer.as_raw_fd();
    let flags = |set: i32| {
        // SAFETY: takes no pointers; the descriptor is open.
        unsafe { libc::fcntl(fd, libc::F_SETFL, set) };
    };
    flags(libc::O_NONBLOCK);
    while writer.write(&[b'x'; 4096]).is_ok() {}
    while writer.write(b"x").is_ok() {}
    flags(0);
    (reader, writer)
}

#[test]
fn a_reader_that_never_reads_holds_nobody_up() {
    let _alone = lab::serial();
    let Some(scene) = Scene::new("progress-full") else {
        return;
    };
    for (field, us, options) in [
        ("guard_us", 12_000, &GUARDED[..]),
        ("hold_us", 40_000, &COPIED),
    ] {
        let time = |ended: &Ended| certificate(ended)[field].as_f64().unwrap() / 1e6;
        let usual = time(&run(scene.slow(us, options), LIMIT).ok("checkpoint"));
        assert!(usual > 2.0, "{usual} s");

        let (reader, writer) = full_pipe();
        let mut command = scene.slow(us, options);
        command.stdout(Stdio::piped()).stderr(writer);
        process::dies_with_us(&mut command);
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        // Ours, too, would keep the pipe open.
        drop(command);
        let mut out = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        let status = child.wait().unwrap();
        let object: Value = serde_json::from_str(&out).expect("one object");
        assert!(status.success() && object["verified"] == true, "{out}");
        let took = object[field].as_f64().unwrap() / 1e6;
        println!(
            "{field}: {took:.2} s, with a reader {usual:.2} s, in all {:?}",
            begun.elapsed()
        );
        assert!(took < usual * 1.5 + 0.3, "{took} s instead of {usual}");
        drop(reader);
    }
}

/// What is told must not be a change of what is captured.
#[test]
fn nothing_is_written_to_a_file_while_it_may_be_captured() {
    let _alone = lab::serial();
    let Some(scene) = Scene::new("progress-file") else {
        return;
    };
    let log = scene.lab.data().join("log");
    // Opened by a shell that becomes snapshim: what is outside the set and has it open would be
    // stopped, as strace must not be.
    let words = Scene::slowly(12_000);
    let mut command = scene.lab.command(&words[0]);
    command
        .args(&words[1..])
        .args(["sh", "-c", "exec \"$0\" checkpoint \"$@\" 2>\"$LOG\""])
        .arg(product::snapshim())
        .arg(scene.lab.set())
        .args(GUARDED)
        .env("LOG", &log);
    let object = certificate(&run(command, LIMIT).ok("checkpoint"));
    assert!(object["guard_us"].as_u64().unwrap() > 2_000_000);
    assert_eq!(fs::read_to_string(&log).unwrap(), "");
}
