//! Closing the gate, draining it, and opening it again.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use snapshim_gate::abi::Gate;
use snapshim_gate::guard::{self, Ask, Broken};
use snapshim_gate::reap::{self, Claimed};
use snapshim_gate::slot::{Owner, Slot};
use snapshim_gate::sys::{futex_wake_all, monotonic_ns};
use snapshim_gate::table::{FileId, KIND_DEVICES, KIND_ONLY};
use snapshim_gate::{Shared, hold, word};

use super::calls::{Changes, changes};
use super::clock::Clock;
use super::locate::Locator;
use super::process::{self, Doing, Pid, Schedule};
use crate::capture::delta::AtCut;
use crate::{Error, Result};

/// Which files a hold shuts.
#[derive(Clone, Debug)]
pub enum Shut {
    /// Every regular file on these devices.
    Devices(Vec<u64>),
    /// One file.
    Only(FileId),
}

/// Time without a look at `/proc`: a call in flight nearly always ends within it.
const SPIN: Duration = Duration::from_micros(300);
/// Time between looks at `/proc` after that.
const LOOK: Duration = Duration::from_millis(1);

/// Opens a gate that a dead coordinator left shut, and frees the slots of dead
/// processes. For the holder of the set's lock. Returns whether it was shut.
pub fn recover(gate: &Gate) -> bool {
    let word = &gate.header().word;
    let mut was_shut = false;
    // Again if a program shuts it just then: it may have been left armed.
    while hold::recover::<Shared>(word, futex_wake_all) || !word::is_open(word.load(Relaxed)) {
        was_shut = true;
    }
    if was_shut {
        // Whoever waits for chunks does not look at the word.
        futex_wake_all(&gate.guard().served);
    }
    reap_the_dead(gate);
    was_shut
}

/// Frees the slots of processes that have ended.
pub fn reap_the_dead(gate: &Gate) {
    let claimed: Vec<(&Slot, Claimed)> = gate
        .used_slots()
        .iter()
        .filter_map(|slot| Some((slot, Claimed::read(slot)?)))
        .collect();
    let locator = Locator::default();
    for (slot, claimed) in claimed {
        if let Some(owner) = Owner::unpack(claimed.owner)
            && locator.is_gone(owner, claimed.start_time)
        {
            reap::reap(slot, claimed);
        }
    }
}

/// A gate that is shut. Dropping it opens it.
#[derive(Debug)]
pub struct Hold<'a> {
    pub(super) gate: &'a Gate,
    pub(super) gate_id: FileId,
    pub(super) closed: u32,
    pub(super) shut: Shut,
    pub(super) clock: Clock,
    parked: Vec<Parked>,
    pub(super) is_over: bool,
    /// How long it held everybody, if it holds nobody any more but for what is not captured.
    held: Option<Duration>,
}

/// A call in flight that is ignored because its thread cannot do harm while it
/// sleeps as it did when it was looked at.
#[derive(Debug)]
struct Parked {
    slot: &'static Slot,
    owner: u64,
    seq: u32,
    pid: Pid,
    tid: Pid,
    /// What must not have changed at the end; `None` if the call is harmless
    /// whether it ends or not, because it is on no member.
    asleep: Option<(Schedule, Doing)>,
}

impl Parked {
    /// Whether the call may still be ignored.
    fn stands(&self) -> bool {
        let Some((schedule, doing)) = &self.asleep else {
            return true;
        };
        self.slot.owner.load(Acquire) == self.owner
            && self.slot.seq.load(Relaxed) == self.seq
            && process::schedule(self.pid, self.tid) == Some(*schedule)
            && process::doing(self.pid, self.tid) == *doing
    }
}

