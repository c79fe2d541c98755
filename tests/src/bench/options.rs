//! What `bench peers` is asked for.

use std::path::PathBuf;
use std::time::Duration;

use super::workload::{self, State, Workload};
use crate::{Fs, fs, product};

/// What is said about the command.
pub const USAGE: &str = "\
bench peers [OPTIONS]      the benchmark against every other way to copy; needs root

  --out DIR         where the raw data, the report and the pictures go [target/bench]
  --docs            also write the tables and pictures into docs/ (the default of a
                    run that leaves nothing out); --no-docs: do not
  --full            1 GiB, all states, everything on every file system, 500 copies in a row
  --quick           a few windows of a small file on one file system: does it work?
  --fs NAME         only there: tmpfs, ext4, xfs, btrfs (may be repeated, as all of these)
  --part NAME       only this: stall, throughput, hold, consistency, many, growth
  --workload NAME   only this: pages, ordered, many, few, log, sqlite, pgbench
  --method NAME     only this: cp, ficlone, sigstop, fsfreeze, btrfs-snapshot, rsync, restic,
                    snapshim-CAPTURE
  --size MIB        of the file of blocks in stall and throughput
  --windows N       windows of each method in stall; others than snapshim and SIGSTOP, and
                    snapshim-copy, get N/2
  --checkpoints N   copies in a row
  --buffered-loops  loop devices go through the page cache, with a worker of the kernel that
                    copies all data and keeps a processor for it; else they pass requests on
";

/// A group of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// How long a paced writer stands still.
    Stall,
    /// How much an unthrottled one gets done.
    Throughput,
    /// The hold against the size of the file.
    Hold,
    /// Whether copies are consistent.
    Consistency,
    /// 10,000 files.
    Many,
    /// Hundreds of copies in a row.
    Growth,
}

const PARTS: [(&str, Part); 6] = [
    ("stall", Part::Stall),
    ("throughput", Part::Throughput),
    ("hold", Part::Hold),
    ("consistency", Part::Consistency),
    ("many", Part::Many),
    ("growth", Part::Growth),
];

/// How much of everything.
#[derive(Clone, Debug)]
pub struct Amounts {
    /// Size of the file of blocks.
    pub mib: u64,
    /// Its states.
    pub states: Vec<State>,
    /// Windows of snapshim, of SIGSTOP and without anything.
    pub rounds: usize,
    /// Windows of the others.
    pub peer_rounds: usize,
    /// Length of a window.
    pub window: Duration,
    /// Windows of an unthrottled writer.
    pub throughput_rounds: usize,
    /// Their length.
    pub throughput_window: Duration,
    /// Sizes of the file whose hold is measured, MiB.
    pub sizes: Vec<u64>,
    /// Windows for each.
    pub hold_rounds: usize,
    /// Copies that are looked at, of each method and workload.
    pub consistency_rounds: usize,
    /// Windows with 10,000 files.
    pub many_rounds: usize,
    /// Copies in a row.
    pub checkpoints: usize,
    /// Size of the file they are of.
    pub growth_mib: u64,
    /// Between two of them.
    pub growth_pause: Duration,
}

/// All that can be asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where results go.
    pub out: PathBuf,
    /// Whether docs/ is written.
    pub docs: bool,
    /// Everything, everywhere.
    pub full: bool,
    /// Only to see that it works.
    pub quick: bool,
    /// File systems.
    pub fs: Vec<Fs>,
    /// Parts.
    pub parts: Vec<Part>,
    /// Workloads; none: all.
    pub workloads: Vec<Workload>,
    /// Methods by name; none: all.
    pub methods: Vec<String>,
    /// How much.
    pub amounts: Amounts,
    /// Loop devices go through the page cache.
    pub buffered_loops: bool,
    /// What was asked for, as it was said, but for where results go.
    pub line: String,
}

