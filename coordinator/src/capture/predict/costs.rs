//! What each method costs, from what is known of a file. The numbers were measured on a virtual
//! machine; they have to be right to a factor of some, to tell microseconds from milliseconds.

use std::ops::AddAssign;
use std::time::Duration;

use super::facts::{Facts, FileSystem};

/// What every hold takes: the gate is shut, calls in flight return, processes are looked at.
pub(super) const BASE: Duration = Duration::from_micros(150);
/// Freezing a subvolume: a tick of the coarse clock, and a transaction.
const FREEZE: Duration = Duration::from_millis(8);
/// Making a clone, and each further extent of it, of which XFS counts who shares it.
const CLONE: Duration = Duration::from_micros(30);
const EXTENT: Duration = Duration::from_micros(13);
/// Opening, reading and writing a file that is small.
const COPY: Duration = Duration::from_micros(25);
/// Walking to a file, and looking whether it is what it was.
const LOOK: Duration = Duration::from_nanos(2_500);
/// Giving its copy in the previous snapshot a further name.
const LINK: Duration = Duration::from_micros(7);
/// Making a file durable: part of a journal's commit.
const DURABLE: Duration = Duration::from_micros(20);
/// Writing back whatever is dirty, and waiting for that.
const WRITE_BACK: Duration = Duration::from_micros(250);
/// Bytes a second: copied in memory, written back to a disk, and the same of pages here and there.
const COPIED: u64 = 2 << 30;
const WRITTEN_BACK: u64 = 300 << 20;
const SCATTERED: u64 = 50 << 20;

/// What one method is expected to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// How long programs are held.
    pub(super) hold: Duration,
    /// To be written.
    pub(super) bytes: u64,
    /// From the cut until it is on disk.
    pub(super) wall: Duration,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.hold = self.hold.saturating_add(other.hold);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.wall = self.wall.saturating_add(other.wall);
    }
}

fn at_rate(bytes: u64, rate: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / rate as f64)
}

/// Until so many bytes that were copied are on disk.
fn until_durable(bytes: u64, file_system: &FileSystem) -> Duration {
    match file_system.is_memory() {
        true => Duration::ZERO,
        false => DURABLE + at_rate(bytes, WRITTEN_BACK),
    }
}

/// `FICLONE` under the hold. What is dirty is written back first, and each extent is a record to be made.
pub(super) fn reflink(facts: &Facts) -> Cost {
    let rate = match facts.is_overwritten {
        true => SCATTERED,
        false => WRITTEN_BACK,
    };
    let further = facts.extents.unwrap_or(1).saturating_sub(1);
    let dirty = match facts.is_to_be_flushed {
        true => 0,
        false => facts.dirty,
    };
    let flush = match dirty {
        0 => Duration::ZERO,
        dirty => WRITE_BACK + at_rate(dirty, rate),
    };
    let hold = LOOK + CLONE + EXTENT * further + flush;
    Cost {
        hold,
        bytes: 0,
        wall: hold + DURABLE,
    }
}

/// Reading and writing all bytes under the hold.
pub(super) fn copy(facts: &Facts, file_system: &FileSystem) -> Cost {
    let hold = LOOK + COPY + at_rate(facts.data, COPIED);
    Cost {
        hold,
        bytes: facts.data,
        wall: hold + until_durable(facts.data, file_system),
    }
}

/// The same after the cut. `is_looked_at`: they are few, and looked at again at the cut; of many, only
/// what has changed.
pub(super) fn copy_before_write(
    facts: &Facts,
    file_system: &FileSystem,
    is_looked_at: bool,
) -> Cost {
    let Cost { bytes, wall, .. } = copy(facts, file_system);
    Cost {
        hold: after_the_cut(is_looked_at),
        bytes,
        wall,
    }
}

fn after_the_cut(is_looked_at: bool) -> Duration {
    match is_looked_at {
        true => LOOK,
        false => Duration::ZERO,
    }
}

/// Of a file that has not changed since the previous snapshot: under the hold, and after the cut.
pub(super) fn shared(is_looked_at: bool) -> [Cost; 2] {
    [LOOK, after_the_cut(is_looked_at)].map(|hold| Cost {
        hold,
        bytes: 0,
        wall: LINK,
    })
}

/// A clone of each file from the frozen subvolume.
pub(super) fn subvolume(facts: &Facts) -> Cost {
    let clone = reflink(&Facts { dirty: 0, ..*facts });
    Cost {
        hold: Duration::ZERO,
        ..clone
    }
}

/// What there is besides the files: for any method, and for freezing.
pub(super) fn base() -> Cost {
    Cost {
        hold: BASE,
        bytes: 0,
        wall: BASE,
    }
}

/// See [`base`].
pub(super) fn freeze() -> Cost {
    let hold = BASE + FREEZE;
    Cost {
        hold,
        bytes: 0,
        wall: hold,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_bytes_extents_and_size_cost_what_they_should() {
        let disk = FileSystem {
            name: "xfs".to_owned(),
        };
        let memory = FileSystem {
            name: "tmpfs".to_owned(),
        };
        let clean = Facts {
            size: 256 << 20,
            data: 256 << 20,
            extents: Some(1),
            ..Facts::default()
        };
        let dirty = Facts {
            dirty: 30 << 20,
            ..clean
        };
        let broken = Facts {
            extents: Some(4_567),
            ..clean
        };
        let ms = |cost: Cost| cost.hold.as_secs_f64() * 1e3;
        assert!(ms(reflink(&clean)) < 0.1);
        assert!((90.0..110.0).contains(&ms(reflink(&dirty))));
        let scattered = Facts {
            is_overwritten: true,
            ..dirty
        };
        assert!((500.0..700.0).contains(&ms(reflink(&scattered))));
        assert!((50.0..70.0).contains(&ms(reflink(&broken))));
        let flushed = Facts {
            is_to_be_flushed: true,
            ..dirty
        };
        assert_eq!(reflink(&flushed), reflink(&Facts { dirty: 0, ..dirty }));
        assert_eq!(reflink(&dirty).bytes, 0);
        assert!((100.0..200.0).contains(&ms(copy(&clean, &disk))));
        assert_eq!(copy(&clean, &disk).bytes, 256 << 20);
        assert!(copy(&clean, &disk).wall > 2 * copy(&clean, &memory).wall);
        assert!(ms(copy_before_write(&dirty, &disk, true)) < 0.1);
        assert_eq!(subvolume(&dirty).hold, Duration::ZERO);
    }
}
