//! A gate that is armed: calls pass, what they change is noted
//! ([`snapshim_gate::watch`]), and the call that reaches a commit point shuts it.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use snapshim_gate::abi::Gate;
use snapshim_gate::sys::{futex_wait, futex_wake_all, monotonic_ns};
use snapshim_gate::table::FileId;
use snapshim_gate::watch::Watch;
use snapshim_gate::word;

use super::clock::Clock;
use super::cut::{Hold, Shut, broken, write_table};
use crate::{Error, Result, interrupt};

/// A gate that is armed. Dropping it opens it.
#[derive(Debug)]
pub struct Armed<'a> {
    gate: &'a Gate,
    gate_id: FileId,
    armed: u32,
    shut: Shut,
    limit: Duration,
    is_over: bool,
}

/// What became of waiting.
#[derive(Debug)]
pub enum Waited<'a> {
    /// A call has shut the gate. Nothing is drained yet.
    Shut(Hold<'a>),
    /// The time is over, or a signal came.
    Still(Armed<'a>),
}

impl<'a> Hold<'a> {
    /// Lets calls pass again, and be noted from now on. For a hold that is drained: no
    /// call is half noted then. Nobody shuts the gate until [`Armed::look_for`] says so, nor
    /// after `until`.
    pub fn arm(self, until: Instant) -> Result<Armed<'a>> {
        let armed = word::next(self.closed, word::ARMED);
        // The hold that ends at the point uses the other table than this one.
        write_table(self.gate, word::next(armed, word::CLOSED), &self.shut)?;
        self.gate.header().watch.arm(armed);
        self.arm_again(until)
    }

    /// The same, with the notes that there are.
    pub fn arm_again(mut self, until: Instant) -> Result<Armed<'a>> {
        let armed = word::next(self.closed, word::ARMED);
        let header = self.gate.header();
        header.watch.points.store(0, Relaxed);
        header.watch.until_ns.store(end_of(until), Relaxed);
        self.is_over = true;
        let elapsed = self.elapsed();
        let swapped = header.word.compare_exchange(
            self.closed,
            armed,
            std::sync::atomic::Ordering::SeqCst,
            Relaxed,
        );
        if swapped.is_err() {
            return Err(broken(elapsed, "while a commit point was looked for"));
        }
        futex_wake_all(&header.word);
        header
            .last_hold_ns
            .store(elapsed.as_nanos() as u64, Relaxed);
        header.last_open_ns.store(monotonic_ns(), Relaxed);
        Ok(Armed {
            gate: self.gate,
            gate_id: self.gate_id,
            armed,
            shut: self.shut.clone(),
            limit: self.clock.limit(),
            is_over: false,
        })
    }
}

/// When programs need wait for us no more: later than we wait, for the case that we do
/// not live to see it.
fn end_of(until: Instant) -> u64 {
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_secs(1);
    monotonic_ns().saturating_add(left.as_nanos() as u64)
}

impl<'a> Armed<'a> {
    /// Waits longer than was said.
    pub fn extend(&self, until: Instant) {
        self.watch().until_ns.store(end_of(until), Relaxed);
    }

