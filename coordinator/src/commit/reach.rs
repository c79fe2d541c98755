//! Waiting for a commit point.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use snapshim_gate::table::FileId;
use snapshim_gate::watch::Watch;

use super::judge::{Ground, Judge};
use super::observed::Observed;
use super::seal::Seal;
use super::{CommitPoint, Otherwise};
use crate::hold::armed::Waited;
use crate::hold::cut::{self, Hold, Shut};
use crate::stop::Stop;
use crate::{Error, Exit, Result, hooks, interrupt};

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
    /// What has to be so when the files have been captured.
    pub seal: Option<Seal>,
}

/// How a point is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The point.
    pub at: CommitPoint,
    /// What else, if it is not reached.
    pub otherwise: Otherwise,
    /// For how long.
    pub wait: Duration,
    /// The longest hold.
    pub limit: Duration,
    /// Whether to wait no longer.
    pub stop: &'a Stop,
}

impl Asked<'_> {
    /// Whether somebody wants it to end at once.
    fn is_over(&self) -> bool {
        interrupt::is_asked() || self.stop.is_asked()
    }

    /// Sleeps, unless it is to end.
    fn sleep_until(&self, until: Instant) {
        const SLICE: Duration = Duration::from_millis(10);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_over() {
                return;
            }
            std::thread::sleep(left.min(SLICE));
        }
    }
}

/// Shuts the gate at the point asked for.
///
/// # Errors
///
/// The point was not reached in time ([`Exit::NotReached`]); the hold was broken.
pub fn reach<'a>(
    ground: &Ground<'a, '_>,
    gate_id: FileId,
    shut: Shut,
    asked: Asked<'_>,
) -> Result<Reached<'a>> {
    let mut refused = 0;
    let at = match asked.at {
        CommitPoint::Auto => match choose(ground, gate_id, shut.clone(), asked)? {
            at if at.may_have_been_mapped() || ground.seen.outside().is_empty() => at,
            _ => CommitPoint::Write,
        },
        at => at,
    };
    let asked = Asked { at, ..asked };
    let found = try_for(ground, gate_id, shut.clone(), asked, &mut refused)?;
    let (point, found) = match (found, asked.otherwise) {
        (Some(found), _) => (at, found),
        (None, Otherwise::Fail) => return Err(not_reached(asked, refused)),
        (None, Otherwise::At(point)) => {
            // Stores into a mapping, also one that is gone by now, are changes that nobody has noted.
            let may_be_told = point == CommitPoint::Write
                || point.may_have_been_mapped()
                || ground.seen.outside().is_empty();
            if !may_be_told {
                return Err(not_reached(asked, refused));
            }
            let asked = Asked { at: point, ..asked };
            let found = try_for(ground, gate_id, shut, asked, &mut refused)?;
            (point, found.ok_or_else(|| not_reached(asked, refused))?)
        }
    };
    let Found { hold, drain, seal } = found;
    Ok(Reached {
        hold,
        drain,
        point,
        seal,
    })
}

/// A hold that ends at the point.
struct Found<'a> {
    hold: Hold<'a>,
    drain: Duration,
    seal: Option<Seal>,
}

/// `None`: the time is over, and the gate open.
fn try_for<'a>(
    ground: &Ground<'a, '_>,
    gate_id: FileId,
    shut: Shut,
    asked: Asked<'_>,
    refused: &mut u32,
) -> Result<Option<Found<'a>>> {
    let until = Instant::now() + asked.wait;
    if matches!(asked.at, CommitPoint::Lock | CommitPoint::Unit) {
        // From here on it matters who ends: before that, nothing is known of anybody.
        cut::reap_the_dead(ground.gate);
        ground.gate.header().watch.forget_ended();
    }
    let mut hold = Hold::close(ground.gate, gate_id, shut, asked.limit)?;
    let drain = hold.drain()?;
    if asked.at == CommitPoint::Write {
        return Ok(Some(Found {
            hold,
            drain,
            seal: None,
        }));
    }
    let mut judge = Judge::new(ground, asked.at);
    // What is there may do: nothing open, no lock held by a program known to lock. The
    // other points are about what was noted, of which there is nothing yet.
    let shows = matches!(
        asked.at,
        CommitPoint::Close | CommitPoint::Lock | CommitPoint::Unit
    );
    let found = match shows && judge.is_reached(false) {
        true => Some((hold, drain)),
        false => wait(hold, &mut judge, asked, until, refused)?,
    };
    Ok(found.map(|(hold, drain)| Found {
        hold,
        drain,
        seal: judge.into_seal(),
    }))
}

/// The strongest point the program was seen to offer; watches it for a while if it never was.
fn choose(
    ground: &Ground<'_, '_>,
    gate_id: FileId,
    shut: Shut,
    asked: Asked<'_>,
) -> Result<CommitPoint> {
    let is_partly_seen = ground.seen.is_partly_seen();
    let observed = || Observed::of(ground.gate).as_noted(is_partly_seen);
    let offered = || observed().offered().first().copied();
    if let Some(point) = offered() {
        return Ok(point);
    }
    let until = Instant::now() + OBSERVED.min(asked.wait);
    let mut hold = Hold::close(ground.gate, gate_id, shut, asked.limit)?;
    hold.drain()?;
    // Points that shut the gate: none. It is opened when this is dropped.
    let _ = hold.arm(until)?.wait(until)?;
    Ok(observed().choice())
}

/// Arms the gate and waits. `None`: the time is over, and the gate open.
fn wait<'a>(
    hold: Hold<'a>,
    judge: &mut Judge<'_>,
    asked: Asked<'_>,
    mut until: Instant,
    refused: &mut u32,
) -> Result<Option<(Hold<'a>, Duration)>> {
    let point = asked.at;
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
        if asked.is_over() {
            armed.watch().open_door();
            return Err(hooks::interrupted());
        }
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
        if judge.compares() {
            // It is quiet if it is as it was now when as much time has passed again.
            was_refused_quiet = false;
            last = (changes(&closed.gate().header().watch), Instant::now());
        }
        // As long as it was shut for nothing, it stays open, and ever longer, so that looking
        // takes a small part of its time.
        let pause = closed.elapsed() * (*refused).min(8);
        armed = closed.arm_again(until)?;
        if is_door_shut {
            armed.watch().shut_door(judge.holders());
        } else {
            asked.sleep_until(until.min(Instant::now() + pause));
        }
        armed.look_for(point.bits());
    }
}

fn changes(watch: &Watch) -> u32 {
    watch.changes.load(Relaxed)
}

/// The error of a point that was not reached.
fn not_reached(asked: Asked<'_>, refused: u32) -> Error {
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
