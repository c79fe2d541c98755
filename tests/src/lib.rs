//! What the tests share: file systems, programs, deadlines, and independent
//! checkers.
//!
//! The tests run real processes on real file systems. Three rules:
//!
//! - **Every consistency test has its control**: the same workload, copied
//!   without the gate, must fail the same checker.
//! - **Nothing is skipped silently.** Tests that need root and loop devices fail
//!   without them, unless `SNAPSHIM_TEST_NO_MOUNTS=1` says that this is known.
//! - **Nothing outlives its test.** Every process is ended by its id, every
//!   wait has a deadline, every mount is undone, also after a killed run.
//!
//! | module | what it holds |
//! |---|---|
//! | [`apps`] | real programs under load, and what becomes of snapshots of them |
//! | [`mod@bench`] | the benchmark against every other way to copy |
//! | [`coverage`] | what holds see of each of the ways to change a file |
//! | [`effect`] | a script with the shim and without, compared |
//! | [`fs`] | XFS, btrfs, ext4 and tmpfs mounts |
//! | [`lab`] | one test's directories, set and processes |
//! | [`paths`] | the ways to change a file: programs in `programs/paths` |
//! | [`process`] | processes with deadlines |
//! | [`product`] | building and finding `snapshim` and the C programs |
//! | [`records`] | the checker of ordered records |
//! | [`retention`] | a model of the retention policy |
//! | [`scribble`] | a program that changes files in every way, and its replay |
//! | [`stats`] | what a program measured about itself; percentiles |
//! | [`tree`] | comparing directory trees |

pub mod apps;
pub mod bench;
pub mod coverage;
pub mod effect;
pub mod fs;
pub mod lab;
pub mod paths;
pub mod process;
pub mod product;
pub mod records;
pub mod retention;
pub mod scribble;
pub mod stats;
pub mod tree;

pub use fs::Fs;
pub use lab::{Certificate, Lab, Outcome};
pub use process::Proc;

/// Whether the long form of the tests was asked for (`SNAPSHIM_TEST_FULL=1`).
pub fn full() -> bool {
    flag("SNAPSHIM_TEST_FULL")
}

/// `full` in the long form of the tests, else `short`.
pub fn rounds(full_count: usize, short: usize) -> usize {
    if full() { full_count } else { short }
}

/// Whether the environment variable `name` is set to something but `0`.
pub(crate) fn flag(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|v| !v.is_empty() && v != "0")
}

/// A small generator of reproducible numbers (splitmix64).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
}

/// The kernel's version, without what its builders have added: "6.18".
pub fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let parts: Vec<&str> = release.trim().split('.').take(2).collect();
    parts.join(".")
}
