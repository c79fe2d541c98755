//! The digest of one file.

use std::os::fd::AsFd;

use blake3::hazmat::{ChainingValue, HasherExt, Mode};
use blake3::{Hash, Hasher, hazmat};
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, Result};

/// Bytes of a chunk: what is hashed anew at least when a byte of a large file changed.
pub(super) const CHUNK: u64 = 1 << 20;
/// Bytes read at once; small enough for a CPU cache, and for a device not to be waited for too often.
const BUFFER: usize = 512 << 10;

static ZEROS: [u8; BUFFER] = [0; BUFFER];

/// A digested file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hashed {
    /// Of all its bytes, as `b3sum` prints it.
    pub(crate) digest: Hash,
    /// Of each chunk, if there are several.
    pub(super) values: Vec<ChainingValue>,
    /// Bytes that were hashed for it; the others' values were known.
    pub(super) hashed: u64,
}

/// How many chunks a file of so many bytes has.
pub(super) fn chunks(size: u64) -> u64 {
    size.div_ceil(CHUNK)
}

/// How many chaining values are kept of a file of so many bytes: the only chunk of a
/// small one is its root, which has none.
pub(super) fn kept(size: u64) -> u64 {
    match chunks(size) {
        0 | 1 => 0,
        several => several,
    }
}

/// The digest that follows from the chaining values of at least two chunks.
pub(super) fn root(values: &[ChainingValue]) -> Hash {
    let (left, right) = values.split_at(left_of(values.len()));
    hazmat::merge_subtrees_root(&merged(left), &merged(right), Mode::Hash)
}

/// The tree's depth is that of the number of chunks, some 40 at most.
pub(super) fn merged(values: &[ChainingValue]) -> ChainingValue {
    if let [one] = values {
        return *one;
    }
    let (left, right) = values.split_at(left_of(values.len()));
    hazmat::merge_subtrees_non_root(&merged(left), &merged(right), Mode::Hash)
}

/// How many of `count` (two at least) chunks are left of the top: the largest power of two below.
fn left_of(count: usize) -> usize {
    count.div_ceil(2).next_power_of_two()
}

