//! The file that the benchmark and a writer share (`programs/paced.h`): words to steer by, and
//! for each millisecond the longest latency of the calls that were due in it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process;

const READY: u64 = 0;
const PID: u64 = 1;
const RUN: u64 = 2;
const RATE: u64 = 3;
const BURST: u64 = 4;
const REACHED: u64 = 5;
const CALLS: u64 = 6;
const BUCKETS: u64 = 7;
const ORIGIN: u64 = 8;
const IDLE: u64 = 9;

const PAUSE: u64 = 0;
const GO: u64 = 1;
const END: u64 = 2;

/// Milliseconds that are recorded: more than a writer lives. The file is sparse.
const MILLISECONDS: u64 = 2 << 20;

/// Nanoseconds of the monotonic clock, which the writers use, too.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// One millisecond of a writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// The longest latency of a call that was due in it.
    pub longest_us: u32,
    /// Calls that ended in it.
    pub calls: u32,
}

/// The shared file. Read and written as a file: on tmpfs that is the same memory.
#[derive(Debug)]
pub struct Control {
    file: File,
    path: PathBuf,
    origin: u64,
}

impl Control {
    /// A new one at `path`, which must be on tmpfs.
    pub fn create(path: &Path) -> Control {
        let _ = fs::remove_file(path);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .expect("a file for the writer's figures");
        file.set_len(4096 + MILLISECONDS * 8).expect("its size");
        let control = Control {
            file,
            path: path.to_owned(),
            origin: now_ns(),
        };
        control.set(BUCKETS, MILLISECONDS);
        control.set(ORIGIN, control.origin);
        control
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn get(&self, word: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file
            .read_exact_at(&mut bytes, word * 8)
            .expect("a word of the control file");
        u64::from_le_bytes(bytes)
    }

    fn set(&self, word: u64, value: u64) {
        self.file
            .write_all_at(&value.to_le_bytes(), word * 8)
            .expect("a word of the control file");
    }

    /// Whether the writer is there, and its id as it sees itself.
    pub fn writer(&self) -> Option<i32> {
        (self.get(READY) == 1).then(|| self.get(PID) as i32)
    }

    /// Calls made so far.
    pub fn calls(&self) -> u64 {
        self.get(CALLS)
    }

    /// Lets the writer go on, `rate` calls a second, or as many as it can for 0.
    pub fn go(&self, rate: u64) {
        self.set(RATE, rate);
        self.set(RUN, GO);
    }

    /// Stops the writer between two calls; `false` if it does not within the limit.
    pub fn pause(&self, limit: Duration) -> bool {
        self.set(RUN, PAUSE);
        process::wait_until(limit, || self.get(IDLE) == 1)
    }

    /// Has a paused writer make `calls` calls at once.
    pub fn burst(&self, calls: u64, limit: Duration) -> bool {
        self.set(IDLE, 0);
        self.set(BURST, calls);
        process::wait_until(limit, || self.get(BURST) == 0 && self.get(IDLE) == 1)
    }

    /// Tells the writer to end.
    pub fn end(&self) {
        self.set(RUN, END);
    }

    /// Waits until all calls that were due before `ns` are made.
    pub fn wait_for(&self, ns: u64, limit: Duration) -> bool {
        process::wait_until(limit, || self.get(REACHED) >= ns)
    }

    /// Records a call, for a writer that keeps its own figures.
    pub fn record(&self, due: u64, end: u64) {
        let at = |ns: u64| {
            let n = ns.saturating_sub(self.origin) / 1_000_000;
            4096 + n.min(MILLISECONDS - 1) * 8
        };
        let word = |at: u64, change: &dyn Fn(u32) -> u32| {
            let mut bytes = [0; 4];
            let file = &self.file;
            file.read_exact_at(&mut bytes, at).expect("a figure");
            let value = change(u32::from_le_bytes(bytes));
            file.write_all_at(&value.to_le_bytes(), at)
                .expect("a figure");
        };
        let us = u32::try_from((end - due) / 1000).unwrap_or(u32::MAX);
        word(at(due), &|longest| longest.max(us));
        word(at(end) + 4, &|calls| calls + 1);
    }

    /// What was recorded between two moments.
    pub fn between(&self, from: u64, to: u64) -> Vec<Bucket> {
        let at = |ns: u64| (ns.saturating_sub(self.origin) / 1_000_000).min(MILLISECONDS - 1);
        let (first, last) = (at(from), at(to));
        let mut bytes = vec![0; (last.saturating_sub(first) as usize + 1) * 8];
        self.file
            .read_exact_at(&mut bytes, 4096 + first * 8)
            .expect("the writer's figures");
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("four bytes"));
        let pairs = bytes.chunks_exact(8);
        pairs
            .map(|b| Bucket {
                longest_us: word(&b[..4]),
                calls: word(&b[4..]),
            })
            .collect()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end();
        let _ = fs::remove_file(&self.path);
    }
}
