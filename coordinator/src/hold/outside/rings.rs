//! What an io_uring still does when nothing is submitted to it any more.
//!
//! A process that is stopped, or whose submissions wait at the gate, submits nothing, which does not keep the kernel from
//! working on what was submitted: in worker threads, or by completion of direct I/O.
//! `/proc/PID/fdinfo` of the ring says how many entries the kernel has taken
//! (`CachedSqHead`) and how many completions it has posted (`CachedCqTail`). Requests
//! that complete more or less than once (multishot, CQE_SKIP_SUCCESS) spoil the
//! comparison: one that is off keeps the reason; one that is equal by accident needs a
//! request in flight, whose write the ctime evidence shows like any unseen call. So the
//! workers must be asleep as well.

use std::time::{Duration, Instant};

use crate::hold::process::{self, Pid, Polling, Ring, Unreadable};

/// Time between two looks.
const PAUSE: Duration = Duration::from_micros(200);

/// Waits until no ring of the process has anything in flight; else says what.
pub(super) fn drain(pid: Pid, until: Instant) -> Result<(), String> {
    loop {
        match look(pid) {
            Ok(()) => return Ok(()),
            Err(Flight::Later(_)) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(Flight::Later(why) | Flight::Never(why)) => return Err(why),
        }
    }
}

/// Why a ring is not drained.
#[derive(Debug, PartialEq)]
enum Flight {
    /// It may be soon.
    Later(String),
    /// It will not be.
    Never(String),
}

fn look(pid: Pid) -> Result<(), Flight> {
    let rings = process::rings(pid);
    let unseen = |why: Unreadable| Flight::Never(format!("it cannot be looked at: {why}"));
    let rings = rings.map_err(unseen)?;
    rings.iter().try_for_each(is_idle)?;
    let is_busy =
        |tid: &Pid| process::task(pid, *tid).is_some_and(|t| t.is_io_worker && t.state != 'S');
    match process::threads(pid).map_err(unseen)?.iter().any(is_busy) {
        true => Err(Flight::Later("a worker of it is still at work".into())),
        false => Ok(()),
    }
}

/// What speaks against one ring.
fn is_idle(ring: &Ring) -> Result<(), Flight> {
    if ring.is_busy {
        return Err(Flight::Later("the kernel was still at work at it".into()));
    }
    if ring.polling == Polling::Yes {
        return Err(Flight::Never(
            "a kernel thread submits for it (SQPOLL), and that cannot be stopped".into(),
        ));
    }
    match (ring.taken, ring.done) {
        (Some(taken), Some(done)) if taken == done => Ok(()),
        (Some(taken), Some(done)) => Err(Flight::Later(format!(
            "{} of the operations it submitted were still in flight",
            taken.wrapping_sub(done) as i32
        ))),
        _ => Err(Flight::Never(
            "this kernel does not say what is in flight".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings() {
        let info = |sq: i64, cq: i64, thread: i64| {
            format!(
                "SqMask:\t0x7\nSqHead:\t{sq}\nCachedSqHead:\t{sq}\nCqTail:\t{cq}\nCachedCqTail:\t{cq}\nSqThread:\t{thread}\n"
            )
        };
        let is_idle = |info: &str| is_idle(&Ring::parse(3, info));
        assert_eq!(is_idle(&info(4, 4, -1)), Ok(()));
        let Err(Flight::Later(why)) = is_idle(&info(6, 4, -1)) else {
            panic!();
        };
        assert!(why.starts_with("2 of the operations"), "{why}");
        assert!(matches!(is_idle(&info(4, 4, 17)), Err(Flight::Never(_))));
        assert!(matches!(is_idle("SqHead:\t0\n"), Err(Flight::Never(_))));
        // Its lock was held.
        assert!(matches!(is_idle("pos:\t0\n"), Err(Flight::Later(_))));
    }
}
