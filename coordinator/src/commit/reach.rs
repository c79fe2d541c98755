//! Waiting for a commit point.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use snapshim_gate::table::FileId;
use snapshim_gate::watch::Watch;

use super::judge::{Ground, Judge};
use super::observed::Observed;
use super::{CommitPoint, Otherwise};
use crate::hold::armed::Waited;
use crate::hold::cut::{Hold, Shut};
use crate::{Error, Exit, Result};

/// How long nothing may change before a program counts as quiet, if it says nothing of it.
pub(super) const QUIET: Duration = Duration::from_millis(100);
/// How long a program is watched before `auto` chooses for the first time.
pub(super) const OBSERVED: Duration = Duration::from_millis(500);
/// Time between looks at a program that is to be idle.
const TICK: Duration = Duration::from_millis(5);

/// A hold at a commit point, drained.
#[derive(Debug)]
pub struct Reached<'a> {
    /// The gate, shut.
    pub hold: Hold<'a>,
    /// From shutting it to the last call in flight having returned.
    pub drain: Duration,
    /// Where.
    pub point: CommitPoint,
}

/// How a point is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The point.
    pub at: CommitPoint,
    /// What else, if it is not reached.
    pub otherwise: Otherwise,
    /// For how long.
    pub wait: Duration,
    /// The longest hold.
    pub limit: Duration,
}

/// Shuts the gate at the point asked for.
///
/// # Errors
///
/// The point was not reached in time ([`Exit::NotReached`]); the hold was broken.
pub fn reach<'a>(
    ground: &Ground<'a>,
    gate_id: FileId,
    shut: Shut,
    asked: Asked,
) -> Result<Reached<'a>> {
    let mut refused = 0;
    let at = match asked.at {
        CommitPoint::Auto => choose(ground, gate_id, shut.clone(), asked)?,
        at => at,
    };
    let asked = Asked { at, ..asked };
    let found = try_for(ground, gate_id, shut.clone(), asked, &mut refused)?;
    let (point, (hold, drain)) = match (found, asked.otherwise) {
        (Some(found), _) => (at, found),
        (None, Otherwise::Fail) => return Err(not_reached(asked, refused)),
        (None, Otherwise::At(point)) => {
            let asked = Asked { at: point, ..asked };
            let found = try_for(ground, gate_id, shut, asked, &mut refused)?;
            (point, found.ok_or_else(|| not_reached(asked, refused))?)
        }
    };
    Ok(Reached { hold, drain, point })
}

/// `None`: the time is over, and the gate open.
fn try_for<'a>(
    ground: &Ground<'a>,
    gate_id: FileId,
    shut: Shut,
    asked: Asked,
    refused: &mut u32,
) -> Result<Option<(Hold<'a>, Duration)>> {
    let until = Instant::now() + asked.wait;
    let mut hold = Hold::close(ground.gate, gate_id, shut, asked.limit)?;
    let drain = hold.drain()?;
    if asked.at == CommitPoint::Write {
        return Ok(Some((hold, drain)));
    }
    let mut judge = Judge::new(ground, asked.at);
    // What is there may do: nothing open, no lock held by a program known to lock. The
    // other points are about what was noted, of which there is nothing yet.
    let shows = matches!(
        asked.at,
        CommitPoint::Close | CommitPoint::Lock | CommitPoint::Unit
    );
    if shows && judge.is_reached(false) {
        return Ok(Some((hold, drain)));
    }
    wait(hold, &mut judge, asked.at, until, refused)
}

/// The strongest point the program was seen to offer; watches it for a while if it never was.
fn choose(ground: &Ground<'_>, gate_id: FileId, shut: Shut, asked: Asked) -> Result<CommitPoint> {
    let offered = || Observed::of(ground.gate).offered().first().copied();
    if let Some(point) = offered() {
        return Ok(point);
    }
    let until = Instant::now() + OBSERVED.min(asked.wait);
    let mut hold = Hold::close(ground.gate, gate_id, shut, asked.limit)?;
    hold.drain()?;
    // Points that shut the gate: none. It is opened when this is dropped.
    let _ = hold.arm(until)?.wait(until)?;
    Ok(Observed::of(ground.gate).choice())
}

/// Arms the gate and waits. `None`: the time is over, and the gate open.
fn wait<'a>(
    hold: Hold<'a>,
    judge: &mut Judge<'_>,
    point: CommitPoint,
    mut until: Instant,
    refused: &mut u32,
) -> Result<Option<(Hold<'a>, Duration)>> {
    let limit = hold.limit();
    let mut armed = hold.arm(until)?;
    armed.look_for(point.bits());
    let quiet = match point {
        CommitPoint::Idle(time) => time,
        _ => QUIET,
    };
    let mut last = (changes(armed.watch()), Instant::now());
    let mut was_refused_quiet = false;
    let mut is_door_shut = false;
    loop {
        let now = Instant::now();
        if now >= until {
            if is_door_shut || !matches!(point, CommitPoint::Lock | CommitPoint::Unit) {
                armed.watch().open_door();
                return Ok(None);
            }
            // Watched in vain: new holders are kept out, within the bound of a hold, until
            // those that there are have finished.
            is_door_shut = true;
            until = now + limit / 2;
            armed.extend(until);
            armed.watch().shut_door(judge.holders());
        }
        let tick = match point {
            CommitPoint::Idle(_) => TICK.min(quiet),
            _ => quiet,
        };
        let (mut closed, is_quiet) = match armed.wait((now + tick).min(until))? {
            Waited::Shut(hold) => (hold, false),
            Waited::Still(still) => {
                armed = still;
                let changes = changes(armed.watch());
                // What is in flight is no quiet, however long ago it began.
                if changes != last.0 || !armed.watch().is_still() {
                    last = (changes, Instant::now());
                    was_refused_quiet = false;
                }
                // Locks and idleness show also in what does not happen.
                let may_be = matches!(
                    point,
                    CommitPoint::Idle(_)
                        | CommitPoint::Lock
                        | CommitPoint::Close
                        | CommitPoint::Unit
                );
                if !may_be || was_refused_quiet || last.1.elapsed() < quiet {
                    continue;
                }
                (armed.close()?, true)
            }
        };
        let drain = closed.drain()?;
        if is_door_shut {
            closed.gate().header().watch.open_door();
        }
        let is_quiet = is_quiet && changes(&closed.gate().header().watch) == last.0 && drain < TICK;
        if judge.is_reached(is_quiet) {
            return Ok(Some((closed, drain)));
        }
        *refused += 1;
        was_refused_quiet = is_quiet;
        // As long as it was shut for nothing, it stays open, and ever longer, so that looking
        // takes a small part of its time.
        let pause = closed.elapsed() * (*refused).min(8);
        armed = closed.arm_again(until)?;
        if is_door_shut {
            armed.watch().shut_door(judge.holders());
        } else {
            std::thread::sleep(pause.min(until.saturating_duration_since(Instant::now())));
        }
        armed.look_for(point.bits());
    }
}

fn changes(watch: &Watch) -> u32 {
    watch.changes.load(Relaxed)
}

/// The error of a point that was not reached.
fn not_reached(asked: Asked, refused: u32) -> Error {
    let message = format!(
        "the commit point {} was not reached within {} ms{}",
        asked.at,
        asked.wait.as_millis(),
        match refused {
            0 => String::new(),
            n => format!(" (looked at {n} times)"),
        }
    );
    Error {
        exit: Exit::NotReached,
        ..Error::new(message)
    }
    .next(
        "allow more time with --wait, or say what else will do with --else write; \
         `snapshim status` shows what the program does",
    )
}
