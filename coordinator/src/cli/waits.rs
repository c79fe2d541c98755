//! How long calls of a set have waited, as the programs counted it themselves.

use std::sync::atomic::Ordering::Relaxed;

use serde::Serialize;
use snapshim_gate::abi::Gate;
use snapshim_gate::guard::wait_limit;

/// Of all calls that waited since the gate was made, at the gate or for something to be captured.
#[derive(Serialize)]
pub(super) struct Waits {
    count: u64,
    /// Half of them were no longer than this, µs; counted in steps of a quarter of an octave.
    p50_us: u64,
    /// 99 in 100 of them, likewise.
    p99_us: u64,
    /// All of them.
    longest_us: u64,
}

impl Waits {
    pub(super) fn of(gate: &Gate) -> Waits {
        let counts = gate.guard().waited.iter();
        Waits::counted(&counts.map(|count| count.load(Relaxed)).collect::<Vec<_>>())
    }

    fn counted(classes: &[u32]) -> Waits {
        let count: u64 = classes.iter().map(|count| u64::from(*count)).sum();
        // The class in which so many, in 10,000, are reached.
        let at = |part: u64| {
            let wanted = (count * part).div_ceil(10_000).max(1);
            let mut sum = 0;
            let reached = classes.iter().position(|n| {
                sum += u64::from(*n);
                sum >= wanted
            });
            reached.map_or(0, wait_limit)
        };
        Waits {
            count,
            p50_us: at(5_000),
            p99_us: at(9_900),
            longest_us: at(10_000),
        }
    }
}

#[cfg(test)]
mod tests {
    use snapshim_gate::guard::{WAIT_CLASSES, wait_class};

    use super::*;

    #[test]
    fn percentiles() {
        let mut classes = [0; WAIT_CLASSES];
        let none = Waits::counted(&classes);
        assert_eq!((none.count, none.p99_us, none.longest_us), (0, 0, 0));
        classes[wait_class(50)] = 990;
        classes[wait_class(9_000)] = 10;
        let waits = Waits::counted(&classes);
        assert_eq!(waits.count, 1_000);
        assert!((50..=64).contains(&waits.p50_us) && waits.p99_us == waits.p50_us);
        assert!((9_000..=12_000).contains(&waits.longest_us));
    }
}
