//! A set: its gate, its files, its writers and its coordinator.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU32;
use loom::sync::atomic::Ordering::Relaxed;
use loom::sync::{Condvar, Mutex};
use loom::thread::yield_now;
use snapshim_gate::hold;
use snapshim_gate::memory::Cell;
use snapshim_gate::passage::{self, Thread};
use snapshim_gate::slot::{Call, Class, Slot};
use snapshim_gate::word;

use crate::memory::{Modelled, U32, U64};

thread_local! {
    static SEEN: RefCell<BTreeMap<&'static str, u64>> = const { RefCell::new(BTreeMap::new()) };
}

/// Notes that `what` happened in some execution: no scenario may pass because
/// nothing happens in it.
pub(crate) fn note(what: &'static str) {
    SEEN.with_borrow_mut(|seen| *seen.entry(what).or_default() += 1);
}

/// What was noted in this thread's exploration.
pub(crate) fn noted() -> BTreeMap<&'static str, u64> {
    SEEN.take()
}

/// A file of one record. Each call writes the record in two halves.
pub(crate) enum File {
    /// Of a hold that nobody breaks: to read it while it may be written is an
    /// error in itself, whatever is read.
    Plain([UnsafeCell<u32>; 2]),
    /// Of a hold that may be broken: it may be read while it is written, and a
    /// read may miss what is not ordered before it; but then nothing may come of it.
    Racy([AtomicU32; 2]),
}

impl File {
    pub(crate) fn plain() -> File {
        File::Plain([UnsafeCell::new(0), UnsafeCell::new(0)])
    }

    pub(crate) fn racy() -> File {
        File::Racy([AtomicU32::new(0), AtomicU32::new(0)])
    }

    fn write(&self, record: u32) {
        match self {
            // SAFETY: loom checks that the access is exclusive, and one thread runs at a time.
            File::Plain(halves) => halves.iter().for_each(|h| h.with_mut(|h| unsafe { *h = record })),
            File::Racy(halves) => halves.iter().for_each(|h| h.store(record, Relaxed)),
        }
    }

    /// The two halves as they stand.
    fn read(&self) -> [u32; 2] {
        match self {
            // SAFETY: as in `write`.
            File::Plain(halves) => [0, 1].map(|i| halves[i].with(|h| unsafe { *h })),
            File::Racy(halves) => [0, 1].map(|i| halves[i].load(Relaxed)),
        }
    }
}

/// Index of a file in [`Set::files`], and its bit in a member table.
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
pub(crate) const C: usize = 2;

/// What a gate's segment, the kernel's futex and the file system hold together.
pub(crate) struct Set {
    pub(crate) word: U32,
    pub(crate) slots: Vec<Slot<Modelled>>,
    pub(crate) files: Vec<File>,
    /// The member tables: a bit for each file.
    tables: [U32; 2],
    /// The futex: the kernel compares and falls asleep under a lock that a waker takes.
    lock: Mutex<()>,
    bell: Condvar,
    /// Words of holds that somebody waited for in vain. Not part of the model.
    given_up: std::sync::Mutex<Vec<u32>>,
}

impl Set {
    pub(crate) fn new(slots: usize, files: impl IntoIterator<Item = File>) -> Arc<Set> {
        Arc::new(Set {
            word: U32::new(word::OPEN),
            slots: (0..slots).map(|_| slot()).collect(),
            files: files.into_iter().collect(),
            tables: [u32::MAX, u32::MAX].map(U32::new),
            lock: Mutex::new(()),
            bell: Condvar::new(),
            given_up: std::sync::Mutex::default(),
        })
    }

    /// FUTEX_WAIT.
    fn sleep(&self, seen: u32) {
        let guard = self.lock.lock().unwrap();
        if self.word.load(Relaxed) == seen {
            note("slept");
            drop(self.bell.wait(guard).unwrap());
        }
    }

    /// FUTEX_WAKE.
    pub(crate) fn wake(&self) {
        let _guard = self.lock.lock().unwrap();
        self.bell.notify_all();
    }
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
        longest_wait_ns: U64::new(0),
        waited_ns: U64::new(0),
        waits: U32::new(0),
        parked: U32::new(0),
        seen: std::array::from_fn(|_| U32::new(0)),
        aside: U32::new(0),
    }
}

