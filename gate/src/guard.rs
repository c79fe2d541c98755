//! The guard: after the cut, while chunks of members are still being captured.
//!
//! Calls pass, but one that would change bytes of the cut waits until the chunks it
//! changes are captured. The shim asks for them, and the coordinator, which does all
//! the reading, captures those first.
//!
//! ```text
//! coordinator                             a call
//! table of files and chunks, bits clear
//! closed → guarded                        which chunks of the cut does it change?
//! reads a chunk into memory               all their bits set: passes
//! sets its bit                            else: writes them into its ask, wakes the
//! wakes whoever waits                     coordinator, and waits until they are
//! all read: guarded → open
//! ```
//!
//! A bit is set after its chunk was read, with release, and looked at before the change,
//! with acquire. The table belongs to one guarded word: it is written while the gate is
//! not guarded, and whoever has read it looks at the gate's word again before he believes it.
//!
//! Everything in here is untrusted, on both sides: indices are clamped, and the
//! coordinator keeps a record of its own of what it has captured.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::lookup::{Files, Place, Row};
use crate::memory::{Cell, Memory, Mutation, Shared};
use crate::sys::futex_wake_all;
use crate::table::FileId;

/// Most files one guard can be about.
pub const MAX_FILES: usize = 16_384;
/// Places in the table of files: twice as many, so that looking one up is short.
pub const PLACES: usize = 2 * MAX_FILES;
/// Most chunks of all files together.
pub const MAX_CHUNKS: u32 = 1 << 20;
/// A chunk is 2 to the power of this, bytes, unless there would be too many: 64 KiB.
pub const MIN_SHIFT: u32 = 16;
/// The largest chunk: 4 MiB. A call waits for whole chunks.
pub const MAX_SHIFT: u32 = 22;
/// Classes of [`Guard::waited`]: four for each power of two, from 1 µs on.
pub const WAIT_CLASSES: usize = 96;

/// A file of the cut.
#[repr(C)]
#[derive(Debug)]
struct GuardedFile {
    /// Its size at the cut, bytes: what lies beyond is nobody's business.
    size: AtomicU64,
    /// Number of its first chunk.
    first: AtomicU32,
    /// S. A call that may change it, or its metadata, has passed since the cut.
    touched: AtomicU32,
}

/// In [`Guard::changed_by_path`]: directories, and with them link counts of files.
pub const NAMES: u32 = 1;
/// Likewise: modes, owners, times, attributes.
pub const METADATA: u32 = 2;

/// Why a guard was broken by a call, in [`Guard::why_broken`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It waited as long as a call may.
    TimeOut = 1,
    /// It has changed other bytes than those it had asked for.
    Missed = 2,
}

/// The guard of a gate. Who writes a field: C the coordinator, S any shim.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Guard {
    /// C. The guarded word that the table is about.
    word: AtomicU32,
    /// C. Chunks are 2 to the power of this, bytes.
    shift: AtomicU32,
    /// C. Number of all chunks.
    chunks: AtomicU32,
    /// S. [`Broken`] of the last guard that a call has ended, or 0.
    broken: AtomicU32,
    /// S. What was changed by name since the cut: [`NAMES`], [`METADATA`].
    by_path: AtomicU32,
    /// S. Not zero: a call waits for the end of the guard, as it cannot ask for less.
    awaited: AtomicU32,
    _line: [AtomicU32; 10],
    /// S. The futex of the coordinator: raised with each ask.
    pub requests: AtomicU32,
    _requests_line: [AtomicU32; 15],
    /// C. The futex of those who wait for chunks: raised when some were captured.
    pub served: AtomicU32,
    _served_line: [AtomicU32; 15],
    /// S. How long calls have waited, at the gate or for chunks: a count for each class,
    /// see [`wait_class`]. Never set back.
    pub waited: [AtomicU32; WAIT_CLASSES],
    /// C. The files.
    files: Files<GuardedFile, PLACES>,
    /// C. A bit for each chunk: captured.
    captured: [AtomicU32; MAX_CHUNKS as usize / 32],
}

