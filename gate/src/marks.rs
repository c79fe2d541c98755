//! Marks: which blocks of which files were changed since an earlier cut.
//!
//! Off unless a set asks for it, and then a bit of the gate's word ([`crate::word::MARKS`]):
//! no call passes without a further look, and each marks the blocks that it is about to
//! change. The mark of a block is a number, that of the cut that was made last when it was
//! set. So what was changed since a cut is whatever bears its number or a later one: marks
//! are never consumed and never cleared, and whatever becomes of the snapshots in between,
//! they say the same of each.
//!
//! ```text
//! coordinator, gate shut and drained      a call, counted in its slot
//! which files, by what is noted of them   finds its file by fstat
//! enters new files, number n → n + 1      marks blocks with the number
//! guards the cut, captures what bears     makes the change
//! the number of the base or a later one   is counted out
//! ```
//!
//! A mark is set while its call is counted, so whoever has drained the slots has it. While the
//! gate is guarded, blocks of a chunk that is not captured yet bear no mark of the new number
//! that stands for a change: the call that would make it still waits.
//!
//! Everything in here is untrusted, on both sides: indices are clamped.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::lookup::{Files, Place, Row};
use crate::memory::{Cell, Memory, Mutation, Shared};
use crate::table::FileId;

/// Most files that are marked.
pub const MAX_FILES: usize = 4096;
/// Places in the table of files: twice as many, so that looking one up is short.
pub const PLACES: usize = 2 * MAX_FILES;
/// Most blocks of all files together.
pub const MAX_BLOCKS: u32 = 1 << 20;
/// A block is 2 to the power of this, bytes, unless there would be too many: 4 KiB.
pub const MIN_SHIFT: u32 = 12;
/// The largest block: the smallest chunk of a guard, 64 KiB.
pub const MAX_SHIFT: u32 = crate::guard::MIN_SHIFT;

/// A file that is marked.
#[repr(C)]
#[derive(Debug)]
struct MarkedFile {
    /// Number of its first block.
    first: AtomicU32,
    /// How many blocks it has. What lies beyond is never marked.
    count: AtomicU32,
    /// S. The number when a call was last about to change anything of it.
    touched: AtomicU32,
    /// S. The number when all of it was last marked.
    whole: AtomicU32,
}

/// The marks of a gate. Who writes a field: C the coordinator, S any shim.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Marks {
    /// C. The number of the last cut.
    number: AtomicU32,
    /// C. Blocks are 2 to the power of this, bytes.
    shift: AtomicU32,
    /// C. Blocks that are in use.
    blocks_used: AtomicU32,
    /// C. Files in the table.
    files_used: AtomicU32,
    /// C. Not zero: a comparison has shown that marks are missing.
    refuted: AtomicU32,
    _line: [AtomicU32; 11],
    /// S. The number when something was last changed that cannot be told.
    blind: AtomicU32,
    /// S. The number when names were last changed: directories, and link counts of files.
    names: AtomicU32,
    /// S. The number when metadata was last changed by path.
    metadata: AtomicU32,
    _blind_line: [AtomicU32; 13],
    /// C. The files.
    files: Files<MarkedFile, PLACES>,
    /// S. The mark of each block.
    blocks: [AtomicU32; MAX_BLOCKS as usize],
}

/// Stores `value` where there is another: most marks are set again and again.
#[inline]
fn set(cell: &AtomicU32, value: u32) {
    set_mark::<Shared>(cell, value);
}

/// Sets a mark. It is ordered by its call being counted out, and needs no order of its own.
#[inline]
pub fn set_mark<M: Memory>(cell: &M::U32, number: u32) {
    if !M::mutated(Mutation::MarkNothing) && cell.load(Relaxed) != number {
        cell.store(number, Relaxed);
    }
}

/// Whether a mark says that there was a change since the cut of this number.
#[inline]
pub fn is_since<M: Memory>(cell: &M::U32, number: u32) -> bool {
    cell.load(Relaxed) >= number
}

/// What is known of a marked file.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    marks: &'a Marks,
    file: &'a Row<MarkedFile>,
    /// Where it stands in the table.
    pub index: u32,
    first: u32,
    count: u32,
    shift: u32,
}

