//! Random schedules of several made-up programs that lock, change, unlock, close, duplicate,
//! fork and end as they like, against the arming logic: no cut is claimed while a write lock
//! is held under which something was changed, nobody waits longer than he may, and all come
//! to their end.
//!
//! What is played is the real code: the gate's words and slots, the way past it, the notes,
//! the door ([`snapshim_gate::armed`]) and the judge ([`super::locked`]). Made up are the
//! kernel's locks, the programs, time, and the coordinator's loop, which follows
//! [`super::reach`]. One step of one of them at a time; what is between two steps of a
//! call is the gate's own model's to explore (`gate/tests/model.rs`).
//!
//! `SNAPSHIM_SCHEDULE=SEED` plays one again, and tells it.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use snapshim_gate::abi::Gate;
use snapshim_gate::armed::{self, Break, Change, Door, Kind, Locks, Rules};
use snapshim_gate::passage::{self, Thread};
use snapshim_gate::reap::{self, Claimed};
use snapshim_gate::slot::{Call, Class, FORKED, Owner, Seen, Slot};
use snapshim_gate::table::{FileId, KIND_ALL};
use snapshim_gate::watch::{self, Noted};
use snapshim_gate::{Shared, hold, word};

use super::files::{Changes, Key};
use super::locked::{Ended, LockJudge, Look, Outsider, State};
use crate::hold::memory_gate;

/// Steps of time that a call may be made to wait.
const BOUND: u64 = 400;
/// Files; any may be locked, and any changed.
const FILES: u64 = 4;
/// Most processes at a time.
const MOST: usize = 5;
/// Steps of one schedule.
const STEPS: u64 = 1_000;
/// Changes nothing for so long: quiet.
const QUIET: u64 = 60;

thread_local! {
    static BROKEN: Cell<Option<Break>> = const { Cell::new(None) };
}

#[derive(Debug)]
enum Played {}

impl Rules for Played {
    fn broken(how: Break) -> bool {
        BROKEN.get() == Some(how)
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// An open file description.
type Description = u64;

/// Whose a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// `fcntl`: a process's, dropped by any close of the file.
    Posix(usize),
    /// `F_OFD_SETLK`: an open file description's.
    Ofd(Description),
    /// `flock`: another's, which does not see the others.
    Flock(Description),
}

impl Holder {
    fn kind(self) -> Kind {
        match self {
            Holder::Posix(_) => Kind::Posix,
            Holder::Ofd(_) => Kind::Ofd,
            Holder::Flock(_) => Kind::Flock,
        }
    }
}

#[derive(Clone, Debug)]
struct Lock {
    is_write: bool,
    /// Something was changed, by somebody who had it, since it was granted for writing.
    has_changes: bool,
    /// By whom.
    changers: BTreeSet<usize>,
    /// One of those ended while he had it.
    is_orphaned: bool,
}

/// The kernel, as far as locks go.
#[derive(Default)]
struct Kernel {
    locks: BTreeMap<(Holder, u64), Lock>,
    /// A write lock ended with its last owner, and with one who had changed something under it.
    is_torn: bool,
}

impl Kernel {
    fn conflicts(&self, holder: Holder, file: u64, is_write: bool) -> bool {
        let is_flock = |holder| matches!(holder, Holder::Flock(_));
        self.locks.iter().any(|((other, of), lock)| {
            *of == file
                && *other != holder
                && is_flock(*other) == is_flock(holder)
                && (lock.is_write || is_write)
        })
    }

    fn grant(&mut self, holder: Holder, file: u64, is_write: bool) {
        let before = self.locks.remove(&(holder, file));
        let lock = before.filter(|lock| lock.is_write && is_write);
        let lock = lock.unwrap_or(Lock {
            is_write,
            has_changes: false,
            changers: BTreeSet::new(),
            is_orphaned: false,
        });
        self.locks.insert((holder, file), lock);
    }

    /// Drops locks; `is_end`: because somebody ended, not because he asked for it.
    fn drop_where(&mut self, is_end: bool, which: impl Fn(Holder, u64) -> bool) {
        let gone = self
            .locks
            .extract_if(.., |(holder, file), _| which(*holder, *file));
        let is_torn = gone.fold(false, |torn, (_, lock)| torn | lock.is_orphaned);
        self.is_torn |= is_end && is_torn;
    }

    fn is_mid_unit(&self) -> bool {
        self.is_torn
            || self
                .locks
                .values()
                .any(|lock| lock.is_write && lock.has_changes)
    }
}

/// What a process is in the middle of.
#[derive(Clone, Copy, Debug)]
enum At {
    /// Nothing.
    Rest,
    /// A call that changes a file: not past the gate.
    Gate { fd: i32, came: u64 },
    /// The same: past the gate; noted, under this generation.
    Change { fd: i32, is_noted: bool, made: bool },
    /// Before a lock is asked for.
    Door { wish: Wish, came: u64 },
    /// Asking for it.
    Lock {
        wish: Wish,
        since: u64,
        is_event: bool,
    },
    /// It was granted, or given up, and the shim is not told yet.
    Told {
        kind: Kind,
        fd: i32,
        takes: bool,
        is_event: bool,
    },
    /// Closed, and not told yet.
    Closed { is_event: bool },
}

#[derive(Clone, Copy, Debug)]
struct Wish {
    fd: i32,
    kind: u8,
    is_write: bool,
    is_patient: bool,
}

struct Process {
    id: usize,
    owner: Owner,
    image: u64,
    slot: Option<&'static Slot>,
    locks: Locks,
    has_locked: bool,
    fds: BTreeMap<i32, (Description, u64)>,
    at: At,
    /// Steps until the next.
    rest: u64,
    /// Locks first, changes then, in a row: most programs.
    is_orderly: bool,
    steps: u64,
}

/// The table in the middle of a call.
struct Passing<'a> {
    scene: &'a Gate,
    locks: &'a Locks,
    slot: &'a Slot,
    file: u64,
    is_noted: bool,
}