/// What a thread asks for, in a cell of its own (see [`crate::abi::Gate::ask`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Nothing.
    None,
    /// These chunks, now.
    Chunks(Span),
    /// Nothing more. It is in a call that was granted what it asked for, and this is what
    /// remains to be compared when it returns.
    Expects(u64),
    /// The same of a call that has marked what it changes, at a gate that is not guarded.
    Marked(u64),
}

/// Consecutive chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Span {
    /// Their numbers.
    pub fn range(self) -> core::ops::Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }
}

const KIND_SHIFT: u32 = 62;
const COUNT_BITS: u32 = 31;
/// Largest value that [`Ask::Expects`] and [`Ask::Marked`] can have.
pub const MAX_EXPECTED: u64 = (1 << KIND_SHIFT) - 1;

impl Ask {
    /// The form in shared memory.
    pub fn pack(self) -> u64 {
        match self {
            Ask::None => 0,
            Ask::Chunks(Span { first, count }) => {
                1 << KIND_SHIFT
                    | u64::from(first & ((1 << COUNT_BITS) - 1)) << COUNT_BITS
                    | u64::from(count & ((1 << COUNT_BITS) - 1))
            }
            Ask::Expects(value) => 2 << KIND_SHIFT | value & MAX_EXPECTED,
            Ask::Marked(value) => 3 << KIND_SHIFT | value & MAX_EXPECTED,
        }
    }

    /// What `raw` means.
    pub fn unpack(raw: u64) -> Ask {
        let mask = (1 << COUNT_BITS) - 1;
        match raw >> KIND_SHIFT {
            1 => Ask::Chunks(Span {
                first: (raw >> COUNT_BITS & mask) as u32,
                count: (raw & mask) as u32,
            }),
            2 => Ask::Expects(raw & MAX_EXPECTED),
            3 => Ask::Marked(raw & MAX_EXPECTED),
            _ => Ask::None,
        }
    }
}

/// The class of a wait.
pub const fn wait_class(us: u64) -> usize {
    let us = if us == 0 { 1 } else { us };
    let log = us.ilog2();
    let quarter = (us << 2 >> log) as usize & 3;
    let class = 4 * log as usize + quarter;
    if class < WAIT_CLASSES {
        class
    } else {
        WAIT_CLASSES - 1
    }
}

/// The longest wait of a class, µs.
pub const fn wait_limit(class: usize) -> u64 {
    let (log, quarter) = (class / 4, class as u64 % 4);
    ((4 + quarter + 1) << log) / 4
}

/// What the guard knows of a file.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    file: &'a Row<GuardedFile>,
    /// Its size at the cut.
    pub size: u64,
    /// Where it stands in the table.
    pub index: u32,
    first: u32,
    shift: u32,
    chunks: u32,
}

impl Known<'_> {
    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.file.id()
    }

    /// The chunks of the cut that hold the bytes from `from` to before `to`.
    pub fn span(&self, from: u64, to: u64) -> Span {
        let to = to.min(self.size);
        if from >= to {
            return Span::default();
        }
        let (from, last) = (from >> self.shift, (to - 1) >> self.shift);
        let first = self
            .first
            .saturating_add(u32::try_from(from).unwrap_or(u32::MAX));
        Span {
            first: first.min(self.chunks),
            count: u32::try_from(last - from + 1).unwrap_or(u32::MAX),
        }
    }

    /// Notes that a call may change it from now on.
    pub fn touch(&self) {
        if self.file.of.touched.load(Relaxed) == 0 {
            self.file.of.touched.store(1, Relaxed);
        }
    }
}

/// A member to be guarded.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Which.
    pub id: FileId,
    /// Its size at the cut, bytes.
    pub size: u64,
}

/// How many chunks a file of `size` bytes has.
pub const fn chunks_of(size: u64, shift: u32) -> u64 {
    size.div_ceil(1 << shift)
}

