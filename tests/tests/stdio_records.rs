//! `--stdio-records`: a program that prints records and never flushes has whole
//! records in its file whenever a snapshot is taken, and the same bytes in the end.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use snapshim_tests::{Fs, Lab, lab, process, product, rounds};

const LIMIT: Duration = Duration::from_secs(900);
const WAYS: [&str; 8] = [
    "fprintf", "floats", "printf", "vfprintf", "fwrite", "fputs", "puts", "fwprintf",
];

/// Whether the file consists of whole records, in order.
fn is_whole(text: &[u8]) -> bool {
    let Some(body) = text.strip_suffix(b"\n") else {
        return text.is_empty();
    };
    body.split(|b| *b == b'\n').enumerate().all(|(n, line)| {
        let head = format!("{n:010} {:03} ", n * 37 % 389);
        line.starts_with(head.as_bytes())
            && line.ends_with(b" .")
            && line.len() == head.len() + n * 37 % 389 + 2
    })
}

/// Snapshots of a running recorder: how many, and how many end in mid-record.
fn torn(lab: &Lab, how: &str, options: &[&str], count: usize) -> usize {
    let file = lab.data().join("records");
    let _ = fs::remove_file(&file);
    let program = product::program("recorder");
    let mut proc = lab.run(options, &program, &[file.to_str().unwrap(), how, "0"]);
    let filled = process::wait_until(Duration::from_secs(20), || {
        file.metadata().is_ok_and(|m| m.len() > 8192)
    });
    assert!(filled, "{how}: the program writes nothing");
    let mut torn = 0;
    let begin = Instant::now();
    for _ in 0..count {
        let outcome = lab.checkpoint(&["--keep-last", "1"]);
        let text = fs::read(outcome.certificate().copy_of(&file)).unwrap();
        torn += usize::from(!is_whole(&text));
        assert!(begin.elapsed() < LIMIT, "too slow");
    }
    proc.end();
    torn
}

#[test]
fn every_snapshot_ends_on_a_whole_record() {
    let _serial = lab::serial();
    let count = rounds(1000, 60);
    let lab = Lab::new("records", Fs::Xfs, LIMIT).unwrap();
    let torn_with = torn(&lab, "fprintf", &["--stdio-records"], count);
    drop(lab);
    let lab = Lab::new("records-control", Fs::Xfs, LIMIT).unwrap();
    let control = count.min(100);
    let torn_without = torn(&lab, "fprintf", &[], control);
    println!(
        "whole records: {} of {count}; without --stdio-records: {} of {control}",
        count - torn_with,
        control - torn_without
    );
    assert_eq!(torn_with, 0);
    assert!(torn_without > control / 2, "the control shows nothing");
}

#[test]
fn every_way_to_print_is_seen() {
    let lab = Lab::new("records-ways", Fs::Tmpfs, LIMIT).unwrap();
    for how in WAYS {
        let torn = torn(&lab, how, &["--stdio-records"], 5);
        assert_eq!(torn, 0, "{how}");
    }
}

#[test]
fn the_bytes_are_the_same() {
    let lab = Lab::new("records-same", Fs::Tmpfs, LIMIT).unwrap();
    let program = product::program("recorder");
    let run = |how: &str, command: std::process::Command, path: &Path| {
        let mut command = command;
        command.arg(&program).arg(path).args([how, "20000"]);
        process::run(command, LIMIT).ok(how);
        fs::read(path).unwrap()
    };
    for how in WAYS {
        let bare = run(how, lab.command("env"), &lab.data().join("bare"));
        assert!(is_whole(&bare), "{how}: the program itself is wrong");
        for options in [&["--stdio-records"][..], &[]] {
            let shimmed = lab.run_command(options);
            let name = format!("shimmed-{how}-{}", options.len());
            assert!(
                run(how, shimmed, &lab.data().join(name)) == bare,
                "{how} {options:?}: other bytes"
            );
        }
    }
}
