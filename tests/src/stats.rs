//! Numbers: what a program measured about itself, and distributions.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The file a C program keeps its measurements in while it runs
/// (`programs/common.h`, `struct stats`); readable also after it was killed.
#[derive(Clone, Debug)]
pub struct Stats {
    path: PathBuf,
}

/// The environment variable that names the file.
pub const STATS: &str = "SNAPSHIM_TEST_STATS";

impl Stats {
    /// The measurements at `path`.
    pub fn at(path: &Path) -> Stats {
        Stats {
            path: path.to_owned(),
        }
    }

    fn word(&self, index: usize) -> u64 {
        fs::read(&self.path)
            .ok()
            .and_then(|b| b.get(index * 8..index * 8 + 8)?.try_into().ok())
            .map(u64::from_le_bytes)
            .unwrap_or(0)
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Records written so far, or turns of the program's loop.
    pub fn beats(&self) -> u64 {
        self.word(0)
    }

    /// The longest single call.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.word(1))
    }

    /// Turns of the difficult activity that runs beside the loop.
    pub fn turns(&self) -> u64 {
        self.word(2)
    }
}

/// Measures how long this machine keeps a thread from running that wants to: what a
/// bound on the clock has to allow for beyond the product.
#[derive(Debug)]
pub struct Stalls {
    shared: Arc<(AtomicBool, AtomicU64, AtomicU64)>,
}

impl Stalls {
    /// Watches from now on, until dropped.
    pub fn watch() -> Stalls {
        const NAP: Duration = Duration::from_millis(2);
        let shared = Arc::new(Default::default());
        let stalls = Stalls {
            shared: Arc::clone(&shared),
        };
        std::thread::spawn(move || {
            let (end, longest, total): &(AtomicBool, AtomicU64, AtomicU64) = &shared;
            while !end.load(Ordering::Relaxed) {
                let start = Instant::now();
                std::thread::sleep(NAP);
                // Timers are late by a little on any machine.
                let late = start.elapsed().saturating_sub(NAP * 2).as_nanos() as u64;
                longest.fetch_max(late, Ordering::Relaxed);
                total.fetch_add(late, Ordering::Relaxed);
            }
        });
        stalls
    }

    /// The longest so far.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.shared.1.load(Ordering::Relaxed))
    }

    /// All together so far.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.shared.2.load(Ordering::Relaxed))
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.shared.0.store(true, Ordering::Relaxed);
    }
}

/// The `percent`-th percentile of `values` (nearest rank); 0 if there are none.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(0.0)
}

/// The median.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// "median / p99 / max" of durations in µs, as text.
pub fn distribution(values: &[f64]) -> String {
    format!(
        "median {:.0} µs, p99 {:.0} µs, max {:.0} µs",
        median(values),
        percentile(values, 99.0),
        percentile(values, 100.0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let v: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(median(&v), 50.0);
        assert_eq!(percentile(&v, 99.0), 99.0);
        assert_eq!(percentile(&v, 100.0), 100.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[]), 0.0);
    }
}