/// The chunk size to take for files of these sizes: the smallest with which all chunks can
/// be numbered. `None`: there is none.
pub fn shift_for(sizes: impl Iterator<Item = u64> + Clone) -> Option<u32> {
    (MIN_SHIFT..=MAX_SHIFT).find(|shift| {
        let all = sizes.clone().map(|size| chunks_of(size, *shift));
        all.fold(0u64, u64::saturating_add) <= u64::from(MAX_CHUNKS)
    })
}

impl Guard {
    /// Empties the table. For the coordinator, before [`Guard::write`] and while the gate is not
    /// guarded: it takes longer than a hold should.
    pub fn clear(&self) {
        self.word.store(0, Relaxed);
        self.files.clear();
        for word in &self.captured {
            word.store(0, Relaxed);
        }
    }

    /// Writes the table of a guard, which is empty; `guarded` is the word that it will belong
    /// to. For the coordinator, with the gate shut and drained. Tells the number of each
    /// member's first chunk. `false`: they do not fit, or one is there twice.
    pub fn write(
        &self,
        guarded: u32,
        shift: u32,
        members: impl Iterator<Item = Member>,
        mut numbered: impl FnMut(u32),
    ) -> bool {
        let mut next = 0u32;
        for (count, member) in members.enumerate() {
            let chunks = chunks_of(member.size, shift);
            if count >= MAX_FILES || u64::from(next) + chunks > u64::from(MAX_CHUNKS) {
                return false;
            }
            // One that is there already would be found, and its chunks be asked for, once only.
            let Some(Place::Free(file)) = self.files.place(member.id) else {
                return false;
            };
            file.of.size.store(member.size, Relaxed);
            file.of.first.store(next, Relaxed);
            file.of.touched.store(0, Relaxed);
            file.name(member.id);
            numbered(next);
            next += chunks as u32;
        }
        self.by_path.store(0, Relaxed);
        self.awaited.store(0, Relaxed);
        self.shift.store(shift, Relaxed);
        self.chunks.store(next, Relaxed);
        self.broken.store(0, Relaxed);
        self.word.store(guarded, Release);
        true
    }

