//! How far a capture is: counted by whoever works, looked at by whoever tells people.
//!
//! While programs are held, or wait for what they are about to change, nothing may be
//! told: who reads it may be held himself, and writing to his pipe would wait for him. So the
//! capture only counts; to count takes no lock, makes no call and never waits. Another thread
//! looks, and nobody waits for it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// What is done at length in a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// What is dirty is written back, before the hold.
    Flush,
    /// Small files are copied before the hold.
    Ahead,
    /// Bytes are captured, under the hold or after the cut.
    Capture,
    /// The snapshot is written to disk, after the hold.
    Durable,
}

impl Step {
    const ALL: [Step; 4] = [Step::Flush, Step::Ahead, Step::Capture, Step::Durable];

    /// In a word or two.
    pub fn name(self) -> &'static str {
        match self {
            Step::Flush => "flushing",
            Step::Ahead => "copying ahead",
            Step::Capture => "capturing",
            Step::Durable => "writing to disk",
        }
    }

    /// Whether programs may be held meanwhile, or wait for something.
    pub fn may_hold(self) -> bool {
        self == Step::Capture
    }
}

/// How far a capture is. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Tally(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Counts the steps begun and ended; times 8, and the number of the step, from 1, or 0.
    step: AtomicU64,
    bytes: AtomicU64,
    done: AtomicU64,
}

/// What a look at a [`Tally`] showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Another for each step.
    pub serial: u64,
    /// Which step it is.
    pub step: Step,
    /// Bytes the step takes; 0 if not known.
    pub bytes: u64,
    /// Of these, done.
    pub done: u64,
}

impl Tally {
    /// A step of so many bytes begins; 0 if that is not known.
    pub fn begin(&self, step: Step, bytes: u64) {
        self.0.done.store(0, Relaxed);
        self.0.bytes.store(bytes, Relaxed);
        let number = Step::ALL.iter().position(|s| *s == step).unwrap_or(0) as u64 + 1;
        self.change(number);
    }

    /// So many bytes more are done.
    pub fn add(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Relaxed);
    }

    /// Bytes done in this step.
    pub fn done(&self) -> u64 {
        self.0.done.load(Relaxed)
    }

    /// Corrects what was added by estimate.
    pub fn set(&self, done: u64) {
        self.0.done.store(done, Relaxed);
    }

    /// The step is over.
    pub fn end(&self) {
        self.change(0);
    }

    fn change(&self, number: u64) {
        // Only whoever captures writes here.
        let serial = self.0.step.load(Relaxed) / 8 + 1;
        self.0.step.store(serial * 8 + number, Release);
    }

    /// How far it is; `None` between steps.
    pub fn look(&self) -> Option<Look> {
        let step = self.0.step.load(Acquire);
        let number = usize::try_from(step % 8).ok()?;
        Some(Look {
            serial: step / 8,
            step: *Step::ALL.get(number.checked_sub(1)?)?,
            bytes: self.0.bytes.load(Relaxed),
            done: self.0.done.load(Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_shows_the_step_and_how_far_it_is() {
        let tally = Tally::default();
        assert_eq!(tally.look(), None);
        tally.begin(Step::Capture, 10);
        tally.add(3);
        tally.clone().add(4);
        let look = tally.look().unwrap();
        assert_eq!((look.step, look.bytes, look.done), (Step::Capture, 10, 7));
        tally.end();
        assert_eq!(tally.look(), None);
        tally.begin(Step::Durable, 0);
        let next = tally.look().unwrap();
        assert_eq!((next.step, next.done), (Step::Durable, 0));
        assert_ne!(next.serial, look.serial);
    }
}
