//! The set that is played with: its gate, its files, its writers, its coordinator.

use std::cell::{Cell as StdCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU32;
use loom::sync::atomic::Ordering::Relaxed;
use loom::sync::{Condvar, Mutex};
use loom::thread::yield_now;
use snapshim_gate::guard;
use snapshim_gate::hold;
use snapshim_gate::marks;
use snapshim_gate::memory::Cell;
use snapshim_gate::passage::{self, Thread};
use snapshim_gate::slot::{Call, Class, Slot};
use snapshim_gate::word;

use crate::memory::{Modelled, U32, U64};

/// How often something happened, by what it is.
pub(crate) type Events = BTreeMap<&'static str, u64>;

thread_local! {
    static EVENTS: RefCell<Events> = const { RefCell::new(Events::new()) };
}

/// Notes that something happened in an execution.
pub(crate) fn note(event: &'static str) {
    EVENTS.with_borrow_mut(|events| *events.entry(event).or_default() += 1);
}

/// What was noted on this thread, that is, in one exploration.
pub(crate) fn take_events() -> Events {
    EVENTS.take()
}

/// A file of one record. A call writes the record in two halves.
pub(crate) enum File {
    /// Of holds that nobody breaks: to read it while a call may be writing it is an
    /// error, whatever is read.
    Guarded([UnsafeCell<u32>; 2]),
    /// Of holds that may be broken: it is then read while calls write it, and may
    /// be read in any state; but nothing may come of that.
    Exposed([AtomicU32; 2]),
}

impl File {
    pub(crate) fn guarded() -> File {
        File::Guarded([UnsafeCell::new(0), UnsafeCell::new(0)])
    }

    pub(crate) fn exposed() -> File {
        File::Exposed([AtomicU32::new(0), AtomicU32::new(0)])
    }

    fn write(&self, record: u32) {
        match self {
            File::Guarded(halves) => {
                for half in halves {
                    // SAFETY: loom runs one thread at a time, and ends the execution
                    // if this access is not ordered with all others.
                    half.with_mut(|half| unsafe { *half = record });
                }
            }
            File::Exposed(halves) => {
                for half in halves {
                    half.store(record, Relaxed);
                }
            }
        }
    }

    fn read(&self) -> [u32; 2] {
        match self {
            // SAFETY: as in `write`.
            File::Guarded(halves) => [0, 1].map(|i| halves[i].with(|half| unsafe { *half })),
            File::Exposed(halves) => [0, 1].map(|i| halves[i].load(Relaxed)),
        }
    }
}

/// Files by their place in [`Set::files`]; also their bits in a member table.
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
pub(crate) const C: usize = 2;

/// The gate's segment, the kernel's futex, and the files.
pub(crate) struct Set {
    pub(crate) word: U32,
    pub(crate) slots: Vec<Slot<Modelled>>,
    files: Vec<File>,
    /// The two member tables, a bit for each file. As loosely ordered as the real ones.
    tables: [U32; 2],
    /// The chunks that are captured after a cut: a bit for each file.
    captured: U32,
    /// The marks of each file, and the number of the last cut.
    marks: Vec<U32>,
    number: U32,
    /// The futex: the kernel compares and falls asleep under a lock that a waker takes.
    lock: Mutex<()>,
    bell: Condvar,
    /// What an observer of the execution knows; no part of the model.
    observer: Observer,
}

struct Observer {
    /// The last record of each file whose call has returned.
    written: Vec<StdCell<u32>>,
    /// Words of holds that somebody waited for in vain.
    given_up: RefCell<Vec<u32>>,
}

impl Set {
    pub(crate) fn new(slots: usize, files: impl IntoIterator<Item = File>) -> Rc<Set> {
        let files: Vec<File> = files.into_iter().collect();
        Rc::new(Set {
            word: U32::new(word::OPEN),
            slots: (0..slots).map(|_| slot()).collect(),
            tables: [0, 0].map(U32::new),
            captured: U32::new(0),
            marks: files.iter().map(|_| U32::new(0)).collect(),
            number: U32::new(0),
            lock: Mutex::new(()),
            bell: Condvar::new(),
            observer: Observer {
                written: files.iter().map(|_| StdCell::new(0)).collect(),
                given_up: RefCell::default(),
            },
            files,
        })
    }

    /// FUTEX_WAIT.
    fn sleep(&self, seen: u32) {
        let guard = self.lock.lock().unwrap();
        if self.word.peek() == seen {
            note("slept");
            drop(self.bell.wait(guard).unwrap());
        }
    }

    /// FUTEX_WAIT on what is captured.
    fn sleep_for(&self, file: usize, seen: u32) {
        let guard = self.lock.lock().unwrap();
        if self.word.peek() == seen && self.captured.peek() & 1 << file == 0 {
            note("slept for a chunk");
            drop(self.bell.wait(guard).unwrap());
        }
    }

    /// FUTEX_WAKE.
    pub(crate) fn wake(&self) {
        let _guard = self.lock.lock().unwrap();
        self.bell.notify_all();
    }

    /// Writes the member table of the next hold, and shuts the gate.
    pub(crate) fn close(&self, members: &[usize]) -> u32 {
        let next = word::next(self.word.load(Relaxed), word::CLOSED);
        let table = members.iter().fold(0, |bits, file| bits | 1 << file);
        self.tables[word::bank(next)].store(table, Relaxed);
        hold::close::<Modelled>(&self.word).expect("the gate is open")
    }

    /// Waits until the hold is drained, unless it is broken or `drain` gives up.
    fn drain(&self, closed: u32, drain: Drain) -> bool {
        let mut looks = 0;
        while hold::stands::<Modelled>(&self.word, closed) {
            if hold::is_drained(closed, &self.slots) {
                return true;
            }
            looks += 1;
            if drain == Drain::Looks(looks) {
                return false;
            }
            yield_now();
        }
        false
    }

    /// Closes, drains, captures `members`, and opens. The records captured, if they
    /// are worth anything.
    pub(crate) fn checkpoint(&self, members: &[usize], drain: Drain) -> Option<Vec<u32>> {
        let earlier: Vec<u32> = self.observer.written.iter().map(StdCell::get).collect();
        let closed = self.close(members);
        let captured = self.drain(closed, drain).then(|| {
            let read = |file: &usize| (*file, self.files[*file].read());
            members.iter().map(read).collect::<Vec<_>>()
        });
        if !hold::open::<Modelled>(&self.word, closed, |_| self.wake()) {
            let given_up = self.observer.given_up.borrow();
            assert!(
                given_up.contains(&closed),
                "broken by a call that did not wait for this hold"
            );
            note("broken");
            return None;
        }
        let Some(captured) = captured else {
            note("given up");
            return None;
        };
        note("published");
        Some(checked(captured, &earlier))
    }

    /// Closes, drains, guards, and captures `members` while calls go on.
    pub(crate) fn checkpoint_guarded(&self, members: &[usize]) -> Option<Vec<u32>> {
        let earlier: Vec<u32> = self.observer.written.iter().map(StdCell::get).collect();
        let closed = self.close(members);
        if !self.drain(closed, Drain::Endless) {
            note("broken");
            assert!(!hold::open::<Modelled>(&self.word, closed, |_| self.wake()));
            return None;
        }
        self.captured.store(0, Relaxed);
        let guarded = hold::guard::<Modelled>(&self.word, closed, false, |_| self.wake());
        let Some(guarded) = guarded else {
            note("broken");
            return None;
        };
        let capture = |file: &usize| {
            let record = self.files[*file].read();
            guard::mark::<Modelled>(&self.captured, *file as u32);
            self.wake();
            (*file, record)
        };
        let captured: Vec<(usize, [u32; 2])> = members.iter().map(capture).collect();
        if !hold::unguard::<Modelled>(&self.word, guarded, |_| self.wake()) {
            let given_up = self.observer.given_up.borrow();
            assert!(
                given_up.contains(&guarded),
                "broken by a call that did not wait for it"
            );
            note("broken guard");
            return None;
        }
        note("published");
        Some(checked(captured, &earlier))
    }

    /// The same, from when on calls mark what they change; of a file that is not marked since the
    /// cut `base` (its number and records), the record is taken from that. Its own number and
    /// records.
    pub(crate) fn checkpoint_marked(
        &self,
        members: &[usize],
        base: Option<(u32, Vec<u32>)>,
    ) -> (u32, Vec<u32>) {
        let earlier: Vec<u32> = self.observer.written.iter().map(StdCell::get).collect();
        let closed = self.close(members);
        assert!(self.drain(closed, Drain::Endless), "nobody breaks the hold");
        self.captured.store(0, Relaxed);
        let number = self.number.load(Relaxed) + 1;
        self.number.store(number, Relaxed);
        let guarded = hold::guard::<Modelled>(&self.word, closed, true, |_| self.wake());
        let guarded = guarded.expect("nobody breaks the hold");
        let capture = |(at, file): (usize, &usize)| {
            let record = match &base {
                Some((since, records))
                    if !marks::is_since::<Modelled>(&self.marks[*file], *since) =>
                {
                    note("taken from the base");
                    [records[at]; 2]
                }
                Some(_) => {
                    note("marked since the base");
                    self.files[*file].read()
                }
                None => self.files[*file].read(),
            };
            guard::mark::<Modelled>(&self.captured, *file as u32);
            self.wake();
            (*file, record)
        };
        let captured: Vec<(usize, [u32; 2])> = members.iter().enumerate().map(capture).collect();
        assert!(hold::unguard::<Modelled>(&self.word, guarded, |_| self.wake()));
        (number, checked(captured, &earlier))
    }

    /// At the end: nobody is left counted.
    pub(crate) fn assert_quiet(&self) {
        for slot in &self.slots {
            assert_eq!(slot.count.load(Relaxed), 0, "a count is left");
        }
    }
}

/// The records that were captured, each of which has to be whole, and no older than what was
/// written before the gate was shut.
fn checked(captured: Vec<(usize, [u32; 2])>, earlier: &[u32]) -> Vec<u32> {
    let check = |(file, [first, second]): (usize, [u32; 2])| {
        assert_eq!(first, second, "a call is half done");
        assert!(
            first >= earlier[file],
            "a call that returned before the close is missing"
        );
        first
    };
    captured.into_iter().map(check).collect()
}

fn slot() -> Slot<Modelled> {
    Slot {
        count: U32::new(0),
        generation: U32::new(0),
        seq: U32::new(0),
        class: U32::new(0),
        fd: U32::new(0),
        breaks: U32::new(0),
        sp: U64::new(0),
        owner: U64::new(0),
        start_time: U64::new(0),
        image: U64::new(0),
        longest_wait_us: U32::new(0),
        units: U32::new(0),
        waited_us: U32::new(0),
        settled: U32::new(0),
        waits: U32::new(0),
        parked: U32::new(0),
        seen: std::array::from_fn(|_| U32::new(0)),
        aside: U32::new(0),
        changed: U32::new(0),
        tracked: U32::new(0),
        ticket: U32::new(0),
    }
}

/// How long a coordinator waits for calls in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Until there are none: if that is never, the model fails.
    Endless,
    /// For so many looks at the counts.
    Looks(u32),
}