    /// What is noted.
    pub fn watch(&self) -> &'a Watch {
        &self.gate.header().watch
    }

    /// From now on the gate is shut at these points.
    pub fn look_for(&self, points: u32) {
        self.watch().points.store(points, Relaxed);
    }

    /// Waits until a call has shut the gate, or a signal asks for the end.
    ///
    /// # Errors
    ///
    /// Somebody else has changed the gate.
    pub fn wait(mut self, until: Instant) -> Result<Waited<'a>> {
        let word = &self.gate.header().word;
        loop {
            let found = word.load(Relaxed);
            if found != self.armed {
                self.is_over = true;
                return self.take_over(found).map(Waited::Shut);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || interrupt::is_asked() {
                return Ok(Waited::Still(self));
            }
            futex_wait(word, self.armed, left.as_nanos() as u64);
        }
    }

    /// The hold that a call has begun.
    fn take_over(&self, found: u32) -> Result<Hold<'a>> {
        let closed = word::next(self.armed, word::CLOSED);
        if found != closed {
            return Err(
                Error::aborted("the gate was opened while a commit point was waited for")
                    .next("nothing was published; try again"),
            );
        }
        // Written by a program: a time that cannot be is none.
        let shut_ns = self.watch().shut_ns.load(Relaxed);
        let ago = Duration::from_nanos(monotonic_ns().saturating_sub(shut_ns));
        let clock = Clock::take_over(self.limit, ago.min(self.limit));
        Ok(self.hold(closed, clock))
    }

    /// Shuts the gate, whatever the program is doing.
    ///
    /// # Errors
    ///
    /// As [`Armed::wait`].
    pub fn close(mut self) -> Result<Hold<'a>> {
        self.is_over = true;
        let clock = Clock::start(self.limit);
        let closed = word::next(self.armed, word::CLOSED);
        let word = &self.gate.header().word;
        let order = std::sync::atomic::Ordering::SeqCst;
        match word.compare_exchange(self.armed, closed, order, Relaxed) {
            Ok(_) => Ok(self.hold(closed, clock)),
            Err(found) => self.take_over(found),
        }
    }

    fn hold(&self, closed: u32, clock: Clock) -> Hold<'a> {
        Hold::of(self.gate, self.gate_id, closed, self.shut.clone(), clock)
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let word = &self.gate.header().word;
        let order = std::sync::atomic::Ordering::SeqCst;
        let open = word::next(self.armed, word::OPEN);
        if word
            .compare_exchange(self.armed, open, order, Relaxed)
            .is_err()
            && let Ok(mut hold) = self.take_over(word.load(Relaxed))
        {
            hold.reopen();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;
    use crate::hold::memory_gate;

    const LIMIT: Duration = Duration::from_secs(10);
    const NONE: FileId = FileId { dev: 0, ino: 0 };

    /// The member table that the present word selects is that of the present checkpoint, and
    /// so is that of every word since its gate was armed: whoever waits has seen one of these.
    struct Banks<'a> {
        gate: &'a Gate,
        checkpoint: u64,
        words: Vec<u32>,
    }

    impl Banks<'_> {
        fn check(&mut self) {
            let word = self.gate.header().word.load(Relaxed);
            assert!(!word::is_open(word));
            self.words.push(word);
            let words = match word::is_armed(word) || self.words.len() > 1 {
                true => &self.words[..],
                false => &[word],
            };
            for seen in words {
                let table = self.gate.table(word::bank(*seen));
                let id = |dev| FileId { dev, ino: 7 };
                let others = [self.checkpoint - 1, self.checkpoint + 1];
                assert!(table.shuts(id(self.checkpoint)), "{seen:#x} of {words:x?}");
                assert!(!others.iter().any(|dev| table.shuts(id(*dev))), "{seen:#x}");
            }
        }
    }

    fn random(state: &mut u64, below: u64) -> u64 {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (*state >> 33) % below
    }

    #[test]
    fn tables_are_those_of_the_checkpoint_however_often_a_boundary_is_refused() {
        let gate = memory_gate::new(4);
        let mut state = 1;
        let later = || Instant::now() + LIMIT;
        for checkpoint in 1..2_000 {
            let shut = match random(&mut state, 2) {
                0 => Shut::Devices(vec![checkpoint]),
                _ => Shut::Only(FileId {
                    dev: checkpoint,
                    ino: 7,
                }),
            };
            let mut banks = Banks {
                gate: &gate,
                checkpoint,
                words: Vec::new(),
            };
            let mut hold = Hold::close(&gate, NONE, shut, LIMIT).unwrap();
            banks.check();
            let boundaries = random(&mut state, 6);
            for boundary in 0..boundaries {
                let armed = match boundary {
                    0 => hold.arm(later()),
                    _ => hold.arm_again(later()),
                };
                let armed = armed.unwrap();
                // What was seen before it was armed is of a hold that is over.
                if boundary == 0 {
                    banks.words.clear();
                }
                banks.check();
                hold = match random(&mut state, 2) {
                    0 => armed.close().unwrap(),
                    _ => {
                        let word = gate.header().word.load(Relaxed);
                        let closed = word::next(word, word::CLOSED);
                        gate.header().watch.shut_ns.store(monotonic_ns(), Relaxed);
                        gate.header()
                            .word
                            .compare_exchange(word, closed, SeqCst, Relaxed)
                            .unwrap();
                        match armed.wait(later()).unwrap() {
                            Waited::Shut(hold) => hold,
                            Waited::Still(_) => panic!("it was shut"),
                        }
                    }
                };
                banks.check();
            }
            match random(&mut state, 3) {
                0 => drop(hold),
                1 => drop(hold.arm(later()).unwrap()),
                _ => _ = hold.open().unwrap(),
            }
            assert!(word::is_open(gate.header().word.load(Relaxed)));
        }
    }
}
