//! Reading a file's bytes, and copying them, its holes left out.

use std::ops::Range;
use std::os::fd::AsFd;

use rustix::fs::{SeekFrom, ftruncate, seek};
use rustix::io::Errno;

/// Bytes between two questions whether to go on; small enough for a CPU cache.
pub(crate) const CHUNK: usize = 256 << 10;

/// Why a copy ended early.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The hold is over.
    Stopped,
    /// The file.
    Read(Errno),
    /// The store.
    Write(Errno),
}

/// Copies the first `size` bytes of `from` to the empty file `to`, holes as holes.
/// `buffer` has [`CHUNK`] bytes. If the file is shorter by now, the rest is a hole:
/// that it changed is for the comparison afterwards to find.
pub(crate) fn copy(
    to: impl AsFd,
    from: impl AsFd,
    size: u64,
    buffer: &mut [u8],
    go_on: &mut dyn FnMut() -> bool,
) -> Result<(), Failed> {
    // XFS writes everything back before it sets a size (`xfs_setattr_size`), also one that the
    // file has.
    if copy_range(&to, from, 0..size, buffer, go_on)? == Some(size) {
        return Ok(());
    }
    // The hole at the end, if there is one, and the size of a file that is all hole.
    ftruncate(&to, size).map_err(Failed::Write)
}

/// Copies a range, its holes left out. Tells where the last of its data ends; `None` if that
/// ended early.
pub(crate) fn copy_range(
    to: impl AsFd,
    from: impl AsFd,
    range: Range<u64>,
    buffer: &mut [u8],
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<u64>, Failed> {
    let (mut end, mut written) = (range.start, range.start);
    while end < range.end {
        // The first of these also waits for a write in flight by a process that is not
        // held: ext4 and tmpfs take the inode's lock for SEEK_DATA, which a write holds
        // from its first to its last byte. Reading takes no lock there, so without
        // this a copy could catch such a write half way at its very start.
        let start = match seek(&from, SeekFrom::Data(end)) {
            Ok(start) if start < range.end => start,
            // ENXIO: nothing but a hole up to the end.
            Ok(_) | Err(Errno::NXIO) => break,
            // A file system that does not know: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(cause) => return Err(Failed::Read(cause)),
        };
        end = match seek(&from, SeekFrom::Hole(start)) {
            // Never backwards, or a file system with a fault would keep us here.
            Ok(end) => end.clamp(start + 1, range.end),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => range.end,
            Err(cause) => return Err(Failed::Read(cause)),
        };
        if !copy_data(&to, &from, start..end, buffer, go_on)? {
            return Ok(None);
        }
        written = end;
    }
    Ok(Some(written))
}

/// Copies one piece of data; `false` if the file ended in it.
fn copy_data(
    to: impl AsFd,
    from: impl AsFd,
    range: Range<u64>,
    buffer: &mut [u8],
    go_on: &mut dyn FnMut() -> bool,
) -> Result<bool, Failed> {
    let mut at = range.start;
    while at < range.end {
        if !go_on() {
            return Err(Failed::Stopped);
        }
        let want = usize::try_from(range.end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let got = match rustix::io::pread(&from, &mut buffer[..want], at) {
            Ok(0) => return Ok(false),
            Ok(got) => got,
            Err(Errno::INTR) => continue,
            Err(cause) => return Err(Failed::Read(cause)),
        };
        let mut rest = &buffer[..got];
        while !rest.is_empty() {
            match rustix::io::pwrite(&to, rest, at) {
                Ok(0) => return Err(Failed::Write(Errno::IO)),
                Ok(put) => {
                    rest = &rest[put..];
                    at += put as u64;
                }
                Err(Errno::INTR) => {}
                Err(cause) => return Err(Failed::Write(cause)),
            }
        }
    }
    Ok(true)
}

/// Reads until the buffer is full or the file ends.
pub(crate) fn read(file: impl AsFd, buffer: &mut [u8], at: u64) -> rustix::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(&file, &mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(done)
}