impl Thread<Shared> for Passing<'_> {
    fn mark(&mut self, _: bool) {}

    // Nothing here is captured after a cut.
    fn may_change(&mut self, _: u32, _: bool) -> bool {
        true
    }

    fn wait_for_chunks(&mut self, _: &AtomicU32, _: u32) -> bool {
        true
    }

    fn is_shut(&mut self, _: usize) -> bool {
        true
    }
    fn outer_is_shut(&mut self, _: usize) -> bool {
        true
    }
    fn outer_is_abandoned(&mut self) -> bool {
        false
    }
    fn watched(&mut self, _: u32, is_nested: bool) {
        let change = Change::File(id(self.file));
        let watch = &self.scene.header().watch;
        let slot = Some(self.slot);
        self.is_noted = armed::note::<Played>(watch, slot, self.locks, change, is_nested, || false);
    }
    fn wait(&mut self, _: &AtomicU32, _: u32) -> bool {
        unreachable!("it passes only where it need not wait")
    }
    fn wake_all(&mut self, _: &AtomicU32) {}
}

fn id(file: u64) -> FileId {
    FileId {
        dev: 1,
        ino: file + 1,
    }
}

/// What the coordinator is doing.
enum Task {
    Idle {
        until: u64,
    },
    /// It was killed, and the gate is as it left it.
    Dead {
        until: u64,
    },
    /// The gate is shut; calls in flight are waited for.
    Drain {
        closed: u32,
        since: u64,
        is_quiet: bool,
    },
    /// Processes are looked at, one after the other.
    Look {
        closed: u32,
        since: u64,
        is_quiet: bool,
        todo: Vec<usize>,
        looks: Vec<Look>,
        /// Then all others are looked at.
        judged: Option<Judged>,
    },
    Armed {
        armed: u32,
        looks_at: u64,
        last: (u32, u64),
        refused_quiet: bool,
    },
}

/// What the judge said of processes that own slots.
struct Judged {
    is_free: bool,
    workers: BTreeSet<usize>,
    /// Of the others.
    holders: BTreeSet<Outsider>,
}

#[derive(Default, Debug)]
struct Tally {
    schedules: u64,
    checkpoints: u64,
    reached: u64,
    /// With a write lock held all the same, that nothing was changed under.
    lenient: u64,
    refused: u64,
    missed: u64,
    doors: u64,
    broken: u64,
    longest: u64,
    ended: u64,
    mid_unit: u64,
    killed: u64,
}

struct Scene<'a> {
    gate: Gate,
    random: Random,
    now: u64,
    kernel: Kernel,
    processes: Vec<Process>,
    /// Owners of slots that have ended.
    gone: BTreeSet<u32>,
    next_id: u32,
    next_description: Description,
    task: Task,
    judge: LockJudge<Played>,
    until: u64,
    door: bool,
    refused: u64,
    /// Whether the coordinator may be killed, and processes in the middle of a call.
    is_mortal: bool,
    /// Whether processes take one lock after the other, and end rather than fork.
    is_greedy: bool,
    story: Option<String>,
    tally: &'a mut Tally,
}

impl<'a> Scene<'a> {
    fn new(gate: Gate, seed: u64, tells: bool, tally: &'a mut Tally) -> Scene<'a> {
        let header = gate.header();
        header.word.store(0, Relaxed);
        header.high_water.store(0, Relaxed);
        for count in &header.watch.counts {
            count.store(0, Relaxed);
        }
        for slot in gate.slots() {
            if let Some(claimed) = Claimed::read(slot) {
                reap::reap(slot, claimed);
            }
        }
        for bank in 0..2 {
            gate.table(bank).write(KIND_ALL, &[], &[]);
        }
        let mut scene = Scene {
            gate,
            random: Random(seed),
            now: 1,
            kernel: Kernel::default(),
            processes: Vec::new(),
            gone: BTreeSet::new(),
            next_id: 1,
            next_description: 1,
            task: Task::Idle { until: 0 },
            judge: LockJudge::default(),
            until: 0,
            door: false,
            refused: 0,
            is_mortal: false,
            is_greedy: false,
            story: tells.then(String::new),
            tally,
        };
        scene.is_mortal = scene.random.one_in(4);
        scene.is_greedy = scene.random.one_in(4);
        for _ in 0..1 + scene.random.below(4) {
            scene.start();
        }
        scene.task = Task::Idle {
            until: scene.random.below(200),
        };
        scene
    }

    fn tell(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(story) = &mut self.story {
            let _ = writeln!(story, "{now:5} {}", line());
        }
    }

    fn word(&self) -> &'static AtomicU32 {
        &self.gate.header().word
    }

