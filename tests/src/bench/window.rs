//! One window: a writer at its pace, for a while, and meanwhile a method, or none.

use std::time::Duration;

use super::control::{Bucket, now_ns};
use super::disk;
use super::method::{Method, Taken, mount_of};
use super::noise::Noise;
use super::workload::{Session, State};
use crate::Lab;

/// How a window goes.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Calls a second, 0 for as many as there can be.
    pub rate: u64,
    /// How long it is, unless the method takes longer.
    pub length: Duration,
    /// Once, or again whenever this time is over.
    pub every: Option<Duration>,
    /// The state of the files at its beginning.
    pub state: State,
    /// Whether the last copy is looked at.
    pub look: bool,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// The longest latency of a call that was due in it, from that time on, µs.
    pub stall_us: f64,
    /// The same of a thread that only sleeps.
    pub noise_us: f64,
    /// Its length, s.
    pub seconds: f64,
    /// Calls that ended in it.
    pub calls: u64,
    /// Calls a second while a method worked, and while none did; 0 if there was no such time.
    pub during: f64,
    /// See `during`.
    pub between: f64,
    /// Each copy that was made.
    pub taken: Vec<Taken>,
    /// Bytes that the device was given in it, and to put all on it at its end; of everybody.
    pub device: u64,
    /// Bytes that are used more than before.
    pub space: i64,
    /// Bytes allocated for the last copy, where nothing tells what was written.
    pub allocated: u64,
    /// How many copies were looked at, and how many could not be of one instant. Only the last
    /// copy of a window can be looked at.
    pub looked: usize,
    /// See `looked`.
    pub inconsistent: usize,
    /// When a method worked: ms from the start of the window.
    pub worked: Vec<(f64, f64)>,
    /// Each millisecond.
    pub timeline: Vec<Bucket>,
}

impl Window {
    /// Why a copy failed, if one did.
    pub fn failed(&self) -> Option<&str> {
        self.taken.iter().find_map(|t| t.failed.as_deref())
    }
}

/// Before the first method starts: the window shows what it was like before.
const LEAD: Duration = Duration::from_millis(150);
/// After the last has ended.
const TAIL: Duration = Duration::from_millis(150);
/// Before the window, for the writer to be in its stride.
const SETTLE: Duration = Duration::from_millis(100);

fn sleep_until(ns: u64) {
    std::thread::sleep(Duration::from_nanos(ns.saturating_sub(now_ns())));
}

/// Measures one window.
pub fn measure(
    lab: &Lab,
    session: &mut Session,
    method: Option<&Method>,
    plan: Plan,
    noise: &Noise,
) -> Window {
    let nanos = |d: Duration| d.as_nanos() as u64;
    let mount = mount_of(&session.data);
    // What earlier windows left is not this one's.
    disk::sync(&session.data);
    session.bring_to(plan.state);
    let device = disk::device_written(&mount);
    let used = disk::used(&mount);
    session.go(plan.rate);
    std::thread::sleep(SETTLE);

    noise.take_us();
    let start = now_ns();
    let mut end = start + nanos(plan.length);
    let mut taken: Vec<Taken> = Vec::new();
    let mut worked = Vec::new();
    if let Some(method) = method {
        let mut due = start + nanos(LEAD);
        while due + nanos(TAIL) < end || taken.is_empty() {
            sleep_until(due);
            if !taken.is_empty() {
                method.discard(lab);
            }
            let began = now_ns();
            taken.push(method.take(lab, session));
            let ended = now_ns();
            worked.push((began, ended));
            let Some(every) = plan.every else { break };
            due = (due + nanos(every)).max(ended);
        }
        let last = worked.last().map_or(start, |w| w.1);
        end = end.max(last + nanos(TAIL));
    }
    sleep_until(end);
    let noise_us = noise.take_us();
    session.pause(end);

    let timeline = session.control.between(start, end);
    let seconds = (end - start) as f64 / 1e9;
    let calls = |from: u64, to: u64| -> u64 {
        let buckets = session.control.between(from, to);
        buckets.iter().map(|b| u64::from(b.calls)).sum()
    };
    let all: u64 = timeline.iter().map(|b| u64::from(b.calls)).sum();
    let (mut busy, mut busy_calls) = (0.0, 0);
    for (from, to) in &worked {
        busy += (to - from) as f64 / 1e9;
        busy_calls += calls(*from, *to);
    }
    let rate = |calls: u64, seconds: f64| {
        if seconds > 0.0 {
            calls as f64 / seconds
        } else {
            0.0
        }
    };
    let mut window = Window {
        stall_us: timeline
            .iter()
            .map(|b| f64::from(b.longest_us))
            .fold(0.0, f64::max),
        noise_us,
        seconds,
        calls: all,
        during: rate(busy_calls, busy),
        between: rate(all.saturating_sub(busy_calls), seconds - busy),
        worked: worked
            .iter()
            .map(|(from, to)| ((from - start) as f64 / 1e6, (to - start) as f64 / 1e6))
            .collect(),
        timeline,
        ..Window::default()
    };
    disk::sync(&session.data);
    window.device = match (device, disk::device_written(&mount)) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        _ => 0,
    };
    window.space = disk::used(&mount) as i64 - used as i64;
    if let (Some(method), Some(last)) = (method, taken.last()) {
        // A copy in a repository shows only in what is used.
        window.allocated = match &last.copy {
            Some(copy) => disk::own(copy),
            None => window.space.max(0) as u64,
        };
        if plan.look
            && last.failed.is_none()
            && let Some(copy) = method.look(lab, session, last)
        {
            window.looked = 1;
            window.inconsistent = usize::from(!session.workload.is_consistent(lab, &copy));
        }
        method.discard(lab);
    }
    window.taken = taken;
    window
}