/// How long a call waits at the gate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until it is woken: if that is never, the model fails.
    Endless,
    /// Its time is spent when it arrives: it tries to break the hold it found, at
    /// once or at any later moment.
    None,
}

/// A thread of a program.
#[derive(Clone)]
pub(crate) struct Writer {
    set: Rc<Set>,
    slot: usize,
    patience: Patience,
    /// Whether it has proof that its outer call never returns.
    outer_is_abandoned: bool,
    /// Whether its outer call's descriptor was made to mean a member meanwhile.
    outer_is_replaced: bool,
    /// The call of a signal that comes while it asks which file its own call means.
    while_asking: Rc<RefCell<Option<(Writer, usize)>>>,
}

/// A call in flight, as the shim keeps it.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    generation: u32,
}

impl Writer {
    pub(crate) fn new(set: &Rc<Set>, slot: usize, patience: Patience) -> Writer {
        Writer {
            set: set.clone(),
            slot,
            patience,
            outer_is_abandoned: false,
            outer_is_replaced: false,
            while_asking: Rc::default(),
        }
    }

    /// The same thread after a jump out of all its calls.
    pub(crate) fn jumped(&self) -> Writer {
        Writer {
            outer_is_abandoned: true,
            ..self.clone()
        }
    }

    /// The same thread after a `dup2` of a member onto its outer call's descriptor.
    pub(crate) fn replaced(&self) -> Writer {
        Writer {
            outer_is_replaced: true,
            ..self.clone()
        }
    }