impl<'a> Hold<'a> {
    /// Shuts the gate for at most `limit`. Waits first until it has been open for
    /// as long as the last hold took. Signals that would end or stop this process
    /// are put off until the gate is open again.
    pub fn close(gate: &'a Gate, gate_id: FileId, shut: Shut, limit: Duration) -> Result<Hold<'a>> {
        wait_for_gap(gate);
        let header = gate.header();
        let open = header.word.load(Relaxed);
        write_table(gate, word::next(open, word::CLOSED), &shut)?;
        let clock = Clock::start(limit);
        let closed = match hold::close::<Shared>(&header.word) {
            Ok(closed) => closed,
            Err(found) => {
                return Err(Error::new(format!(
                    "the gate is shut already (state {}, epoch {})",
                    word::state(found),
                    word::epoch(found)
                ))
                .next(
                    "another program writes to the gate file; remove it when no program uses it",
                ));
            }
        };
        Ok(Hold::of(gate, gate_id, closed, shut, clock))
    }

    pub(super) fn of(
        gate: &'a Gate,
        gate_id: FileId,
        closed: u32,
        shut: Shut,
        clock: Clock,
    ) -> Hold<'a> {
        Hold {
            gate,
            gate_id,
            closed,
            shut,
            clock,
            parked: Vec::new(),
            is_over: false,
            held: None,
        }
    }

    /// Ends the hold, and guards the cut: calls go on, and wait only for what they would
    /// change of it. The gate's table of what is guarded was emptied before; `members` go
    /// into it. `has_marks`: calls mark what they change from then on. Returns how long the hold
    /// was, and the number of each member's first chunk.
    ///
    /// # Errors
    ///
    /// A waiter broke the hold; the members do not fit.
    pub fn guard(
        &mut self,
        shift: u32,
        has_marks: bool,
        members: impl Iterator<Item = guard::Member>,
    ) -> Result<(Duration, Vec<u32>)> {
        // Nobody is between his question and his return: all is drained.
        for ask in self.gate.used_asks() {
            ask.store(Ask::None.pack(), Relaxed);
        }
        let guarded = word::guarded(self.closed, has_marks);
        let mut firsts = Vec::with_capacity(members.size_hint().0);
        let table = self.gate.guard();
        if !table.write(guarded, shift, members, |first| firsts.push(first)) {
            return Err(Error::new("the files to guard do not fit into the gate"));
        }
        let word = &self.gate.header().word;
        if hold::guard::<Shared>(word, self.closed, has_marks, futex_wake_all).is_none() {
            return Err(broken(self.elapsed(), "while the cut was made"));
        }
        let held = self.elapsed();
        self.closed = guarded;
        self.held = Some(held);
        Ok((held, firsts))
    }

    /// Ends a guard: everything is captured.
    ///
    /// # Errors
    ///
    /// A call broke it; a thread that was ignored woke up.
    pub fn unguard(self) -> Result<()> {
        let gate = self.gate;
        let opened = self.open();
        futex_wake_all(&gate.guard().served);
        if opened.is_err()
            && let Some(why) = gate.guard().why_broken()
        {
            return Err(guard_broken(why));
        }
        opened?;
        settle(gate)
    }

    /// What is known of the calls that have marked what they change, if they do. To be asked when it is
    /// drained. `is_doubtful`: somebody may have changed something without marks.
    pub fn to_mark(&self, is_doubtful: bool) -> AtCut {
        let has_marks = word::has_marks(self.closed);
        if has_marks {
            // Of a call that was left by a jump, or whose thread sleeps or is gone: it has not
            // compared what it has changed with what it has marked.
            for ask in self.gate.used_asks() {
                if let Ask::Marked(_) = Ask::unpack(ask.load(Acquire)) {
                    ask.store(Ask::None.pack(), Relaxed);
                    self.gate.marks().set_blind();
                }
            }
        }
        AtCut {
            has_marks,
            // What they have marked was before the cut, what they change may come after it.
            may_go_on: self.parked.iter().any(|parked| parked.asleep.is_some()),
            is_doubtful,
        }
    }