    /// What is known of a file; `None` if it was not in the cut, and may be changed.
    pub fn find(&self, id: FileId) -> Option<Known<'_>> {
        let (file, index) = self.files.find(id)?;
        Some(self.known(file, index))
    }

    /// The file in this place of the table.
    pub fn at(&self, index: u32) -> Option<Known<'_>> {
        Some(self.known(self.files.at(index)?, index))
    }

    fn known<'a>(&self, file: &'a Row<GuardedFile>, index: u32) -> Known<'a> {
        Known {
            file,
            size: file.of.size.load(Relaxed),
            index,
            first: file.of.first.load(Relaxed),
            shift: self.shift.load(Relaxed).clamp(MIN_SHIFT, MAX_SHIFT),
            chunks: self.chunks(),
        }
    }

    /// Number of all chunks.
    pub fn chunks(&self) -> u32 {
        self.chunks.load(Relaxed).min(MAX_CHUNKS)
    }

    /// Whether a call that may change a file has passed since the cut.
    pub fn was_touched(&self, id: FileId) -> bool {
        self.find(id)
            .is_some_and(|known| known.file.of.touched.load(Relaxed) != 0)
    }

    /// Whether all of these chunks are captured.
    pub fn has(&self, span: Span) -> bool {
        let end = self.chunks();
        span.range()
            .take_while(|chunk| *chunk < end)
            .all(|chunk| self.has_chunk(chunk))
    }

    /// Whether a chunk is captured.
    pub fn has_chunk(&self, chunk: u32) -> bool {
        let cell = self.captured.get(chunk as usize / 32);
        cell.is_some_and(|cell| is_marked::<Shared>(cell, chunk % 32))
    }

    /// Says that a chunk is captured. For the coordinator, once for each.
    pub fn mark(&self, chunk: u32) {
        if let Some(cell) = self.captured.get(chunk as usize / 32) {
            mark::<Shared>(cell, chunk % 32);
        }
    }

    /// Whether the table is the one of this guarded word. To be asked after it was read, and
    /// with the gate's word: a table is not written while that stands.
    pub fn is_of(&self, guarded: u32) -> bool {
        self.word.load(Acquire) == guarded
    }

    /// Notes why a call is about to break the guard.
    pub fn note_broken(&self, why: Broken) {
        self.broken.store(why as u32, Relaxed);
    }

    /// Why a call has broken it.
    pub fn why_broken(&self) -> Option<Broken> {
        match self.broken.load(Relaxed) {
            1 => Some(Broken::TimeOut),
            2 => Some(Broken::Missed),
            _ => None,
        }
    }

    /// Notes that a call waits for the end of the guard: whoever captures may be in no hurry.
    pub fn note_awaited(&self) {
        if self.awaited.swap(1, AcqRel) == 0 {
            self.requests.fetch_add(1, AcqRel);
            futex_wake_all(&self.requests);
        }
    }

    /// Whether a call has waited for the end of this guard.
    pub fn is_awaited(&self) -> bool {
        self.awaited.load(Relaxed) != 0
    }

    /// Notes that names or metadata are about to be changed.
    pub fn note_by_path(&self, what: u32) {
        if self.by_path.load(Relaxed) & what != what {
            self.by_path.fetch_or(what, Relaxed);
        }
    }

    /// What was changed by name since the cut.
    pub fn changed_by_path(&self) -> u32 {
        self.by_path.load(Acquire)
    }

    /// Counts a wait.
    pub fn count_wait(&self, us: u64) {
        if let Some(count) = self.waited.get(wait_class(us)) {
            count.fetch_add(1, Relaxed);
        }
    }
}

/// Sets a bit that is not set: what was read before is captured.
pub fn mark<M: Memory>(cell: &M::U32, bit: u32) {
    let order = match M::mutated(Mutation::MarkRelaxed) {
        true => Relaxed,
        false => Release,
    };
    // Each bit is set once: an addition is an or.
    cell.add(1 << (bit % 32), order);
}