    /// Has a signal handler write 1 to `file` when the thread next asks what its
    /// call means: that is a system call, on the way back from which signals come.
    pub(crate) fn signal_while_asking(&self, file: usize) {
        let handler = Writer::new(&self.set, self.slot, self.patience);
        self.while_asking.replace(Some((handler, file)));
    }

    /// One call: writes `record` to `file`.
    pub(crate) fn call(&self, file: usize, record: u32) {
        self.call_and(file, record, || ());
    }

    /// One call, interrupted by `handler`.
    pub(crate) fn call_and(&self, file: usize, record: u32, handler: impl FnOnce()) {
        let frame = self.enter(file);
        handler();
        self.write_and_leave(file, record, frame);
    }

    /// One call whose thread is killed before it returns.
    pub(crate) fn call_and_die(&self, file: usize, record: u32) {
        self.enter(file);
        self.set.files[file].write(record);
    }

    pub(crate) fn write_and_leave(&self, file: usize, record: u32, frame: Frame) {
        self.set.files[file].write(record);
        self.leave(frame);
        self.set.observer.written[file].set(record);
    }

    pub(crate) fn enter(&self, file: usize) -> Frame {
        let call = Call {
            class: Class::Write,
            fd: file as i32,
            sp: 0,
        };
        passage::pass(
            self.slot(),
            &self.set.word,
            call,
            &mut Visit { writer: self, file },
        );
        Frame {
            generation: self.slot().generation.load(Relaxed),
        }
    }

