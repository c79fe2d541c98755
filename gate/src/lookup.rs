//! The table of files that a guard and marks each have: looked up by identity, in calls, without
//! a lock. Its owner writes it, and sees to it that at most every second place is taken, so that
//! looking one up is short.
//!
//! Whatever is written there, each place is looked at once.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use crate::table::FileId;

/// A place in the table.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Row<T> {
    dev: AtomicU64,
    /// 0: no file. (No file system gives that number to a file.)
    ino: AtomicU64,
    /// What is known of the file.
    pub(crate) of: T,
}

impl<T> Row<T> {
    /// Which file it is.
    pub(crate) fn id(&self) -> FileId {
        FileId {
            dev: self.dev.load(Relaxed),
            ino: self.ino.load(Relaxed),
        }
    }

    /// Says which. After all else was written: whoever does this may be killed in the middle.
    pub(crate) fn name(&self, id: FileId) {
        self.dev.store(id.dev, Relaxed);
        self.ino.store(id.ino, Relaxed);
    }
}

/// Where a file stands, or may.
pub(crate) enum Place<'a, T> {
    /// There it is, in the place of this number.
    Its(&'a Row<T>, u32),
    /// It is not there.
    Free(&'a Row<T>),
}

/// The table.
#[repr(transparent)]
#[derive(Debug)]
pub(crate) struct Files<T, const PLACES: usize>(pub(crate) [Row<T>; PLACES]);

impl<T, const PLACES: usize> Files<T, PLACES> {
    /// Empties it.
    pub(crate) fn clear(&self) {
        for row in &self.0 {
            row.ino.store(0, Relaxed);
        }
    }

    /// The place of a file; `None` if it has none, and none is free.
    #[inline]
    pub(crate) fn place(&self, id: FileId) -> Option<Place<'_, T>> {
        // Consecutive inode numbers far apart (Fibonacci hashing, 2^64 over the golden ratio).
        let mixed = (id.ino ^ id.dev.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let begin = (mixed >> 32) as usize % PLACES;
        for at in (0..PLACES).map(|step| (begin + step) % PLACES) {
            let row = self.0.get(at)?;
            match row.ino.load(Relaxed) {
                0 => return Some(Place::Free(row)),
                ino if ino == id.ino && row.dev.load(Relaxed) == id.dev => {
                    return Some(Place::Its(row, at as u32));
                }
                _ => {}
            }
        }
        None
    }

    /// A file, and the number of its place; `None` if it is not there.
    #[inline]
    pub(crate) fn find(&self, id: FileId) -> Option<(&Row<T>, u32)> {
        match self.place(id)? {
            Place::Its(row, at) => Some((row, at)),
            Place::Free(_) => None,
        }
    }

    /// The file in this place.
    pub(crate) fn at(&self, index: u32) -> Option<&Row<T>> {
        let row = self.0.get(index as usize)?;
        (row.ino.load(Relaxed) != 0).then_some(row)
    }
}