/// Whether it is set: then what it stands for may be changed.
pub fn is_marked<M: Memory>(cell: &M::U32, bit: u32) -> bool {
    cell.load(Acquire) & 1 << (bit % 32) != 0
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::boxed::Box;
    use std::vec::Vec;

    use super::*;

    fn guard() -> Box<Guard> {
        // SAFETY: made of atomics, for which all-zero is a value; the allocation has its layout.
        unsafe {
            let layout = std::alloc::Layout::new::<Guard>();
            Box::from_raw(std::alloc::alloc_zeroed(layout).cast())
        }
    }

    fn member(ino: u64, size: u64) -> Member {
        Member {
            id: FileId { dev: 7, ino },
            size,
        }
    }

    fn written(guard: &Guard, members: &[Member]) -> Vec<u32> {
        let mut firsts = Vec::new();
        guard.clear();
        assert!(guard.write(2, MIN_SHIFT, members.iter().copied(), |first| {
            firsts.push(first)
        }));
        firsts
    }

    #[test]
    fn chunks_of_files() {
        let guard = guard();
        let firsts = written(&guard, &[member(1, 0), member(2, 1), member(3, 200_000)]);
        assert_eq!(firsts, [0, 0, 1]);
        assert_eq!(guard.chunks(), 5);
        let known = guard.find(member(3, 0).id).unwrap();
        assert_eq!(known.size, 200_000);
        assert_eq!(known.span(0, 1), Span { first: 1, count: 1 });
        assert_eq!(known.span(65_535, 65_537), Span { first: 1, count: 2 });
        assert_eq!(known.span(190_000, u64::MAX), Span { first: 3, count: 2 });
        // Beyond the cut.
        assert_eq!(known.span(200_000, 300_000).count, 0);
        assert_eq!(known.span(9, 9).count, 0);
        assert!(guard.find(FileId { dev: 8, ino: 3 }).is_none());
    }

    #[test]
    fn what_is_captured_may_be_changed() {
        let guard = guard();
        written(&guard, &[member(1, 10 << 16)]);
        let span = guard.find(member(1, 0).id).unwrap().span(0, 3 << 16);
        for chunk in 0..3 {
            assert!(!guard.has(span));
            guard.mark(chunk);
        }
        assert!(guard.has(span) && !guard.has_chunk(3));
        // The next guard begins anew.
        written(&guard, &[member(1, 10 << 16)]);
        assert!(!guard.has_chunk(0));
    }

    #[test]
    fn files_that_collide_are_found() {
        let guard = guard();
        let members: Vec<Member> = (1..=MAX_FILES as u64).map(|ino| member(ino, 1)).collect();
        written(&guard, &members);
        for member in &members {
            let known = guard.find(member.id).unwrap();
            assert_eq!(guard.at(known.index).unwrap().span(0, 1), known.span(0, 1));
        }
        assert!(guard.find(member(MAX_FILES as u64 + 1, 0).id).is_none());
        guard.clear();
        let more = (1..=MAX_FILES as u64 + 1).map(|ino| member(ino, 1));
        assert!(!guard.write(2, MIN_SHIFT, more, |_| ()));
    }

    #[test]
    fn a_file_has_one_place() {
        let guard = guard();
        guard.clear();
        assert!(!guard.write(
            2,
            MIN_SHIFT,
            [member(1, 9), member(1, 9)].into_iter(),
            |_| ()
        ));
        for file in &guard.files.0 {
            file.name(FileId { dev: 0, ino: 5 });
        }
        assert!(!guard.write(2, MIN_SHIFT, [member(1, 9)].into_iter(), |_| ()));
    }

    #[test]
    fn sizes_decide_the_size_of_chunks() {
        assert_eq!(shift_for([64u64 << 30].into_iter()), Some(16));
        assert_eq!(shift_for([64u64 << 30, 1].into_iter()), Some(17));
        assert_eq!(shift_for([4u64 << 40].into_iter()), Some(22));
        assert_eq!(shift_for([u64::MAX].into_iter()), None);
    }

    #[test]
    fn absurd_contents_stay_in_bounds() {
        let guard = guard();
        for file in &guard.files.0 {
            file.name(FileId { dev: 0, ino: 5 });
            file.of.first.store(u32::MAX, Relaxed);
            file.of.size.store(u64::MAX, Relaxed);
        }
        guard.shift.store(77, Relaxed);
        guard.chunks.store(u32::MAX, Relaxed);
        assert!(guard.find(FileId { dev: 1, ino: 1 }).is_none());
        let known = guard.find(FileId { dev: 0, ino: 5 }).unwrap();
        let span = known.span(0, u64::MAX);
        assert!(guard.has(span));
        guard.mark(u32::MAX);
        assert!(!guard.has_chunk(u32::MAX));
        assert!(guard.at(u32::MAX).is_none());
    }

    #[test]
    fn asks_round_trip() {
        let span = Span {
            first: MAX_CHUNKS,
            count: MAX_CHUNKS,
        };
        for ask in [
            Ask::None,
            Ask::Chunks(span),
            Ask::Expects(MAX_EXPECTED),
            Ask::Marked(7),
        ] {
            assert_eq!(Ask::unpack(ask.pack()), ask);
        }
    }

    #[test]
    fn classes_of_waits() {
        let mut last = 0;
        for us in 1..100_000 {
            let class = wait_class(us);
            assert!(class >= last && us < wait_limit(class).max(us + 1));
            assert!(us <= wait_limit(class), "{us} in {class}");
            last = class;
        }
        assert_eq!(wait_class(u64::MAX), WAIT_CLASSES - 1);
        assert_eq!(wait_class(0), wait_class(1));
    }
}