impl Known<'_> {
    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.file.id()
    }

    /// Marks the blocks that hold the bytes from `from` to before `to`, and that something of
    /// the file is changed, if only its metadata.
    pub fn mark(&self, from: u64, to: u64) {
        let number = self.marks.number();
        set(&self.file.of.touched, number);
        if from == 0 && to == u64::MAX {
            return self.mark_whole();
        }
        if from >= to {
            return;
        }
        let end = ((to - 1) >> self.shift)
            .saturating_add(1)
            .min(u64::from(self.count)) as u32;
        let begin = (from >> self.shift).min(u64::from(end)) as u32;
        for block in begin..end {
            if let Some(cell) = self.marks.blocks.get((self.first + block) as usize) {
                set(cell, number);
            }
        }
    }

    /// Marks all of it.
    pub fn mark_whole(&self) {
        let number = self.marks.number();
        set(&self.file.of.touched, number);
        set(&self.file.of.whole, number);
    }

    /// Whether something of it was changed since the cut of this number.
    pub fn is_touched_since(&self, number: u32) -> bool {
        is_since::<Shared>(&self.file.of.touched, number)
    }

    /// Whether all of it counts as changed since the cut of this number.
    pub fn is_whole_since(&self, number: u32) -> bool {
        is_since::<Shared>(&self.file.of.whole, number)
    }

    /// Whether a block was changed since the cut of this number. One that has no mark was.
    pub fn is_changed_since(&self, block: u64, number: u32) -> bool {
        if block >= u64::from(self.count) {
            return true;
        }
        let cell = self.marks.blocks.get(self.first as usize + block as usize);
        cell.is_none_or(|cell| is_since::<Shared>(cell, number))
    }

    /// Blocks are 2 to the power of this, bytes.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// How many bytes have marks.
    pub fn room(&self) -> u64 {
        u64::from(self.count) << self.shift
    }
}

impl Marks {
    /// The number of the last cut.
    #[inline]
    pub fn number(&self) -> u32 {
        self.number.load(Relaxed)
    }

    /// Ends what is said of earlier cuts: the table is emptied, and nothing is known since any of
    /// them. For the coordinator, while nobody marks.
    pub fn reset(&self, shift: u32) {
        self.files.clear();
        self.blocks_used.store(0, Relaxed);
        self.files_used.store(0, Relaxed);
        self.shift.store(shift, Relaxed);
        self.set_blind();
    }

    /// Begins the time after a cut; its number. `None`: there are no more numbers. For the
    /// coordinator, with the gate shut and drained.
    pub fn next(&self) -> Option<u32> {
        // One is left for `set_blind_for_next`.
        let next = self.number().checked_add(1).filter(|n| *n < u32::MAX)?;
        self.number.store(next, Release);
        Some(next)
    }

    /// Enters a file with room for this many bytes. For the coordinator, with the gate shut and
    /// drained. `false`: the table is full. One that is there with less room is entered anew: until
    /// the next cut all of it counts as changed.
    pub fn enter(&self, id: FileId, room: u64) -> bool {
        let (file, is_new) = match self.files.place(id) {
            Some(Place::Its(file, _)) => (file, false),
            Some(Place::Free(file)) => (file, true),
            None => return false,
        };
        let files = self.files_used.load(Relaxed);
        let used = self.blocks_used.load(Relaxed).min(MAX_BLOCKS);
        let blocks = room.div_ceil(1 << self.shift());
        if is_new && files as usize >= MAX_FILES || blocks > u64::from(MAX_BLOCKS - used) {
            return false;
        }
        // The blocks may bear any mark. First of all: whoever does this may be killed in the middle.
        file.of.whole.store(self.number(), Release);
        file.of.first.store(used, Relaxed);
        file.of.count.store(blocks as u32, Relaxed);
        file.of.touched.store(self.number(), Relaxed);
        file.name(id);
        self.blocks_used.store(used + blocks as u32, Relaxed);
        self.files_used.store(files + u32::from(is_new), Relaxed);
        true
    }

    fn shift(&self) -> u32 {
        self.shift.load(Relaxed).clamp(MIN_SHIFT, MAX_SHIFT)
    }

