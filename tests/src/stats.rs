//! Numbers: what a program measured about itself, and distributions.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
