//! `run --every`: checkpoints at a steady pace, in a thread beside the one that
//! waits for the program.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::checkpoint::{Options, checkpoint};
use crate::hold::set::Set;
use crate::progress::Progress;
use crate::stop::Stop;
use crate::store::pace::Pace;
use crate::{Error, Result};

use super::{output, signals};

/// Takes checkpoints of a set until told to end.
pub struct Periodic {
    shared: Arc<Shared>,
    /// Ends what a checkpoint does after its hold, and need not do.
    stop: Stop,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// A checkpoint is being made, and its hold may not be over.
    busy: bool,
    /// None is begun meanwhile: the process is about to stop.
    paused: bool,
    /// None is begun any more.
    ending: bool,
    /// The thread has done its last.
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }
}

impl Periodic {
    /// Starts the thread. Whenever it has finished a checkpoint, and when it
    /// ends, it wakes whoever waits for signals.
    pub fn start(set: Arc<Set>, options: Options, every: Duration) -> Result<Periodic> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let stop = options.stop.clone();
        thread::Builder::new()
            .name("every".into())
            .spawn(move || work(&theirs, &set, &options, every))
            .map_err(|cause| Error::new(format!("cannot start a thread: {cause}")))?;
        Ok(Periodic { shared, stop })
    }

    /// Begins no checkpoint from now on until [`Periodic::resume`]; whether none
    /// is being made that could hold anybody.
    pub fn pause(&self) -> bool {
        let mut state = self.shared.state();
        state.paused = true;
        !state.busy
    }

    /// Ends [`Periodic::pause`].
    pub fn resume(&self) {
        self.shared.change(|state| state.paused = false);
    }

    /// Begins no checkpoint any more; finishes the one being made, without waiting for
    /// digests and for a command that verifies it.
    pub fn end(&self) {
        self.stop.ask();
        self.shared.change(|state| state.ending = true);
    }

    /// Whether the last checkpoint is finished after [`Periodic::end`].
    pub fn has_ended(&self) -> bool {
        self.shared.state().ended
    }
}

fn work(shared: &Shared, set: &Set, options: &Options, every: Duration) {
    let mut next = Instant::now() + every;
    while wait(shared, next) {
        let due = next + every;
        let stop = |waiting| {
            let state = shared.state();
            // More come than go: what is due has to wait for once.
            let is_due = waiting <= Pace::MANY && Instant::now() >= due;
            state.ending || state.paused || is_due
        };
        attempt(shared, set, options, &mut Pace::gentle(&stop));
        shared.change(|state| state.busy = false);
        signals::wake();
        // At a steady pace; what was missed is not made up for.
        let now = Instant::now();
        while next <= now {
            let behind = (now - next).as_nanos() / every.as_nanos().max(1) + 1;
            next += every * u32::try_from(behind).unwrap_or(u32::MAX);
        }
    }
    shared.change(|state| state.ended = true);
    signals::wake();
}

/// Waits until it is time for the next checkpoint, and marks it begun; `false`
/// if there shall be no more.
fn wait(shared: &Shared, next: Instant) -> bool {
    let mut state = shared.state();
    loop {
        if state.ending {
            return false;
        }
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() && !state.paused {
            state.busy = true;
            return true;
        }
        // While paused, the time is up to whoever resumes.
        let left = if left.is_zero() {
            Duration::from_secs(3600)
        } else {
            left
        };
        let waited = shared.changed.wait_timeout(state, left);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Says nothing, but notes when the hold is over: what takes long and is told of comes after
/// it, and need not keep the process from being stopped.
struct AfterHold<'a>(&'a Shared);

impl Progress for AfterHold<'_> {
    fn begin(&mut self, _what: &str, _bytes: u64) {
        self.0.change(|state| state.busy = false);
        signals::wake();
    }

    fn advance(&mut self, _bytes: u64) {}
    fn end(&mut self) {}
    fn note(&mut self, _line: &str) {}
}

/// Makes one checkpoint. Whatever comes of it is no concern of the program's:
/// one line says so if it is not what was wished for. Then removes the files of old ones, at
/// `pace`.
fn attempt(shared: &Shared, set: &Set, options: &Options, pace: &mut Pace<'_>) {
    let made = checkpoint(set, options, &mut AfterHold(shared));
    if let Ok(outcome) = &made {
        for line in &outcome.notes {
            output::note(&format!("snapshim: {}", output::name(line)));
        }
    }
    match &made {
        Ok(outcome) if outcome.manifest.verified => {}
        Ok(outcome) => {
            let manifest = &outcome.manifest;
            let first = manifest
                .reasons
                .first()
                .map_or("", |reason| reason.text.as_str());
            let more = match manifest.reasons.len() {
                0 | 1 => String::new(),
                n => format!(" (and {} more)", n - 1),
            };
            output::error(&format!(
                "snapshim: snapshot {} is not verified: {}{more}",
                manifest.id,
                output::name(first)
            ));
        }
        // The program has ended: nothing is missing.
        Err(error) if error.is_interruption => {}
        Err(error) => {
            let message = output::name(&error.message);
            output::error(&format!(
                "snapshim: there is no snapshot this time: {message}"
            ));
        }
    }
    if let Ok(outcome) = made
        && let Err(error) = outcome.clear(pace)
    {
        output::note(&format!("snapshim: {}", output::name(&error.message)));
    }
}