    fn start(&mut self) {
        let id = self.next_id;
        self.next_id += 1;
        let is_orderly = !self.random.one_in(3);
        self.processes.push(Process {
            id: id as usize,
            owner: Owner {
                pid: id,
                tid: id,
                pidns: 1,
            },
            image: u64::from(id) * 2,
            slot: None,
            locks: Locks::none(),
            has_locked: false,
            fds: BTreeMap::new(),
            at: At::Rest,
            rest: 0,
            is_orderly,
            steps: 0,
        });
    }

    /// The slot of a process, claimed if need be.
    fn slot(&mut self, at: usize) -> &'static Slot {
        let process = &mut self.processes[at];
        if let Some(slot) = process.slot {
            return slot;
        }
        let (owner, image) = (process.owner, process.image);
        // Those of the dead are given on, as `claim` does.
        for slot in self.gate.used_slots() {
            if self.random.one_in(2) {
                self.reap_if_dead(slot);
            }
        }
        let index = self
            .gate
            .slots()
            .iter()
            .position(|slot| slot.claim(owner, u64::from(owner.pid), image))
            .expect("a free slot");
        self.gate
            .header()
            .high_water
            .fetch_max(index as u32 + 1, SeqCst);
        let slot = &self.gate.slots()[index];
        self.processes[at].slot = Some(slot);
        slot
    }

    /// Whoever asks for a lock, or gives one up, is known from then on.
    fn count_lock(&mut self, at: usize) {
        let slot = self.slot(at);
        slot.seen[Seen::Lock as usize].fetch_add(1, Relaxed);
    }

    fn reap_if_dead(&self, slot: &Slot) {
        let is_dead = |claimed: &Claimed| {
            Owner::unpack(claimed.owner).is_some_and(|owner| self.gone.contains(&owner.pid))
        };
        if let Some(claimed) = Claimed::read(slot).filter(is_dead) {
            self.gate.header().watch.note_end(slot);
            reap::reap(slot, claimed);
        }
    }

    fn is_armed(&self) -> bool {
        word::is_armed(self.word().load(Relaxed))
    }

    fn notes_locks(&self) -> bool {
        match Played::broken(Break::LocksNotedArmedOnly) {
            true => self.is_armed(),
            false => armed::notes_locks(self.word().load(Relaxed)),
        }
    }

    fn boundary(&mut self) {
        let now = self.now;
        if armed::shut_at(self.word(), &self.gate.header().watch, watch::LOCK, || now) {
            self.tell(|| "    the gate is shut at a boundary".into());
        }
    }

    /// One step of one process.
    fn act(&mut self, at: usize) {
        let now = self.now;
        self.processes[at].steps += 1;
        let name = self.processes[at].id;
        if self.is_mortal && self.processes.len() > 1 && self.random.one_in(300) {
            return self.end(at);
        }
        match self.processes[at].at {
            At::Rest => self.choose(at),
            At::Gate { fd, came } => self.pass(at, fd, came),
            At::Change {
                fd,
                is_noted,
                made: false,
            } => {
                // Under every lock that it has now.
                let process = &self.processes[at];
                let descriptions: BTreeSet<Description> =
                    process.fds.values().map(|(d, _)| *d).collect();
                let id = process.id;
                for ((holder, _), lock) in &mut self.kernel.locks {
                    let has = match holder {
                        Holder::Posix(of) => *of == id,
                        Holder::Ofd(d) | Holder::Flock(d) => descriptions.contains(d),
                    };
                    if has && lock.is_write {
                        lock.has_changes = true;
                        lock.changers.insert(id);
                    }
                }
                self.tell(|| format!("{name} has changed by {fd}"));
                self.processes[at].at = At::Change {
                    fd,
                    is_noted,
                    made: true,
                };
            }
            At::Change { is_noted, .. } => {
                let slot = self.processes[at].slot.expect("it is counted");
                let watch = &self.gate.header().watch;
                let points = match is_noted {
                    true => armed::changed(watch, slot, 1),
                    false => 0,
                };
                slot.leave_frame(true, slot.generation.load(Relaxed), true);
                if points != 0 {
                    armed::shut_at(self.word(), watch, points, || now);
                }
                self.processes[at].at = At::Rest;
            }
            At::Door { wish, came } => self.ask(at, wish, came),
            At::Lock {
                wish,
                since,
                is_event,
            } => self.lock(at, wish, since, is_event),
            At::Told {
                kind,
                fd,
                takes,
                is_event,
            } => {
                self.processes[at].at = At::Rest;
                if !is_event {
                    return;
                }
                let slot = self.slot(at);
                let watch = &self.gate.header().watch;
                let process = &self.processes[at];
                if takes {
                    process.locks.took(watch, kind, fd);
                } else {
                    process.locks.gave_up::<Played>(watch, Some(slot), kind, fd);
                    self.boundary();
                }
            }
            At::Closed { is_event } => {
                self.processes[at].at = At::Rest;
                if is_event {
                    self.boundary();
                }
            }
        }
    }

    /// What a process does next.
    fn choose(&mut self, at: usize) {
        let is_orderly = self.processes[at].is_orderly;
        let holds = self.holds(at);
        let fds: Vec<i32> = self.processes[at].fds.keys().copied().collect();
        let what = self.random.below(100);
        let fd = match fds.len() {
            0 => None,
            n => Some(fds[self.random.below(n as u64) as usize]),
        };
        self.processes[at].rest = self.random.below(12);
        match (what, fd) {
            (_, None) | (0..4, _) if fds.len() < 5 => self.open(at),
            (_, None) => {}
            (4..40, Some(fd)) if holds || !is_orderly => {
                self.processes[at].at = At::Gate { fd, came: self.now };
            }
            (4..70, Some(fd)) if !holds || self.is_greedy || self.random.one_in(3) => {
                let wish = Wish {
                    fd,
                    // One kind of lock by one open file: programs mix them no more than that.
                    kind: (self.processes[at].fds[&fd].0 % 3) as u8,
                    is_write: !self.random.one_in(4),
                    is_patient: !self.random.one_in(3),
                };
                self.count_lock(at);
                self.processes[at].at = At::Door {
                    wish,
                    came: self.now,
                };
            }
            (4..84, Some(fd)) => self.unlock(at, fd),
            (84..88, Some(fd)) => self.close(at, fd),
            (88..90, Some(fd)) => self.duplicate(at, fd),
            (90..93, _) if self.is_greedy && self.processes.len() > 2 => self.end(at),
            (90..93, _) if self.is_greedy => self.start(),
            (90..93, _) => self.fork(at),
            (93..94, _) if self.processes.len() > 1 => self.end(at),
            _ => {}
        }
    }

    fn holders_of(&self, at: usize) -> impl Fn(Holder) -> bool + use<> {
        let id = self.processes[at].id;
        let descriptions: BTreeSet<Description> =
            self.processes[at].fds.values().map(|(d, _)| *d).collect();
        move |holder| match holder {
            Holder::Posix(of) => of == id,
            Holder::Ofd(d) | Holder::Flock(d) => descriptions.contains(&d),
        }
    }

    fn holds(&self, at: usize) -> bool {
        let is_its = self.holders_of(at);
        self.kernel.locks.keys().any(|(holder, _)| is_its(*holder))
    }

    fn open(&mut self, at: usize) {
        let file = self.random.below(FILES);
        let description = self.next_description;
        self.next_description += 1;
        let fds = &mut self.processes[at].fds;
        let fd = (3..).find(|fd| !fds.contains_key(fd)).expect("a number");
        fds.insert(fd, (description, file));
    }

    fn duplicate(&mut self, at: usize, fd: i32) {
        let fds = &mut self.processes[at].fds;
        let what = fds[&fd];
        if fds.len() < 8 {
            let new = (3..).find(|fd| !fds.contains_key(fd)).expect("a number");
            fds.insert(new, what);
        }
    }

    fn holder(&self, at: usize, fd: i32, kind: u8) -> (Holder, u64) {
        let (description, file) = self.processes[at].fds[&fd];
        let holder = match kind {
            0 => Holder::Posix(self.processes[at].id),
            1 => Holder::Ofd(description),
            _ => Holder::Flock(description),
        };
        (holder, file)
    }

    /// Past the gate, or in front of it.
    fn pass(&mut self, at: usize, fd: i32, came: u64) {
        let found = self.word().load(SeqCst);
        let name = self.processes[at].id;
        if !word::is_open(found) && !word::is_armed(found) {
            if self.now - came >= BOUND {
                let open = word::next(found, word::OPEN);
                let _ = self.word().compare_exchange(found, open, SeqCst, Relaxed);
                self.tell(|| format!("{name} breaks the hold"));
                self.tally.broken += 1;
            }
            self.waited(came);
            return;
        }
        let slot = self.slot(at);
        let call = Call {
            class: Class::Write,
            fd,
            sp: 1 << 40,
        };
        let file = self.processes[at].fds[&fd].1;
        let mut passing = Passing {
            scene: &self.gate,
            locks: &self.processes[at].locks,
            slot,
            file,
            is_noted: false,
        };
        passage::pass::<Shared, _>(slot, self.word(), call, &mut passing);
        let is_noted = passing.is_noted;
        self.tell(|| format!("{name} changes by {fd}, noted: {is_noted}"));
        self.processes[at].at = At::Change {
            fd,
            is_noted,
            made: false,
        };
        self.processes[at].rest = self.random.below(6);
    }

    fn waited(&mut self, came: u64) {
        self.tally.longest = self.tally.longest.max(self.now - came);
    }

    /// At the door, if it is armed; then for the lock.
    fn ask(&mut self, at: usize, wish: Wish, came: u64) {
        let found = self.word().load(Relaxed);
        let is_event = self.notes_locks();
        let process = &mut self.processes[at];
        let name = process.id;
        if is_event {
            process.has_locked = true;
            let watch = &self.gate.header().watch;
            let (owner, is_holder) = (process.owner.pack(), process.locks.is_any());
            let door = armed::door::<Played>(found, watch, owner, is_holder, came, self.now, BOUND);
            if let Door::Shut(_) = door {
                assert!(
                    !is_holder,
                    "process {name} holds a lock, and waits at the door"
                );
                self.waited(came);
                return;
            }
        }
        self.tell(|| format!("{name} asks for {wish:?}"));
        // As long as it was at the door is part of what it waits.
        self.processes[at].at = At::Lock {
            wish,
            since: self.now,
            is_event,
        };
    }

    fn lock(&mut self, at: usize, wish: Wish, since: u64, is_event: bool) {
        let name = self.processes[at].id;
        let (holder, file) = self.holder(at, wish.fd, wish.kind);
        if self.kernel.conflicts(holder, file, wish.is_write) {
            // A time-out of the program's own, or it did not want to wait at all.
            let is_over = !wish.is_patient || self.now - since > 150;
            if is_over {
                // flock gives up what it has before it asks for more, and may not get it back.
                if matches!(holder, Holder::Flock(_)) {
                    self.kernel
                        .drop_where(false, |h, f| (h, f) == (holder, file));
                }
                self.processes[at].at = At::Rest;
            }
            return;
        }
        self.kernel.grant(holder, file, wish.is_write);
        self.tell(|| format!("{name} has {wish:?} of {file}"));
        self.processes[at].at = At::Told {
            kind: holder.kind(),
            fd: wish.fd,
            takes: wish.is_write,
            is_event,
        };
    }

    fn unlock(&mut self, at: usize, fd: i32) {
        let name = self.processes[at].id;
        let is_its = self.holders_of(at);
        let held: Vec<(Holder, u64)> = self.kernel.locks.keys().copied().collect();
        let (file, description) = {
            let (description, file) = self.processes[at].fds[&fd];
            (file, description)
        };
        let one = held.iter().find(|(holder, of)| {
            is_its(*holder)
                && *of == file
                && match holder {
                    Holder::Posix(_) => true,
                    Holder::Ofd(d) | Holder::Flock(d) => *d == description,
                }
        });
        let Some(one) = one.copied() else { return };
        self.count_lock(at);
        // Given up, or made one for reading.
        match self.random.one_in(4) {
            true => self.kernel.grant(one.0, one.1, false),
            false => self.kernel.drop_where(false, |h, f| (h, f) == one),
        }
        self.tell(|| format!("{name} gives up {one:?} by {fd}"));
        self.processes[at].at = At::Told {
            kind: one.0.kind(),
            fd,
            takes: false,
            is_event: self.notes_locks(),
        };
    }

    /// Closes a descriptor of a process: what that drops.
    fn drop_fd(&mut self, at: usize, fd: i32, is_end: bool) {
        let id = self.processes[at].id;
        let (description, file) = self.processes[at].fds.remove(&fd).expect("open");
        let mut all = self.processes.iter().flat_map(|p| p.fds.values());
        let is_last = !all.any(|(d, _)| *d == description);
        self.kernel.drop_where(is_end, |holder, of| match holder {
            Holder::Posix(p) => p == id && of == file,
            Holder::Ofd(d) | Holder::Flock(d) => is_last && d == description,
        });
    }

    fn close(&mut self, at: usize, fd: i32) {
        let name = self.processes[at].id;
        let is_event = self.is_armed() && self.processes[at].has_locked;
        self.drop_fd(at, fd, false);
        self.tell(|| format!("{name} closes {fd}"));
        self.processes[at].at = At::Closed { is_event };
    }

    fn fork(&mut self, at: usize) {
        if self.processes.len() >= MOST {
            return;
        }
        self.start();
        let parent = &self.processes[at];
        let (fds, locks) = (parent.fds.clone(), parent.locks.inherited());
        let (has_locked, name, image) = (parent.has_locked, parent.id, parent.image);
        let child = self.processes.last_mut().expect("just started");
        child.fds = fds;
        child.locks = locks;
        child.image = image | FORKED;
        child.has_locked = has_locked;
        let child = self.next_id - 1;
        self.tell(|| format!("{name} forks {child}"));
    }

    fn end(&mut self, at: usize) {
        let name = self.processes[at].id;
        self.tell(|| format!("{name} ends"));
        let was_torn = self.kernel.is_torn;
        let is_its = self.holders_of(at);
        let locks = self.kernel.locks.iter_mut();
        for (_, lock) in locks.filter(|((holder, _), _)| is_its(*holder)) {
            lock.is_orphaned |= lock.changers.contains(&name);
        }
        let fds: Vec<i32> = self.processes[at].fds.keys().copied().collect();
        for fd in fds {
            self.drop_fd(at, fd, true);
        }
        if self.kernel.is_torn && !was_torn {
            self.tell(|| "    and tears a unit".into());
        }
        let process = self.processes.remove(at);
        self.gone.insert(process.owner.pid);
        self.tally.ended += 1;
    }

    /// One step of the coordinator.
    fn coordinate(&mut self) {
        let task = std::mem::replace(&mut self.task, Task::Idle { until: 0 });
        self.task = match task {
            Task::Idle { until } if self.now < until => Task::Idle { until },
            Task::Dead { until } if self.now < until => Task::Dead { until },
            Task::Idle { .. } | Task::Dead { .. } => self.close_gate(),
            _ if self.is_mortal && self.random.one_in(400) => self.die(),
            Task::Drain {
                closed,
                since,
                is_quiet,
            } => self.drain(closed, since, is_quiet),
            Task::Look {
                closed,
                since,
                is_quiet,
                todo,
                looks,
                judged,
            } => self.look(closed, since, is_quiet, todo, looks, judged),
            Task::Armed {
                armed,
                looks_at,
                last,
                refused_quiet,
            } => self.wait(armed, looks_at, last, refused_quiet),
        };
    }

    /// The coordinator is killed; another comes, much later.
    fn die(&mut self) -> Task {
        self.tell(|| "    the coordinator is killed".into());
        self.tally.killed += 1;
        Task::Dead {
            until: self.now + self.random.below(3 * BOUND),
        }
    }

    fn close_gate(&mut self) -> Task {
        let found = self.word().load(Relaxed);
        if !word::is_open(found) {
            // Left by one that was killed.
            let open = word::next(found, word::OPEN);
            let _ = self.word().compare_exchange(found, open, SeqCst, Relaxed);
        }
        self.tally.checkpoints += 1;
        self.refused = 0;
        self.door = false;
        self.judge = LockJudge::default();
        for slot in self.gate.used_slots() {
            self.reap_if_dead(slot);
        }
        self.gate.header().watch.forget_ended();
        // What was torn before is not known of.
        self.kernel.is_torn = false;
        self.until = self.now + 100 + self.random.below(400);
        let closed = hold::close::<Shared>(self.word()).expect("it is open");
        self.tell(|| "    a checkpoint".into());
        Task::Drain {
            closed,
            since: self.now,
            is_quiet: false,
        }
    }

    fn drain(&mut self, closed: u32, since: u64, is_quiet: bool) -> Task {
        if !hold::stands::<Shared>(self.word(), closed) || self.now - since > BOUND * 9 / 10 {
            return self.give_up(closed);
        }
        for slot in self.gate.used_slots() {
            if !slot.is_idle() {
                self.reap_if_dead(slot);
            }
        }
        let slots = self.gate.used_slots().iter();
        if !hold::is_drained::<Shared>(closed, slots) && !Played::broken(Break::JudgedUndrained) {
            return Task::Drain {
                closed,
                since,
                is_quiet,
            };
        }
        if self.door {
            self.gate.header().watch.open_door();
        }
        let todo = (0..self.gate.used_slots().len()).collect();
        Task::Look {
            closed,
            since,
            is_quiet,
            todo,
            looks: Vec::new(),
            judged: None,
        }
    }

    /// Whether a process waits for a lock. Also if it has only just asked: that there is a moment
    /// between the shim's look at the gate and the kernel's queue is a limitation.
    fn waits(&self, pid: u32) -> bool {
        let mut those = self.processes.iter().filter(|p| p.owner.pid == pid);
        those.any(|p| matches!(p.at, At::Lock { .. }))
    }

    fn state(&self, pid: u32) -> State {
        let Some(at) = self.processes.iter().position(|p| p.owner.pid == pid) else {
            return State::Gone;
        };
        let is_its = self.holders_of(at);
        let locks = self.kernel.locks.iter();
        let held = locks.filter(|((holder, _), lock)| lock.is_write && is_its(*holder));
        let held: Vec<Holder> = held.map(|((holder, _), _)| *holder).collect();
        match held.is_empty() {
            true => State::Unlocked,
            false => State::Locked {
                is_own: held.iter().all(|holder| matches!(holder, Holder::Posix(_))),
            },
        }
    }

    /// Looks at one process more; judges when all have been looked at. See `judge.rs`.
    fn look(
        &mut self,
        closed: u32,
        since: u64,
        is_quiet: bool,
        mut todo: Vec<usize>,
        mut looks: Vec<Look>,
        judged: Option<Judged>,
    ) -> Task {
        if self.now - since > BOUND * 9 / 10 {
            return self.give_up(closed);
        }
        if judged.is_none()
            && let Some(next) = todo.pop()
        {
            let slot = &self.gate.slots()[next];
            if let Some(owner) = Claimed::read(slot).and_then(|c| Owner::unpack(c.owner)) {
                let changed = slot.changed.load(Relaxed);
                let mut changes = Changes::new();
                if changed != 0 {
                    changes.push((next, slot.generation.load(Relaxed), changed));
                }
                let key: Key = (owner.pid, owner.pidns, slot.start_time.load(Relaxed));
                looks.push(Look {
                    may_store: false,
                    key,
                    is_waiting: self.judge.asks_who_waits(&key) && self.waits(owner.pid),
                    state: self.state(owner.pid),
                    changes,
                    is_unsettled: changed != slot.settled.load(Relaxed),
                    image: slot.image.load(Relaxed),
                    locks: slot.seen[Seen::Lock as usize].load(Relaxed) > 0,
                });
            }
            return Task::Look {
                closed,
                since,
                is_quiet,
                todo,
                looks,
                judged: None,
            };
        }
        // Then at all others, one after the other.
        let Some(mut judged) = judged else {
            let workers = looks.iter().map(|look| look.key.0 as usize).collect();
            let watch = &self.gate.header().watch;
            let ended = Ended {
                unsettled: watch.has_vanished(watch::LOCK),
                locker: watch.has_vanished(watch::LOCKER),
                changer: watch.has_vanished(watch::CHANGER),
                anybody: watch.has_vanished(watch::ANYBODY),
                heir: watch.has_vanished(watch::HEIR),
            };
            let is_first = self.judge.is_first();
            let is_free = self.judge.is_free(looks, ended);
            let may_be = is_free && self.uses_locks(is_quiet);
            if !may_be && !is_first {
                return self.refuse(closed, is_quiet);
            }
            return Task::Look {
                closed,
                since,
                is_quiet,
                todo: self.processes.iter().map(|p| p.id).collect(),
                looks: Vec::new(),
                judged: Some(Judged {
                    is_free,
                    workers,
                    holders: BTreeSet::new(),
                }),
            };
        };
        if let Some(next) = todo.pop() {
            let is_worker = judged.workers.contains(&next);
            let is_blind = Played::broken(Break::OnlyWorkersLookedAt);
            if !is_worker && !is_blind && matches!(self.state(next as u32), State::Locked { .. }) {
                judged.holders.insert((next as u32, 0));
            }
            return Task::Look {
                closed,
                since,
                is_quiet,
                todo,
                looks,
                judged: Some(judged),
            };
        }
        let state = |pid| match self.state(pid) {
            State::Gone => None,
            state => Some(matches!(state, State::Locked { .. })),
        };
        let all = (0..self.next_id).map(|pid| (pid, state(pid)));
        let all: BTreeMap<u32, Option<bool>> = all.collect();
        let others = self
            .judge
            .is_free_of_others(judged.holders, |(pid, _)| all[pid]);
        let is_free = judged.is_free && others;
        if is_free && self.uses_locks(is_quiet) && hold::stands::<Shared>(self.word(), closed) {
            return self.claim(closed);
        }
        self.refuse(closed, is_quiet)
    }

    fn uses_locks(&self, is_quiet: bool) -> bool {
        let watch = &self.gate.header().watch;
        watch.counted(Noted::ChangedUnderLock) > 0 && watch.counted(Noted::Unlocked) > 0 || is_quiet
    }

    /// The cut is claimed.
    fn claim(&mut self, closed: u32) -> Task {
        self.tally.reached += 1;
        self.tell(|| "    reached".into());
        let is_held = self.kernel.locks.values().any(|lock| lock.is_write);
        self.tally.lenient += u64::from(is_held);
        assert!(
            !self.kernel.is_mid_unit(),
            "claimed in the middle of a unit: {:?}, torn: {}",
            self.kernel.locks,
            self.kernel.is_torn
        );
        let _ = hold::open::<Shared>(self.word(), closed, |_| ());
        self.pause()
    }

    fn pause(&mut self) -> Task {
        Task::Idle {
            until: self.now + self.random.below(120),
        }
    }

    fn give_up(&mut self, closed: u32) -> Task {
        let _ = hold::open::<Shared>(self.word(), closed, |_| ());
        self.gate.header().watch.open_door();
        self.tell(|| "    given up".into());
        self.pause()
    }

    fn refuse(&mut self, closed: u32, is_quiet: bool) -> Task {
        let is_first = self.refused == 0 && !self.door;
        self.tally.refused += 1;
        self.refused += 1;
        self.tally.mid_unit += u64::from(self.kernel.is_mid_unit());
        let header = self.gate.header();
        let armed = word::next(closed, word::ARMED);
        if is_first {
            header.watch.arm(armed);
        }
        header.watch.points.store(0, Relaxed);
        header.watch.until_ns.store(self.until + BOUND, Relaxed);
        if header
            .word
            .compare_exchange(closed, armed, SeqCst, Relaxed)
            .is_err()
        {
            return self.give_up(closed);
        }
        if self.door {
            self.shut_door();
        }
        self.tell(|| "    armed".into());
        let pause = self.random.below(10);
        Task::Armed {
            armed,
            looks_at: self.now + pause,
            last: (header.watch.changes.load(Relaxed), self.now),
            refused_quiet: is_quiet,
        }
    }

    fn shut_door(&mut self) {
        let holds = |p: &Process| {
            let at = self
                .processes
                .iter()
                .position(|q| q.id == p.id)
                .expect("itself");
            self.holds(at)
        };
        let holders = self
            .processes
            .iter()
            .filter(|p| holds(p))
            .map(|p| p.owner.pack());
        let holders: Vec<u64> = holders.collect();
        self.gate.header().watch.shut_door(holders);
    }

    fn wait(
        &mut self,
        armed: u32,
        looks_at: u64,
        mut last: (u32, u64),
        refused_quiet: bool,
    ) -> Task {
        let header = self.gate.header();
        let found = header.word.load(Relaxed);
        if found != armed {
            if found != word::next(armed, word::CLOSED) {
                header.watch.open_door();
                return self.pause();
            }
            return Task::Drain {
                closed: found,
                since: self.now,
                is_quiet: false,
            };
        }
        if self.now >= looks_at {
            header.watch.points.store(watch::LOCK, Relaxed);
        }
        if self.now >= self.until {
            if self.door {
                header.watch.open_door();
                let open = word::next(armed, word::OPEN);
                let _ = header.word.compare_exchange(armed, open, SeqCst, Relaxed);
                self.tally.missed += 1;
                self.tell(|| "    not reached".into());
                return self.pause();
            }
            self.door = true;
            self.tally.doors += 1;
            self.until = self.now + BOUND / 2;
            header.watch.until_ns.store(self.until + BOUND, Relaxed);
            self.shut_door();
            self.tell(|| "    the door is shut".into());
        }
        let changes = header.watch.changes.load(Relaxed);
        let mut refused_quiet = refused_quiet;
        if changes != last.0 || !header.watch.is_still() {
            last = (changes, self.now);
            refused_quiet = false;
        }
        if !refused_quiet && self.now - last.1 > QUIET {
            let closed = word::next(armed, word::CLOSED);
            if header
                .word
                .compare_exchange(armed, closed, SeqCst, Relaxed)
                .is_ok()
            {
                return Task::Drain {
                    closed,
                    since: self.now,
                    is_quiet: true,
                };
            }
        }
        Task::Armed {
            armed,
            looks_at,
            last,
            refused_quiet,
        }
    }

    fn play(&mut self) {
        self.tally.schedules += 1;
        while self.now < STEPS {
            self.now += 1;
            // Several may step in one unit of time, in any order.
            for _ in 0..3 {
                let n = self.processes.len() as u64 + 1;
                let who = self.random.below(n) as usize;
                match self.processes.get_mut(who) {
                    None => self.coordinate(),
                    Some(process) if process.rest > 0 => process.rest -= 1,
                    Some(_) => self.act(who),
                }
            }
            // Nobody is kept waiting longer than he may, by anything of ours. One turn of the
            // wheel may pass until it is his.
            let late = self.processes.iter().find(|p| match p.at {
                At::Gate { came, .. } | At::Door { came, .. } => self.now - came > BOUND + 60,
                _ => false,
            });
            if let Some(late) = late {
                panic!(
                    "process {} waits since {:?} at {}",
                    late.id, late.at, self.now
                );
            }
        }
    }
}

