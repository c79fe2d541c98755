//! The harness itself: mounts, programs and checkers work without the product.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::records::{self, Shape};
use snapshim_tests::{Fs, Lab, Proc, fs as kinds, product, tree};

const SHAPE: Shape = Shape {
    files: 16,
    lanes: 4,
    record: 4096,
};

/// Starts an ungated writer of [`SHAPE`].
fn writer(lab: &Lab) -> Proc {
    let mut command = lab.command(product::program("ordered"));
    command
        .arg(lab.data())
        .args(["16", "2", "2", "4096", "0", "60"]);
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    writer
}

#[test]
fn every_file_system_mounts_and_clones_as_it_should() {
    for kind in kinds::ALL {
        let Some(point) = kind.mount() else { continue };
        let (from, to) = (point.join("from"), point.join("to"));
        fs::write(&from, vec![1; 1 << 20]).unwrap();
        tree::copy_plainly(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), vec![1; 1 << 20]);
    }
}

#[test]
fn an_idle_writer_leaves_consistent_files_and_a_busy_one_does_not() {
    let Some(lab) = Lab::new("harness", Fs::Xfs, Duration::from_secs(60)) else {
        return;
    };
    let copy = lab.beside("copy");
    fs::create_dir_all(&copy).unwrap();
    let mut proc = writer(&lab);
    let copies = 20;
    let bad = (0..copies)
        .filter(|_| {
            for index in 0..SHAPE.files {
                let from = records::file(&lab.data(), index);
                tree::copy_plainly(&from, &records::file(&copy, index)).unwrap();
            }
            !records::check(&copy, SHAPE).is_consistent()
        })
        .count();
    assert!(bad > copies / 2, "only {bad} of {copies} are inconsistent");
    proc.signal(Signal::SIGTERM);
    proc.wait(Duration::from_secs(20)).ok("the writer");
    let verdict = records::check(&lab.data(), SHAPE);
    assert!(
        verdict.is_consistent() && verdict.progress > 0,
        "{verdict:?}"
    );
    assert!(lab.stats().longest() > Duration::ZERO);
}

#[test]
fn everything_of_a_test_goes_with_it() {
    let Some(lab) = Lab::new("harness-gone", Fs::Tmpfs, Duration::from_secs(60)) else {
        return;
    };
    let (data, gates) = (lab.data(), lab.gates().to_owned());
    let proc = writer(&lab);
    let pids = lab.processes();
    assert!(pids.len() >= 2, "{pids:?}");
    // As if the test had failed with the writer forgotten.
    std::mem::forget(proc);
    drop(lab);
    assert!(!data.exists() && !gates.exists());
    for pid in pids {
        assert_ne!(snapshim_tests::process::state(pid), Some('R'), "{pid}");
    }
}