    pub(crate) fn leave(&self, frame: Frame) {
        self.slot().leave_frame(true, frame.generation, true);
    }

    /// The way out of a call that a forked child inherited.
    pub(crate) fn leave_in_child(&self, frame: Frame) {
        self.slot().leave_frame(false, frame.generation, true);
    }

    /// The way past the gate of a thread that could get no slot.
    pub(crate) fn pass_without_slot(&self, file: usize) {
        let mut visit = Visit { writer: self, file };
        passage::pass_uncounted(&self.set.word, &mut visit);
    }

    fn slot(&self) -> &Slot<Modelled> {
        &self.set.slots[self.slot]
    }
}

/// A call that found the gate shut, or another call of its thread in flight.
struct Visit<'a> {
    writer: &'a Writer,
    file: usize,
}

impl Visit<'_> {
    fn shuts(&self, bank: usize, file: usize) -> bool {
        self.writer.set.tables[bank].load(Relaxed) & (1 << file) != 0
    }
}

impl Thread<Modelled> for Visit<'_> {
    fn is_shut(&mut self, bank: usize) -> bool {
        if let Some((handler, file)) = self.writer.while_asking.take() {
            note("signal while asking");
            handler.call(file, 1);
        }
        let is_shut = self.shuts(bank, self.file);
        note(if is_shut {
            "found its file shut"
        } else {
            "found its file not shut"
        });
        is_shut
    }

    fn outer_is_shut(&mut self, bank: usize) -> bool {
        let outer = self.writer.slot().fd.load(Relaxed) as usize;
        let is_shut = self.writer.outer_is_replaced || self.shuts(bank, outer);
        note(if is_shut {
            "outer call is on a member"
        } else {
            "outer call is on no member"
        });
        is_shut
    }

    fn outer_is_abandoned(&mut self) -> bool {
        self.writer.outer_is_abandoned
    }

    fn wait(&mut self, _: &U32, seen: u32) -> bool {
        let set = &self.writer.set;
        match self.writer.patience {
            Patience::Endless => {
                set.sleep(seen);
                true
            }
            Patience::None => {
                set.observer.given_up.borrow_mut().push(seen);
                false
            }
        }
    }

    fn watched(&mut self, _: u32, _: bool) {}

    fn mark(&mut self, _: bool) {
        let set = &self.writer.set;
        marks::set_mark::<Modelled>(&set.marks[self.file], set.number.load(Relaxed));
    }

    fn may_change(&mut self, seen: u32, is_nested: bool) -> bool {
        let may = guard::is_marked::<Modelled>(&self.writer.set.captured, self.file as u32);
        note(if may {
            "found its chunk captured"
        } else {
            "asked for a chunk"
        });
        if may && word::has_marks(seen) {
            self.mark(is_nested);
        }
        may
    }

    fn wait_for_chunks(&mut self, _: &U32, seen: u32) -> bool {
        let set = &self.writer.set;
        match self.writer.patience {
            Patience::Endless => {
                set.sleep_for(self.file, seen);
                true
            }
            Patience::None => {
                set.observer.given_up.borrow_mut().push(seen);
                false
            }
        }
    }

    fn wake_all(&mut self, _: &U32) {
        self.writer.set.wake();
    }
}