impl Options {
    /// Reads the arguments after `peers`.
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let all: Vec<String> = args.collect();
        let mut said = Vec::new();
        let mut args = all.into_iter();
        let (mut full, mut quick, mut docs) = (false, false, None);
        let mut buffered_loops = false;
        let mut out = product::target_dir().join("bench");
        let (mut kinds, mut parts, mut workloads, mut methods) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut size, mut windows, mut checkpoints) = (None, None, None);
        while let Some(arg) = args.next() {
            if !["--out", "--docs", "--no-docs"].contains(&arg.as_str()) {
                said.push(arg.clone());
            }
            let mut value = || {
                let value = args.next().ok_or(format!("{arg} needs a value"))?;
                if arg != "--out" {
                    said.push(value.clone());
                }
                Ok::<String, String>(value)
            };
            let number = |text: String| -> Result<u64, String> {
                let number = text.parse().ok().filter(|n| *n > 0);
                number.ok_or(format!("not a number: {text}"))
            };
            match arg.as_str() {
                "--out" => out = value()?.into(),
                "--docs" => docs = Some(true),
                "--no-docs" => docs = Some(false),
                "--full" => full = true,
                "--quick" => quick = true,
                "--buffered-loops" => buffered_loops = true,
                "--fs" => {
                    let name = value()?;
                    let found = fs::ALL.into_iter().find(|f| f.name() == name);
                    kinds.push(found.ok_or(format!("no such file system: {name}"))?);
                }
                "--part" => {
                    let name = value()?;
                    let found = PARTS.into_iter().find(|p| p.0 == name);
                    parts.push(found.ok_or(format!("no such part: {name}"))?.1);
                }
                "--workload" => {
                    let name = value()?;
                    let found = workload::ALL.into_iter().find(|w| w.name() == name);
                    workloads.push(found.ok_or(format!("no such workload: {name}"))?);
                }
                "--method" => methods.push(value()?),
                "--size" => size = Some(number(value()?)?),
                "--windows" => windows = Some(number(value()?)? as usize),
                "--checkpoints" => checkpoints = Some(number(value()?)? as usize),
                _ => return Err(format!("unknown argument: {arg}\n\n{USAGE}")),
            }
        }
        let is_whole = kinds.is_empty()
            && parts.is_empty()
            && workloads.is_empty()
            && methods.is_empty()
            && !buffered_loops
            && !quick;
        let mut amounts = if quick {
            Amounts::quick()
        } else if full {
            Amounts::full()
        } else {
            Amounts::essential()
        };
        if let Some(mib) = size {
            amounts.mib = mib;
        }
        if let Some(windows) = windows {
            amounts.rounds = windows;
            amounts.peer_rounds = windows.div_ceil(2);
        }
        if let Some(checkpoints) = checkpoints {
            amounts.checkpoints = checkpoints;
        }
        if kinds.is_empty() {
            // The quiet ones first: what is left to write back disturbs what comes after.
            kinds = match quick {
                true => vec![Fs::Xfs],
                false => vec![Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs],
            };
        }
        if parts.is_empty() {
            parts = PARTS.map(|p| p.1).into();
        }
        Ok(Options {
            out,
            docs: docs.unwrap_or(is_whole),
            full,
            quick,
            fs: kinds,
            parts,
            workloads,
            methods,
            amounts,
            // Images are not worth filling for it.
            buffered_loops: buffered_loops || quick,
            line: said.join(" "),
        })
    }

    /// Where those parts run that need not run everywhere.
    pub fn main_fs(&self) -> Fs {
        if self.fs.contains(&Fs::Xfs) {
            Fs::Xfs
        } else {
            self.fs[0]
        }
    }

    /// Room for the largest file and its copies.
    pub fn image_bytes(&self) -> u64 {
        let sizes = &self.amounts.sizes;
        let hold = if self.parts.contains(&Part::Hold) {
            sizes.iter().copied().max().unwrap_or(0)
        } else {
            0
        };
        // Two writers, a copy of the one, and of the other two snapshots that are kept and one that is
        // made; of which a tmpfs gets half.
        let largest = (self.amounts.mib * 10)
            .max(hold * 5)
            .max(self.amounts.growth_mib * 5);
        (largest.max(2048) << 20) + (4 << 30)
    }
}

impl Amounts {
    fn essential() -> Amounts {
        Amounts {
            mib: 256,
            states: vec![State::Fragmented],
            rounds: 10,
            peer_rounds: 3,
            window: Duration::from_secs(2),
            throughput_rounds: 3,
            throughput_window: Duration::from_millis(4000),
            sizes: vec![256, 1024, 4096],
            hold_rounds: 5,
            consistency_rounds: 4,
            many_rounds: 5,
            checkpoints: 100,
            growth_mib: 256,
            growth_pause: Duration::from_millis(100),
        }
    }

    fn full() -> Amounts {
        Amounts {
            mib: 1024,
            states: vec![State::Clean, State::Dirty, State::Fragmented],
            peer_rounds: 5,
            throughput_rounds: 5,
            throughput_window: Duration::from_millis(6000),
            hold_rounds: 10,
            consistency_rounds: 20,
            many_rounds: 10,
            checkpoints: 500,
            ..Amounts::essential()
        }
    }

    fn quick() -> Amounts {
        Amounts {
            mib: 32,
            rounds: 2,
            peer_rounds: 1,
            window: Duration::from_millis(500),
            throughput_rounds: 1,
            throughput_window: Duration::from_millis(2500),
            sizes: vec![32, 64],
            hold_rounds: 1,
            consistency_rounds: 2,
            many_rounds: 1,
            checkpoints: 5,
            growth_mib: 32,
            ..Amounts::essential()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn only_a_whole_run_writes_the_documents() {
        assert!(parse("").unwrap().docs && parse("--full").unwrap().docs);
        assert!(!parse("--quick").unwrap().docs && !parse("--fs xfs").unwrap().docs);
        assert!(parse("--fs xfs --docs").unwrap().docs && !parse("--no-docs").unwrap().docs);
        assert_eq!(parse("--out x --fs xfs --docs").unwrap().line, "--fs xfs");
    }

    #[test]
    fn mistakes_are_told() {
        for line in [
            "--fs zfs",
            "--size 0",
            "--windows x",
            "--part",
            "--frobnicate",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