    /// What is known of a file; `None` if it is not marked.
    pub fn find(&self, id: FileId) -> Option<Known<'_>> {
        let (file, index) = self.files.find(id)?;
        Some(self.known(file, index))
    }

    /// The file in this place of the table.
    pub fn at(&self, index: u32) -> Option<Known<'_>> {
        Some(self.known(self.files.at(index)?, index))
    }

    fn known<'a>(&'a self, file: &'a Row<MarkedFile>, index: u32) -> Known<'a> {
        let first = file.of.first.load(Relaxed).min(MAX_BLOCKS);
        Known {
            marks: self,
            file,
            index,
            first,
            count: file.of.count.load(Relaxed).min(MAX_BLOCKS - first),
            shift: self.shift(),
        }
    }

    /// Notes that something is changed that cannot be told.
    pub fn set_blind(&self) {
        self.blind.fetch_max(self.number(), AcqRel);
    }

    /// The same of what may still be changed after the next cut, or noted too late for it.
    pub fn set_blind_for_next(&self) {
        self.blind
            .fetch_max(self.number().saturating_add(1), AcqRel);
    }

    /// Whether something was changed since the cut of this number that cannot be told.
    pub fn is_blind_since(&self, number: u32) -> bool {
        self.blind.load(Acquire) >= number
    }

    /// Notes that names or metadata are about to be changed, see
    /// [`crate::guard::Guard::note_by_path`].
    pub fn note_by_path(&self, what: u32) {
        let number = self.number();
        if what & crate::guard::NAMES != 0 {
            set(&self.names, number);
        }
        if what & crate::guard::METADATA != 0 {
            set(&self.metadata, number);
        }
    }

    /// What was changed by name since the cut of this number.
    pub fn changed_by_path_since(&self, number: u32) -> u32 {
        let since = |cell, what| match is_since::<Shared>(cell, number) {
            true => what,
            false => 0,
        };
        since(&self.names, crate::guard::NAMES) | since(&self.metadata, crate::guard::METADATA)
    }

    /// Says that marks are missing, or (`false`) that they may be tried again. For the coordinator.
    pub fn refute(&self, is_refuted: bool) {
        self.refuted.store(u32::from(is_refuted), Release);
    }

    /// Whether marks were found to be missing.
    pub fn is_refuted(&self) -> bool {
        self.refuted.load(Acquire) != 0
    }
}

/// The block size to take for files of these sizes: the smallest with which there is room for all
/// and as much again. `None`: there is none.
pub fn shift_for(sizes: impl Iterator<Item = u64> + Clone) -> Option<u32> {
    (MIN_SHIFT..=MAX_SHIFT).find(|shift| {
        let all = sizes
            .clone()
            .map(|size| room_for(size).div_ceil(1 << shift));
        all.fold(0u64, u64::saturating_add) <= u64::from(MAX_BLOCKS)
    })
}