/// Plays schedules; what failed, with the seed.
fn play(seeds: impl Iterator<Item = u64>, broken: Option<Break>) -> Result<Tally, (u64, String)> {
    BROKEN.set(broken);
    let gate = memory_gate::new(64);
    let mut tally = Tally::default();
    let tells = std::env::var_os("SNAPSHIM_SCHEDULE").is_some();
    for seed in seeds {
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut scene = Scene::new(gate, seed, tells, &mut tally);
            let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scene.play()));
            if let Some(story) = &scene.story {
                println!("{story}");
            }
            if let Err(cause) = played {
                std::panic::resume_unwind(cause);
            }
        }));
        if let Err(cause) = played {
            let text = cause.downcast_ref::<String>().cloned();
            return Err((seed, text.unwrap_or_else(|| "?".into())));
        }
    }
    Ok(tally)
}

fn is_full() -> bool {
    std::env::var_os("SNAPSHIM_TEST_FULL").is_some_and(|v| v != "0" && !v.is_empty())
}

#[test]
fn no_cut_is_claimed_in_the_middle_of_a_unit() {
    if let Some(seed) = std::env::var("SNAPSHIM_SCHEDULE")
        .ok()
        .and_then(|s| s.parse().ok())
    {
        play(std::iter::once(seed), None).unwrap();
        return;
    }
    let count = if is_full() { 100_000 } else { 1_000 };
    let begun = std::time::Instant::now();
    match play(0..count, None) {
        Ok(tally) => {
            println!(
                "{tally:?} in {:.1?}; a call may wait {BOUND}",
                begun.elapsed()
            );
            assert!(
                tally.reached > count && tally.lenient > count / 50 && tally.doors > count / 10
            );
            assert!(tally.mid_unit > count, "nothing could have gone wrong");
        }
        Err((seed, cause)) => panic!("SNAPSHIM_SCHEDULE={seed}: {cause}"),
    }
}

/// Each of these has to be found, or the schedules prove nothing.
#[test]
fn broken_rules_are_found() {
    let full = is_full();
    let mut all = vec![
        Break::ChangesUncounted,
        Break::NewLocksArePassed,
        Break::TheDeadAreForgotten,
        Break::JudgedUndrained,
        Break::AnyUnlockSettles,
        Break::DoorForHolders,
        Break::DoorWithoutBound,
        Break::OnlyWorkersLookedAt,
    ];
    // Found in one schedule of some ten thousand.
    if full {
        all.extend([Break::LocksNotedArmedOnly, Break::WaitersAreForgotten]);
    }
    let count = if full { 100_000 } else { 2_000 };
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let found: Vec<_> = all
        .into_iter()
        .map(|broken| (broken, play(0..count, Some(broken)).err()))
        .collect();
    std::panic::set_hook(report);
    for (broken, found) in &found {
        match found {
            Some((seed, cause)) => println!("{broken:?}: seed {seed}: {cause}"),
            None => println!("{broken:?}: NOT FOUND"),
        }
    }
    assert!(found.iter().all(|(_, found)| found.is_some()));
}