/// Digests the first `size` bytes of a file, whole.
pub(crate) fn hash_file(
    file: impl AsFd,
    size: u64,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Hashed> {
    hash_with(file, size, &|_| None, go_on)
}

/// Digests the first `size` bytes of a file; `known` has the values of chunks (by number)
/// that need not be read. `go_on` is told of the bytes done, and asked.
///
/// # Errors
///
/// Those of reading; `EINTR` if `go_on` said no; `ENODATA` if the file is shorter.
pub(super) fn hash_with(
    file: impl AsFd,
    size: u64,
    known: &dyn Fn(u64) -> Option<ChainingValue>,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Hashed> {
    let mut reader = Reader::new(file, size);
    if chunks(size) <= 1 {
        let mut hasher = Hasher::new();
        reader.feed(&mut hasher, 0..size, go_on)?;
        return Ok(Hashed {
            digest: hasher.finalize(),
            values: Vec::new(),
            hashed: size,
        });
    }
    let mut values = Vec::new();
    let mut hashed = 0;
    for number in 0..chunks(size) {
        let start = number * CHUNK;
        let end = start.saturating_add(CHUNK).min(size);
        let value = match known(number) {
            Some(value) => {
                if !go_on(end - start) {
                    return Err(Errno::INTR);
                }
                value
            }
            None => {
                let mut hasher = Hasher::new();
                hasher.set_input_offset(start);
                reader.feed(&mut hasher, start..end, go_on)?;
                hashed += end - start;
                hasher.finalize_non_root()
            }
        };
        values.push(value);
    }
    Ok(Hashed {
        digest: root(&values),
        values,
        hashed,
    })
}

/// Reads a file's data, and knows its holes without reading.
struct Reader<F> {
    file: F,
    size: u64,
    buffer: Box<[u8]>,
    /// Up to where it is known what there is, and whether that is a hole.
    known_to: u64,
    is_hole: bool,
}

impl<F: AsFd> Reader<F> {
    fn new(file: F, size: u64) -> Reader<F> {
        let length = usize::try_from(size).unwrap_or(BUFFER).clamp(1, BUFFER);
        Reader {
            file,
            size,
            buffer: vec![0; length].into(),
            known_to: 0,
            is_hole: false,
        }
    }

    fn feed(
        &mut self,
        hasher: &mut Hasher,
        range: std::ops::Range<u64>,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            self.look(at)?;
            let here = self.known_to.min(range.end) - at;
            let want = usize::try_from(here).unwrap_or(BUFFER).min(BUFFER);
            let done = if self.is_hole {
                hasher.update(&ZEROS[..want]);
                want
            } else {
                let want = want.min(self.buffer.len());
                match rustix::io::pread(&self.file, &mut self.buffer[..want], at) {
                    Ok(0) => return Err(Errno::NODATA),
                    Ok(got) => {
                        hasher.update(&self.buffer[..got]);
                        got
                    }
                    Err(Errno::INTR) => continue,
                    Err(cause) => return Err(cause),
                }
            };
            at += done as u64;
            if !go_on(done as u64) {
                return Err(Errno::INTR);
            }
        }
        Ok(())
    }

    /// Finds out what is at an offset, if that is not known yet.
    fn look(&mut self, at: u64) -> Result<()> {
        // Chunks are read in order, but some are left out.
        if at < self.known_to {
            return Ok(());
        }
        let data = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data.min(self.size),
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => self.size,
            // A file system that does not know: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(cause) => return Err(cause),
        };
        if data > at {
            (self.known_to, self.is_hole) = (data, true);
            // ENXIO is also what a file that has become shorter says.
            let end = seek(&self.file, SeekFrom::End(0))?;
            return if end < self.size {
                Err(Errno::NODATA)
            } else {
                Ok(())
            };
        }
        let end = match seek(&self.file, SeekFrom::Hole(at)) {
            // Never backwards, or a file system with a fault would keep us here.
            Ok(end) => end.clamp(at + 1, self.size),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => self.size,
            Err(cause) => return Err(cause),
        };
        (self.known_to, self.is_hole) = (end, false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::store::scratch::Scratch;

    const MIB: usize = 1 << 20;

    /// Bytes without a pattern that a chunk's number would not show in.
    fn bytes(count: usize) -> Vec<u8> {
        let mut state = 1_u64;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect()
    }

    fn all(_: u64) -> bool {
        true
    }

    #[test]
    fn digests_are_those_of_the_plain_function() {
        let scratch = Scratch::new();
        let path = scratch.join("file");
        let content = bytes(9 * MIB + 17);
        for size in [
            0,
            1,
            1024,
            1025,
            MIB - 1,
            MIB,
            MIB + 1,
            2 * MIB,
            2 * MIB + 1,
            3 * MIB,
            4 * MIB,
            5 * MIB - 1,
            8 * MIB,
            9 * MIB + 17,
        ] {
            std::fs::write(&path, &content[..size]).unwrap();
            let file = File::open(&path).unwrap();
            let hashed = hash_file(&file, size as u64, &mut all).unwrap();
            assert_eq!(hashed.digest, blake3::hash(&content[..size]), "{size}");
            assert_eq!(hashed.values.len() as u64, kept(size as u64));
            assert_eq!(hashed.hashed, size as u64);
            // From the values alone.
            let again = hash_with(
                &file,
                size as u64,
                &|n| hashed.values.get(n as usize).copied(),
                &mut all,
            )
            .unwrap();
            assert_eq!(again.digest, hashed.digest);
            assert_eq!(again.hashed, if size > MIB { 0 } else { size as u64 });
        }
    }

    #[test]
    fn holes_are_zeros() {
        let scratch = Scratch::new();
        let file = File::create_new(scratch.join("file")).unwrap();
        file.set_len(6 * MIB as u64 + 5).unwrap();
        file.write_all_at(b"here", 3 * MIB as u64 - 2).unwrap();
        let file = File::open(scratch.join("file")).unwrap();
        let mut content = vec![0; 6 * MIB + 5];
        content[3 * MIB - 2..3 * MIB + 2].copy_from_slice(b"here");
        let told = Cell::new(0);
        let hashed = hash_file(&file, content.len() as u64, &mut |n| {
            told.set(told.get() + n);
            true
        });
        assert_eq!(hashed.unwrap().digest, blake3::hash(&content));
        assert_eq!(told.get(), content.len() as u64);
    }

    #[test]
    fn shorter_than_it_was_and_told_to_stop() {
        let scratch = Scratch::new();
        std::fs::write(scratch.join("file"), bytes(MIB)).unwrap();
        let file = File::open(scratch.join("file")).unwrap();
        for size in [MIB as u64 + 1, 1 << 40] {
            assert_eq!(hash_file(&file, size, &mut all), Err(Errno::NODATA));
        }
        assert_eq!(
            hash_file(&file, MIB as u64, &mut |_| false),
            Err(Errno::INTR)
        );
    }
}