/// The room to give a file of this size, bytes: it may grow.
pub const fn room_for(size: u64) -> u64 {
    size.saturating_add(size / 2).saturating_add(1 << 20)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::boxed::Box;

    use super::*;

    fn marks() -> Box<Marks> {
        // SAFETY: made of atomics, for which all-zero is a value; the allocation has its layout.
        let marks: Box<Marks> = unsafe {
            let layout = std::alloc::Layout::new::<Marks>();
            Box::from_raw(std::alloc::alloc_zeroed(layout).cast())
        };
        marks.reset(MIN_SHIFT);
        marks
    }

    fn id(ino: u64) -> FileId {
        FileId { dev: 3, ino }
    }

    #[test]
    fn a_mark_is_of_all_cuts_before_it() {
        let marks = marks();
        assert!(marks.enter(id(1), 100 << 12));
        let first = marks.next().unwrap();
        let known = marks.find(id(1)).unwrap();
        assert!(!known.is_touched_since(first) && !known.is_whole_since(first));
        known.mark(5 << 12, (6 << 12) + 1);
        // A cut whose snapshot comes to nothing.
        let second = marks.next().unwrap();
        known.mark(8 << 12, 8 << 12);
        known.mark(9 << 12, (9 << 12) + 1);
        let changed = |number| {
            (0..100)
                .filter(|block| known.is_changed_since(*block, number))
                .collect::<std::vec::Vec<u64>>()
        };
        assert_eq!(changed(first), [5, 6, 9]);
        assert_eq!(changed(second), [9]);
        assert!(known.is_touched_since(second) && !known.is_whole_since(first));
        known.mark(0, u64::MAX);
        assert!(known.is_whole_since(second));
        assert!(!known.is_whole_since(marks.next().unwrap()));
    }

    #[test]
    fn beyond_its_room_everything_is_changed() {
        let marks = marks();
        assert!(marks.enter(id(1), 10 << 12) && marks.enter(id(2), 1));
        let number = marks.next().unwrap();
        let (first, second) = (marks.find(id(1)).unwrap(), marks.find(id(2)).unwrap());
        first.mark(9 << 12, u64::MAX);
        assert!(!first.is_changed_since(8, number) && first.is_changed_since(9, number));
        assert!(first.is_changed_since(10, number) && first.is_changed_since(u64::MAX, number));
        // Not those of its neighbour.
        assert!(!second.is_changed_since(0, number) && second.is_changed_since(1, number));
        // With more room, nothing is known of it until the next cut.
        assert!(marks.enter(id(2), 9 << 12));
        let second = marks.find(id(2)).unwrap();
        assert!(second.is_whole_since(number));
        let next = marks.next().unwrap();
        assert!(!second.is_whole_since(next) && !second.is_changed_since(8, next));
    }

    #[test]
    fn what_cannot_be_told_is_of_all_files() {
        let marks = marks();
        let number = marks.next().unwrap();
        assert!(!marks.is_blind_since(number));
        marks.set_blind();
        assert!(marks.is_blind_since(number));
        let next = marks.next().unwrap();
        assert!(!marks.is_blind_since(next));
        marks.set_blind_for_next();
        let last = marks.next().unwrap();
        assert!(marks.is_blind_since(last));
        assert!(!marks.is_blind_since(marks.next().unwrap()));
        marks.note_by_path(crate::guard::NAMES);
        assert_eq!(marks.changed_by_path_since(last), crate::guard::NAMES);
    }

    #[test]
    fn a_full_table_takes_no_more() {
        let marks = marks();
        assert!(marks.enter(id(1), u64::from(MAX_BLOCKS) << 12));
        assert!(!marks.enter(id(2), 1));
        marks.reset(MIN_SHIFT);
        assert!(marks.find(id(1)).is_none());
        for ino in 1..=MAX_FILES as u64 {
            assert!(marks.enter(id(ino), 1));
        }
        assert!(!marks.enter(id(MAX_FILES as u64 + 1), 1));
        assert_eq!(shift_for([1u64 << 30].into_iter()), Some(MIN_SHIFT));
        assert_eq!(shift_for([40u64 << 30].into_iter()), Some(MAX_SHIFT));
        assert_eq!(shift_for([u64::MAX].into_iter()), None);
    }

    #[test]
    fn absurd_contents_stay_in_bounds() {
        let marks = marks();
        for file in &marks.files.0 {
            file.name(FileId { dev: 0, ino: 5 });
            file.of.first.store(u32::MAX, Relaxed);
            file.of.count.store(u32::MAX, Relaxed);
        }
        marks.shift.store(99, Relaxed);
        marks.blocks_used.store(u32::MAX, Relaxed);
        marks.files_used.store(u32::MAX, Relaxed);
        assert!(marks.find(id(1)).is_none());
        let known = marks.find(FileId { dev: 0, ino: 5 }).unwrap();
        known.mark(1, u64::MAX);
        assert!(known.is_changed_since(0, 1));
        marks.files.0[7].of.first.store(MAX_BLOCKS - 1, Relaxed);
        marks.at(7).unwrap().mark(0, 1 << 40);
        assert!(marks.at(u32::MAX).is_none());
        assert!(!marks.enter(id(9), 1 << 30));
        marks.number.store(u32::MAX - 1, Relaxed);
        assert_eq!(marks.next(), None);
    }
}
