//! Writing chunks into the snapshot.
//!
//! On XFS around the page cache, into files whose room was reserved: written back, they would
//! stall the program's own writes. On other file systems, and into clones, through it.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{
    FallocateFlags, OFlags, fallocate, fcntl_getfl, fcntl_setfl, fstat, fstatfs, ftruncate,
};
use rustix::io::Errno;

use super::buffers::{Buffer, Pool};
use super::live::XFS_MAGIC;
use super::{Read, Source, to_read};
use crate::Result;
use crate::store::fault;

/// What O_DIRECT wants lengths and offsets to be multiples of, at most.
pub(super) const ALIGNMENT: usize = 4096;
/// Most chunks written at once, around the page cache and into it, where a chunk may take some 150 µs.
const RUN: usize = 8;
const RUN_CACHED: usize = 2;

/// A file that is written.
#[derive(Debug)]
pub(in super::super) struct Target {
    path: PathBuf,
    file: OwnedFd,
    is_direct: bool,
    is_sparse: bool,
}

impl Target {
    /// An empty file of the tree, for a file of `size` bytes that has room for `allocated`.
    /// Reserves as much, unless that has holes, or (`is_placed`) bytes of an earlier snapshot are
    /// in it: then a hole of the live file is none here, and zeros are written.
    pub(in super::super) fn new(
        path: PathBuf,
        file: OwnedFd,
        size: u64,
        allocated: u64,
        is_placed: bool,
    ) -> Result<Target> {
        let is_sparse = allocated < size && !is_placed;
        if size > 0 && !is_sparse && !is_placed {
            match fallocate(&file, FallocateFlags::empty(), 0, size) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(cause) => return Err(fault("reserve room for", &path, cause)),
            }
        }
        let is_xfs = fstatfs(&file).is_ok_and(|fs| fs.f_type == XFS_MAGIC);
        let flags = fcntl_getfl(&file).map_err(|cause| fault("look at", &path, cause))?;
        // What is written into a clone is in many small pieces: each would be waited for.
        let is_direct = is_xfs && !is_placed && fcntl_setfl(&file, flags | OFlags::DIRECT).is_ok();
        Ok(Target {
            path,
            file,
            is_direct,
            is_sparse,
        })
    }

    /// The file.
    pub(in super::super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether it is written around the page cache.
    pub(in super::super) fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Whether holes are to be holes.
    pub(super) fn is_sparse(&self) -> bool {
        self.is_sparse
    }

    fn not_written(&self, cause: Errno) -> crate::Error {
        fault("write to", &self.path, cause)
    }

    /// From now on through the page cache.
    fn not_direct(&self) -> rustix::io::Result<()> {
        let flags = fcntl_getfl(&self.file)?;
        fcntl_setfl(&self.file, flags.difference(OFlags::DIRECT))
    }
}

pub(super) struct Writer<'a> {
    sources: &'a [Source],
    pool: &'a Pool,
    /// Called between writes: gives others their turn.
    pause: &'a mut dyn FnMut(),
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        sources: &'a [Source],
        pool: &'a Pool,
        pause: &'a mut dyn FnMut(),
    ) -> Writer<'a> {
        Writer {
            sources,
            pool,
            pause,
        }
    }

    /// Writes chunks; those that follow each other in one go.
    pub(super) fn write(&mut self, chunks: impl Iterator<Item = Read>) -> Result<()> {
        let mut run: Vec<Read> = Vec::with_capacity(RUN);
        for chunk in chunks {
            let follows = run.last().is_some_and(|last| {
                last.source == chunk.source && last.offset + last.len as u64 == chunk.offset
            });
            let most = match self.sources[chunk.source].target.is_direct {
                true => RUN,
                false => RUN_CACHED,
            };
            if run.len() >= most || !follows {
                self.put(&mut run)?;
            }
            if chunk.unmarked != 0 {
                self.put(&mut run)?;
                self.put_marked(chunk)?;
                continue;
            }
            run.push(chunk);
        }
        self.put(&mut run)
    }

    fn put(&mut self, run: &mut Vec<Read>) -> Result<()> {
        let Some(first) = run.first() else {
            return Ok(());
        };
        let target = &self.sources[first.source].target;
        let is_hole =
            |chunk: &Read| target.is_sparse && is_zero(&chunk.buffer.bytes()[..chunk.len]);
        if !run.iter().all(is_hole) {
            let offset = first.offset;
            let parts: Vec<&[u8]> = run
                .iter()
                .map(|chunk| {
                    let len = match target.is_direct {
                        true => chunk.len.next_multiple_of(ALIGNMENT),
                        false => chunk.len,
                    };
                    &chunk.buffer.bytes()[..len]
                })
                .collect();
            write_all(target, &parts, offset).map_err(|cause| target.not_written(cause))?;
        }
        self.pool
            .give(run.drain(..).map(|chunk| -> Buffer { chunk.buffer }));
        (self.pause)();
        Ok(())
    }

    /// Writes what of a chunk is not in place already. Where something is, the target is never
    /// direct (see [`Target::new`]), and lengths are as they come.
    fn put_marked(&mut self, chunk: Read) -> Result<()> {
        let target = &self.sources[chunk.source].target;
        for part in to_read(chunk.unmarked, chunk.piece_shift, chunk.len) {
            let offset = chunk.offset + part.start as u64;
            write_all(target, &[&chunk.buffer.bytes()[part]], offset)
                .map_err(|cause| target.not_written(cause))?;
        }
        self.pool.give([chunk.buffer]);
        (self.pause)();
        Ok(())
    }

    /// Gives each file its size: what was written may be longer by a part of a page, and a hole
    /// at the end is in nothing that was written.
    pub(super) fn finish(self) -> Result<()> {
        for source in self.sources {
            let target = &source.target;
            // To set the size that it has may cost as much as another.
            if fstat(&target.file).is_ok_and(|stat| u64::try_from(stat.st_size) == Ok(source.size))
            {
                continue;
            }
            let set = ftruncate(&target.file, source.size);
            set.map_err(|cause| target.not_written(cause))?;
        }
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // By words: compilers make vectors of that.
    let (head, words, tail) = {
        // SAFETY: any bytes are a u64.
        unsafe { bytes.align_to::<u64>() }
    };
    head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

fn write_all(target: &Target, parts: &[&[u8]], mut offset: u64) -> rustix::io::Result<()> {
    let mut rest: Vec<&[u8]> = parts.to_vec();
    while !rest.is_empty() {
        let slices: Vec<IoSlice<'_>> = rest.iter().map(|part| IoSlice::new(part)).collect();
        let mut put = match rustix::io::pwritev(&target.file, &slices, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(put) => put,
            Err(Errno::INTR) => continue,
            // A device that wants more than a page.
            Err(Errno::INVAL) if target.is_direct => {
                target.not_direct()?;
                rustix::io::pwritev(&target.file, &slices, offset)?
            }
            Err(cause) => return Err(cause),
        };
        offset += put as u64;
        while let Some(part) = rest.first_mut() {
            if put < part.len() {
                *part = &part[put..];
                break;
            }
            put -= part.len();
            rest.remove(0);
        }
        // What is left of a page cannot go around the cache.
        if target.is_direct && !rest.is_empty() && !offset.is_multiple_of(ALIGNMENT as u64) {
            target.not_direct()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros() {
        let mut bytes = vec![0; 100_001];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 1, 50_000, 100_000] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes));
            bytes[at] = 0;
        }
    }
}