/// How long a call waits at the gate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until it is woken: whoever is not woken sleeps for ever.
    Endless,
    /// Not at all: its time is spent when it arrives, so that it breaks the hold,
    /// or tries to, at any moment from then on.
    None,
}

/// A thread of a writer.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) set: Arc<Set>,
    pub(crate) slot: usize,
    pub(crate) patience: Patience,
    /// Whether its outer call is known never to return.
    pub(crate) abandoned: bool,
}

/// What a call has to undo when it returns, as the shim keeps it.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    generation: u32,
}

impl Writer {
    pub(crate) fn new(set: &Arc<Set>, slot: usize, patience: Patience) -> Writer {
        Writer { set: set.clone(), slot, patience, abandoned: false }
    }

    pub(crate) fn slot(&self) -> &Slot<Modelled> {
        &self.set.slots[self.slot]
    }

    /// One call that writes `record` to `file`.
    pub(crate) fn call(&self, file: usize, record: u32) {
        let frame = self.enter(file);
        self.set.files[file].write(record);
        self.leave(frame);
    }

    pub(crate) fn enter(&self, file: usize) -> Option<Frame> {
        let call = Call { class: Class::Write, fd: file as i32, sp: 0 };
        let mut visit = Visit { writer: self, file };
        match passage::pass(self.slot(), &self.set.word, call, &mut visit) {
            passage::Passage::Counted => {
                Some(Frame { generation: self.slot().generation.load(Relaxed) })
            }
            passage::Passage::Uncounted => None,
        }
    }

    pub(crate) fn leave(&self, frame: Option<Frame>) {
        if let Some(frame) = frame {
            self.slot().leave_frame(true, frame.generation);
        }
    }
}

/// One call of a writer at the gate.
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
        self.shuts(bank, self.file)
    }

    fn outer_is_shut(&mut self, bank: usize) -> bool {
        let outer = self.writer.slot().fd.load(Relaxed) as usize;
        self.shuts(bank, outer)
    }

    fn outer_is_abandoned(&mut self) -> bool {
        self.writer.abandoned
    }

    fn wait(&mut self, _: &U32, seen: u32) -> bool {
        match self.writer.patience {
            Patience::Endless => {
                self.writer.set.sleep(seen);
                true
            }
            Patience::None => {
                self.writer.set.given_up.lock().unwrap().push(seen);
                false
            }
        }
    }

    fn wake_all(&mut self, _: &U32) {
        note("broke a hold");
        self.writer.set.wake();
    }
}

/// How often a coordinator looks at the counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Until all are quiet: a drain that never ends is an error.
    Endless,
    /// So many times; then it gives the hold up.
    Looks(u32),
}

/// The coordinator's side: closes, drains, captures the members, and opens.
/// Returns the records captured, by file, if they are worth anything.
pub(crate) fn checkpoint(set: &Set, members: &[usize], drain: Drain) -> Option<Vec<u32>> {
    let open = set.word.load(Relaxed);
    let table = members.iter().fold(0, |bits, file| bits | 1 << file);
    set.tables[word::bank(word::next(open, word::CLOSED))].store(table, Relaxed);
    let closed = hold::close::<Modelled>(&set.word).expect("the gate is open");
    let captured = drained(set, closed, drain)
        .then(|| members.iter().map(|file| set.files[*file].read()).collect::<Vec<_>>());
    let unbroken = hold::open::<Modelled>(&set.word, closed, |_| set.wake());
    if !unbroken {
        // Nobody breaks a hold that nobody waited for in vain.
        assert!(set.given_up.lock().unwrap().contains(&closed), "broken by a stranger");
        note("broken");
        return None;
    }
    let Some(captured) = captured else {
        note("given up");
        return None;
    };
    note("published");
    let whole = |[one, two]: [u32; 2]| {
        assert_eq!(one, two, "a call is half done");
        one
    };
    Some(captured.into_iter().map(whole).collect())
}

fn drained(set: &Set, closed: u32, drain: Drain) -> bool {
    let mut looks = 0;
    while hold::stands::<Modelled>(&set.word, closed) {
        if hold::is_drained(closed, &set.slots) {
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

/// Nobody is left counted at the end.
pub(crate) fn assert_quiet(set: &Set) {
    for slot in &set.slots {
        assert_eq!(slot.count.load(Relaxed), 0, "a count leaked");
    }
}
