//! Tells how far a capture is, from a thread of its own.
//!
//! The thread looks at a [`Tally`] and offers lines to standard error (`offer`). Nobody waits for it:
//! not while programs are held, and not at the end. Should it be stopped in the middle of a
//! write after all, it holds no lock, and ends with the process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::interrupt;
use crate::tally::{Look, Tally};

use super::offer::{self, Kind};
use super::progress::{Far, Shape};

/// Between two looks.
const TICK: Duration = Duration::from_millis(100);
/// Of captures that take no longer nothing is told.
const PATIENCE: Duration = Duration::from_secs(1);
/// A capture that pauses for so long, between two steps, begins anew.
const PAUSE: Duration = Duration::from_millis(500);

/// Tells how far a capture is until it is dropped.
#[derive(Debug)]
pub struct Watch {
    is_over: Arc<AtomicBool>,
}

impl Watch {
    /// Begins. With `json`, events are told instead of lines for people.
    pub fn start(tally: &Tally, json: bool) -> Watch {
        let is_over = Arc::new(AtomicBool::new(false));
        let shape = Shape::new(json);
        if shape != Shape::Nothing {
            let (tally, theirs) = (tally.clone(), Arc::clone(&is_over));
            let work = move || watch(&tally, &theirs, shape);
            // Without a thread nothing is told, and nothing is missing.
            let _ = thread::Builder::new().name("progress".into()).spawn(work);
        }
        Watch { is_over }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        offer::clear();
    }
}

/// What was seen of a capture so far.
struct Seen {
    /// When it began.
    since: Instant,
    step: Far,
    serial: u64,
    last: Instant,
    said: Option<Instant>,
}

fn watch(tally: &Tally, is_over: &AtomicBool, shape: Shape) {
    interrupt::leave_to_others();
    let kind = Kind::of_stderr();
    let mut seen: Option<Seen> = None;
    loop {
        thread::sleep(TICK);
        if is_over.load(Relaxed) {
            return;
        }
        match tally.look() {
            Some(look) => tell(&mut seen, look, shape, kind),
            None => {
                offer::clear();
                if seen.as_ref().is_some_and(|s| s.last.elapsed() > PAUSE) {
                    seen = None;
                }
            }
        }
    }
}

fn tell(seen: &mut Option<Seen>, look: Look, shape: Shape, kind: Kind) {
    let now = Instant::now();
    let seen = seen.get_or_insert_with(|| Seen {
        since: now,
        step: Far::new(look.step.name(), look.bytes),
        serial: look.serial,
        last: now,
        said: None,
    });
    if seen.serial != look.serial {
        seen.serial = look.serial;
        seen.step = Far::new(look.step.name(), look.bytes);
    }
    seen.step.done = look.done;
    seen.last = now;
    let is_due = seen.said.unwrap_or(seen.since).elapsed() >= shape.pace();
    // It would be changed during the cut, by us.
    let is_captured = kind == Kind::File && look.step.may_hold();
    if seen.since.elapsed() < PATIENCE || !is_due || is_captured {
        return;
    }
    seen.said = Some(now);
    match shape {
        Shape::Bar => offer::replace(&seen.step.line()),
        Shape::Lines => offer::line(&format!("snapshim: {}", seen.step.line())),
        Shape::Events => offer::line(&seen.step.event()),
        Shape::Nothing => {}
    }
}
