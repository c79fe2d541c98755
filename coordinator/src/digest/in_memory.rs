//! Values of what is in memory while it is captured, so that it need not be read back.
//!
//! They tell what was captured. That the same is on the disk is what `snapshim verify` finds out.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt};

use super::tree::{CHUNK, chunks, merged};

/// The pieces of one file, of which each goes through memory once, in no order.
#[derive(Debug)]
pub(crate) struct Pieces {
    size: u64,
    shift: u32,
    /// Of each of the digest's chunks, its pieces: none, as long as nothing of it is known.
    chunks: Vec<Mutex<Vec<Option<ChainingValue>>>>,
}

impl Pieces {
    /// Of a file of `size` bytes, pieces of 2 to the power of `shift` bytes; `None` if that does not
    /// go with the digest's chunks, or there is only one.
    pub(crate) fn new(size: u64, shift: u32) -> Option<Pieces> {
        // BLAKE3's own chunks, of which a subtree is made of, have 2^10 bytes.
        let fits = (10..=CHUNK.trailing_zeros()).contains(&shift) && chunks(size) > 1;
        fits.then(|| Pieces {
            size,
            shift,
            chunks: (0..chunks(size)).map(|_| Mutex::default()).collect(),
        })
    }

    /// How many pieces a chunk has that begins at `start`.
    fn pieces(&self, start: u64) -> usize {
        let length = self.size.saturating_sub(start).min(CHUNK);
        length.div_ceil(1 << self.shift) as usize // 2^10 at most
    }

    /// Hashes the piece that begins at `offset`, unless that was done. `bytes`: all of it.
    pub(crate) fn add(&self, offset: u64, bytes: &[u8]) {
        let length = (self.size.saturating_sub(offset)).min(1 << self.shift);
        let is_one = offset.trailing_zeros() >= self.shift && bytes.len() as u64 == length;
        let number = usize::try_from(offset / CHUNK).ok();
        let Some(chunk) = number
            .and_then(|number| self.chunks.get(number))
            .filter(|_| is_one)
        else {
            return;
        };
        // Nobody else hashes a piece of this chunk for long: they come in order.
        let mut values = chunk.lock().unwrap_or_else(PoisonError::into_inner);
        let within = offset % CHUNK;
        values.resize(self.pieces(offset - within), None);
        let place = &mut values[(within >> self.shift) as usize];
        place.get_or_insert_with(|| {
            let mut hasher = Hasher::new();
            hasher.set_input_offset(offset);
            hasher.update(bytes);
            hasher.finalize_non_root()
        });
    }

    /// The values of the digest's chunks, as far as all of a chunk is known.
    fn values(&self) -> Vec<Option<ChainingValue>> {
        let whole = |chunk: &Mutex<Vec<Option<ChainingValue>>>| {
            let pieces = chunk.lock().unwrap_or_else(PoisonError::into_inner);
            let values: Option<Vec<_>> = pieces.iter().copied().collect();
            values
                .filter(|values| !values.is_empty())
                .map(|values| merged(&values))
        };
        self.chunks.iter().map(whole).collect()
    }
}

/// What is known of the files of a draft before they are read.
#[derive(Debug, Default)]
pub struct InMemory {
    /// By the files' paths: their sizes, and what is known of their chunks.
    files: HashMap<PathBuf, (u64, Vec<Option<ChainingValue>>)>,
}

impl InMemory {
    /// Remembers what was captured of the file `path`.
    pub(crate) fn add(&mut self, path: PathBuf, pieces: &Pieces) {
        self.files.insert(path, (pieces.size, pieces.values()));
    }

    /// The values of the chunks of a file that has `size` bytes now.
    pub(super) fn find(&self, path: &Path, size: u64) -> Option<&[Option<ChainingValue>]> {
        let (known_size, values) = self.files.get(path)?;
        (*known_size == size).then_some(values)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::root;
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 251) as u8).collect()
    }

    #[test]
    fn what_comes_in_pieces_has_the_digest_of_the_whole() {
        const M: usize = 1 << 20;
        for size in [
            M + 1,
            2 * M,
            2 * M + 1,
            3 * M - 65_536,
            5 * M + 4097,
            5 * M - 1,
        ] {
            let all = bytes(size);
            for shift in [12, 16, 20] {
                let pieces = Pieces::new(size as u64, shift).unwrap();
                let step = 1usize << shift;
                // From behind, and some twice.
                for at in (0..size).step_by(step).rev() {
                    let piece = &all[at..size.min(at + step)];
                    pieces.add(at as u64, piece);
                    pieces.add(at as u64, piece);
                }
                let values: Option<Vec<_>> = pieces.values().into_iter().collect();
                assert_eq!(root(&values.unwrap()), blake3::hash(&all), "{size} {shift}");
            }
        }
    }

    #[test]
    fn a_chunk_with_a_piece_missing_is_not_known() {
        let size = (3 << 20) + 7;
        let all = bytes(size);
        let pieces = Pieces::new(size as u64, 16).unwrap();
        for at in (0..size).step_by(1 << 16) {
            if at != (1 << 20) + (5 << 16) {
                pieces.add(at as u64, &all[at..size.min(at + (1 << 16))]);
            }
        }
        // Neither these count: not all of it, and not where one begins.
        let missing = (1 << 20) + (5u64 << 16);
        pieces.add(missing, &all[..100]);
        pieces.add(missing + 1, &all[..1 << 16]);
        let known: Vec<bool> = pieces.values().iter().map(Option::is_some).collect();
        assert_eq!(known, [true, false, true, true]);
        let mut known = InMemory::default();
        known.add("/f".into(), &pieces);
        assert!(known.find("/f".as_ref(), size as u64).is_some());
        assert!(known.find("/f".as_ref(), size as u64 - 1).is_none());
        assert!(known.find("/g".as_ref(), size as u64).is_none());
    }

    #[test]
    fn what_does_not_go_with_chunks_is_read_back() {
        assert!(Pieces::new(1 << 20, 16).is_none());
        assert!(Pieces::new(1 << 30, 21).is_none());
        assert!(Pieces::new(1 << 30, 9).is_none());
    }
}
