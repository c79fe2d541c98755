//! Where the bytes of two files differ, with as much memory as two buffers take.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::SeekFrom;
use rustix::io::{Errno, Result};

use crate::store::extents::may_differ;
use crate::tree::copy;
use crate::tree::seen::Seen;

/// Bytes: what differs is told in blocks of this size, counted from the start of the file.
pub const BLOCK: u64 = 4096;
/// Bytes read at once; whole blocks.
const CHUNK: u64 = 1 << 20;

/// Where two files differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Offset and length of the first ranges, in bytes, in order. A range is blocks of [`BLOCK`]
    /// bytes that differ; the last ends with the longer file, and what only that one
    /// has is part of it.
    pub ranges: Vec<(u64, u64)>,
    /// How many ranges there are.
    pub count: u64,
    /// Bytes in all of them.
    pub bytes: u64,
}

/// Compares files.
#[derive(Debug)]
pub(super) struct Comparer {
    keep: usize,
    a: Vec<u8>,
    b: Vec<u8>,
}

impl Comparer {
    /// Ranges beyond the first `keep` of a file are counted only.
    pub(super) fn new(keep: usize) -> Comparer {
        Comparer {
            keep,
            a: Vec::new(),
            b: Vec::new(),
        }
    }

    /// Compares two open regular files; `advance` is told of bytes that are read.
    ///
    /// A file that is written to meanwhile differs in some way or other.
    pub(super) fn compare(
        &mut self,
        a: &OwnedFd,
        b: &OwnedFd,
        advance: &mut dyn FnMut(u64),
    ) -> Result<Difference> {
        let seen = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| Seen::of(&stat));
        let (seen_a, seen_b) = (seen(a)?, seen(b)?);
        // Shared by two snapshots.
        if seen_a.id == seen_b.id {
            return Ok(Difference::default());
        }
        let (size_a, size_b) = (seen_a.size, seen_b.size);
        let common = size_a.min(size_b);
        // What the file system cannot tell, the bytes can.
        let may = may_differ(a, b).unwrap_or(None);
        let mut ranges = Ranges::new(self.keep);
        let mut at = 0;
        for range in may.unwrap_or_else(|| std::iter::once(0..common).collect()) {
            let start = (range.start / BLOCK * BLOCK).max(at);
            let end = range.end.div_ceil(BLOCK).saturating_mul(BLOCK).min(common);
            at = at.max(end);
            self.range(a, b, start..end, &mut ranges, advance)?;
        }
        ranges.push(common, size_a.max(size_b));
        Ok(ranges.finish())
    }

    fn range(
        &mut self,
        a: &OwnedFd,
        b: &OwnedFd,
        range: std::ops::Range<u64>,
        ranges: &mut Ranges,
        advance: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            // What is a hole in both is equal.
            let data = next_data(a, at).min(next_data(b, at));
            let data = (data / BLOCK * BLOCK).max(at);
            if data > at {
                at = data;
                continue;
            }
            let length = (range.end - at).min(CHUNK);
            let wanted = length as usize; // at most CHUNK
            self.a.resize(CHUNK as usize, 0);
            self.b.resize(CHUNK as usize, 0);
            let got_a = copy::read(a, &mut self.a[..wanted], at)?;
            let got_b = copy::read(b, &mut self.b[..wanted], at)?;
            let got = got_a.min(got_b);
            for start in (0..got).step_by(BLOCK as usize) {
                let end = (start + BLOCK as usize).min(got);
                if self.a[start..end] != self.b[start..end] {
                    ranges.push(at + start as u64, at + end as u64);
                }
            }
            // Cut short since: whatever was there is gone.
            ranges.push(at + got as u64, at + length);
            advance(length);
            at += length;
        }
        Ok(())
    }
}

/// Where data begins at or after an offset; the offset itself if that cannot be told.
fn next_data(file: impl AsFd, at: u64) -> u64 {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.max(at),
        Err(Errno::NXIO) => u64::MAX,
        Err(_) => at,
    }
}

/// Ranges that are found in order; neighbours become one.
struct Ranges {
    found: Difference,
    keep: usize,
    last: Option<(u64, u64)>,
}

impl Ranges {
    fn new(keep: usize) -> Ranges {
        Ranges {
            found: Difference::default(),
            keep,
            last: None,
        }
    }

    fn push(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        match &mut self.last {
            Some(last) if last.1 == start => last.1 = end,
            _ => {
                self.flush();
                self.last = Some((start, end));
            }
        }
    }

    fn flush(&mut self) {
        if let Some((start, end)) = self.last.take() {
            self.found.count += 1;
            self.found.bytes += end - start;
            if self.found.ranges.len() < self.keep {
                self.found.ranges.push((start, end - start));
            }
        }
    }

    fn finish(mut self) -> Difference {
        self.flush();
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_range_and_only_some_are_kept() {
        let mut ranges = Ranges::new(1);
        for (start, end) in [(0, 10), (10, 12), (12, 12), (20, 21), (30, 34)] {
            ranges.push(start, end);
        }
        let found = ranges.finish();
        assert_eq!(found.ranges, [(0, 12)]);
        assert_eq!((found.count, found.bytes), (3, 17));
    }
}