    /// The gate it shuts.
    pub fn gate(&self) -> &'a Gate {
        self.gate
    }

    /// Waits until no call on a member is in flight. Returns how long that took.
    pub fn drain(&mut self) -> Result<Duration> {
        let mut next_look = SPIN;
        let mut rounds = 0u32;
        loop {
            let busy: Vec<&'static Slot> = self
                .gate
                .used_slots()
                .iter()
                .filter(|s| !s.is_quiet(self.closed) && !self.is_parked(s))
                .collect();
            let elapsed = self.elapsed();
            if busy.is_empty() {
                // What was ignored early may have gone on since.
                if self.refresh_parked() {
                    return Ok(elapsed);
                }
                continue;
            }
            if !self.stands() {
                return Err(broken(elapsed, "while calls in flight were waited for"));
            }
            if self.left().is_zero() {
                return Err(self.stuck(&busy));
            }
            if elapsed > next_look {
                let claimed: Vec<(&'static Slot, Claimed)> = busy
                    .into_iter()
                    .filter_map(|slot| Some((slot, Claimed::read(slot)?)))
                    .collect();
                let locator = Locator::default();
                for (slot, claimed) in claimed {
                    if self.goes_on()
                        && let Some(parked) = self.look(&locator, slot, claimed, elapsed > 5 * LOOK)
                    {
                        self.parked.push(parked);
                    }
                }
                next_look = self.elapsed() + LOOK;
            }
            rounds += 1;
            if rounds < 50 {
                std::hint::spin_loop();
            } else if elapsed < SPIN {
                // The writer may need this very CPU to finish its call.
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Drops what need not, or may not, be ignored any more. `false` if something
    /// has to be looked at again.
    fn refresh_parked(&mut self) -> bool {
        let closed = self.closed;
        self.parked.retain(|p| !p.slot.is_quiet(closed));
        let before = self.parked.len();
        self.parked.retain(Parked::stands);
        self.parked.len() == before
    }

    fn is_parked(&self, slot: &Slot) -> bool {
        self.parked
            .iter()
            .any(|p| std::ptr::eq(p.slot, slot) && p.seq == slot.seq.load(Relaxed))
    }

    /// Whether the call counted in `slot` can be ignored for now. Frees the slot if
    /// its owner is gone.
    fn look(
        &self,
        locator: &Locator,
        slot: &'static Slot,
        claimed: Claimed,
        thorough: bool,
    ) -> Option<Parked> {
        let seq = slot.seq.load(Relaxed);
        let owner = Owner::unpack(claimed.owner)?;
        if locator.is_gone(owner, claimed.start_time) {
            self.gate.header().watch.note_end(slot);
            reap::reap(slot, claimed);
            return None;
        }
        let pid = locator.process(owner)?;
        let Some(tid) = locator.thread(owner, pid).ok()? else {
            self.gate.header().watch.note_end(slot);
            reap::reap(slot, claimed);
            return None;
        };
        let schedule = process::schedule(pid, tid)?;
        // Another image, without the shim, in a process that made an exec: the
        // count is the old image's.
        let is_replaced =
            || thorough && process::mappings(pid, self.gate_id).is_ok_and(|m| !m.gate);
        if matches!(schedule.state, 'Z' | 'X') || is_replaced() {
            self.gate.header().watch.note_end(slot);
            reap::reap(slot, claimed);
            return None;
        }
        let doing = process::doing(pid, tid);
        // Threads that share one slot, or a handler in a call: which count is
        // whose cannot be told. An odd sequence: the call has not passed yet.
        let single = slot.count.load(Relaxed) == 1 && seq & 1 == 0;
        let asleep = match (schedule.state, &doing) {
            // Stopped: signals stop a thread only on its way back to the program,
            // not inside a call.
            ('T' | 't', _) => Some((schedule, doing)),
            ('S', Doing::Call { number, args }) if single => match changes(*number) {
                Some(Changes::File(arg)) => {
                    let (id, mode) = process::file_behind(pid, tid, i64::from(args[arg] as i32))?;
                    if self.is_member(id, mode) {
                        return None;
                    }
                    None
                }
                Some(Changes::Open | Changes::Submitted) | None => Some((schedule, doing)),
                Some(Changes::Name) => return None,
            },
            _ => return None,
        };
        Some(Parked {
            slot,
            owner: claimed.owner,
            seq,
            pid,
            tid,
            asleep,
        })
    }

    /// Whether a file, by identity and mode, is shut by this hold.
    pub fn is_member(&self, id: FileId, mode: u32) -> bool {
        const S_IFMT: u32 = 0o170000;
        if !matches!(mode & S_IFMT, 0o100000 | 0o040000) {
            return false;
        }
        match &self.shut {
            Shut::Devices(devices) => devices.contains(&id.dev),
            Shut::Only(only) => *only == id,
        }
    }

    /// Whether the hold still stands: no waiter broke it.
    pub fn stands(&self) -> bool {
        hold::stands::<Shared>(&self.gate.header().word, self.closed)
    }

    /// To ask whether it stands while it is being ended.
    pub fn watch(&self) -> Watching<'a> {
        Watching {
            gate: self.gate,
            word: self.closed,
        }
    }

    /// Whether there is time left for the capture.
    pub fn goes_on(&self) -> bool {
        self.stands() && !self.left().is_zero()
    }

    /// How long it may last.
    pub fn limit(&self) -> Duration {
        self.clock.limit()
    }

    /// How long it has lasted.
    pub fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    /// How much longer it may last.
    pub fn left(&self) -> Duration {
        self.clock.left()
    }

    /// Threads whose calls were ignored, as (process, thread).
    pub fn parked(&self) -> Vec<(Pid, Pid)> {
        self.parked.iter().map(|p| (p.pid, p.tid)).collect()
    }

    /// Opens the gate. Returns how long it was shut; an error if a waiter broke
    /// the hold, or if a thread that was ignored woke up.
    pub fn open(mut self) -> Result<Duration> {
        let woke = self
            .parked
            .iter()
            .find(|p| !p.stands())
            .map(|p| (p.pid, p.tid));
        let held = self.reopen();
        let held = held.ok_or_else(|| broken(self.elapsed(), "while files were captured"))?;
        match woke {
            None => Ok(held),
            Some((pid, tid)) => Err(Error::by_chance(format!(
                "thread {tid} of {} ({pid}) woke up inside a call during the hold",
                process::name(pid)
            ))
            .next("nothing is wrong with the program; try again")),
        }
    }

    /// Opens the gate if this hold still shuts it; the time it was shut.
    pub(super) fn reopen(&mut self) -> Option<Duration> {
        if self.is_over {
            return None;
        }
        self.is_over = true;
        let header = self.gate.header();
        let ours = hold::open::<Shared>(&header.word, self.closed, futex_wake_all);
        if self.held.is_some() {
            futex_wake_all(&self.gate.guard().served);
        }
        let held = self.held.unwrap_or_else(|| self.elapsed());
        header.last_hold_ns.store(held.as_nanos() as u64, Relaxed);
        header.last_open_ns.store(monotonic_ns(), Relaxed);
        ours.then_some(held)
    }

    fn stuck(&self, busy: &[&'static Slot]) -> Error {
        let owners: Vec<Owner> = busy
            .iter()
            .take(3)
            .filter_map(|slot| Owner::unpack(slot.owner.load(Relaxed)))
            .collect();
        let locator = Locator::default();
        let mut is_seen = true;
        let who: Vec<String> = owners
            .into_iter()
            .filter_map(|owner| match locator.process(owner) {
                Some(pid) => Some(format!(
                    "{} ({pid}, thread {})",
                    process::name(pid),
                    owner.tid
                )),
                None if locator.is_own_namespace(owner) => None,
                None => {
                    is_seen = false;
                    Some(format!("process {} of another pid namespace", owner.pid))
                }
            })
            .collect();
        let error = Error::aborted(format!(
            "{} still in a call that changes a member after {} ms",
            if who.is_empty() {
                "a writer was".into()
            } else {
                format!("{} was", who.join(", "))
            },
            self.clock.limit().as_millis()
        ));
        match is_seen {
            true => {
                error.next("the program goes on; try again, or allow more time with --max-hold")
            }
            false => error.next(
                "whether it still lives cannot be seen from here: run the coordinator as root on \
                 the host, or in the pid namespace of the program",
            ),
        }
    }
}

/// Whether a hold or guard stands.
#[derive(Clone, Copy, Debug)]
pub struct Watching<'a> {
    gate: &'a Gate,
    word: u32,
}

impl Watching<'_> {
    /// It does.
    pub fn stands(&self) -> bool {
        hold::stands::<Shared>(&self.gate.header().word, self.word)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.reopen();
    }
}

/// Writes which files are members into the table that `word` selects.
pub(super) fn write_table(gate: &Gate, word: u32, shut: &Shut) -> Result<()> {
    let table = gate.table(word::bank(word));
    let written = match shut {
        Shut::Devices(devices) => table.write(KIND_DEVICES, devices, &[]),
        Shut::Only(id) => table.write(KIND_ONLY, &[], &[*id]),
    };
    match written {
        true => Ok(()),
        false => Err(Error::new("the member table of the gate is full")),
    }
}

/// How long calls are waited for that have to be compared with what they were granted.
const SETTLES: Duration = Duration::from_millis(500);

/// Waits until whoever was let through under a guard has looked at what he changed.
fn settle(gate: &Gate) -> Result<()> {
    let since = Instant::now();
    loop {
        let expects = |ask: &AtomicU64| matches!(Ask::unpack(ask.load(Acquire)), Ask::Expects(_));
        let (mut waits, mut is_lost) = (false, false);
        for (ask, slot) in gate.used_asks().iter().zip(gate.used_slots()) {
            if expects(ask) {
                waits = true;
                // Left by a jump, or with its thread: nobody will look any more. (Once more, for
                // it may have looked in between. No other call expects anything by now.)
                is_lost |= slot.is_idle() && expects(ask);
            }
        }
        if let Some(why) = gate.guard().why_broken() {
            return Err(guard_broken(why));
        }
        if !waits {
            return Ok(());
        }
        if is_lost {
            return Err(guard_broken(Broken::Missed));
        }
        if since.elapsed() > SETTLES {
            return Err(Error::by_chance(
                "a write that began during the capture did not come to an end",
            ));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Waits for every call that is in flight now, without holding anybody; `false` if one goes on.
pub fn settled(gate: &Gate) -> bool {
    const PATIENCE: Duration = Duration::from_millis(50);
    let since = Instant::now();
    // Sequentially consistent, like a drain: a call that is not counted yet has done nothing
    // yet when we look.
    let in_flight = |slot: &&'static Slot| !slot.is_empty();
    let mut calls: Vec<(&'static Slot, u32)> = gate
        .used_slots()
        .iter()
        .filter(in_flight)
        .map(|slot| (slot, slot.seq.load(Acquire)))
        .collect();
    loop {
        calls.retain(|(slot, seq)| !slot.is_empty() && slot.seq.load(Acquire) == *seq);
        if calls.is_empty() {
            return true;
        }
        if since.elapsed() > PATIENCE {
            return false;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// The error of a guard that a call has ended.
pub fn why_unguarded(gate: &Gate) -> Option<Error> {
    gate.guard().why_broken().map(guard_broken)
}

fn guard_broken(why: Broken) -> Error {
    match why {
        Broken::TimeOut => Error::aborted(
            "a program waited as long as it may for something that was not captured yet",
        )
        .next("nothing was published; allow more time with --max-hold, or use another --capture"),
        Broken::Missed => Error::by_chance(
            "a program changed other bytes than it seemed about to, before they were captured",
        ),
    }
}

pub(super) fn broken(after: Duration, when: &str) -> Error {
    Error::aborted(format!(
        "a waiting program ended the hold after {} ms, {when}",
        after.as_millis()
    ))
    .next("nothing was published; a longer hold can be allowed with --max-hold")
}

/// Keeps the gate open at least as long as it was last shut, so that checkpoints
/// back to back leave a program half of its time.
fn wait_for_gap(gate: &Gate) {
    let header = gate.header();
    let held = header.last_hold_ns.load(Relaxed).min(10_000_000_000);
    let until = header.last_open_ns.load(Relaxed).saturating_add(held);
    let now = monotonic_ns();
    // A time far ahead is not ours to believe.
    if until > now && until - now <= held {
        std::thread::sleep(Duration::from_nanos(until - now));
    }
}
