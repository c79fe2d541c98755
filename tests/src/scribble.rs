//! `scribble`, which changes files in every way there is, and its replay: what its operations do
//! follows from their number, so that a copy can be compared, byte by byte, with the state after as
//! many operations as it says were made.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::lab::{Certificate, Lab};
use crate::{process, product};

/// Of the test's numbers; any will do.
pub const SEED: &str = "7";

/// A workload of `scribble`.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Threads of each process.
    pub threads: usize,
    /// Processes.
    pub processes: usize,
    /// Size of the large file of the first lane, KiB.
    pub big_kib: usize,
    /// Pause after an operation, µs.
    pub pace_us: usize,
}

/// Two threads in each of two processes.
pub const LOAD: Load = Load {
    threads: 2,
    processes: 2,
    big_kib: 64 << 10,
    pace_us: 1500,
};

impl Load {
    /// Threads in all.
    pub fn lanes(self) -> usize {
        self.threads * self.processes
    }

    /// The arguments of `scribble` in this directory.
    pub fn args(self, dir: &Path) -> Vec<String> {
        let mut args = vec!["run".to_owned(), dir.display().to_string(), SEED.to_owned()];
        let numbers = [
            self.threads,
            self.processes,
            self.big_kib,
            self.pace_us,
            3000,
        ];
        args.extend(numbers.map(|n| n.to_string()));
        args
    }
}

/// The files of one lane, made again.
#[derive(Debug)]
pub struct Replay {
    dir: PathBuf,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    made: u64,
    begun: u64,
}

impl Replay {
    fn new(dir: PathBuf, lane: usize, load: Load) -> Replay {
        let kib = if lane == 0 {
            load.big_kib
        } else {
            load.big_kib / 8
        };
        let mut command = Command::new(product::program("scribble"));
        command
            .arg("replay")
            .arg(&dir)
            .args([SEED, &lane.to_string(), &kib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        process::dies_with_us(&mut command);
        let mut child = command.spawn().expect("a replay");
        Replay {
            dir,
            to: child.stdin.take().expect("its input"),
            from: BufReader::new(child.stdout.take().expect("its output")),
            child,
            made: 0,
            begun: 0,
        }
    }

    /// Begins to go on until `to` operations are made.
    fn begin(&mut self, to: u64) {
        if self.begun < to {
            self.begun = to;
            writeln!(self.to, "{to}").expect("the replay");
        }
    }

    /// Goes on until `to` operations are made.
    fn waits_for(&mut self, to: u64) {
        self.begin(to);
        while self.made < to {
            let mut line = String::new();
            self.from.read_line(&mut line).expect("the replay");
            self.made = line.trim().parse().expect("a number from the replay");
        }
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What lanes have noted: how many operations were made, and how many the next lane had made.
fn head(dir: &Path) -> Option<(u64, u64)> {
    let bytes = fs::read(dir.join("head")).ok()?;
    let word = |at| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    Some((word(0)?, word(8)?))
}

/// How the entries below two directories differ, if they do.
fn difference(here: &Path, there: &Path) -> Option<String> {
    let names = |dir: &Path| {
        let entries = fs::read_dir(dir).map(|entries| {
            let mut names: Vec<_> = entries.flatten().map(|e| e.file_name()).collect();
            names.retain(|name| name.as_bytes() != b"head");
            names.sort();
            names
        });
        entries.unwrap_or_default()
    };
    let (ours, theirs) = (names(here), names(there));
    if ours != theirs {
        return Some(format!("{ours:?} instead of {theirs:?}"));
    }
    ours.iter().find_map(|name| {
        let (a, b) = (here.join(name), there.join(name));
        let found = entry_difference(&a, &b)?;
        Some(format!("{}: {found}", name.display()))
    })
}

fn entry_difference(a: &Path, b: &Path) -> Option<String> {
    let (Ok(ours), Ok(theirs)) = (fs::symlink_metadata(a), fs::symlink_metadata(b)) else {
        return Some("is gone".to_owned());
    };
    if ours.mode() != theirs.mode() {
        return Some(format!(
            "mode {:o} instead of {:o}",
            ours.mode(),
            theirs.mode()
        ));
    }
    if ours.is_dir() {
        return difference(a, b);
    }
    // It may have further names in earlier snapshots.
    if ours.nlink() < theirs.nlink() {
        return Some(format!("{} names of {}", ours.nlink(), theirs.nlink()));
    }
    if ours.is_symlink() {
        let (ours, theirs) = (fs::read_link(a).ok(), fs::read_link(b).ok());
        return (ours != theirs).then(|| format!("leads to {ours:?} instead of {theirs:?}"));
    }
    if ours.len() != theirs.len() {
        return Some(format!("{} bytes instead of {}", ours.len(), theirs.len()));
    }
    if attribute(a) != attribute(b) {
        return Some("another attribute".to_owned());
    }
    let (mut a, mut b) = (fs::File::open(a).ok()?, fs::File::open(b).ok()?);
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let len = a.read(&mut ours).ok()?;
        b.read_exact(&mut theirs[..len]).ok()?;
        if ours[..len] != theirs[..len] {
            let first = (0..len).find(|i| ours[*i] != theirs[*i]).unwrap_or(0);
            return Some(format!("byte {} is another", at + first));
        }
        if len == 0 {
            return None;
        }
        at += len;
    }
}

fn attribute(path: &Path) -> Option<[u8; 8]> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut value = [0u8; 8];
    // SAFETY: both names end with NUL, and there is room for eight bytes.
    let got = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            c"user.scribble".as_ptr(),
            value.as_mut_ptr().cast(),
            8,
        )
    };
    (got == 8).then_some(value)
}

