//! The promise itself: a checkpoint of a program that writes all the time is a
//! copy of one instant.
//!
//! Each test prints a line for its control, the same workload copied file by
//! file without the gate. `SNAPSHIM_TEST_FULL=1` takes the full number of
//! checkpoints: 1,000 on XFS, 1,000 on btrfs, 300 on ext4, 300 on tmpfs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use snapshim_tests::records::{self, Shape};
use snapshim_tests::stats::distribution;
use snapshim_tests::{Fs, Lab, Proc, lab, product, rounds, tree};

/// One workload and its share of the checkpoints.
struct Workload {
    name: &'static str,
    files: usize,
    threads: usize,
    processes: usize,
    record: usize,
    pace_us: usize,
    percent: usize,
}

const WORKLOADS: [Workload; 5] = [
    Workload {
        name: "2-files-1-thread",
        files: 2,
        threads: 1,
        processes: 1,
        record: 65536,
        pace_us: 0,
        percent: 25,
    },
    Workload {
        name: "2-files-16-threads",
        files: 2,
        threads: 16,
        processes: 1,
        record: 16384,
        pace_us: 100,
        percent: 25,
    },
    Workload {
        name: "16-files-4-threads-2-processes",
        files: 16,
        threads: 4,
        processes: 2,
        record: 4096,
        pace_us: 100,
        percent: 20,
    },
    Workload {
        name: "16-files-8-processes",
        files: 16,
        threads: 1,
        processes: 8,
        record: 8192,
        pace_us: 200,
        percent: 20,
    },
    Workload {
        name: "500-files-2-threads",
        files: 500,
        threads: 2,
        processes: 1,
        record: 4096,
        pace_us: 0,
        percent: 10,
    },
];

impl Workload {
    fn shape(&self) -> Shape {
        Shape {
            files: self.files,
            lanes: self.threads * self.processes,
            record: self.record,
        }
    }

    fn args(&self, dir: &Path) -> Vec<String> {
        let mut args = vec![dir.display().to_string()];
        let numbers = [
            self.files,
            self.threads,
            self.processes,
            self.record,
            self.pace_us,
            900,
        ];
        args.extend(numbers.map(|n| n.to_string()));
        args
    }
}

/// Copies the files of a writer that is not under the gate, at least 20 times and
/// until a copy could not be of one instant; returns how many of how many.
fn control(lab: &Lab, workload: &Workload) -> (usize, usize) {
    let (live, copy) = (lab.beside("control"), lab.beside("control-copy"));
    fs::create_dir_all(&live).unwrap();
    fs::create_dir_all(&copy).unwrap();
    let mut command = lab.command(product::program("ordered"));
    command.args(workload.args(&live));
    let mut writer = Proc::piped(command);
    lab.wait_for_beats(&mut writer, 3);
    let shape = workload.shape();
    let (mut bad, mut copies) = (0, 0);
    while copies < 20 || (bad == 0 && copies < 1000) {
        for index in 0..shape.files {
            tree::copy_plainly(&records::file(&live, index), &records::file(&copy, index))
                .expect("a copy");
        }
        copies += 1;
        bad += usize::from(!records::check(&copy, shape).is_consistent());
    }
    writer.end();
    fs::remove_dir_all(&live).unwrap();
    fs::remove_dir_all(&copy).unwrap();
    fs::remove_file(lab.stats().path()).unwrap();
    (bad, copies)
}

/// `total` checkpoints of all workloads on `fs`.
fn consistent(fs: Fs, total: usize) {
    let _alone = lab::serial();
    for workload in &WORKLOADS {
        let name = format!("consistency-{}", workload.name);
        let Some(lab) = Lab::new(&name, fs, Duration::from_secs(900)) else {
            return;
        };
        let (bad, controls) = control(&lab, workload);

        let args = workload.args(&lab.data());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        // A slow machine may take its time over 500 files: that is no inconsistency.
        let options = ["--keep-last", "2", "--max-hold", "10s"];
        let mut writer = lab.run(&options, &product::program("ordered"), &args);
        lab.wait_for_beats(&mut writer, 3);
        let shape = workload.shape();
        let (mut torn, mut out_of_order, mut missing, mut unverified) = (0, 0, 0, 0);
        let (mut holds, mut drains, mut progress) = (Vec::new(), Vec::new(), 0);
        let mut reasons = Vec::new();
        let count = total * workload.percent / 100;
        for _ in 0..count {
            let outcome = lab.checkpoint(&[]);
            let certificate = outcome.certificate();
            let verdict = records::check(&certificate.copy_of(&lab.data()), shape);
            torn += verdict.torn;
            out_of_order += verdict.out_of_order;
            missing += verdict.missing;
            if outcome.code != 0 || !certificate.is_verified() {
                unverified += 1;
                reasons.extend(certificate.reasons());
            }
            assert!(
                verdict.progress >= progress,
                "a snapshot is older than the one before"
            );
            progress = verdict.progress;
            holds.push(certificate.hold_us());
            drains.push(certificate.drain_us());
        }
        let kept = lab.stored().len();
        writer.signal(Signal::SIGTERM);
        let ended = writer.wait(Duration::from_secs(30)).ok("the writer");
        println!(
            "{} {}: {count} checkpoints: {torn} torn, {out_of_order} out of order, \
             {missing} missing, {unverified} unverified; hold {}; drain {}; \
             without the gate {bad} of {controls} copies inconsistent; {}",
            fs.name(),
            workload.name,
            distribution(&holds),
            distribution(&drains),
            ended.out().trim(),
        );
        assert_eq!((torn, out_of_order, missing), (0, 0, 0));
        assert_eq!(unverified, 0, "{reasons:?}");
        assert!(bad > 0, "the control shows nothing");
        assert!(progress > 0 && kept <= 2, "{progress} {kept}");
    }
}

#[test]
fn on_xfs() {
    consistent(Fs::Xfs, rounds(1000, 200));
}

#[test]
fn on_btrfs() {
    consistent(Fs::Btrfs, rounds(1000, 200));
}

#[test]
fn on_ext4() {
    consistent(Fs::Ext4, rounds(300, 60));
}

#[test]
fn on_tmpfs() {
    consistent(Fs::Tmpfs, rounds(300, 60));
}