/// Everything that is wrong with a copy of what `scribble` writes.
pub fn faults(copy: &Path, replays: &mut [Replay]) -> Vec<String> {
    let mut faults = Vec::new();
    let heads: Vec<Option<(u64, u64)>> = (0..replays.len())
        .map(|lane| head(&copy.join(format!("lane-{lane}"))))
        .collect();
    // All at once.
    for (replay, head) in replays.iter_mut().zip(&heads) {
        replay.begin(head.map_or(0, |(made, _)| made));
    }
    for (lane, replay) in replays.iter_mut().enumerate() {
        let Some((made, seen)) = heads[lane] else {
            faults.push(format!("lane {lane} has no head"));
            continue;
        };
        let next = (lane + 1) % heads.len();
        if heads[next].is_none_or(|(made, _)| made < seen) {
            faults.push(format!(
                "lane {lane} has seen {seen} operations of lane {next}, which has made {:?}",
                heads[next]
            ));
        }
        if replay.made > made + 1 {
            faults.push(format!("lane {lane} went back to {made}"));
            continue;
        }
        let copy = copy.join(format!("lane-{lane}"));
        replay.waits_for(made);
        let Some(first) = difference(&copy, &replay.dir) else {
            continue;
        };
        // The operation was made, and not yet counted.
        if replay.made == made {
            replay.waits_for(made + 1);
        }
        if let Some(second) = difference(&copy, &replay.dir) {
            faults.push(format!(
                "lane {lane} after {made} operations: {first}; after one more: {second}"
            ));
        }
    }
    faults
}

/// Replays of all lanes, in a directory of this name.
pub fn replays(lab: &Lab, name: &str, load: Load) -> Vec<Replay> {
    let base = lab.beside(name);
    fs::create_dir_all(&base).expect("a directory for replays");
    (0..load.lanes())
        .map(|lane| Replay::new(base.join(format!("lane-{lane}")), lane, load))
        .collect()
}

/// A number of a certificate; 0 if it has none.
pub fn number(certificate: &Certificate, field: &str) -> u64 {
    certificate.0[field].as_u64().unwrap_or(0)
}
